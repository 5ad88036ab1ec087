"""Finds pauses in a recording from the level of every 10 ms frame.

The positions of windows are chosen in `windows.py`; voice activity is detected in `voice_activity.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# frames over which the power is averaged: 50 ms, longer than a pitch period and shorter than a pause between words
SMOOTHING_FRAMES = 5
# mean power that is added before the logarithm, so that digital silence has a finite level: -100 dB
POWER_FLOOR = 1e-10
# a frame belongs to a pause if its level is below the middle, in dB, of these two quantiles of the levels around it
QUIET_QUANTILE, LOUD_QUANTILE = 0.05, 0.95


@dataclass(frozen=True)
class Pause:
    """A stretch of consecutive frames with a low level.

    Args:
        first: index of the first frame.
        stop: index of the frame after the last frame.
    """

    first: int
    stop: int

    @property
    def middle(self) -> int:
        """Index of the frame in the middle of the pause."""
        return (self.first + self.stop) // 2


def compute_frame_powers(samples: Tensor, hop_length: int) -> Tensor:
    """Compute the mean power of every frame of `hop_length` samples.

    Args:
        samples: (S,) samples.
        hop_length: number of samples of a frame; an incomplete frame at the end is ignored.

    Returns:
        (S // hop_length,) mean squares of the samples.
    """
    num_frames = len(samples) // hop_length
    return samples[: num_frames * hop_length].reshape(num_frames, hop_length).square().mean(1)


def compute_smoothed_levels(powers: Tensor) -> Tensor:
    """Convert frame powers to levels that are smoothed over `SMOOTHING_FRAMES` frames.

    Args:
        powers: (T,) mean power of every frame.

    Returns:
        (T,) levels in dB. A level is that of the mean power of a frame and its neighbours inside the recording.
    """
    if len(powers) == 0:
        return powers
    half = SMOOTHING_FRAMES // 2
    means = F.avg_pool1d(powers[None], SMOOTHING_FRAMES, stride=1, padding=half, count_include_pad=False)[0]
    return 10 * torch.log10(means + POWER_FLOOR)


def find_longest_pause(levels: Tensor, first: int, stop: int) -> Pause:
    """Find the longest pause in a range of frames.

    A pause is a stretch of frames whose level is at most the middle between the quiet and the loud frames of the range:
    the middle of the quantiles `QUIET_QUANTILE` and `LOUD_QUANTILE` of the levels. The threshold therefore adapts to
    the level of the background noise.

    Args:
        levels: (T,) level of every frame of the recording in dB.
        first: first frame of the range.
        stop: frame after the last frame of the range; the range must contain a frame of `levels`.

    Returns:
        The longest pause, with frames counted from the start of the recording; the last one of several longest ones.
    """
    range_levels = levels[first:stop]
    quantiles = torch.quantile(range_levels, range_levels.new_tensor([QUIET_QUANTILE, LOUD_QUANTILE]))
    is_quiet = (range_levels <= quantiles.mean()).int()
    # +1 where a pause starts, -1 after its last frame
    changes = torch.diff(F.pad(is_quiet, (1, 1)))
    starts, stops = (changes == 1).nonzero()[:, 0], (changes == -1).nonzero()[:, 0]
    lengths = (stops - starts).tolist()
    # the last of the longest pauses gives the longest window
    index = max(range(len(lengths)), key=lambda position: (lengths[position], position))
    return Pause(first + int(starts[index]), first + int(stops[index]))
