"""Forced alignment: equal to the best of all paths, listed by brute force on small lattices."""

import itertools

import numpy as np
import pytest

from transformers_parakeet.decoding import NodeScores, align_ctc, align_transducer
from transformers_parakeet.decoding.alignment import count_ctc_frames

# exact sums differ only by the order of additions
TOLERANCE = 1e-12


def draw_log_probs(rng, *shape):
    logits = 2 * rng.standard_normal(shape)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def list_ctc_paths(num_frames, labels, vocab_size, blank):
    for path in itertools.product(range(vocab_size), repeat=num_frames):
        if [token for token, _ in itertools.groupby(path) if token != blank] == labels:
            yield path


def read_runs(path, blank):
    runs, frame = [], 0
    for token, repeats in itertools.groupby(path):
        length = len(list(repeats))
        if token != blank:
            runs.append((frame, length))
        frame += length
    return runs


@pytest.mark.parametrize("seed", range(60))
def test_ctc_alignment_is_the_best_path(seed):
    rng = np.random.default_rng(seed)
    vocab_size, num_frames = 3 + seed % 2, int(rng.integers(1, 6))
    labels = rng.integers(1, vocab_size, size=rng.integers(0, 4)).tolist()
    log_probs = draw_log_probs(rng, num_frames, vocab_size)
    paths = list(list_ctc_paths(num_frames, labels, vocab_size, blank=0))
    if not paths:
        assert count_ctc_frames(labels) > num_frames
        with pytest.raises(ValueError, match="needs at least"):
            align_ctc(log_probs, labels, 0)
        return
    scores = [sum(log_probs[frame, token] for frame, token in enumerate(path)) for path in paths]
    best = int(np.argmax(scores))
    alignment = align_ctc(log_probs, labels, 0)
    assert alignment.score == pytest.approx(scores[best], abs=TOLERANCE)
    assert list(zip(alignment.frames, alignment.durations, strict=True)) == read_runs(paths[best], 0)
    assert len(alignment.log_probs) == len(labels)


def list_transducer_paths(scores, durations, is_tdt):
    """Yield (score, [(frame, duration)]) of every path from (0, 0) to the end."""
    num_frames, num_positions = scores.blank.shape

    def extend(frame, position, score, emitted):
        if frame >= num_frames:
            if position == num_positions - 1:
                yield score, emitted
            return
        for index, duration in enumerate(durations):
            step = min(duration, num_frames - frame)
            arc = score + scores.durations[frame, position, index]
            if duration > 0:
                yield from extend(frame + step, position, arc + scores.blank[frame, position], emitted)
            if position < num_positions - 1 and (is_tdt or duration == 0):
                label_score = arc + scores.label[frame, position]
                yield from extend(frame + step, position + 1, label_score, [*emitted, (frame, step)])

    yield from extend(0, 0, 0.0, [])


@pytest.mark.parametrize("durations", [None, (0, 1, 2), (1, 2), (0, 1, 2, 3, 4), (2, 0, 1)])
@pytest.mark.parametrize("seed", range(20))
def test_transducer_alignment_is_the_best_path(durations, seed):
    rng = np.random.default_rng(seed)
    num_frames, num_labels = int(rng.integers(1, 5)), int(rng.integers(0, 4))
    log_probs = draw_log_probs(rng, num_frames, num_labels + 1, 4)
    is_tdt = durations is not None
    duration_scores = np.zeros((num_frames, num_labels + 1, 2))
    if is_tdt:
        duration_scores = draw_log_probs(rng, num_frames, num_labels + 1, len(durations))
    scores = NodeScores(log_probs[..., 0], log_probs[:, :-1, 1], duration_scores)
    paths = list(list_transducer_paths(scores, durations or (0, 1), is_tdt))
    if not paths:
        with pytest.raises(ValueError, match="must exist"):
            align_transducer(scores, durations)
        return
    best_score, best_path = max(paths, key=lambda path: path[0])
    alignment = align_transducer(scores, durations)
    assert alignment.score == pytest.approx(best_score, abs=TOLERANCE)
    assert list(zip(alignment.frames, alignment.durations, strict=True)) == best_path
    labels = [scores.label[frame, position] for position, (frame, _) in enumerate(best_path)]
    assert alignment.log_probs == pytest.approx(labels, abs=TOLERANCE)


def test_impossible_labels_keep_finite_scores():
    log_probs = np.array([[0.0, -np.inf], [0.0, -np.inf]])
    alignment = align_ctc(log_probs, [1], 0)
    assert np.isfinite(alignment.score)
    assert len(alignment.frames) == 1


def test_text_without_labels_has_only_blanks():
    log_probs = draw_log_probs(np.random.default_rng(0), 4, 3)
    assert align_ctc(log_probs, [], 0).score == pytest.approx(log_probs[:, 0].sum())
    assert align_ctc(np.zeros((0, 3)), [], 0).frames == []
