"""Computes the features of a long recording, or of its windows, while the samples arrive in blocks.

`windows.py` chooses the positions of the windows, and `audio.py` reads the samples. No function here holds all samples
of a recording, and only `compute_recording_features` holds all features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..audio import FloatArray
from ..feature_extraction_parakeet import ParakeetFeatureExtractor, normalize_per_feature, normalize_with_statistics
from .pauses import compute_frame_powers, compute_smoothed_levels
from .windows import Window

# length in seconds of the blocks in which a recording is read, features are computed and speech is detected: 60 s of
# samples at 16 kHz are 4 MB, and their spectra 12 MB
BLOCK_S = 60.0
# The features of a window are padded to a multiple of this number of frames (2 s). On a CPU, oneDNN stores a compiled
# kernel of every layer for every shape, about 2 MB per length of a window with the sizes of the 110M models.
WINDOW_FRAMES_MULTIPLE = 200


@dataclass(frozen=True)
class RecordingSummary:
    """What the first pass over a recording computes.

    Args:
        num_samples: length S of the recording in samples.
        mean: (F,) mean of the log-mel energies of each bin over all frames of the recording.
        std: (F,) unbiased standard deviation of the log-mel energies of each bin.
        levels: (S // hop_length,) smoothed level of every feature frame in dB.
    """

    num_samples: int
    mean: Tensor
    std: Tensor
    levels: Tensor


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


def iterate_log_mel(
    blocks: Iterable[FloatArray], extractor: ParakeetFeatureExtractor, device: torch.device
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
        # `torch.tensor` copies the samples, because an array may be read-only
        buffer = torch.cat([buffer, torch.tensor(block, device=device)])
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


def compute_recording_features(
    blocks: Iterable[FloatArray], num_samples: int, extractor: ParakeetFeatureExtractor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute the features of a whole recording, as the feature extractor does for a clip.

    Args:
        blocks: (S_i,) float32 samples of consecutive parts of the recording.
        num_samples: length S of the recording in samples.
        extractor: the feature extractor.
        device: device on which the features are computed.

    Returns:
        (1, T, F) features and a (1, T) mask, True for valid frames. T is 1 + S // hop_length, and the last frame is
        padding.
    """
    num_frames = num_samples // extractor.hop_length
    features = torch.zeros(1, num_frames + 1, len(extractor.mel_filters), device=device)
    mask = torch.ones(features.shape[:2], dtype=torch.bool, device=device)
    mask[:, num_frames:] = False
    first_frame = 0
    for log_mel in iterate_log_mel(blocks, extractor, device):
        features[0, first_frame : first_frame + len(log_mel)] = log_mel
        first_frame += len(log_mel)
    if extractor.normalize is not None:
        features = normalize_per_feature(features, mask)
    return features, mask


def summarize_recording(
    blocks: Iterable[FloatArray],
    num_samples: int,
    extractor: ParakeetFeatureExtractor,
    device: torch.device,
) -> RecordingSummary:
    """Make the first pass over a recording: compute the statistics of its features, and its levels.

    Args:
        blocks: (S_i,) float32 samples of consecutive parts of the recording. The length of every block except the last
            one is a multiple of the hop length.
        num_samples: length S of the recording in samples.
        extractor: the feature extractor.
        device: device on which the features are computed.

    Returns:
        The summary of the recording.
    """
    num_bins = len(extractor.mel_filters)
    statistics = RunningStatistics(0, torch.zeros(num_bins).double(), torch.zeros(num_bins).double())
    # allocated once: small results between the blocks would prevent the allocator from reusing the memory of a block
    powers = torch.zeros(num_samples // extractor.hop_length)

    def observe_blocks() -> Iterator[FloatArray]:
        """Yield the blocks unchanged; store the powers of the frames."""
        num_frames = 0
        for block in blocks:
            block_powers = compute_frame_powers(torch.tensor(block), extractor.hop_length)
            powers[num_frames : num_frames + len(block_powers)] = block_powers
            num_frames += len(block_powers)
            del block_powers
            yield block

    for log_mel in iterate_log_mel(observe_blocks(), extractor, device):
        statistics.add(log_mel)
    return RecordingSummary(
        num_samples, statistics.mean.float(), statistics.compute_std().float(), compute_smoothed_levels(powers)
    )


def iterate_window_features(
    blocks: Iterable[FloatArray],
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
    log_mel_blocks = iterate_log_mel(blocks, extractor, device)
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
    """Normalise the log-mel energies of a window as the feature extractor normalises those of a clip, and pad them.

    Args:
        log_mel: (T, F) log-mel energies.
        extractor: the feature extractor; no normalisation if its `normalize` is None.
        summary: summary of the recording, whose mean and standard deviation are used; `None` for those of the window.

    Returns:
        (1, T', F) features and a (1, T') mask, True for the first T frames. T' is T, rounded up to a multiple of
        `WINDOW_FRAMES_MULTIPLE`. The padding frames are zero.
    """
    num_frames = len(log_mel)
    features = F.pad(log_mel, (0, 0, 0, -num_frames % WINDOW_FRAMES_MULTIPLE))[None]
    mask = (torch.arange(features.shape[1], device=log_mel.device) < num_frames)[None]
    if extractor.normalize is None:
        return features, mask
    if summary is None:
        return normalize_per_feature(features, mask), mask
    return normalize_with_statistics(features, mask, summary.mean.to(features), summary.std.to(features)), mask
