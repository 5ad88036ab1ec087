"""Long audio: cuts it into overlapping windows, and merges the hypotheses of the windows by time.

The pipeline runs the model on the windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoding import Hypotheses


@dataclass(frozen=True)
class Window:
    """A window of a clip. All numbers count samples from the start of the clip.

    The samples outside `keep_from` and `keep_to` are context: the model sees them, but their tokens are dropped.

    Args:
        start: first sample of the window.
        stop: sample after the last one.
        keep_from: tokens before this sample are taken from the previous window.
        keep_to: tokens from this sample on are taken from the next window; `None` for the last window.
    """

    start: int
    stop: int
    keep_from: int
    keep_to: int | None


def cut_windows(num_samples: int, length: int, left: int, right: int) -> Iterator[Window]:
    """Cut a clip into windows that overlap by `left + right` samples.

    Args:
        num_samples: length of the clip.
        length: samples of a window; 0 for one window over the whole clip.
        left: samples at the start of a window that are only context.
        right: samples at the end of a window that are only context.

    Yields:
        Windows whose kept ranges cover every sample of the clip once.

    Raises:
        ValueError: a window consists of context only.
    """
    if length and length <= left + right:
        raise ValueError(
            f"a chunk must be longer than its strides: got {length} samples with strides of {left} and {right}; "
            "raise `chunk_length_s` or lower `stride_length_s`"
        )
    start = 0
    while length and start + length < num_samples:
        yield Window(start, start + length, start + left if start else 0, start + length - right)
        start += length - left - right
    yield Window(start, num_samples, start + left if start else 0, None)


def merge_windows(hypotheses: Sequence[Hypotheses], windows: Sequence[Window], samples_per_frame: int) -> Hypotheses:
    """Join the hypotheses of the windows of one clip, so that every token occurs once.

    Args:
        hypotheses: one row per window, with frames counted from the start of the window.
        windows: the windows, in order of time.
        samples_per_frame: samples per encoder frame.

    Returns:
        One row for the clip, with frames counted from the start of the clip.
    """
    kept = [
        keep_tokens(hypothesis, window, samples_per_frame)
        for hypothesis, window in zip(hypotheses, windows, strict=True)
    ]
    confidences = [row.confidence for row in kept if row.confidence is not None]
    return Hypotheses(
        tokens=torch.cat([row.tokens for row in kept], dim=1),
        frames=torch.cat([row.frames for row in kept], dim=1),
        durations=torch.cat([row.durations for row in kept], dim=1),
        lengths=torch.stack([row.lengths for row in kept]).sum(0),
        confidence=torch.cat(confidences, dim=1) if confidences else None,
    )


def keep_tokens(hypothesis: Hypotheses, window: Window, samples_per_frame: int) -> Hypotheses:
    """Select the tokens of one window that lie in its kept range.

    Args:
        hypothesis: one row, with frames counted from the start of the window.
        window: the window.
        samples_per_frame: samples per encoder frame.

    Returns:
        One row, with frames counted from the start of the clip.
    """
    row = hypothesis[0]
    # (1, L) first sample of the frame of every token
    samples = window.start + row.frames * samples_per_frame
    is_kept = samples >= window.keep_from
    if window.keep_to is not None:
        is_kept &= samples < window.keep_to

    def select(values: Tensor) -> Tensor:
        """Return the values (1, L) of the kept tokens."""
        return values[is_kept][None]

    return Hypotheses(
        tokens=select(row.tokens),
        frames=select(row.frames) + window.start // samples_per_frame,
        durations=select(row.durations),
        lengths=is_kept.sum(1),
        confidence=None if row.confidence is None else select(row.confidence),
    )
