"""Chooses how a model is streamed: cache-aware step by step, or with left and right context around each chunk.

The streams themselves are in `streaming.py`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

from transformers.utils import logging

from ..configuration_parakeet import get_head_type
from ..generation_arguments import list_decoders

logger = logging.get_logger(__name__)

# default chunk, left and right context in seconds, as in NeMo's speech_to_text_streaming_infer_rnnt.py
DEFAULT_CHUNK_S, DEFAULT_LEFT_S, DEFAULT_RIGHT_S = 2.0, 10.0, 2.0

# context style of models that are trained for offline use and for chunks with right context ("unified")
UNIFIED_STYLE = "chunked_limited_with_rc"


@dataclass(frozen=True)
class StreamSettings:
    """How a model is streamed. Counts of frames are encoder frames.

    Args:
        is_cache_aware: whether each step encodes only the new frames and reads a cache of the past. If not, each step
            encodes a buffer of left context, chunk and right context, and decodes the frames of the chunk.
        hop_length: number of samples per feature frame.
        window_length: number of samples that a feature frame depends on, centred on its first sample.
        samples_per_frame: number of samples per encoder frame.
        chunk: number of frames that a step decodes.
        left: number of frames of left context in the buffer; for cache-aware streaming in the cache, -1 for no limit.
        right: number of frames of right context in the buffer; 0 for cache-aware streaming.
    """

    is_cache_aware: bool
    hop_length: int
    window_length: int
    samples_per_frame: int
    chunk: int
    left: int
    right: int


def choose_settings(
    encoder: Any, feature_extractor: Any, chunk_s: float | None, left_s: float | None, right_s: float | None
) -> StreamSettings:
    """Choose how a model is streamed from its configuration.

    An encoder with chunked attention and causal convolutions, whose features are not normalised, is streamed with a
    cache, and its attention context sets the length of the chunk. Every other encoder is streamed with left and right
    context.

    Args:
        encoder: encoder of the model.
        feature_extractor: feature extractor of the model.
        chunk_s: duration of a chunk in seconds; `None` for the default.
        left_s: left context in seconds; `None` for the default.
        right_s: right context in seconds; `None` for the default.

    Raises:
        ValueError: a duration is not finite or too short, or is given although the attention context of the model sets
            it.
    """
    config, hop_length = encoder.config, feature_extractor.hop_length
    samples_per_frame = hop_length * config.subsampling_factor
    frame_s = samples_per_frame / feature_extractor.sampling_rate
    is_cache_aware = encoder.supports_cache and feature_extractor.normalize is None
    if is_cache_aware:
        left, right = config.attention_context_size
        if (chunk_s, left_s, right_s) != (None, None, None):
            raise ValueError(
                "the chunk and the context of a cache-aware model must come from its attention context, got "
                f"chunk_s={chunk_s}, left_s={left_s}, right_s={right_s}: omit them and call "
                f"`model.set_attention_context(left, right)` before the stream starts; now it is [{left}, {right}], "
                f"chunks of {(right + 1) * frame_s:.2f} s"
            )
        counts = {"chunk": right + 1, "left": left, "right": 0}
    else:
        counts = {
            "chunk": to_frames("chunk_s", DEFAULT_CHUNK_S if chunk_s is None else chunk_s, frame_s, minimum=1),
            "left": to_frames("left_s", DEFAULT_LEFT_S if left_s is None else left_s, frame_s),
            "right": to_frames("right_s", DEFAULT_RIGHT_S if right_s is None else right_s, frame_s),
        }
    return StreamSettings(
        is_cache_aware,
        hop_length=hop_length,
        window_length=feature_extractor.win_length,
        samples_per_frame=samples_per_frame,
        **counts,
    )


def to_frames(name: str, seconds: float, frame_s: float, minimum: int = 0) -> int:
    """Convert a duration to encoder frames, rounded down as in NeMo.

    Args:
        name: name of the argument, for the error.
        seconds: the duration in seconds.
        frame_s: duration of an encoder frame in seconds.
        minimum: smallest allowed number of frames.

    Raises:
        ValueError: the duration is not finite, or shorter than `minimum` frames.
    """
    if not math.isfinite(seconds):
        raise ValueError(f"`{name}` must be finite, got {seconds}: pass a number of seconds")
    # the small term corrects durations such as 0.56 / 0.08 that are slightly below a whole number
    num_frames = int(seconds / frame_s + 1e-6) if seconds >= 0 else -1
    if num_frames < minimum:
        raise ValueError(f"`{name}` must be at least {minimum * frame_s:g} s, got {seconds}: pass a larger value")
    return num_frames


def choose_decoder(config: Any, decoder: str | None) -> str:
    """Choose the head that decodes: `"ctc"`, `"rnnt"` or `"tdt"`.

    Args:
        config: configuration of the model.
        decoder: `"ctc"`, `"transducer"`, or `None` for the transducer if the model has one.

    Raises:
        ValueError: the model does not have the head.
    """
    decoders = list_decoders(config)
    if decoder is not None and decoder not in decoders:
        raise ValueError(f"`decoder` must be a head of the model, {' or '.join(decoders)}, got {decoder!r}: change it")
    return "ctc" if (decoder or decoders[0]) == "ctc" else get_head_type(config)


def prepare_encoder(encoder: Any, settings: StreamSettings) -> Any:
    """Return the encoder of a stream.

    A unified model gets the attention context [left, chunk, right] of the stream. The encoder is then a copy with this
    context that shares all weights, so the model does not change.

    Args:
        encoder: encoder of the model.
        settings: settings of the stream.
    """
    if encoder.config.attention_context_style != UNIFIED_STYLE:
        return encoder
    if settings.left % settings.chunk:
        logger.warning_once(
            f"The left context of {settings.left} frames is not a multiple of the chunk of {settings.chunk} frames, so "
            "the chunks of the attention differ from those that are decoded: choose `left_s` as a multiple of `chunk_s`"
        )
    tensors = chain(encoder.parameters(), encoder.buffers())
    # `deepcopy` uses the objects in its memo instead of copying them
    encoder = copy.deepcopy(encoder, {id(tensor): tensor for tensor in tensors})
    encoder.config.attention_context_size = [settings.left, settings.chunk, settings.right]
    return encoder
