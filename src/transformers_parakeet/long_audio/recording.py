"""Computes the features of a long recording, or of its windows, while the samples arrive in blocks.

`windows.py` chooses the positions of the windows. No function here holds all samples or all features of a recording,
except `read_short_recording`, whose length is limited by its caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..feature_extraction_parakeet import ParakeetFeatureExtractor, normalize_per_feature, normalize_with_statistics
from .pauses import compute_frame_powers, compute_smoothed_levels
from .voice_activity import SpeechDetector, SpeechRange, join_ranges
from .windows import Window

# length in seconds of the blocks in which features are computed and speech is detected
BLOCK_S = 60


@dataclass(frozen=True)
class RecordingSummary:
    """What the first pass over a recording computes.

    Args:
        num_samples: length S of the recording in samples.
        mean: (F,) mean of the log-mel energies of each bin over all frames of the recording.
        std: (F,) unbiased standard deviation of the log-mel energies of each bin.
        levels: (S // hop_length,) smoothed level of every feature frame in dB.
        speech: ranges of samples with speech; `None` if no detector was used.
    """

    num_samples: int
    mean: Tensor
    std: Tensor
    levels: Tensor
    speech: list[SpeechRange] | None


@dataclass
class RunningStatistics:
    """Mean and sum of squared deviations of every mel bin over the frames so far, in double precision.

    Args:
        num_frames: number of frames so far.
        mean: (F,) float64 means.
        squares: (F,) float64 sums of the squared deviations from the mean.
    """

    num_frames: int
    mean: Tensor
    squares: Tensor

    def add(self, log_mel: Tensor) -> None:
        """Add frames.

        The sums of two parts of a recording are combined as in Chan et al., 1979 ("Updating formulae and a pairwise
        algorithm for computing sample variances"), which does not subtract large numbers.

        Args:
            log_mel: (K, F) log-mel energies.
        """
        if len(log_mel) == 0:
            return
        log_mel = log_mel.double().to(self.mean.device)
        block_mean = log_mel.mean(0)
        difference = block_mean - self.mean
        num_frames = self.num_frames + len(log_mel)
        self.squares += (log_mel - block_mean).square().sum(0)
        self.squares += difference.square() * (self.num_frames * len(log_mel) / num_frames)
        self.mean += difference * (len(log_mel) / num_frames)
        self.num_frames = num_frames

    def compute_std(self) -> Tensor:
        """Return the (F,) unbiased standard deviations; 0 for fewer than two frames, as in NeMo."""
        return (self.squares / max(self.num_frames - 1, 1)).sqrt()


def split_into_blocks(blocks: Iterable[np.ndarray], block_size: int) -> Iterator[Tensor]:
    """Change the length of the blocks in which a recording arrives.

    Args:
        blocks: (S_i,) float32 samples of consecutive parts of a recording.
        block_size: number of samples of a block.

    Yields:
        (block_size,) samples; the last block can be shorter. A recording without samples has no block.
    """
    pending: list[Tensor] = []
    num_pending = 0
    for block in blocks:
        # no copy: the samples are only read
        samples = torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32))
        while num_pending + len(samples) >= block_size:
            needed = block_size - num_pending
            yield torch.cat([*pending, samples[:needed]])
            pending, num_pending, samples = [], 0, samples[needed:]
        pending.append(samples)
        num_pending += len(samples)
    if num_pending:
        yield torch.cat(pending)


def read_short_recording(blocks: Iterable[np.ndarray], max_samples: float) -> Tensor | None:
    """Read a recording into memory unless it is too long.

    Args:
        blocks: (S_i,) float32 samples of consecutive parts of the recording.
        max_samples: maximum number of samples; infinity for no limit.

    Returns:
        (S,) samples of the whole recording; `None` if the recording is longer than `max_samples`.
    """
    parts: list[Tensor] = []
    num_samples = 0
    for block in blocks:
        num_samples += len(block)
        if num_samples > max_samples:
            return None
        parts.append(torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32)))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.zeros(0)


def iterate_log_mel(
    blocks: Iterable[Tensor], extractor: ParakeetFeatureExtractor, device: torch.device
) -> Iterator[Tensor]:
    """Compute the log-mel energies of a recording whose samples arrive in blocks.

    Args:
        blocks: (S_i,) float32 samples of consecutive parts of the recording.
        extractor: the feature extractor.
        device: device on which the energies are computed.

    Yields:
        (K_i, F) log-mel energies without normalisation. Together they are the S // hop_length valid frames of the
        recording.
    """
    # samples from `left_margin` samples before the centre of the next frame on; before the recording they are zeros
    buffer = torch.zeros(extractor.left_margin, device=device)
    num_samples = num_frames = 0
    for block in blocks:
        buffer = torch.cat([buffer, block.to(device)])
        num_samples += len(block)
        # the frame t is complete if its last sample, t * hop_length + right_margin - 1, has arrived
        num_complete = (num_samples - extractor.right_margin) // extractor.hop_length + 1
        if num_complete > num_frames:
            yield compute_first_frames(buffer, num_complete - num_frames, len(buffer), extractor)
            buffer = buffer[(num_complete - num_frames) * extractor.hop_length :]
            num_frames = num_complete
    num_missing = num_samples // extractor.hop_length - num_frames
    if num_missing > 0:
        padded = torch.cat([buffer, torch.zeros(extractor.right_margin, device=device)])
        yield compute_first_frames(padded, num_missing, len(buffer), extractor)


def compute_first_frames(
    buffer: Tensor, num_frames: int, num_valid: int, extractor: ParakeetFeatureExtractor
) -> Tensor:
    """Compute the first log-mel frames of a buffer of samples.

    Args:
        buffer: samples that start `left_margin` samples before the centre of the first frame.
        num_frames: number K of frames.
        num_valid: number of samples of the buffer that belong to the recording; the samples after them are padding.
        extractor: the feature extractor.

    Returns:
        (K, F) log-mel energies without normalisation.
    """
    size = extractor.left_margin + (num_frames - 1) * extractor.hop_length + extractor.right_margin
    lengths = torch.tensor([num_valid], device=buffer.device)
    return extractor.log_mel_of_block(buffer[None, :size], lengths)[0]


def summarize_recording(
    blocks: Iterable[np.ndarray],
    extractor: ParakeetFeatureExtractor,
    device: torch.device,
    speech_detector: SpeechDetector | None = None,
) -> RecordingSummary:
    """Make the first pass over a recording: length, statistics of the features, levels, and speech.

    Args:
        blocks: (S_i,) float32 samples of consecutive parts of the recording.
        extractor: the feature extractor.
        device: device on which the features are computed.
        speech_detector: detector of speech; `None` for no detection. It is called for every block of `BLOCK_S` seconds.

    Returns:
        The summary of the recording.
    """
    num_bins = len(extractor.mel_filters)
    statistics = RunningStatistics(0, torch.zeros(num_bins).double(), torch.zeros(num_bins).double())
    powers: list[Tensor] = []
    speech: list[SpeechRange] | None = None if speech_detector is None else []
    num_samples = 0

    def read_blocks() -> Iterator[Tensor]:
        """Yield the blocks of samples; count the samples, and collect powers and speech."""
        nonlocal num_samples
        for block in split_into_blocks(blocks, BLOCK_S * extractor.sampling_rate):
            powers.append(compute_frame_powers(block, extractor.hop_length))
            if speech is not None and speech_detector is not None:
                speech.extend((first + num_samples, stop + num_samples) for first, stop in speech_detector(block))
            num_samples += len(block)
            yield block

    for log_mel in iterate_log_mel(read_blocks(), extractor, device):
        statistics.add(log_mel)
    return RecordingSummary(
        num_samples,
        statistics.mean.float(),
        statistics.compute_std().float(),
        compute_smoothed_levels(torch.cat(powers) if powers else torch.zeros(0)),
        None if speech is None else join_ranges(speech),
    )


def iterate_window_features(
    blocks: Iterable[np.ndarray],
    windows: Iterable[Window],
    extractor: ParakeetFeatureExtractor,
    device: torch.device,
) -> Iterator[tuple[Window, Tensor]]:
    """Make the second pass over a recording: compute the log-mel energies of its windows.

    Args:
        blocks: (S_i,) float32 samples of consecutive parts of the recording.
        windows: windows in chronological order, which start on a feature frame.
        extractor: the feature extractor.
        device: device on which the features are computed.

    Yields:
        Each window with its (T, F) log-mel energies, which are frames of the whole recording, without normalisation.
    """
    hop_length = extractor.hop_length
    log_mel_blocks = iterate_log_mel(split_into_blocks(blocks, BLOCK_S * extractor.sampling_rate), extractor, device)
    # frames from `first_frame` on that a window may still need
    buffer = torch.zeros(0, len(extractor.mel_filters), device=device)
    first_frame = 0
    for window in windows:
        start, stop = window.start // hop_length, window.stop // hop_length
        while first_frame + len(buffer) < stop:
            num_passed = min(max(start - first_frame, 0), len(buffer))
            buffer, first_frame = buffer[num_passed:], first_frame + num_passed
            buffer = torch.cat([buffer, next(log_mel_blocks)])
        yield window, buffer[start - first_frame : stop - first_frame].clone()


def normalize_window(
    log_mel: Tensor, extractor: ParakeetFeatureExtractor, summary: RecordingSummary | None
) -> tuple[Tensor, Tensor]:
    """Normalise the log-mel energies of a window as the feature extractor normalises those of a clip.

    Args:
        log_mel: (T, F) log-mel energies; overwritten.
        extractor: the feature extractor; no normalisation if its `normalize` is None.
        summary: summary of the recording, whose mean and standard deviation are used; `None` for those of the window.

    Returns:
        (1, T, F) features and a (1, T) mask, True everywhere.
    """
    features = log_mel[None]
    mask = torch.ones(features.shape[:2], dtype=torch.bool, device=log_mel.device)
    if extractor.normalize is None:
        return features, mask
    if summary is None:
        return normalize_per_feature(features, mask), mask
    return normalize_with_statistics(features, mask, summary.mean.to(features), summary.std.to(features)), mask
