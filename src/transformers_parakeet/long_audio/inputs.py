"""Converts a recording to inputs of the model, one or several windows, and merges their hypotheses.

The pipeline passes the inputs to the model. `planner.py` decides between the whole recording and windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ..audio import AudioSource
from ..decoding import Hypotheses
from ..feature_extraction_parakeet import ParakeetFeatureExtractor
from .planner import Plan, check_memory_budget, find_max_samples, get_memory_budget, has_limited_context, plan_recording
from .recording import (
    BLOCK_S,
    compute_recording_features,
    iterate_window_features,
    normalize_window,
    summarize_recording,
)
from .voice_activity import SpeechDetector, SpeechRange, contains_speech, detect_speech, drop_tokens_outside_speech
from .windows import SEAM_SEARCH_S, Window, WindowOptions, build_window_options, cut_windows, merge_windows

logger = logging.get_logger(__name__)

# allowed values of `normalize_over`
NORMALIZATIONS = ("recording", "chunk")


@dataclass(frozen=True)
class InputOptions:
    """How recordings are converted to inputs of the model.

    Args:
        window_s: maximum length of a window in seconds, with its context; 0 for no windows, `None` to use windows only
            if the memory for the whole recording exceeds the budget.
        context_s: context in seconds on each side of a window, one number or a pair (left, right); `None` for one sixth
            of the length of a window.
        normalize_over: whether the features of a window are normalised with the mean and standard deviation of the
            `"recording"` or of the window (`"chunk"`).
        memory_budget: bytes that may be used in addition to the model if `window_s` is `None`; `None` for a quarter of
            the free memory, at least 1 GB.
        speech_detector: detector of speech. Windows without speech are skipped, and tokens that are not near speech are
            dropped. `None` for no detection.
        batch_size: number of recordings or windows that the model processes together.

    Raises:
        ValueError: `normalize_over` is not one of the allowed values, `window_s` is negative or not a number, or
            `memory_budget` is not a positive integer.
    """

    window_s: float | None = None
    context_s: float | Sequence[float] | None = None
    normalize_over: str = "recording"
    memory_budget: int | None = None
    speech_detector: SpeechDetector | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.normalize_over not in NORMALIZATIONS:
            raise ValueError(
                f"`normalize_over` must be one of {', '.join(NORMALIZATIONS)}, got {self.normalize_over!r}: correct it"
            )
        # this condition is also true for NaN
        if self.window_s is not None and not self.window_s >= 0:
            raise ValueError(f"`chunk_length_s` must not be negative, got {self.window_s}: use 0 for no windows")
        check_memory_budget(self.memory_budget)


@dataclass(frozen=True)
class ModelInput:
    """One input of the model: a window of a recording.

    Args:
        window: position of the window in the recording.
        features: (1, T, F) features.
        mask: (1, T) mask, True for valid frames.
        is_last: whether it is the last window of the recording.
        speech: ranges of samples of the recording with speech; `None` if no detector was used.
    """

    window: Window
    features: Tensor
    mask: Tensor
    is_last: bool
    speech: list[SpeechRange] | None


def iterate_model_inputs(
    source: AudioSource,
    options: InputOptions,
    extractor: ParakeetFeatureExtractor,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[ModelInput]:
    """Convert a recording to inputs of the model, without holding the samples of all windows at once.

    Args:
        source: the recording, at the sampling rate of the model.
        options: lengths of windows, normalisation, memory budget and speech detection.
        extractor: the feature extractor.
        config: configuration of the model.
        dtype: dtype of the model, for the estimate of its memory.
        device: device on which the features are computed.

    Yields:
        At least one input. If the recording is silent, it is an input without valid frames.

    Raises:
        ValueError: a window consists only of context, or an option is invalid.
    """
    window_options = None
    if options.window_s:
        # checked first, so that invalid lengths are an error for recordings of any length
        window_options = get_window_options(options.window_s, options.context_s, extractor, config)
    plan = choose_plan(source.num_samples, options, extractor, config, dtype, device)
    logger.debug("%s: %s, because %s", source.name, plan.mode, plan.reason)
    speech = None
    if options.speech_detector is not None:
        speech = detect_speech(source.blocks(BLOCK_S), options.speech_detector)
    if plan.window_s is None or speech == []:
        features, mask = compute_features(source, extractor, device, is_silent=speech == [])
        yield ModelInput(Window(0, source.num_samples, 0, None), features, mask, True, speech)
        return
    if window_options is None:
        window_options = get_window_options(plan.window_s, options.context_s, extractor, config)
    yield from iterate_windows(source, window_options, options.normalize_over, extractor, config, device, speech)


def compute_features(
    source: AudioSource, extractor: ParakeetFeatureExtractor, device: torch.device, is_silent: bool
) -> tuple[Tensor, Tensor]:
    """Compute the features of a whole recording. A recording longer than `BLOCK_S` is read in blocks.

    Args:
        source: the recording.
        extractor: the feature extractor.
        device: device on which the features are computed.
        is_silent: whether no speech was detected; the recording is then replaced by one without samples.

    Returns:
        (1, T, F) features and a (1, T) mask, True for valid frames. For a recording without samples T is 1, and the
        frame is not valid.
    """
    if not is_silent and source.num_samples > BLOCK_S * extractor.sampling_rate:
        return compute_recording_features(source.blocks(BLOCK_S), source.num_samples, extractor, device)
    samples = np.zeros(0, np.float32) if is_silent else source.load()
    inputs = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt", device=device)
    return inputs["input_features"], inputs["attention_mask"]


def get_window_options(
    window_s: float, context_s: float | Sequence[float] | None, extractor: ParakeetFeatureExtractor, config: Any
) -> WindowOptions:
    """Return the options of windows for a model; see `build_window_options`.

    Args:
        window_s: maximum length of a window in seconds.
        context_s: context in seconds on each side, one number or a pair; `None` for one sixth of the length.
        extractor: the feature extractor.
        config: configuration of the model.
    """
    return build_window_options(window_s, context_s, extractor.sampling_rate, config.inputs_to_logits_ratio)


def choose_plan(
    num_samples: int,
    options: InputOptions,
    extractor: ParakeetFeatureExtractor,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    """Choose between the whole recording and windows.

    Args:
        num_samples: length of the recording in samples.
        options: lengths of windows and memory budget.
        extractor: the feature extractor.
        config: configuration of the model.
        dtype: dtype of the model.
        device: device of the model.
    """
    budget, max_samples = 0, 0
    if options.window_s is None:
        budget = get_memory_budget(options.memory_budget, device)
        max_samples = find_max_samples(config, budget, options.batch_size, dtype.itemsize)
    has_full_attention = not has_limited_context(config.encoder_config)
    return plan_recording(
        num_samples, max_samples, options.window_s, extractor.sampling_rate, budget, has_full_attention
    )


def iterate_windows(
    source: AudioSource,
    window_options: WindowOptions,
    normalize_over: str,
    extractor: ParakeetFeatureExtractor,
    config: Any,
    device: torch.device,
    speech: list[SpeechRange] | None,
) -> Iterator[ModelInput]:
    """Read a recording twice, and compute the inputs of its windows with speech.

    Args:
        source: the recording.
        window_options: lengths of the windows.
        normalize_over: `"recording"` or `"chunk"`.
        extractor: the feature extractor.
        config: configuration of the model.
        device: device on which the features are computed.
        speech: ranges of samples with speech, at least one; `None` for speech everywhere.

    Yields:
        The inputs of the windows in chronological order.
    """
    summary = summarize_recording(source.blocks(BLOCK_S), source.num_samples, extractor, device)
    all_windows = cut_windows(
        summary.num_samples, window_options, summary.levels, extractor.hop_length, config.inputs_to_logits_ratio
    )
    windows = [window for window in all_windows if contains_speech(window, speech)]
    statistics = summary if normalize_over == "recording" else None
    for window, log_mel in iterate_window_features(source.blocks(BLOCK_S), windows, extractor, device):
        features, mask = normalize_window(log_mel, extractor, statistics)
        yield ModelInput(window, features, mask, window is windows[-1], speech)


def merge_recording(
    hypotheses: Sequence[Hypotheses],
    windows: Sequence[Window],
    speech: list[SpeechRange] | None,
    sampling_rate: int,
    samples_per_frame: int,
) -> Hypotheses:
    """Join the hypotheses of the windows of one recording, without tokens that are not near speech.

    Args:
        hypotheses: hypothesis of each window, with frames counted from the start of the window.
        windows: the windows in chronological order.
        speech: ranges of samples with speech; `None` if no detector was used.
        sampling_rate: samples per second.
        samples_per_frame: number of samples per encoder frame.

    Returns:
        The hypothesis of the recording, with frames counted from its start.
    """
    search_frames = round(SEAM_SEARCH_S * sampling_rate / samples_per_frame)
    merged = merge_windows(hypotheses, windows, samples_per_frame, search_frames)
    return drop_tokens_outside_speech(merged, speech, sampling_rate, samples_per_frame)
