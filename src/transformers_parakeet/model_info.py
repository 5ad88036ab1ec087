"""Describes a checkpoint from its configuration, without its weights, for `parakeet info`.

`nemo/reader.py` reads the configuration, and `long_audio/planner.py` estimates the memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .configuration_parakeet import get_head_type
from .generation_arguments import list_decoders
from .long_audio import DEFAULT_WINDOW_S, estimate_peak_memory
from .nemo import NemoError, build_empty_model, check_config, describe_head, load_config
from .networks import check_cache_support

# rate of the input of every model in samples per second
SAMPLING_RATE = 16000

# durations in seconds for which the memory is estimated
MEMORY_DURATIONS_S = (60.0, 3600.0)

# dtypes for which the size of the weights is computed
WEIGHT_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class ModelInfo:
    """What a checkpoint contains, what it needs and what it can do. Frames are encoder frames.

    Args:
        source: path or Hub id of the checkpoint.
        head: head type for a reader, such as "TDT and CTC (hybrid)".
        decoders: values of the option `decoder` that the model supports: `"transducer"`, `"ctc"`.
        num_parameters: number of parameters.
        dtype: dtype of the weights in the checkpoint, such as `"float32"`.
        num_layers: number of Conformer blocks of the encoder.
        hidden_size: width of the encoder.
        num_heads: number of attention heads.
        num_mel_bins: number of mel bins of the features.
        frame_duration_s: duration of a frame in seconds, which is the resolution of times.
        vocab_size: number of tokens with the blank.
        prediction_hidden_size: width of the prediction network; None for a CTC model.
        num_prediction_layers: number of LSTM layers of the prediction network; None for a CTC model.
        durations: numbers of frames that a step of a TDT model can advance; None for other models.
        attention_style: `attention_context_style` of the encoder.
        attention_context: number of frames that a frame attends to, in the form of `attention_context_size`.
        trained_contexts: every attention context that the model was trained with.
        is_local_attention: whether the attention is NeMo's local attention.
        is_cache_aware: whether no frame depends on frames after its chunk, so that a stream encodes each frame once.
            For this the features must also have no normalisation, which the configuration does not state.
        nemo_export_error: why the model cannot be written as a `.nemo` file; None if it can.
        weight_bytes: dtype -> memory of the weights in bytes.
        peak_bytes: duration of a clip in seconds -> estimated memory for its recognition as a whole in the dtype of the
            checkpoint, in addition to the weights, in bytes.
        window_peak_bytes: estimated memory for a window of a long recording, in addition to the weights, in bytes.
    """

    source: str
    head: str
    decoders: tuple[str, ...]
    num_parameters: int
    dtype: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_mel_bins: int
    frame_duration_s: float
    vocab_size: int
    prediction_hidden_size: int | None
    num_prediction_layers: int | None
    durations: tuple[int, ...] | None
    attention_style: str
    attention_context: tuple[int, ...]
    trained_contexts: tuple[tuple[int, ...], ...]
    is_local_attention: bool
    is_cache_aware: bool
    nemo_export_error: str | None
    weight_bytes: dict[str, int]
    peak_bytes: dict[float, int]
    window_peak_bytes: int


def read_model_info(path: str | Path, **hub: Any) -> ModelInfo:
    """Read the description of a checkpoint without its weights.

    Of a folder or a Hub repository, only the configuration is read. A `.nemo` file on the Hub is downloaded.

    Args:
        path: path of a `.nemo` file or folder, or Hub id `org/name`.
        **hub: `revision`, `token`, `cache_dir` and `local_files_only`, as in `load_nemo`.

    Raises:
        FileNotFoundError: the file does not exist.
        NemoError: the checkpoint is damaged, or is not a Parakeet model with a head.
        OSError: the Hub refuses the request or cannot be reached.
    """
    return describe_config(load_config(path, **hub), str(path))


def describe_config(config: Any, source: str) -> ModelInfo:
    """Describe the model that a configuration defines.

    Args:
        config: configuration of a model with a head.
        source: path or Hub id of the checkpoint.
    """
    encoder = config.encoder_config
    head_type = get_head_type(config)
    is_transducer = head_type != "ctc"
    num_parameters = sum(parameter.numel() for parameter in build_empty_model(config).parameters())
    dtype = config.dtype or torch.float32
    contexts = encoder.attention_context_sizes or [encoder.attention_context_size]
    return ModelInfo(
        source=source,
        head=describe_head(config),
        decoders=tuple(list_decoders(config)),
        num_parameters=num_parameters,
        dtype=str(dtype).removeprefix("torch."),
        num_layers=encoder.num_hidden_layers,
        hidden_size=encoder.hidden_size,
        num_heads=encoder.num_attention_heads,
        num_mel_bins=encoder.num_mel_bins,
        frame_duration_s=config.inputs_to_logits_ratio / SAMPLING_RATE,
        vocab_size=config.vocab_size,
        prediction_hidden_size=config.decoder_hidden_size if is_transducer else None,
        num_prediction_layers=config.num_decoder_layers if is_transducer else None,
        durations=tuple(config.durations) if head_type == "tdt" else None,
        attention_style=encoder.attention_context_style,
        attention_context=tuple(encoder.attention_context_size),
        trained_contexts=tuple(map(tuple, contexts)),
        is_local_attention=encoder.self_attention_model == "rel_pos_local_attn",
        is_cache_aware=check_cache_support(encoder),
        nemo_export_error=find_nemo_export_error(config),
        weight_bytes={str(kind).removeprefix("torch."): num_parameters * kind.itemsize for kind in WEIGHT_DTYPES},
        peak_bytes={seconds: estimate_bytes(config, seconds, dtype) for seconds in MEMORY_DURATIONS_S},
        window_peak_bytes=estimate_bytes(config, DEFAULT_WINDOW_S, dtype),
    )


def find_nemo_export_error(config: Any) -> str | None:
    """Return why a model cannot be written as a `.nemo` file, or None if it can.

    Args:
        config: configuration of a model with a head.
    """
    try:
        check_config(config)
    except NemoError as error:
        return str(error)
    return None


def estimate_bytes(config: Any, duration_s: float, dtype: torch.dtype) -> int:
    """Estimate the memory for the recognition of a clip as a whole, in addition to the weights, in bytes.

    Args:
        config: configuration of a model with a head.
        duration_s: duration of the clip in seconds.
        dtype: dtype of the model.
    """
    return estimate_peak_memory(config, math.ceil(duration_s * SAMPLING_RATE), dtype_bytes=dtype.itemsize)


__all__ = ["ModelInfo", "describe_config", "read_model_info"]
