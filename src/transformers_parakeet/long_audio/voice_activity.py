"""Detects speech in samples: by energy, or with the neural detector of the package `silero-vad`.

A detector is any callable that takes (S,) samples and returns ranges of samples. `detect_speech` calls it
for every block of a recording.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..audio import FloatArray
from ..decoding import Hypotheses
from .pauses import compute_frame_powers, compute_smoothed_levels
from .windows import Window, select_tokens

# first sample and last sample (exclusive) of a stretch of speech
SpeechRange = tuple[int, int]
# (S,) float32 samples at the sampling rate of the model -> ranges in chronological order
SpeechDetector = Callable[[Tensor], Sequence[SpeechRange]]

# A token belongs to speech if it is at most this number of seconds away from it: heads can emit a token a few encoder
# frames of 80 ms after the sound.
TOKEN_MARGIN_S = 0.4
# frame length of the energy detector in seconds
FRAME_S = 0.01
# quantile of the levels that is taken as the level of the background noise
NOISE_QUANTILE = 0.1
# Shorter samples, in seconds, can consist of one word without a pause, so they do not contain the background noise.
MIN_NOISE_S = 1.0


@dataclass(frozen=True)
class EnergySpeechDetector:
    """Detects speech as frames whose level is well above the level of the background noise.

    The level of the noise is the quantile `NOISE_QUANTILE` of the levels of all frames passed in one call. Sound with a
    constant level, such as silence, white noise or a tone, therefore contains no speech. Music and other sound with a
    changing level is not distinguished from speech. In samples shorter than `MIN_NOISE_S` the noise is not measured,
    and all frames above `min_level_db` are speech.

    Args:
        sampling_rate: sampling rate of the samples in Hz.
        threshold_db: a frame is speech if its level is more than this number of dB above the noise.
        min_level_db: a frame with a lower level is never speech, in dB relative to a mean square of 1.
        min_speech_s: shorter stretches of speech are ignored, in seconds.
        min_pause_s: shorter pauses between two stretches are counted as speech, in seconds.
        margin_s: number of seconds by which every stretch is extended on both sides.

    Raises:
        ValueError: a duration or the sampling rate is negative, or the threshold is not positive.
    """

    sampling_rate: int = 16_000
    threshold_db: float = 10.0
    min_level_db: float = -70.0
    min_speech_s: float = 0.05
    min_pause_s: float = 0.3
    margin_s: float = 0.2

    def __post_init__(self) -> None:
        durations = (self.min_speech_s, self.min_pause_s, self.margin_s)
        if min(durations) < 0 or self.sampling_rate < 1 / FRAME_S or self.threshold_db <= 0:
            raise ValueError(
                "the durations of a detector must not be negative, its sampling rate must be at least 100 Hz, and its "
                f"threshold must be positive: got {self}; correct these values"
            )

    def __call__(self, samples: Tensor) -> list[SpeechRange]:
        """Detect speech.

        Args:
            samples: (S,) float32 samples at `sampling_rate`.

        Returns:
            Ranges (first sample, end exclusive) with speech, in chronological order and without overlaps.
        """
        frame_length = int(self.sampling_rate * FRAME_S)
        levels = compute_smoothed_levels(compute_frame_powers(samples, frame_length))
        if len(levels) == 0:
            return []
        threshold = self.min_level_db
        if len(samples) >= MIN_NOISE_S * self.sampling_rate:
            threshold = max(threshold, float(torch.quantile(levels, NOISE_QUANTILE)) + self.threshold_db)
        changes = torch.diff(F.pad((levels > threshold).int(), (1, 1)))
        starts, stops = (changes == 1).nonzero()[:, 0].tolist(), (changes == -1).nonzero()[:, 0].tolist()
        frame_ranges = join_ranges(zip(starts, stops, strict=True), round(self.min_pause_s / FRAME_S))
        min_frames, margin = self.min_speech_s / FRAME_S, round(self.margin_s * self.sampling_rate)
        return join_ranges(
            (max(start * frame_length - margin, 0), min(stop * frame_length + margin, len(samples)))
            for start, stop in frame_ranges
            if stop - start >= min_frames
        )


@dataclass(frozen=True)
class SileroSpeechDetector:
    """Detects speech with the model of the package `silero-vad` (MIT licence), which is bundled in that package.

    The model has a state during a call, so two threads must not use one object at the same time.

    Args:
        sampling_rate: sampling rate of the samples in Hz: 8000, or a multiple of 16000.
        threshold: a frame is speech if the model gives it at least this probability.
        min_speech_s: shorter stretches of speech are ignored, in seconds.
        min_pause_s: shorter pauses between two stretches are counted as speech, in seconds.
        margin_s: number of seconds by which every stretch is extended on both sides.

    Raises:
        ImportError: the package `silero-vad` is not installed.
        ValueError: the model does not support the sampling rate.
    """

    sampling_rate: int = 16_000
    threshold: float = 0.5
    min_speech_s: float = 0.1
    min_pause_s: float = 0.3
    margin_s: float = 0.2
    package: Any = field(init=False, repr=False, compare=False)
    model: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.sampling_rate != 8_000 and (self.sampling_rate % 16_000 or self.sampling_rate <= 0):
            raise ValueError(
                f"the sampling rate of SileroSpeechDetector must be 8000 Hz or a multiple of 16000 Hz, got "
                f"{self.sampling_rate} Hz: resample the audio"
            )
        num_threads = torch.get_num_threads()
        try:
            package = importlib.import_module("silero_vad")
        except ImportError as error:
            raise ImportError(
                "SileroSpeechDetector needs the package silero-vad (in the extra `vad`), which is not installed: run "
                "`pip install silero-vad`, or use EnergySpeechDetector"
            ) from error
        finally:
            # the import of silero-vad limits all of PyTorch to one thread, which would slow down the recognition
            torch.set_num_threads(num_threads)
        # the fields of a frozen dataclass are set through its base class
        object.__setattr__(self, "package", package)
        object.__setattr__(self, "model", package.load_silero_vad())

    def __call__(self, samples: Tensor) -> list[SpeechRange]:
        """Detect speech. The state of the model is reset at the start of the call.

        Args:
            samples: (S,) float32 samples at `sampling_rate`.

        Returns:
            Ranges (first sample, end exclusive) with speech, in chronological order and without overlaps.
        """
        ranges = self.package.get_speech_timestamps(
            samples.cpu(),
            self.model,
            threshold=self.threshold,
            sampling_rate=self.sampling_rate,
            min_speech_duration_ms=round(1000 * self.min_speech_s),
            min_silence_duration_ms=round(1000 * self.min_pause_s),
            speech_pad_ms=round(1000 * self.margin_s),
        )
        return join_ranges((entry["start"], min(entry["end"], len(samples))) for entry in ranges)


def detect_speech(blocks: Iterable[FloatArray], detector: SpeechDetector) -> list[SpeechRange]:
    """Detect the speech of a recording block by block.

    Args:
        blocks: (S_i,) float32 samples of consecutive parts of the recording.
        detector: the detector, which is called for every block.

    Returns:
        Ranges of samples, counted from the start of the recording, in chronological order and without overlaps.
    """
    speech: list[SpeechRange] = []
    num_samples = 0
    for block in blocks:
        for first, stop in detector(torch.tensor(block)):
            # a detector that works on frames can return a range that ends after the block
            speech.append((max(first, 0) + num_samples, min(stop, len(block)) + num_samples))
        num_samples += len(block)
    return join_ranges(speech)


def join_ranges(ranges: Iterable[SpeechRange], min_gap: int = 1) -> list[SpeechRange]:
    """Join ranges that overlap, touch, or are less than `min_gap` apart.

    Args:
        ranges: ranges (first, end exclusive), ordered by their first value.
        min_gap: minimum distance between two ranges of the result, at least 1.

    Returns:
        The joined ranges in the same order. Empty ranges are removed.
    """
    joined: list[SpeechRange] = []
    for first, stop in ranges:
        if stop <= first:
            continue
        if joined and first - joined[-1][1] < min_gap:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((first, stop))
    return joined


def contains_speech(window: Window, speech: Sequence[SpeechRange] | None) -> bool:
    """Return whether the kept range of a window overlaps with speech.

    Args:
        window: the window.
        speech: ranges of samples with speech; `None` if no detector was used, which counts as speech everywhere.
    """
    if speech is None:
        return True
    keep_to = window.stop if window.keep_to is None else window.keep_to
    return any(first < keep_to and stop > window.keep_from for first, stop in speech)


def drop_tokens_outside_speech(
    hypothesis: Hypotheses, speech: Sequence[SpeechRange] | None, sampling_rate: int, samples_per_frame: int
) -> Hypotheses:
    """Drop the tokens of a recording that are not near speech.

    Args:
        hypothesis: hypothesis of one recording, without padding.
        speech: ranges of samples with speech; `None` if no detector was used, which counts as speech everywhere.
        sampling_rate: samples per second.
        samples_per_frame: number of samples per encoder frame.

    Returns:
        The hypothesis without the tokens whose first encoder frame is more than `TOKEN_MARGIN_S` seconds away from
        speech.
    """
    if speech is None:
        return hypothesis
    margin = round(TOKEN_MARGIN_S * sampling_rate)
    # (1, num_tokens) first sample of the frame of each token
    starts = hypothesis.frames * samples_per_frame
    is_speech = torch.zeros_like(starts, dtype=torch.bool)
    for first, stop in speech:
        is_speech |= (starts < stop + margin) & (starts + samples_per_frame > first - margin)
    return select_tokens(hypothesis, is_speech)
