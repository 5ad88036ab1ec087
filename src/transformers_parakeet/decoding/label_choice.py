"""Chooses the labels of greedy decoding with a fusion, without scoring all labels where this is possible.

The fusion is in `fusion.py`. The searches that need the labels are in `greedy.py` and `label_looping.py`. A label can
only have the largest sum of logit and weighted scores if its logit is large enough, because the scores have an upper
bound. So only the few labels with a large logit are scored. The result is that of `Fusion.choose_labels`, which scores
all labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .automaton import SUM_ERROR
from .fusion import Array, Fusion

# largest number of labels per clip, on average over the clips, that are scored one by one
MAX_LABELS_PER_CLIP = 128


class LabelScores(Protocol):
    """The scores of a joint network on R frames, of which most need not be exact.

    A frame is an index from 0 to R - 1. The labels 0 to V - 1 are those without the blank.
    """

    @property
    def best_tokens(self) -> Tensor:
        """(R,) the token with the largest logit on each frame."""

    def list_best(self, frames: Array) -> tuple[Array, Array, Array]:
        """List some labels with a large logit, among them the best label if it is the best token.

        Args:
            frames: (N,) frames, ascending.

        Returns:
            For each of P labels the (P,) index in `frames`, ascending, the (P,) label, and its (P,) logit.
        """

    def list_above(self, frames: Array, thresholds: Array) -> tuple[Array, Array, Array]:
        """List all labels whose logit may be at least a threshold.

        Args:
            frames: (N,) frames.
            thresholds: (N,) threshold of each frame; no label of a frame is listed if it is NaN or infinite.

        Returns:
            For each of P labels the (P,) index in `frames`, ascending, the (P,) label, and a (P,) upper bound of its
            logit.
        """

    def compute_logits(self, frames: Array, labels: Array) -> Array:
        """Compute the (P,) logits of (P,) labels on (P,) frames."""

    def compute_all_logits(self, frames: Array) -> Tensor:
        """Compute the (N, V) logits of all labels on (N,) frames."""


class KnownLogits:
    """Label scores that are known for all labels.

    Args:
        logits: (R, V) logits of the labels, on the CPU.
        best_tokens: (R,) the label with the largest logit on each frame.
    """

    def __init__(self, logits: Tensor, best_tokens: Tensor) -> None:
        self.logits, self.best_tokens = logits, best_tokens
        # NumPy has no bfloat16
        is_16_bit = logits.dtype.itemsize == 2
        self.float_logits: Array = (logits.float() if is_16_bit else logits).detach().numpy()

    def list_best(self, frames: Array) -> tuple[Array, Array, Array]:
        """List the best label of each frame, see `LabelScores`."""
        labels = self.best_tokens.numpy()[frames]
        return np.arange(len(frames)), labels, self.float_logits[frames, labels]

    def list_above(self, frames: Array, thresholds: Array) -> tuple[Array, Array, Array]:
        """List all labels whose logit is at least a threshold, see `LabelScores`."""
        indices, labels = np.divmod(
            (self.float_logits[frames] >= thresholds[:, None]).ravel().nonzero()[0], self.float_logits.shape[1]
        )
        return indices, labels, self.compute_logits(frames[indices], labels)

    def compute_logits(self, frames: Array, labels: Array) -> Array:
        """Return the logits of (P,) labels on (P,) frames."""
        logits: Array = self.float_logits[frames, labels]
        return logits

    def compute_all_logits(self, frames: Array) -> Tensor:
        """Return the logits of all labels on (N,) frames."""
        return self.logits[torch.from_numpy(frames)]


class JoinedScores:
    """The label scores of several calls of the joint network, of which each scored some of the clips.

    Args:
        parts: the scores of each call, and the (N_i,) frames in them, ascending. The clips are those of the first
            call, then those of the second call, and so on.
    """

    def __init__(self, parts: Sequence[tuple[LabelScores, Array]]) -> None:
        self.parts = parts
        # index of the first clip of each part, and the number of clips N
        self.offsets = np.cumsum([0, *(len(frames) for _, frames in parts)])
        self.num_clips = int(self.offsets[-1])

    def list_best(self) -> tuple[Array, Array, Array]:
        """List some labels with a large logit: (P,) clips, ascending, (P,) labels, (P,) logits."""
        return self._join([scores.list_best(frames) for scores, frames in self.parts])

    def list_above(self, thresholds: Array) -> tuple[Array, Array, Array]:
        """List all labels above the (N,) thresholds: (P,) clips, ascending, (P,) labels, (P,) bounds of the logits."""
        ranges = zip(self.parts, self.offsets, self.offsets[1:], strict=False)
        return self._join(
            [scores.list_above(frames, thresholds[first:stop]) for (scores, frames), first, stop in ranges]
        )

    def compute_logits(self, clips: Array, labels: Array) -> Array:
        """Compute the (P,) logits of (P,) labels of (P,) clips, ascending."""
        if len(self.parts) == 1:
            scores, frames = self.parts[0]
            return scores.compute_logits(frames[clips], labels)
        ends = clips.searchsorted(self.offsets)
        logits = []
        for (scores, frames), offset, first, stop in zip(self.parts, self.offsets, ends, ends[1:], strict=False):
            logits.append(scores.compute_logits(frames[clips[first:stop] - offset], labels[first:stop]))
        return np.concatenate(logits)

    def compute_all_logits(self) -> Tensor:
        """Compute the (N, V) logits of all labels."""
        return torch.cat([scores.compute_all_logits(frames) for scores, frames in self.parts])

    def _join(self, lists: list[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
        """Join the lists of labels of all parts."""
        if len(lists) == 1:
            return lists[0]
        indices, labels, values = zip(*lists, strict=True)
        clips = [index + offset for index, offset in zip(indices, self.offsets, strict=False)]
        return np.concatenate(clips), np.concatenate(labels), np.concatenate(values)


class LabelChooser:
    """Chooses the new labels of a batch of clips with a fusion, and holds the fusion state of every clip.

    Args:
        fusion: token scorers with weights, on the device of the clips.
        states: (B, number of scorers) fusion states before the first label.
    """

    def __init__(self, fusion: Fusion, states: Tensor) -> None:
        self.fusion, self.states = fusion, states

    def choose(self, clip_indices: Sequence[int], logits: Tensor) -> Tensor:
        """Choose one label for each of R clips, and advance the fusion states of these clips.

        Args:
            clip_indices: indices of the R clips.
            logits: (R, V) logits of the labels, without the blank.

        Returns:
            (R,) labels.
        """
        indices = torch.tensor(clip_indices, device=self.states.device)
        labels, next_states = self.fusion.choose_labels(self.states[indices], logits)
        self.states = self.states.index_copy(0, indices, next_states)
        return labels

    def choose_from(self, clip_indices: Sequence[int], parts: Sequence[tuple[LabelScores, Array]]) -> Tensor:
        """Choose one label for each of N clips on the CPU, and advance the fusion states of these clips.

        The result is that of `choose`.

        Args:
            clip_indices: indices of the N clips.
            parts: the scores of the labels, see `JoinedScores`.

        Returns:
            (N,) labels.
        """
        scores = JoinedScores(parts)
        choice = choose_few(self.fusion, self.states.numpy()[clip_indices], scores)
        if choice is None:
            return self.choose(clip_indices, scores.compute_all_logits())
        labels, next_states = choice
        self.states = self.states.clone()
        self.states.numpy()[clip_indices] = next_states
        return torch.from_numpy(labels)


def choose_few(fusion: Fusion, states: Array, scores: JoinedScores) -> tuple[Array, Array] | None:
    """Choose labels as `Fusion.choose_labels`, but score only the labels that can be the best.

    Args:
        fusion: token scorers with weights.
        states: (N, number of scorers) fusion states, on the CPU.
        scores: the scores of the labels of N clips.

    Returns:
        (N,) labels, and the (N, number of scorers) states after them. `None` if the labels that can be the best are
        too many, or a score is not finite, or a weight is negative, so the scores have no upper bound.
    """
    if min(fusion.weights) < 0:
        return None
    # the best sum of some labels is a lower bound of the best sum
    clips, labels, logits = scores.list_best()
    label_scores, next_states = fusion.score_labels(states[clips], labels)
    sums = logits + label_scores
    best = select_best(clips, labels, sums, len(states))
    if best is None:
        return None
    best_sums, bounds = sums[best], fusion.bound_scores(states)
    thresholds = best_sums - bounds - SUM_ERROR * (np.abs(best_sums) + np.abs(bounds))
    all_clips, all_labels, logit_bounds = scores.list_above(thresholds)
    if len(all_labels) > MAX_LABELS_PER_CLIP * len(states):
        return None
    # the list contains the best label of every clip so far; other labels must be compared with it
    if len(all_labels) > len(states):
        label_scores, next_states = fusion.score_labels(states[all_clips], all_labels)
        possible = (logit_bounds + label_scores >= best_sums[all_clips]).nonzero()[0]
        clips, labels = all_clips[possible], all_labels[possible]
        sums = scores.compute_logits(clips, labels) + label_scores[possible]
        best = select_best(clips, labels, sums, len(states))
        if best is None:
            return None
        return labels[best], next_states[possible[best]]
    return labels[best], next_states[best]


def select_best(indices: Array, labels: Array, sums: Array, num_clips: int) -> Array | None:
    """Select the label with the largest sum in every clip; the smallest label if several sums are equal.

    Args:
        indices: (P,) index of the clip of each label, ascending.
        labels: (P,) labels.
        sums: (P,) sums.
        num_clips: number of clips N.

    Returns:
        (N,) index of the best label of each clip; `None` if a clip has no label or its best sum is not finite.
    """
    order = np.lexsort((labels, -sums, indices))
    firsts = indices.searchsorted(np.arange(num_clips + 1))
    if not (firsts[1:] > firsts[:-1]).all():
        return None
    best: Array = order[firsts[:-1]]
    return best if np.isfinite(sums[best]).all() else None
