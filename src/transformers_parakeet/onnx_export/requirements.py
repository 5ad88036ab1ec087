"""Checks whether the package onnx-asr computes the same as a model of this package.

The facts about onnx-asr are those of release 0.12: `onnx_asr/asr.py`, `models/nemo.py` and
`preprocessors/numpy_preprocessor.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..configuration_parakeet import get_head_type
from ..networks import compute_subsampled_lengths

# settings of the features that onnx-asr computes for NeMo models
FEATURE_SETTINGS = {
    "sampling_rate": 16000,
    "hop_length": 160,
    "n_fft": 512,
    "win_length": 400,
    "preemphasis": 0.97,
    "normalize": "per_feature",
}
MEL_BINS = (80, 128)

# implementations of attention whose operations the exporter knows
ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")


def check_onnx_asr_runs(model: Any, processor: Any, decoder: str) -> None:
    """Check that onnx-asr computes the same as a model.

    Args:
        model: a model with a head.
        processor: processor of the model.
        decoder: `"transducer"` or `"ctc"`.

    Raises:
        ValueError: something prevents it; the message names everything that does.
    """
    obstacles = [
        *list_model_obstacles(model),
        *list_encoder_obstacles(model.config.encoder_config, decoder),
        *list_feature_obstacles(processor.feature_extractor),
    ]
    durations = list(getattr(model.config, "durations", None) or [])
    if decoder == "transducer" and durations != list(range(len(durations))):
        obstacles.append(f"the durations must be 0, 1, 2 and so on, got {durations}: onnx-asr uses their indices")
    if obstacles:
        raise ValueError(f"onnx-asr cannot run this model: {'; '.join(obstacles)}")


def list_model_obstacles(model: Any) -> Iterator[str]:
    """List the properties of a loaded model that prevent its export.

    Args:
        model: a model with a head.
    """
    tensors = list(model.parameters())
    if {(tensor.dtype, tensor.device.type) for tensor in tensors} != {(torch.float32, "cpu")}:
        yield "the weights must be float32 on the CPU: load the model with `dtype=torch.float32`"
    if any(module.training for module in model.modules()):
        yield "the model is in training mode: call `model.eval()`"
    implementation = model.config.encoder_config._attn_implementation
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        yield (
            f"the attention implementation must be {' or '.join(ATTENTION_IMPLEMENTATIONS)}, got {implementation!r}: "
            "call `model.set_attn_implementation('sdpa')`"
        )


def list_encoder_obstacles(config: Any, decoder: str) -> Iterator[str]:
    """List the settings of an encoder that prevent its export.

    Args:
        config: configuration of the encoder.
        decoder: `"transducer"` or `"ctc"`.
    """
    if max(config.attention_context_size) >= 0:
        # the number of attention blocks depends on the length of a clip, so there is no single graph
        yield (
            f"its attention context is limited to {config.attention_context_size} frames (local or chunked attention, "
            "streaming): if it was trained with full attention, too, call `model.set_attention_context(-1, -1)`"
        )
    factor = config.subsampling_factor
    frames = torch.arange(1, 4 * factor)
    # a CTC graph returns no lengths
    if decoder == "ctc" and not torch.equal(compute_subsampled_lengths(frames, config), (frames - 1) // factor + 1):
        yield "its subsampling is causal or has an unusual kernel, and onnx-asr computes other lengths for CTC"


def list_feature_obstacles(feature_extractor: Any) -> Iterator[str]:
    """List the settings of the features that onnx-asr does not support.

    Args:
        feature_extractor: feature extractor of the model.
    """
    for name, supported_value in FEATURE_SETTINGS.items():
        value = getattr(feature_extractor, name)
        if value != supported_value:
            yield f"`{name}` of the features must be {supported_value!r}, got {value!r}"
    if feature_extractor.feature_size not in MEL_BINS:
        yield f"the number of mel bins must be 80 or 128, got {feature_extractor.feature_size}"


def get_onnx_asr_type(model: Any, decoder: str | None = None) -> str:
    """Return the name of the class of onnx-asr that runs a model, as `onnx_asr.load_model` expects it.

    Args:
        model: a model with a head.
        decoder: `"transducer"` or `"ctc"`; `None` for the default decoder of the model.
    """
    head = "ctc" if decoder == "ctc" else get_head_type(model.config)
    return f"nemo-conformer-{head}"


__all__ = ["check_onnx_asr_runs", "get_onnx_asr_type"]
