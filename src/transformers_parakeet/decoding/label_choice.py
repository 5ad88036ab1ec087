"""Chooses the labels of greedy decoding with a fusion, without scoring all labels where this is possible.

The fusion is in `fusion.py`. The searches that need the labels are in `greedy.py` and `label_looping.py`. A label can
only have the largest sum of logit and weighted scores if its logit is large enough, because the scores have an upper
bound. So only the few labels with a large logit are scored. The result is that of `Fusion.choose_labels`, which scores
all labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .automaton import SUM_ERROR
from .fusion import Fusion
from .label_scores import Array, KnownLogits, LabelScores

# largest number of labels per clip, on average over the clips, that are scored one by one
MAX_LABELS_PER_CLIP = 128


class LabelChooser:
    """Chooses the new labels of a batch of clips with a fusion, and holds the fusion state of every clip.

    Args:
        fusion: token scorers with weights, on the device of the clips.
        states: (B, number of scorers) fusion states before the first label.
    """

    def __init__(self, fusion: Fusion, states: Tensor) -> None:
        self.fusion, self.states = fusion, states

    def choose(self, clip_indices: Sequence[int], logits: Tensor, best_labels: Sequence[int] | None = None) -> Tensor:
        """Choose one label for each of R clips, and advance the fusion states of these clips.

        Args:
            clip_indices: indices of the R clips.
            logits: (R, V) logits of the labels, without the blank.
            best_labels: the label with the largest logit of each clip, which makes the choice faster; `None` if they
                are not known.

        Returns:
            (R,) labels.
        """
        is_large = logits.shape[1] > MAX_LABELS_PER_CLIP
        if best_labels is not None and is_large and logits.device.type == "cpu":
            return self.choose_from(clip_indices, KnownLogits(logits, best_labels))
        indices = torch.tensor(clip_indices, device=self.states.device)
        labels, next_states = self.fusion.choose_labels(self.states[indices], logits)
        self.states = self.states.index_copy(0, indices, next_states)
        return labels

    def choose_from(self, clip_indices: Sequence[int], scores: LabelScores) -> Tensor:
        """Choose one label for each of N clips on the CPU, and advance the fusion states of these clips.

        The result is that of `choose`.

        Args:
            clip_indices: indices of the N clips.
            scores: the scores of the labels.

        Returns:
            (N,) labels.
        """
        choice = choose_few(self.fusion, self.states.numpy()[clip_indices], scores)
        if choice is None:
            return self.choose(clip_indices, scores.compute_all_logits())
        labels, next_states = choice
        self.states = self.states.clone()
        self.states.numpy()[clip_indices] = next_states
        return torch.from_numpy(labels)


def choose_few(fusion: Fusion, states: Array, scores: LabelScores) -> tuple[Array, Array] | None:
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
    clips, labels, logits = scores.list_good()
    label_scores, next_states = fusion.score_labels(states[clips], labels)
    sums = logits + label_scores
    best = select_best(clips, labels, sums, len(states))
    if best is None:
        return None
    errors, bounds = scores.errors, fusion.bound_scores(states)
    rounding = SUM_ERROR * (np.abs(logits[best]) + np.abs(label_scores[best]) + np.abs(bounds))
    good_sums = sums[best] - rounding - errors
    clips, all_labels, logits = scores.list_above(good_sums - bounds)
    if len(all_labels) > MAX_LABELS_PER_CLIP * len(states):
        return None
    # the list contains the best label of every clip from the first step; without other labels, none can be better
    if len(all_labels) == len(states):
        return labels[best], next_states[best]
    label_scores, next_states = fusion.score_labels(states[clips], all_labels)
    possible = (logits + label_scores >= good_sums[clips]).nonzero()[0]
    clips, labels = clips[possible], all_labels[possible]
    sums = scores.compute_logits(clips, labels) + label_scores[possible]
    best = select_best(clips, labels, sums, len(states))
    return None if best is None else (labels[best], next_states[possible[best]])


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
