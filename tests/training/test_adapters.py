"""Frozen modules and LoRA adapters."""

import copy

import pytest
import torch
from training_helpers import compute_features, create_model, sentence_rows, training_arguments

from transformers_parakeet.training import ParakeetTrainer, add_lora, freeze

ROWS = sentence_rows()


def test_frozen_modules_keep_their_weights_and_statistics(tmp_path):
    model, processor = create_model("ctc")
    num_frozen = freeze(model, ["encoder"])
    assert num_frozen == sum(parameter.numel() for parameter in model.encoder.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = compute_features(ROWS, processor)
    trainer = ParakeetTrainer(model, training_arguments(tmp_path, 2), train_dataset=rows, processing_class=processor)
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"ctc_head.weight", "ctc_head.bias"}


def test_a_module_that_the_model_lacks_is_refused():
    model, _ = create_model("ctc")
    with pytest.raises(ValueError, match="got 'decoder': use encoder, ctc_head"):
        freeze(model, ["decoder"])


@pytest.mark.slow
def test_adapters_learn_other_sentences_by_heart(tmp_path):
    from peft import PeftModel

    model, processor = create_model("ctc", 64)
    rows = compute_features(ROWS, processor)

    def train(trained_model, train_rows, steps, learning_rate):
        """Train a model on a few sentences; return the scores on them."""
        settings = training_arguments(
            tmp_path,
            steps,
            learning_rate=learning_rate,
            warmup_steps=20,
            lr_scheduler_type="cosine",
            logging_steps=100,
        )
        trainer = ParakeetTrainer(
            trained_model, settings, train_dataset=train_rows, eval_dataset=train_rows, processing_class=processor
        )
        trainer.train()
        return trainer.evaluate()

    train(model, rows[:10], 160, 3e-3)
    base_model = copy.deepcopy(model)
    adapted_model = add_lora(model, rank=32)
    trained_names = {name for name, parameter in adapted_model.named_parameters() if parameter.requires_grad}
    assert trained_names
    assert all("self_attn" in name and "lora" in name for name in trained_names)
    scores = train(adapted_model, rows[10:], 600, 5e-3)
    assert scores["eval_wer"] == 0
    adapted_model.save_pretrained(tmp_path / "adapter")
    merged_model = adapted_model.merge_and_unload()
    loaded_model = PeftModel.from_pretrained(base_model, tmp_path / "adapter")
    for model in (merged_model, loaded_model):
        settings = training_arguments(tmp_path, 1)
        trainer = ParakeetTrainer(model, settings, eval_dataset=rows[10:], processing_class=processor)
        assert trainer.evaluate()["eval_wer"] == 0
