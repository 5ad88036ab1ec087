"""Cuts long audio into overlapping windows, and merges the hypotheses of the windows by time.

The pipeline decodes the windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoding import Hypotheses


@dataclass(frozen=True)
class Window:
    """A window of a clip; all fields are sample indices counted from the start of the clip.

    The window keeps its tokens from `keep_from` to `keep_to`. The samples outside this range are context: the model
    processes them, but their tokens are dropped.

    Args:
        start: first sample of the window.
        stop: end of the window, exclusive.
        keep_from: first sample whose tokens are kept; tokens before it come from the previous window.
        keep_to: end of the kept range, exclusive; `None` for the last window, which keeps all tokens to its end.
    """

    start: int
    stop: int
    keep_from: int
    keep_to: int | None


def cut_windows(num_samples: int, length: int, left: int, right: int) -> Iterator[Window]:
    """Cut a clip into windows that overlap by `left + right` samples.

    Args:
        num_samples: length of the clip.
        length: length of a window in samples; 0 for one window over the whole clip.
        left: number of samples at the start of a window that are only context.
        right: number of samples at the end of a window that are only context.

    Yields:
        Windows whose kept ranges do not overlap and together cover the clip.

    Raises:
        ValueError: a window consists only of context.
    """
    if length and length <= left + right:
        raise ValueError(
            f"a chunk must be longer than its strides: got {length} samples with strides of {left} and {right}; "
            "raise `chunk_length_s` or lower `stride_length_s`"
        )
    start = 0
    while length and start + length < num_samples:
        # the first window has no left context
        keep_from = start + left if start else 0
        yield Window(start, start + length, keep_from, start + length - right)
        start += length - left - right
    # the last window extends to the end of the clip
    keep_from = start + left if start else 0
    yield Window(start, num_samples, keep_from, None)


def merge_windows(hypotheses: Sequence[Hypotheses], windows: Sequence[Window], samples_per_frame: int) -> Hypotheses:
    """Join the hypotheses of the windows of one clip, dropping tokens duplicated in the overlaps.

    Args:
        hypotheses: hypothesis of each window, with frames counted from the start of the window.
        windows: the windows in chronological order.
        samples_per_frame: number of samples per encoder frame.

    Returns:
        The hypothesis of the clip, with frames counted from the start of the clip.
    """
    kept_hypotheses = [
        keep_tokens(hypothesis, window, samples_per_frame)
        for hypothesis, window in zip(hypotheses, windows, strict=True)
    ]
    confidences = [hypothesis.confidence for hypothesis in kept_hypotheses if hypothesis.confidence is not None]
    return Hypotheses(
        tokens=torch.cat([hypothesis.tokens for hypothesis in kept_hypotheses], dim=1),
        frames=torch.cat([hypothesis.frames for hypothesis in kept_hypotheses], dim=1),
        durations=torch.cat([hypothesis.durations for hypothesis in kept_hypotheses], dim=1),
        lengths=torch.stack([hypothesis.lengths for hypothesis in kept_hypotheses]).sum(0),
        confidence=torch.cat(confidences, dim=1) if confidences else None,
    )


def keep_tokens(hypothesis: Hypotheses, window: Window, samples_per_frame: int) -> Hypotheses:
    """Select the tokens that lie in the kept range of a window.

    Args:
        hypothesis: hypothesis of the window, with frames counted from the start of the window.
        window: the window; tokens from sample `keep_from` to sample `keep_to` of the clip are kept.
        samples_per_frame: number of samples per encoder frame.

    Returns:
        The kept tokens, with frames counted from the start of the clip.
    """
    # remove the padding
    hypothesis = hypothesis[0]
    # (1, num_tokens) position of every token in the clip, in samples
    token_samples = window.start + hypothesis.frames * samples_per_frame
    is_kept = token_samples >= window.keep_from
    if window.keep_to is not None:
        is_kept &= token_samples < window.keep_to

    def select(values: Tensor) -> Tensor:
        """Select the values of the kept tokens from a (1, num_tokens) tensor."""
        return values[is_kept][None]

    return Hypotheses(
        tokens=select(hypothesis.tokens),
        frames=select(hypothesis.frames) + window.start // samples_per_frame,
        durations=select(hypothesis.durations),
        lengths=is_kept.sum(1),
        confidence=None if hypothesis.confidence is None else select(hypothesis.confidence),
    )
