"""The outputs of a large linear layer on some rows: rough scores of all outputs, and float32 scores on request.

`int8_search.py` computes the rough scores. Decoding with a language model or phrase boosting reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Array = NDArray[Any]


@dataclass(frozen=True)
class RoughScores:
    """Scores of all outputs of a linear layer in R rows, with a bound of their errors.

    Args:
        scores: (R, GROUP_SIZE, num_groups) scores: output i * num_groups + g is member i of group g.
        group_maxima: (R, num_groups) largest score of each group.
        errors: (R,) float32 bound of the error of the scores of each row.
    """

    scores: Tensor
    group_maxima: Tensor
    errors: Tensor


def find_outputs(rough_scores: RoughScores, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Find all outputs whose rough score is at least the threshold of its row.

    Args:
        rough_scores: the rough scores of R rows.
        thresholds: (R,) thresholds; no output is found in a row whose threshold is NaN.

    Returns:
        (P,) row indices, ascending, and (P,) output indices.
    """
    scores, group_maxima = rough_scores.scores, rough_scores.group_maxima
    # first select the groups with such outputs, then the outputs in these groups
    group_rows, groups = (group_maxima >= thresholds[:, None]).nonzero(as_tuple=True)
    is_found = scores[group_rows, :, groups] >= thresholds.index_select(0, group_rows)[:, None]
    selected, members = is_found.nonzero(as_tuple=True)
    outputs = torch.add(groups.index_select(0, selected), members, alpha=scores.shape[2])
    return group_rows.index_select(0, selected), outputs


def score_outputs(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, outputs: Tensor) -> Tensor:
    """Compute some outputs of a linear layer.

    Args:
        hidden: (R, J) inputs.
        weight: (V, J) weight.
        bias: (V,) bias.
        rows: (P,) row of each output.
        outputs: (P,) output indices.

    Returns:
        (P,) scores.
    """
    products = torch.linalg.vecdot(weight.index_select(0, outputs), hidden.index_select(0, rows))
    return products + bias.index_select(0, outputs)


@dataclass(frozen=True)
class SearchedOutputs:
    """The largest output of a linear layer in R rows, and rough scores of all outputs.

    Args:
        layer: (V, J) float32 weight and (V,) float32 bias of the layer.
        hidden: (R, J) float32 inputs of the layer.
        best_tokens: (R,) output with the largest float32 score of each row.
        candidates: (P,) row, ascending, (P,) output and (P,) float32 score of each output that could be the largest of
            its row.
        rough_scores: the rough scores of all outputs.
    """

    layer: tuple[Tensor, Tensor]
    hidden: Tensor
    best_tokens: Tensor
    candidates: tuple[Tensor, Tensor, Tensor]
    rough_scores: RoughScores

    def select(self, rows: Sequence[int]) -> SelectedOutputs:
        """Select N rows, so that the memory of the other rows becomes free.

        Args:
            rows: the rows, ascending.
        """
        indices = torch.tensor(rows)
        clip_of_row = np.full(len(self.hidden), -1)
        clip_of_row[rows] = np.arange(len(rows))
        candidate_rows, outputs, scores = (tensor.numpy() for tensor in self.candidates)
        clips = clip_of_row[candidate_rows]
        selected = ((clips >= 0) & (outputs < len(self.layer[1]) - 1)).nonzero()[0]
        return SelectedOutputs(
            self.layer,
            self.hidden.index_select(0, indices),
            (clips[selected], outputs[selected], scores[selected]),
            self.rough_scores.scores.index_select(0, indices),
            self.rough_scores.group_maxima.index_select(0, indices),
            self.rough_scores.errors.numpy()[rows],
        )


@dataclass(frozen=True)
class SelectedOutputs:
    """Rough scores of the outputs of a linear layer in N rows, one per clip.

    The last output is the blank. The other outputs are the labels. The class implements `LabelScores` of the
    sub-package `decoding`.

    Args:
        layer: (V, J) float32 weight and (V,) float32 bias of the layer.
        hidden: (N, J) float32 inputs of the layer.
        best_labels: (P,) clip, ascending, (P,) label and (P,) float32 score of the labels that could be the largest
            output of their row.
        scores: (N, GROUP_SIZE, num_groups) rough scores, see `RoughScores`.
        group_maxima: (N, num_groups) largest rough score of each group.
        errors: (N,) error bounds, see `RoughScores`.
    """

    layer: tuple[Tensor, Tensor]
    hidden: Tensor
    best_labels: tuple[Array, Array, Array]
    scores: Tensor
    group_maxima: Tensor
    errors: Array

    def join(self, others: Sequence[SelectedOutputs]) -> SelectedOutputs:
        """Append the clips of other selections of the same layer.

        Args:
            others: the other selections.
        """
        if not others:
            return self
        parts, first_clip, best_labels = [self, *others], 0, []
        for part in parts:
            clips, labels, scores = part.best_labels
            best_labels.append((clips + first_clip, labels, scores))
            first_clip += len(part.hidden)
        clips, labels, scores = (np.concatenate(arrays) for arrays in zip(*best_labels, strict=True))
        return SelectedOutputs(
            self.layer,
            torch.cat([part.hidden for part in parts]),
            (clips, labels, scores),
            torch.cat([part.scores for part in parts]),
            torch.cat([part.group_maxima for part in parts]),
            np.concatenate([part.errors for part in parts]),
        )

    def list_best(self) -> tuple[Array, Array, Array]:
        """List the labels that could be the largest output of their row, see `LabelScores`."""
        return self.best_labels

    def list_above(self, thresholds: Array) -> tuple[Array, Array, Array]:
        """List all labels whose float32 score may be at least a threshold, see `LabelScores`.

        Args:
            thresholds: (N,) thresholds.
        """
        # a score may be too low by its error bound
        thresholds = thresholds - self.errors
        # first the groups with labels above the threshold, then the labels
        group_maxima = self.group_maxima.numpy()
        group_clips, groups = (group_maxima >= thresholds[:, None]).nonzero()
        members = self.scores[torch.from_numpy(group_clips), :, torch.from_numpy(groups)].numpy()
        selected, positions = (members >= thresholds[group_clips, None]).nonzero()
        outputs = positions * group_maxima.shape[1] + groups[selected]
        is_label = (outputs < len(self.layer[1]) - 1).nonzero()[0]
        selected, outputs = selected[is_label], outputs[is_label]
        scores, clips = members[selected, positions[is_label]], group_clips[selected]
        return clips, outputs, scores + self.errors[clips]

    def compute_logits(self, clips: Array, labels: Array) -> Array:
        """Compute the (P,) float32 scores of (P,) labels of (P,) clips.

        Args:
            clips: (P,) clips, ascending.
            labels: (P,) labels.
        """
        rows, outputs = torch.from_numpy(clips), torch.from_numpy(labels)
        scores: Array = score_outputs(self.hidden, *self.layer, rows, outputs).numpy()
        return scores

    def compute_all_logits(self) -> Tensor:
        """Compute the (N, V - 1) float32 scores of all labels."""
        weight, bias = self.layer
        return F.linear(self.hidden, weight[:-1], bias[:-1])
