"""Checks how long audio is cut, and that merging keeps every token once, at its time in the clip."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from transformers_parakeet.decoding import Hypotheses
from transformers_parakeet.long_audio import Window, cut_windows, merge_windows

SAMPLES_PER_FRAME = 1280


def frame_window(start: int, stop: int, keep_from: int, keep_to: int | None) -> Window:
    """Return a window whose limits are given in frames."""
    first, last = SAMPLES_PER_FRAME * start, SAMPLES_PER_FRAME * stop
    return Window(first, last, SAMPLES_PER_FRAME * keep_from, None if keep_to is None else SAMPLES_PER_FRAME * keep_to)


def one_row(
    tokens: list[int], frames: list[int], durations: list[int], confidence: list[float] | None = None
) -> Hypotheses:
    """Return the hypothesis of one clip or window."""
    return Hypotheses(
        tokens=torch.tensor([tokens], dtype=torch.long),
        frames=torch.tensor([frames], dtype=torch.long),
        durations=torch.tensor([durations], dtype=torch.long),
        lengths=torch.tensor([len(tokens)]),
        confidence=None if confidence is None else torch.tensor([confidence], dtype=torch.float32),
    )


def merged(hypotheses: list[Hypotheses], windows: list[Window], samples_per_frame: int) -> dict[str, Any]:
    """Merge hypotheses and return lists."""
    clip = merge_windows(hypotheses, windows, samples_per_frame)
    assert clip.lengths.tolist() == [clip.tokens.shape[1]]
    return clip.to_lists()


@pytest.mark.parametrize(
    ("length", "left", "right"), [(0, 0, 0), (10, 0, 0), (10, 2, 2), (10, 3, 1), (10, 0, 4), (7, 3, 3), (10, 9, 0)]
)
@pytest.mark.parametrize("num_samples", [0, 1, 6, 7, 9, 10, 11, 19, 20, 21, 100, 101])
def test_the_kept_ranges_cover_a_clip_once(num_samples: int, length: int, left: int, right: int):
    windows = list(cut_windows(num_samples, length, left, right))
    ranges = [(w.keep_from, num_samples if w.keep_to is None else w.keep_to) for w in windows]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == num_samples
    assert all(before[1] == after[0] for before, after in pairwise(ranges))
    assert [window.keep_to is None for window in windows] == [False] * (len(windows) - 1) + [True]
    for window, (first, stop) in zip(windows, ranges, strict=True):
        assert 0 <= window.start <= first <= stop <= window.stop <= num_samples
        # edges inside the clip have the full context
        assert window.start == 0 or first - window.start == left
        assert window.keep_to is None or window.stop - stop == right
        assert not length or window.stop - window.start <= length


def test_windows_by_hand():
    assert list(cut_windows(25, 10, 2, 3)) == [
        Window(0, 10, 0, 7),
        Window(5, 15, 7, 12),
        Window(10, 20, 12, 17),
        Window(15, 25, 17, None),
    ]
    assert list(cut_windows(10, 10, 2, 3)) == [Window(0, 10, 0, None)]
    assert list(cut_windows(10, 0, 0, 0)) == [Window(0, 10, 0, None)]


@pytest.mark.parametrize(("left", "right"), [(5, 5), (10, 0), (0, 10), (20, 20)])
def test_windows_without_a_kept_range_are_refused(left: int, right: int):
    with pytest.raises(ValueError, match=f"got 10 samples with strides of {left} and {right}"):
        list(cut_windows(100, 10, left, right))


def select_window(clip: Hypotheses, window: Window) -> Hypotheses:
    """Return what a perfect model emits on a window of a clip."""
    samples = clip.frames * SAMPLES_PER_FRAME
    is_inside = (samples >= window.start) & (samples < window.stop)
    return Hypotheses(
        tokens=clip.tokens[is_inside][None],
        frames=clip.frames[is_inside][None] - window.start // SAMPLES_PER_FRAME,
        durations=clip.durations[is_inside][None],
        lengths=is_inside.sum(1),
        confidence=clip.confidence[is_inside][None],
    )


@pytest.mark.parametrize(("length", "left", "right"), [(0, 0, 0), (20, 4, 4), (20, 0, 7), (9, 4, 4), (30, 1, 0)])
def test_merging_restores_the_clip(length: int, left: int, right: int):
    num_frames = 100
    # several tokens on one frame, and one on every edge
    frames = sorted(list(range(0, num_frames, 3)) + list(range(0, num_frames, 8)) * 2)
    count = len(frames)
    confidence = [1 / (index + 1) for index in range(count)]
    clip = one_row(list(range(count)), frames, [index % 5 for index in range(count)], confidence)
    windows = list(cut_windows(*(SAMPLES_PER_FRAME * frames for frames in (num_frames, length, left, right))))
    assert merged([select_window(clip, window) for window in windows], windows, SAMPLES_PER_FRAME) == clip.to_lists()


def test_merging_takes_a_token_from_the_window_whose_kept_range_contains_it():
    windows = [frame_window(0, 10, 0, 7), frame_window(4, 14, 7, None)]
    # frame 7 of the clip is frame 7 of the first window and frame 3 of the second
    first = one_row([1, 2, 3], [0, 6, 7], [2, 1, 0], [0.125, 0.25, 0.375])
    second = one_row([8, 3, 4], [2, 3, 9], [1, 4, 1], [0.5, 0.625, 0.75])
    expected = one_row([1, 2, 3, 4], [0, 6, 7, 13], [2, 1, 4, 1], [0.125, 0.25, 0.625, 0.75])
    assert merged([first, second], windows, SAMPLES_PER_FRAME) == expected.to_lists()


def test_merging_without_confidence_or_tokens():
    windows = list(cut_windows(5 * SAMPLES_PER_FRAME, 3 * SAMPLES_PER_FRAME, 0, SAMPLES_PER_FRAME))
    empty = one_row([], [], [])
    assert merged([empty] * len(windows), windows, SAMPLES_PER_FRAME) == empty.to_lists()
    alone = one_row([5], [1], [2])
    assert merged([alone], [Window(0, 9, 0, None)], SAMPLES_PER_FRAME) == alone.to_lists()
    assert alone.to_lists()["confidence"] is None


def test_padding_of_a_row_is_not_merged():
    padded = Hypotheses(
        tokens=torch.tensor([[5, 0]]),
        frames=torch.tensor([[1, 0]]),
        durations=torch.tensor([[2, 0]]),
        lengths=torch.tensor([1]),
    )
    assert merged([padded], [frame_window(0, 4, 0, None)], SAMPLES_PER_FRAME) == one_row([5], [1], [2]).to_lists()


def test_every_window_needs_a_hypothesis():
    with pytest.raises(ValueError, match="zip"):
        merge_windows([one_row([], [], [])], list(cut_windows(40, 10, 2, 2)), 1)
