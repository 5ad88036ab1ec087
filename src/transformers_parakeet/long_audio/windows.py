"""Divides long audio into overlapping windows that are cut in pauses, and merges the hypotheses of the windows.

`recording.py` computes the features of the windows, and the pipeline decodes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..decoding import Hypotheses
from .pauses import find_longest_pause

# A cut is searched in the last part of a window before the limit, this fraction of the length of the window: 5 s of a
# window of 30 s. Fluent speech has a pause of 0.2 s or longer every few seconds.
CUT_SEARCH_FRACTION = 1 / 6
# The outer edge of the context is searched in this fraction of the context, counted from its nominal edge.
CONTEXT_SEARCH_FRACTION = 0.2
# The windows on both sides of a cut can emit a token one or two encoder frames apart. The tokens are therefore divided
# in the longest stretch without tokens that lies within this number of seconds of the cut.
SEAM_SEARCH_S = 0.4


@dataclass(frozen=True)
class Window:
    """A window of a recording; all fields are sample indices counted from the start of the recording.

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


@dataclass(frozen=True)
class WindowOptions:
    """How a recording is divided into windows; lengths are in samples.

    Args:
        length: maximum length of a window, with its context.
        left: context at the start of a window; 0 for no context.
        right: context at the end of a window; 0 for no context.
        cut_search: length of the range before the latest possible cut in which the longest pause is searched; 0 to cut
            at the latest possible position.
        left_search: length of the range after the earliest start of a window in which the longest pause is searched;
            0 to start at the earliest position.
        right_search: length of the range before the latest end of a window in which the longest pause is searched; 0
            to end at the latest position.

    Raises:
        ValueError: a window consists only of context.
    """

    length: int
    left: int
    right: int
    cut_search: int = 0
    left_search: int = 0
    right_search: int = 0

    def __post_init__(self) -> None:
        if min(self.left, self.right) < 0 or self.length <= self.left + self.right:
            raise ValueError(
                "a chunk must be longer than its strides, which must not be negative: got "
                f"{self.length} samples with strides of {self.left} and {self.right}; "
                "raise `chunk_length_s` or lower `stride_length_s`"
            )


def build_window_options(
    length_s: float, context_s: float | Sequence[float] | None, sampling_rate: int, samples_per_frame: int
) -> WindowOptions:
    """Build the options of windows that are cut in pauses.

    Args:
        length_s: maximum length of a window in seconds, with its context.
        context_s: context in seconds on each side, one number or a pair (left, right); `None` for one sixth of
            `length_s`, as in the pipeline of transformers.
        sampling_rate: samples per second.
        samples_per_frame: number of samples per encoder frame.

    Returns:
        The options. The length of a window and of its context are rounded to whole encoder frames.

    Raises:
        ValueError: a window consists only of context.
    """
    context_s = length_s / 6 if context_s is None else context_s
    left_s, right_s = context_s if isinstance(context_s, Sequence) else (context_s, context_s)
    frames_per_second = sampling_rate / samples_per_frame
    length, left, right = (
        round(seconds * frames_per_second) * samples_per_frame for seconds in (length_s, left_s, right_s)
    )
    return WindowOptions(
        length,
        left,
        right,
        cut_search=int(CUT_SEARCH_FRACTION * length),
        left_search=int(CONTEXT_SEARCH_FRACTION * left),
        right_search=int(CONTEXT_SEARCH_FRACTION * right),
    )


