"""Finds the most probable frames of known labels, with the Viterbi algorithm on the lattices of CTC and transducers.

`alignment.py` of the package computes the log-probabilities and converts frames to times.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# Log-probabilities below this value count as this value, because differences of infinite sums are not defined.
MIN_LOG_PROB = -1e6


@dataclass(frozen=True)
class LabelAlignment:
    """The most probable frames of the labels of a clip.

    Args:
        frames: frame of each label: the first frame of its run for CTC, the frame at which it is emitted for a
            transducer.
        durations: number of frames of each label: the length of its run for CTC, the duration for TDT, 0 for RNN-T.
        log_probs: log-probability of each label at its frame.
        score: log-probability of the whole path.
    """

    frames: list[int]
    durations: list[int]
    log_probs: list[float]
    score: float


def count_ctc_frames(labels: Sequence[int]) -> int:
    """Return the minimum number of frames of a CTC alignment: one per label, and a blank between equal neighbours.

    Args:
        labels: the U labels.
    """
    return len(labels) + sum(first == second for first, second in itertools.pairwise(labels))


def align_ctc(log_probs: npt.NDArray[np.floating], labels: Sequence[int], blank_id: int) -> LabelAlignment:
    """Find the most probable CTC alignment of labels.

    State 2u is the blank before label u, state 2u + 1 is label u. Each frame stays in a state, advances by one state,
    or skips the blank between two different labels (Graves et al. 2006, section 4.1).

    Args:
        log_probs: (N, V) log-probabilities of the tokens.
        labels: the U labels.
        blank_id: id of the blank.

    Returns:
        The frames of the labels. For equal scores, a path stays in its state as long as possible.

    Raises:
        ValueError: the clip has fewer frames than the labels need.
    """
    num_frames = len(log_probs)
    required = count_ctc_frames(labels)
    if num_frames < required:
        raise ValueError(
            f"a text of {len(labels)} tokens needs at least {required} frames, got {num_frames}: check that the text "
            "belongs to the recording"
        )
    states = np.full(2 * len(labels) + 1, blank_id)
    states[1::2] = labels
    if num_frames == 0:
        return LabelAlignment([], [], [], 0.0)
    # (N, 2U + 1)
    emissions = np.maximum(np.asarray(log_probs, dtype=np.float64)[:, states], MIN_LOG_PROB)
    path, score = _find_best_states(emissions, states)
    label_states = 2 * np.arange(len(labels)) + 1
    frames, stops = np.searchsorted(path, label_states), np.searchsorted(path, label_states, side="right")
    runs = zip(frames, stops, label_states, strict=True)
    peaks = [float(emissions[start:stop, state].max()) for start, stop, state in runs]
    return LabelAlignment(frames.tolist(), (stops - frames).tolist(), peaks, score)


def _find_best_states(emissions: FloatArray, states: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], float]:
    """Find the best state of CTC at each frame.

    Args:
        emissions: (N, 2U + 1) log-probability of the token of each state.
        states: (2U + 1,) token of each state.

    Returns:
        (N,) states, which never decrease, and the log-probability of the path.
    """
    num_frames, num_states = emissions.shape
    can_skip = np.zeros(num_states, dtype=bool)
    can_skip[3::2] = states[3::2] != states[1:-2:2]
    # number of states by which the best path advances into each state at each frame
    advances = np.zeros(emissions.shape, dtype=np.uint8)
    best = np.full(num_states, -np.inf)
    best[:2] = emissions[0, :2]
    for frame in range(1, num_frames):
        candidates = np.full((3, num_states), -np.inf)
        candidates[0] = best
        candidates[1, 1:] = best[:-1]
        candidates[2, 2:] = np.where(can_skip[2:], best[:-2], -np.inf)
        advances[frame] = candidates.argmax(0)
        best = candidates.max(0) + emissions[frame]
    # a path ends in the last label or in the blank after it
    state = num_states - 1
    if num_states > 1 and best[-2] > best[-1]:
        state -= 1
    score = float(best[state])
    path = np.empty(num_frames, dtype=np.int64)
    for frame in range(num_frames - 1, -1, -1):
        path[frame] = state
        state -= int(advances[frame, state])
    return path, score


@dataclass(frozen=True)
class NodeScores:
    """Log-probabilities at the nodes of the lattice of one clip. Node (n, u): frame n is next, u labels are emitted.

    Args:
        blank: (N, U + 1) log-probability of the blank.
        label: (N, U) log-probability of label u at node (n, u).
        durations: (N, U + 1, D) log-probabilities of the durations; (N, U + 1, 2) zeros for RNN-T.
    """

    blank: FloatArray
    label: FloatArray
    durations: FloatArray


def align_transducer(scores: NodeScores, durations: Sequence[int] | None) -> LabelAlignment:
    """Find the most probable path of a transducer through known labels.

    A blank with duration d > 0 leads from node (n, u) to (n + d, u), a label with duration d leads to (n + d, u + 1).
    RNN-T has blanks of duration 1 and labels of duration 0. As in greedy decoding, a duration can lead beyond the last
    frame, which ends the path; it is then the duration up to the end.

    Args:
        scores: log-probabilities at the nodes.
        durations: durations of TDT in frames, in the order of the outputs; `None` for RNN-T.

    Returns:
        The frames of the labels.

    Raises:
        ValueError: no path exists, because the durations cannot reach the end.
    """
    num_frames, num_positions = scores.blank.shape
    lattice = _Lattice(scores, durations)
    for frame in range(num_frames):
        lattice.emit_labels_without_duration(frame)
        lattice.advance(frame)
    if not np.isfinite(lattice.best[num_frames, -1]):
        raise ValueError(
            f"a path through {num_positions - 1} labels and {num_frames} frames must exist, got none: check that the "
            "text belongs to the recording"
        )
    return lattice.trace_back()


class _Lattice:
    """The best scores of the nodes of one clip, and the arcs by which they are reached.

    Args:
        scores: log-probabilities at the nodes.
        durations: durations of TDT in frames; `None` for RNN-T.
    """

    def __init__(self, scores: NodeScores, durations: Sequence[int] | None) -> None:
        num_frames, num_positions = scores.blank.shape
        self.num_frames, self.scores = num_frames, scores
        self.durations = (0, 1) if durations is None else tuple(durations)
        self.is_tdt = durations is not None
        # row `num_frames` has the ends of the paths
        self.best = np.full((num_frames + 1, num_positions), -np.inf)
        self.best[0, 0] = 0.0
        # duration of the best arc into each node, and whether it emits a label
        self.arc_durations = np.zeros(self.best.shape, dtype=np.int32)
        self.arc_is_label = np.zeros(self.best.shape, dtype=bool)

    def emit_labels_without_duration(self, frame: int) -> None:
        """Extend the paths at a frame by labels of duration 0.

        With c(u), the sum of the first u scores, the best score is max over v <= u of best(v) - c(v), plus c(u).

        Args:
            frame: the frame.
        """
        if 0 not in self.durations:
            return
        label_scores = self.scores.label[frame] + self.scores.durations[frame, :-1, self.durations.index(0)]
        sums = np.concatenate([[0.0], np.maximum(label_scores, MIN_LOG_PROB).cumsum()])
        relative = self.best[frame] - sums
        maxima = np.maximum.accumulate(relative)
        is_extended = relative < maxima
        self.best[frame][is_extended] = (sums + maxima)[is_extended]
        self.arc_durations[frame][is_extended] = 0
        self.arc_is_label[frame][is_extended] = True

    def advance(self, frame: int) -> None:
        """Extend the paths at a frame by blanks and labels that have a duration.

        Args:
            frame: the frame.
        """
        for index, duration in enumerate(self.durations):
            if duration == 0:
                continue
            target, duration_scores = min(frame + duration, self.num_frames), self.scores.durations[frame, :, index]
            arc_duration = target - frame
            self._improve(target, 0, self.best[frame] + self.scores.blank[frame] + duration_scores, arc_duration, False)
            if self.is_tdt:
                label_scores = self.best[frame, :-1] + self.scores.label[frame] + duration_scores[:-1]
                self._improve(target, 1, label_scores, arc_duration, True)

    def _improve(self, target: int, first: int, candidates: FloatArray, duration: int, is_label: bool) -> None:
        """Replace the best paths into some nodes of a frame by better ones.

        Args:
            target: the frame.
            first: first position of the nodes.
            candidates: scores of paths into the nodes from position `first` on.
            duration: duration of their last arc.
            is_label: whether their last arc emits a label.
        """
        is_better = candidates > self.best[target, first:]
        self.best[target, first:][is_better] = candidates[is_better]
        self.arc_durations[target, first:][is_better] = duration
        self.arc_is_label[target, first:][is_better] = is_label

    def trace_back(self) -> LabelAlignment:
        """Follow the best arcs from the end to the start."""
        frame, position = self.num_frames, self.best.shape[1] - 1
        frames: list[int] = []
        durations: list[int] = []
        while frame > 0 or position > 0:
            duration, is_label = int(self.arc_durations[frame, position]), bool(self.arc_is_label[frame, position])
            frame -= duration
            if is_label:
                position -= 1
                frames.append(frame)
                durations.append(duration)
        frames.reverse()
        durations.reverse()
        log_probs = [float(self.scores.label[frame, position]) for position, frame in enumerate(frames)]
        return LabelAlignment(frames, durations, log_probs, float(self.best[-1, -1]))


__all__ = ["LabelAlignment", "NodeScores", "align_ctc", "align_transducer", "count_ctc_frames"]
