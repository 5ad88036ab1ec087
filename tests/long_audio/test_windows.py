"""Checks how long audio is cut, and that merging keeps every token once, at its time in the clip."""

from itertools import pairwise

import pytest

from transformers_parakeet.long_audio.windows import Window, merge, windows
from transformers_parakeet.timestamps import Emissions

# samples per encoder frame
FRAME = 1280


def kept(cut: list[Window], samples: int) -> list[tuple[int, int]]:
    return [(window.keep_from, samples if window.keep_to is None else window.keep_to) for window in cut]


@pytest.mark.parametrize(
    ("length", "left", "right"), [(0, 0, 0), (10, 0, 0), (10, 2, 2), (10, 3, 1), (10, 0, 4), (7, 3, 3), (10, 9, 0)]
)
@pytest.mark.parametrize("samples", [0, 1, 6, 7, 9, 10, 11, 19, 20, 21, 100, 101])
def test_kept_parts_cover_a_clip_once(samples: int, length: int, left: int, right: int):
    cut = list(windows(samples, length, left, right))
    parts = kept(cut, samples)
    assert parts[0][0] == 0
    assert parts[-1][1] == samples
    assert all(before[1] == after[0] for before, after in pairwise(parts))
    assert [window.keep_to is None for window in cut] == [False] * (len(cut) - 1) + [True]
    for window, (first, stop) in zip(cut, parts, strict=True):
        assert 0 <= window.start <= first <= stop <= window.stop <= samples
        # inner edges keep their whole context
        assert window.start == 0 or first - window.start == left
        assert window.keep_to is None or window.stop - stop == right
        assert not length or window.stop - window.start <= length


def test_windows_by_hand():
    assert list(windows(25, 10, 2, 3)) == [
        Window(0, 10, 0, 7),
        Window(5, 15, 7, 12),
        Window(10, 20, 12, 17),
        Window(15, 25, 17, None),
    ]
    assert list(windows(10, 10, 2, 3)) == [Window(0, 10, 0, None)]
    assert list(windows(10, 0, 0, 0)) == [Window(0, 10, 0, None)]


@pytest.mark.parametrize(("left", "right"), [(5, 5), (10, 0), (0, 10), (20, 20)])
def test_context_must_leave_something(left: int, right: int):
    with pytest.raises(ValueError, match=f"got 10 samples with strides of {left} and {right}"):
        list(windows(100, 10, left, right))


def slice_emissions(clip: Emissions, window: Window) -> Emissions:
    """What a perfect model emits on a window of a clip."""
    inside = [i for i, frame in enumerate(clip.frames) if window.start <= frame * FRAME < window.stop]
    return Emissions(
        [clip.tokens[i] for i in inside],
        [clip.frames[i] - window.start // FRAME for i in inside],
        [clip.durations[i] for i in inside],
        None if clip.confidence is None else [clip.confidence[i] for i in inside],
    )


@pytest.mark.parametrize(("length", "left", "right"), [(0, 0, 0), (20, 4, 4), (20, 0, 7), (9, 4, 4), (30, 1, 0)])
def test_merging_gives_back_the_clip(length: int, left: int, right: int):
    frames = 100
    # several tokens on one frame, and one on every edge
    at = sorted(list(range(0, frames, 3)) + list(range(0, frames, 8)) * 2)
    clip = Emissions(list(range(len(at))), at, [i % 5 for i in range(len(at))], [1 / (i + 1) for i in range(len(at))])
    cut = list(windows(frames * FRAME, length * FRAME, left * FRAME, right * FRAME))
    assert merge([slice_emissions(clip, window) for window in cut], cut, FRAME) == clip


def test_merging_believes_the_window_that_a_token_belongs_to():
    cut = [Window(0, 10 * FRAME, 0, 7 * FRAME), Window(4 * FRAME, 14 * FRAME, 7 * FRAME, None)]
    # frame 7 of the clip: frame 7 of the first window, frame 3 of the second
    first = Emissions([1, 2, 3], [0, 6, 7], [2, 1, 0], [0.1, 0.2, 0.3])
    second = Emissions([8, 3, 4], [2, 3, 9], [1, 4, 1], [0.4, 0.5, 0.6])
    assert merge([first, second], cut, FRAME) == Emissions(
        [1, 2, 3, 4], [0, 6, 7, 13], [2, 1, 4, 1], [0.1, 0.2, 0.5, 0.6]
    )


def test_merging_without_confidence_or_tokens():
    cut = list(windows(5 * FRAME, 3 * FRAME, 0, FRAME))
    empty = Emissions([], [], [])
    assert merge([empty] * len(cut), cut, FRAME) == empty
    assert merge([Emissions([5], [1], [2])], [Window(0, 9, 0, None)], FRAME) == Emissions([5], [1], [2], None)


def test_every_window_needs_its_emissions():
    with pytest.raises(ValueError, match="zip"):
        merge([Emissions([], [], [])], list(windows(40, 10, 2, 2)), 1)
