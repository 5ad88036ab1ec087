"""The networks of a model as ONNX graphs: modules with the inputs and outputs of NeMo's exported files.

`folder.py` writes the files, `comparison.py` compares them with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..networks import build_length_mask
from ..optional_packages import import_optional
from .quiet import quiet_libraries

# set of ONNX operators; onnxruntime supports it since release 1.14
OPSET_VERSION = 18

# largest number of values of a constant that is computed at export instead of at loading
MAX_FOLDED_VALUES = 2**31

# sizes of the example inputs. torch.export treats a size of 1 as fixed, so a size that can vary must be at least 2, and
# the number of encoder frames, too.
EXAMPLE_BATCH, EXAMPLE_FRAMES = 2, 73

# variable dimensions of the features and of their lengths
FEATURE_SIZES = {"audio_signal": {0: "batch", 2: "frames"}, "length": {0: "batch"}}


@dataclass(frozen=True)
class Graph:
    """A module to export, with example inputs.

    Args:
        module: module whose `forward` has the inputs and outputs of the graph.
        inputs: name of each input -> example.
        variable_sizes: name of each input -> names of its variable dimensions by index.
        outputs: names of the outputs.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    variable_sizes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]


class EncoderNetwork(nn.Module):
    """Encoder of a transducer with the projection to the width of the joint network.

    Args:
        model: a transducer in eval mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Encode log-mel features.

        Args:
            audio_signal: (B, F, T) log-mel features.
            length: (B,) number of non-padding feature frames.

        Returns:
            (B, J, N) projected encoder states, and (B,) number of non-padding encoder frames.
        """
        features = audio_signal.transpose(1, 2)
        mask = build_length_mask(length, features.shape[1])
        outputs = self.model.get_audio_features(features, attention_mask=mask)
        return outputs.pooler_output.transpose(1, 2), outputs.attention_mask.sum(-1)


class CTCNetwork(nn.Module):
    """Encoder and CTC head of a CTC model or a hybrid.

    Args:
        model: a model with a CTC head in eval mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, audio_signal: Tensor, length: Tensor) -> Tensor:
        """Compute the log-probabilities of the tokens.

        Args:
            audio_signal: (B, F, T) log-mel features.
            length: (B,) number of non-padding feature frames.

        Returns:
            (B, N, V) log-probabilities.
        """
        features = audio_signal.transpose(1, 2)
        mask = build_length_mask(length, features.shape[1])
        hidden = self.model.encoder(features, attention_mask=mask).last_hidden_state
        return self.model.ctc_logits(hidden).log_softmax(-1)


class StepNetwork(nn.Module):
    """Prediction network and joint network: one decoding step of a transducer.

    Args:
        model: a transducer in eval mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        encoder_outputs: Tensor,
        targets: Tensor,
        target_length: Tensor,
        input_states_1: Tensor,
        input_states_2: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Advance the prediction network by one label, and score an encoder frame.

        Args:
            encoder_outputs: (B, J, 1) projected encoder state of one frame.
            targets: (B, 1) int32 last label; the blank at the start.
            target_length: (B,) int32 number of labels, always 1. It is an input of NeMo's files.
            input_states_1: (L, B, P) hidden states of L LSTM layers of width P before the step.
            input_states_2: (L, B, P) cell states before the step.

        Returns:
            (B, 1, 1, V) logits, for TDT (B, 1, 1, V + D); `target_length`; hidden and cell states after the step.
        """
        decoder = self.model.decoder
        hidden, (states_1, states_2) = decoder.lstm(decoder.embedding(targets.long()), (input_states_1, input_states_2))
        # (B, 1, 1, J) for broadcasting over frames and labels
        predictor_states = decoder.decoder_projector(hidden)[:, None]
        encoder_states = encoder_outputs.transpose(1, 2)[:, :, None]
        return self.model.joint(predictor_states, encoder_states), target_length.clone(), states_1, states_2


def build_encoder_graph(model: Any) -> Graph:
    """Build the graph of the encoder of a transducer.

    Args:
        model: a transducer.
    """
    outputs = ("outputs", "encoded_lengths")
    return Graph(EncoderNetwork(model).eval(), build_example_features(model), FEATURE_SIZES, outputs)


def build_ctc_graph(model: Any) -> Graph:
    """Build the graph of encoder and CTC head.

    Args:
        model: a CTC model or a hybrid.
    """
    return Graph(CTCNetwork(model).eval(), build_example_features(model), FEATURE_SIZES, ("logprobs",))


def build_example_features(model: Any) -> dict[str, Tensor]:
    """Build random features and lengths of two clips.

    Args:
        model: any model with an encoder; only its number of mel bins is used.

    Returns:
        `audio_signal` (B, F, T) and `length` (B,).
    """
    generator = torch.Generator().manual_seed(0)
    num_mel_bins = model.config.encoder_config.num_mel_bins
    features = torch.randn(EXAMPLE_BATCH, num_mel_bins, EXAMPLE_FRAMES, generator=generator)
    return {"audio_signal": features, "length": torch.tensor([EXAMPLE_FRAMES, EXAMPLE_FRAMES // 2])}


def build_step_graph(model: Any) -> Graph:
    """Build the graph of one decoding step.

    Args:
        model: a transducer.
    """
    generator = torch.Generator().manual_seed(0)
    lstm = model.decoder.lstm
    states = torch.randn(2, lstm.num_layers, EXAMPLE_BATCH, lstm.hidden_size, generator=generator)
    encoder_states = torch.randn(EXAMPLE_BATCH, model.joint.head.in_features, 1, generator=generator)
    inputs = {
        "encoder_outputs": encoder_states,
        "targets": torch.tensor([[model.config.blank_token_id], [0]], dtype=torch.int32),
        "target_length": torch.ones(EXAMPLE_BATCH, dtype=torch.int32),
        "input_states_1": states[0],
        "input_states_2": states[1],
    }
    sizes = {name: {0: "batch"} for name in ("encoder_outputs", "targets", "target_length")}
    state_sizes = {name: {1: "batch"} for name in ("input_states_1", "input_states_2")}
    outputs = ("outputs", "prednet_lengths", "output_states_1", "output_states_2")
    return Graph(StepNetwork(model).eval(), inputs, {**sizes, **state_sizes}, outputs)


@torch.no_grad()
def write_graph(graph: Graph, path: Path) -> None:
    """Export a graph to an ONNX file. Weights of more than 1.5 GB in total go to a second file `<path>.data`.

    Args:
        graph: the graph; its module is not changed.
        path: file to write.

    Raises:
        ImportError: a package of the extra `onnx` is not installed.
    """
    optimizer = import_optional("onnxscript.optimizer", "the export", "onnx")
    passes = import_optional("onnx_ir.passes.common", "the export", "onnx")
    with quiet_libraries():
        program: Any = torch.onnx.export(
            graph.module,
            kwargs=graph.inputs,
            dynamo=True,
            opset_version=OPSET_VERSION,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.variable_sizes,
            verbose=False,
        )
        # the exporter does not fold large constants, such as the gates of the LSTM in the order of ONNX
        optimizer.optimize(program.model, input_size_limit=MAX_FOLDED_VALUES, output_size_limit=MAX_FOLDED_VALUES)
        # the exporter stores a Python traceback, with the paths of this machine, for each node
        passes.ClearMetadataAndDocStringPass()(program.model)
        program.save(path)


__all__ = ["Graph", "build_ctc_graph", "build_encoder_graph", "build_step_graph", "write_graph"]