def cut_windows(
    num_samples: int, options: WindowOptions, levels: Tensor, hop_length: int, samples_per_frame: int
) -> Iterator[Window]:
    """Divide a recording into windows.

    Args:
        num_samples: length S of the recording.
        options: lengths of the windows and of their context.
        levels: (S // hop_length,) level of every feature frame in dB.
        hop_length: number of samples per feature frame.
        samples_per_frame: number of samples per encoder frame.

    Yields:
        Windows whose kept ranges do not overlap and together cover the recording. Every window starts on an encoder
        frame of the whole recording, and not before the previous window.
    """

    def search_pause(first: int, stop: int) -> int:
        """Return the sample in the middle of the longest pause of a range of samples; `stop` for an empty range."""
        first_frame, stop_frame = -(-first // hop_length), stop // hop_length
        if stop_frame <= first_frame:
            return stop
        return find_longest_pause(levels, first_frame, stop_frame).middle * hop_length

    keep_from = start = 0
    while start + options.length < num_samples:
        last_cut = start + options.length - options.right
        # every kept range contains at least one encoder frame
        earliest_cut = max(last_cut - options.cut_search, keep_from + samples_per_frame)
        keep_to = search_pause(earliest_cut, last_cut) if options.cut_search else last_cut
        latest_stop = keep_to + options.right
        stop = search_pause(latest_stop - options.right_search, latest_stop) if options.right_search else latest_stop
        # feature frames are not divided
        yield Window(start, stop // hop_length * hop_length, keep_from, keep_to)
        keep_from = keep_to
        next_start = max(0, keep_from - options.left)
        if next_start and options.left_search:
            next_start = search_pause(next_start, next_start + options.left_search)
        # no window starts before the previous one, because the second pass reads the recording only forward
        start = max(start, next_start // samples_per_frame * samples_per_frame)
    # the last window extends to the end of the recording
    yield Window(start, num_samples, keep_from, None)


def merge_windows(
    hypotheses: Sequence[Hypotheses], windows: Sequence[Window], samples_per_frame: int, search_frames: int = 0
) -> Hypotheses:
    """Join the hypotheses of the windows of one recording, dropping tokens of the context.

    Args:
        hypotheses: hypothesis of each window, with frames counted from the start of the window.
        windows: the windows in chronological order. A window can be missing if it contains no speech.
        samples_per_frame: number of samples per encoder frame.
        search_frames: maximum distance in encoder frames between a cut and the position at which the tokens of its
            two windows are divided; see `find_seam`.

    Returns:
        The hypothesis of the recording, with frames counted from the start of the recording.

    Raises:
        ValueError: the numbers of hypotheses and of windows differ.
    """
    # remove the padding, and count frames from the start of the recording
    hypotheses = [
        shift_frames(hypothesis[0], window.start // samples_per_frame)
        for hypothesis, window in zip(hypotheses, windows, strict=True)
    ]
    # first and last kept frame (exclusive) of every window; a token on the frame that contains a cut precedes the cut
    first_frames = [-(-window.keep_from // samples_per_frame) for window in windows]
    stop_frames = [None if window.keep_to is None else -(-window.keep_to // samples_per_frame) for window in windows]
    for index, (previous, following) in enumerate(pairwise(windows)):
        if previous.keep_to == following.keep_from:
            seam = find_seam(
                torch.cat([hypotheses[index].frames[0], hypotheses[index + 1].frames[0]]),
                cut=first_frames[index + 1],
                first=max(
                    first_frames[index + 1] - search_frames, following.start // samples_per_frame, first_frames[index]
                ),
                stop=min(first_frames[index + 1] + search_frames, previous.stop // samples_per_frame),
            )
            stop_frames[index] = first_frames[index + 1] = seam
    pieces = list(map(select_frames, hypotheses, first_frames, stop_frames))
    confidences = [piece.confidence for piece in pieces if piece.confidence is not None]
    return Hypotheses(
        tokens=torch.cat([piece.tokens for piece in pieces], dim=1),
        frames=torch.cat([piece.frames for piece in pieces], dim=1),
        durations=torch.cat([piece.durations for piece in pieces], dim=1),
        lengths=torch.stack([piece.lengths for piece in pieces]).sum(0),
        confidence=torch.cat(confidences, dim=1) if confidences else None,
    )


def find_seam(token_frames: Tensor, cut: int, first: int, stop: int) -> int:
    """Find the frame at which the tokens of two overlapping windows are divided.

    The two windows can emit the same token one or two frames apart. If these frames lie on both sides of the cut, the
    token is lost or doubled. The tokens are therefore divided in the middle of the longest stretch without tokens.

    Args:
        token_frames: frames of the tokens of both windows, in any order.
        cut: frame of the cut.
        first: first frame of the searched range.
        stop: last frame of the searched range.

    Returns:
        The first frame whose tokens come from the second window; `cut` if the range is empty. Of several longest
        stretches, the one nearest to the cut is used.
    """
    if stop <= first:
        return cut
    in_range = token_frames[(token_frames >= first) & (token_frames < stop)].unique().tolist()
    # a seam at frame s divides tokens on the frames before s from tokens on s and later frames
    borders = [first - 1, *in_range, stop]
    stretches = [(after - before, (before + after + 1) // 2) for before, after in pairwise(borders)]
    return max(stretches, key=lambda stretch: (stretch[0], -abs(stretch[1] - cut)))[1]


def shift_frames(hypothesis: Hypotheses, num_frames: int) -> Hypotheses:
    """Add a number of frames to the frames of a hypothesis.

    Args:
        hypothesis: hypothesis of one window.
        num_frames: number of frames between the start of the recording and the start of the window.
    """
    return replace(hypothesis, frames=hypothesis.frames + num_frames)


def select_frames(hypothesis: Hypotheses, first: int, stop: int | None) -> Hypotheses:
    """Select the tokens of a range of frames.

    Args:
        hypothesis: hypothesis of one clip, without padding.
        first: first frame of the range.
        stop: end of the range, exclusive; `None` for no end.
    """
    is_selected = hypothesis.frames >= first
    if stop is not None:
        is_selected &= hypothesis.frames < stop
    return select_tokens(hypothesis, is_selected)


def select_tokens(hypothesis: Hypotheses, is_selected: Tensor) -> Hypotheses:
    """Select tokens of the hypothesis of one clip.

    Args:
        hypothesis: hypothesis of one clip, without padding.
        is_selected: (1, num_tokens) True for the tokens to select.

    Returns:
        The hypothesis with the selected tokens, and their frames, durations and confidence.
    """

    def select(values: Tensor) -> Tensor:
        """Select the values of the selected tokens from a (1, num_tokens) tensor."""
        return values[is_selected][None]

    return Hypotheses(
        tokens=select(hypothesis.tokens),
        frames=select(hypothesis.frames),
        durations=select(hypothesis.durations),
        lengths=is_selected.sum(1),
        confidence=None if hypothesis.confidence is None else select(hypothesis.confidence),
    )
