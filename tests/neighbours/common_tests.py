"""Runs the common model tests of transformers on tiny models of other families that use the Parakeet encoder."""

import os
import unittest

import torch
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers import (
    CanaryConfig,
    CanaryForConditionalGeneration,
    CanaryModel,
    CohereAsrConfig,
    CohereAsrForConditionalGeneration,
    CohereAsrModel,
)

CLIPS, MEL_FRAMES, MEL_BINS, LABELS = 3, 120, 80, 7
WIDTH, LAYERS, HEADS, VOCABULARY = 32, 2, 4, 99
ENCODER = {
    "model_type": "parakeet_encoder", "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 48, "conv_kernel_size": 9, "subsampling_conv_channels": 16, "num_mel_bins": MEL_BINS,
    "dropout": 0.0, "dropout_positions": 0.0, "layerdrop": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "intermediate_size": 48, "head_dim": WIDTH // HEADS, "max_position_embeddings": 64,
}  # fmt: skip


class Inputs:
    """Configuration, inputs and sizes of a model, under the names that the common tests read."""

    is_training = False
    batch_size, seq_length, encoder_seq_length, decoder_seq_length = CLIPS, LABELS, MEL_FRAMES // 8, LABELS
    hidden_size, num_hidden_layers, num_attention_heads = WIDTH, LAYERS, HEADS

    def __init__(self, config):
        self.config = config

    def prepare_config_and_inputs_for_common(self):
        """Return the configuration and random inputs of the model."""
        inputs = {
            "input_features": floats_tensor([CLIPS, MEL_FRAMES, MEL_BINS]),
            "attention_mask": torch.ones(CLIPS, MEL_FRAMES, dtype=torch.bool),
            "decoder_input_ids": ids_tensor([CLIPS, LABELS], VOCABULARY),
        }
        return self.config, inputs


class CommonTests(ModelTesterMixin):
    """Settings of the common tests for both families."""

    test_resize_embeddings = False
    is_encoder_decoder = True

    def setUp(self):
        """Build the inputs of the family under test."""
        self.model_tester = Inputs(self.make_config())

    def test_the_encoder_comes_from_the_package_that_was_imported_first(self):
        model = self.all_model_classes[0](self.model_tester.config)
        assert type(model.get_encoder()).__module__.startswith(os.environ["IMPORTED_FIRST"] + ".")

    @unittest.skip("the source distribution of transformers does not contain the tests of generation")
    def test_generation_tester_mixin_inheritance(self):
        pass

    @unittest.skip("needs the weight names of a released checkpoint")
    def test_reverse_loading_mapping(self):
        pass


class CanaryTest(CommonTests, unittest.TestCase):
    """Common tests of Canary."""

    all_model_classes = (CanaryModel, CanaryForConditionalGeneration)

    @staticmethod
    def make_config():
        """Return the configuration of a tiny Canary model."""
        return CanaryConfig(encoder_config=dict(ENCODER), decoder_config=dict(DECODER), vocab_size=VOCABULARY)


class CohereTest(CommonTests, unittest.TestCase):
    """Common tests of Cohere-ASR."""

    all_model_classes = (CohereAsrModel, CohereAsrForConditionalGeneration)

    @staticmethod
    def make_config():
        """Return the configuration of a tiny Cohere-ASR model."""
        return CohereAsrConfig(encoder_config=dict(ENCODER), **DECODER)
