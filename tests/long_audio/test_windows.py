"""Checks how recordings are cut, and that merging keeps every token once, at its time in the recording."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from transformers_parakeet.decoding import Hypotheses
from transformers_parakeet.long_audio import Window, WindowOptions, cut_windows, merge_windows
from transformers_parakeet.long_audio.windows import build_window_options, find_seam

HOP = 160
SAMPLES_PER_FRAME = 1280
RATE = 16000


def cut_without_pauses(num_samples: int, length: int, left: int, right: int) -> list[Window]:
    """Cut at fixed positions; every sample counts as one feature frame and as one encoder frame."""
    return list(cut_windows(num_samples, WindowOptions(length, left, right), torch.zeros(num_samples), 1, 1))


def frame_window(start: int, stop: int, keep_from: int, keep_to: int | None) -> Window:
    """Return a window whose limits are given in encoder frames."""
    first, last = SAMPLES_PER_FRAME * start, SAMPLES_PER_FRAME * stop
    return Window(first, last, SAMPLES_PER_FRAME * keep_from, None if keep_to is None else SAMPLES_PER_FRAME * keep_to)


def one_row(
    tokens: list[int], frames: list[int], durations: list[int], confidence: list[float] | None = None
) -> Hypotheses:
    """Return the hypothesis of one recording or window."""
    return Hypotheses(
        tokens=torch.tensor([tokens], dtype=torch.long),
        frames=torch.tensor([frames], dtype=torch.long),
        durations=torch.tensor([durations], dtype=torch.long),
        lengths=torch.tensor([len(tokens)]),
        confidence=None if confidence is None else torch.tensor([confidence], dtype=torch.float32),
    )


def merged(
    hypotheses: list[Hypotheses], windows: list[Window], samples_per_frame: int, search_frames: int = 0
) -> dict[str, Any]:
    """Merge hypotheses and return lists."""
    clip = merge_windows(hypotheses, windows, samples_per_frame, search_frames)
    assert clip.lengths.tolist() == [clip.tokens.shape[1]]
    return clip.to_lists()


def check_cover(windows: list[Window], num_samples: int) -> None:
    """Assert that the kept ranges cover a recording exactly once, and that every window contains its kept range."""
    ranges = [(w.keep_from, num_samples if w.keep_to is None else w.keep_to) for w in windows]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == num_samples
    assert all(before[1] == after[0] for before, after in pairwise(ranges))
    assert [window.keep_to is None for window in windows] == [False] * (len(windows) - 1) + [True]
    for window, (first, stop) in zip(windows, ranges, strict=True):
        assert 0 <= window.start <= first <= stop <= window.stop <= num_samples


@pytest.mark.parametrize(("length", "left", "right"), [(10, 0, 0), (10, 2, 2), (10, 3, 1), (10, 0, 4), (7, 3, 3)])
@pytest.mark.parametrize("num_samples", [0, 1, 6, 7, 9, 10, 11, 19, 20, 21, 100, 101])
def test_fixed_cuts_cover_a_recording_once_with_the_full_context(num_samples, length, left, right):
    windows = cut_without_pauses(num_samples, length, left, right)
    check_cover(windows, num_samples)
    for window in windows:
        assert window.start == 0 or window.keep_from - window.start == left
        assert window.keep_to is None or window.stop - window.keep_to == right
        assert window.stop - window.start <= length


def test_windows_by_hand():
    assert cut_without_pauses(25, 10, 2, 3) == [
        Window(0, 10, 0, 7),
        Window(5, 15, 7, 12),
        Window(10, 20, 12, 17),
        Window(15, 25, 17, None),
    ]
    assert cut_without_pauses(10, 10, 2, 3) == [Window(0, 10, 0, None)]


@pytest.mark.parametrize(("left", "right"), [(5, 5), (10, 0), (0, 10), (20, 20), (-1, 2)])
def test_windows_without_a_kept_range_are_refused(left, right):
    with pytest.raises(ValueError, match=f"got 10 samples with strides of {left} and {right}"):
        WindowOptions(10, left, right)


def test_seconds_are_rounded_to_encoder_frames():
    options = build_window_options(30, None, RATE, SAMPLES_PER_FRAME)
    # 30 s are 375 encoder frames of 80 ms, and 5 s are 62.5
    assert (options.length, options.left, options.right) == (375 * 1280, 62 * 1280, 62 * 1280)
    assert build_window_options(10, (1.0, 2.0), RATE, SAMPLES_PER_FRAME).right == 25 * 1280
    assert build_window_options(10, 0.0, RATE, SAMPLES_PER_FRAME).left_search == 0


@pytest.mark.parametrize("seed", range(40))
def test_cuts_in_pauses_cover_a_recording_once_whatever_the_levels(seed):
    """Random levels, lengths and contexts, also windows shorter than their search ranges."""
    rng = np.random.default_rng(seed)
    left, right, kept = rng.integers(0, 40), rng.integers(0, 40), rng.integers(1, 60)
    length = int(left + right + kept) * SAMPLES_PER_FRAME
    searches = [int(rng.integers(0, 2) * rng.integers(1, length)) for _ in range(3)]
    options = WindowOptions(
        length,
        int(left) * SAMPLES_PER_FRAME,
        int(right) * SAMPLES_PER_FRAME,
        cut_search=searches[0],
        left_search=min(searches[1], int(left) * SAMPLES_PER_FRAME),
        right_search=min(searches[2], int(right) * SAMPLES_PER_FRAME),
    )
    num_samples = int(rng.integers(0, 40 * RATE))
    levels = torch.from_numpy(rng.choice([-60.0, -20.0, -10.0], size=num_samples // HOP)).float()
    windows = list(cut_windows(num_samples, options, levels, HOP, SAMPLES_PER_FRAME))
    check_cover(windows, num_samples)
    for window in windows:
        assert window.start % SAMPLES_PER_FRAME == 0
        # the start is rounded down to an encoder frame
        assert window.stop - window.start < length + SAMPLES_PER_FRAME
        assert window.keep_to is None or window.keep_to > window.keep_from


@pytest.mark.parametrize("seed", [20, 30, 57, 58, 135])
def test_no_window_starts_before_the_previous_one(seed):
    """The second pass over a recording drops the features before the start of a window.

    With contexts of almost half a window, pauses were chosen in the opposite order for these seeds.
    """
    options = build_window_options(10, (4.8, 4.0), RATE, SAMPLES_PER_FRAME)
    levels = np.repeat(np.random.default_rng(seed).choice([-60.0, -40.0, -30.0, -20.0, -10.0], size=150), 20)
    windows = list(cut_windows(30 * RATE, options, torch.from_numpy(levels).float(), HOP, SAMPLES_PER_FRAME))
    check_cover(windows, 30 * RATE)
    starts = [window.start for window in windows]
    assert starts == sorted(starts)


def test_cuts_and_edges_lie_in_the_planted_pauses():
    # speech with a pause of 0.3 s every 2.5 s, and short dips of 50 ms that are not pauses between words
    num_frames = 6000
    levels = torch.full((num_frames,), -20.0)
    levels[70::110] = -60.0
    pauses = [range(first, first + 30) for first in range(240, num_frames - 30, 250)]
    for pause in pauses:
        levels[pause.start : pause.stop] = -60.0
    options = build_window_options(15, 2.5, RATE, SAMPLES_PER_FRAME)
    # search ranges of 2.5 s contain a whole pause wherever they lie
    options = WindowOptions(options.length, 3 * RATE, 3 * RATE, 3 * RATE, 3 * RATE, 3 * RATE)
    windows = list(cut_windows(num_frames * HOP, options, levels, HOP, SAMPLES_PER_FRAME))
    check_cover(windows, num_frames * HOP)
    assert len(windows) >= 6

    def is_pause(sample: int, tolerance: int = 0) -> bool:
        return any(pause.start - tolerance <= sample / HOP < pause.stop for pause in pauses)

    assert all(is_pause(window.keep_to) for window in windows[:-1])
    # middle of the pause, when the range contains all of it
    assert {window.keep_to // HOP % 250 for window in windows[:-1]} == {5}
    assert all(is_pause(window.start, 8) for window in windows if window.start)
    assert all(is_pause(window.stop) for window in windows[:-1])


def select_window(clip: Hypotheses, window: Window) -> Hypotheses:
    """Return what a perfect model emits on a window of a recording."""
    samples = clip.frames * SAMPLES_PER_FRAME
    is_inside = (samples >= window.start) & (samples < window.stop)
    return Hypotheses(
        tokens=clip.tokens[is_inside][None],
        frames=clip.frames[is_inside][None] - window.start // SAMPLES_PER_FRAME,
        durations=clip.durations[is_inside][None],
        lengths=is_inside.sum(1),
        confidence=clip.confidence[is_inside][None],
    )


@pytest.mark.parametrize("search_frames", [0, 3])
@pytest.mark.parametrize(("length", "left", "right"), [(100, 0, 0), (20, 4, 4), (20, 0, 7), (9, 4, 4), (30, 1, 0)])
def test_merging_restores_the_recording(length, left, right, search_frames):
    num_frames = 100
    # several tokens on one frame, and one on every edge
    frames = sorted(list(range(0, num_frames, 3)) + list(range(0, num_frames, 8)) * 2)
    count = len(frames)
    confidence = [1 / (index + 1) for index in range(count)]
    clip = one_row(list(range(count)), frames, [index % 5 for index in range(count)], confidence)
    options = WindowOptions(*(SAMPLES_PER_FRAME * frames for frames in (length, left, right)))
    levels = torch.zeros(num_frames * 8)
    windows = list(cut_windows(num_frames * SAMPLES_PER_FRAME, options, levels, HOP, SAMPLES_PER_FRAME))
    hypotheses = [select_window(clip, window) for window in windows]
    assert merged(hypotheses, windows, SAMPLES_PER_FRAME, search_frames) == clip.to_lists()


def test_merging_takes_a_token_from_the_window_whose_kept_range_contains_it():
    windows = [frame_window(0, 10, 0, 7), frame_window(4, 14, 7, None)]
    # frame 7 of the recording is frame 7 of the first window and frame 3 of the second
    first = one_row([1, 2, 3], [0, 6, 7], [2, 1, 0], [0.125, 0.25, 0.375])
    second = one_row([8, 3, 4], [2, 3, 9], [1, 4, 1], [0.5, 0.625, 0.75])
    expected = one_row([1, 2, 3, 4], [0, 6, 7, 13], [2, 1, 4, 1], [0.125, 0.25, 0.625, 0.75])
    assert merged([first, second], windows, SAMPLES_PER_FRAME) == expected.to_lists()


@pytest.mark.parametrize("offsets", [(0, 1), (1, 0), (-1, 1), (1, -1), (-2, 0), (0, -2)])
def test_a_token_that_two_windows_emit_on_both_sides_of_the_cut_is_neither_lost_nor_doubled(offsets):
    """The word 7 is emitted near the cut at frame 20, and the words 6 and 8 six frames before and after it."""
    windows = [frame_window(0, 32, 0, 20), frame_window(10, 60, 20, None)]
    first = one_row([5, 6, 7, 8], [2, 14, 20 + offsets[0], 26], [1] * 4)
    second = one_row([6, 7, 8, 9], [4, 10 + offsets[1], 16, 40], [1] * 4)
    result = merged([first, second], windows, SAMPLES_PER_FRAME, search_frames=5)
    assert result["tokens"] == [5, 6, 7, 8, 9]
    assert result["frames"] == sorted(result["frames"])
    # at the cut itself the word would be lost or doubled
    plain = merged([first, second], windows, SAMPLES_PER_FRAME)["tokens"]
    is_straddled = (offsets[0] < 0) != (offsets[1] < 0)
    assert (plain == [5, 6, 7, 8, 9]) != is_straddled


def test_a_word_of_several_tokens_is_not_torn_at_the_cut():
    # the tokens 71, 72 and 73 of one word are emitted on neighbouring frames around the cut at frame 20
    windows = [frame_window(0, 30, 0, 20), frame_window(10, 60, 20, None)]
    first = one_row([6, 71, 72, 73], [12, 18, 19, 21], [1] * 4)
    second = one_row([71, 72, 73, 8], [9, 10, 11, 20], [1] * 4)
    assert merged([first, second], windows, SAMPLES_PER_FRAME, search_frames=5)["tokens"] == [6, 71, 72, 73, 8]


def test_seams_by_hand():
    def seam(frames: list[int], first: int = 15, stop: int = 25) -> int:
        return find_seam(torch.tensor(frames), 20, first, stop)

    assert seam([]) == 20
    # between the frames 18 and 23
    assert seam([16, 18, 23]) == 21
    # if all frames have tokens, the seam is the cut
    assert seam(list(range(15, 25))) == 20
    assert seam([18], 20, 20) == 20
    # frames outside the range do not count
    assert seam([3, 40]) == 20


def test_windows_that_were_skipped_have_no_seam():
    windows = [frame_window(0, 14, 0, 10), frame_window(26, 40, 30, None)]
    first, second = one_row([1, 2], [9, 12], [1, 1]), one_row([3, 4], [3, 5], [1, 1])
    result = merged([first, second], windows, SAMPLES_PER_FRAME, search_frames=5)
    assert (result["tokens"], result["frames"]) == ([1, 4], [9, 31])


def test_merging_without_confidence_or_tokens():
    windows = [Window(0, 9, 0, 6), Window(3, 14, 6, None)]
    empty = one_row([], [], [])
    assert merged([empty] * 2, windows, 1, search_frames=2) == empty.to_lists()
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
        merge_windows([one_row([], [], [])], cut_without_pauses(40, 10, 2, 2), 1)
