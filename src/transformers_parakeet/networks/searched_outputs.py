"""The outputs of a large linear layer on some rows: rough scores of all outputs, and float32 scores on request.

`fast_linear.py` computes the rough scores. Decoding with a language model or phrase boosting reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Array = NDArray[Any]

# largest relative error of rounding to bfloat16, which has 8 significant bits
BFLOAT16_ERROR = 2.0**-8

# the error bound of bfloat16 is enlarged by 5 % to include the rounding of the float32 sums
ERROR_MARGIN = 1.05

# bound of the error of a rough score that is relative to the score
RELATIVE_ERROR = ERROR_MARGIN * BFLOAT16_ERROR


@dataclass(frozen=True)
class RoughScores:
    """bfloat16 scores of all outputs of a linear layer in R rows.

    Args:
        scores: (R, GROUP_SIZE, num_groups) scores: output i * num_groups + g is member i of group g.
        group_maxima: (R, num_groups) largest score of each group.
        fixed_errors: (R,) float32 bound of the error of a score, without the error that is relative to the score.
    """

    scores: Tensor
    group_maxima: Tensor
    fixed_errors: Tensor


def find_outputs(rough_scores: RoughScores, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Find all outputs whose rough score is at least the threshold of its row.

    Args:
        rough_scores: the rough scores of R rows.
        thresholds: (R,) thresholds; no output is found in a row whose threshold is NaN.

    Returns:
        (P,) row indices, ascending, and (P,) output indices.
    """
    scores, group_maxima = rough_scores.scores, rough_scores.group_maxima
    # first select the groups with candidates, then the candidates in these groups
    group_rows, groups = (group_maxima >= thresholds[:, None]).nonzero(as_tuple=True)
    selected_groups, members = (scores[group_rows, :, groups] >= thresholds[group_rows, None]).nonzero(as_tuple=True)
    return group_rows[selected_groups], members * scores.shape[2] + groups[selected_groups]


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
    return products + bias[outputs]


@dataclass(frozen=True)
class SearchedOutputs:
    """The largest output of a linear layer in R rows, and rough scores of all outputs.

    The last output is the blank. The other outputs are the labels. The class implements `LabelScores` of the
    sub-package `decoding`, whose frames are the rows.

    Args:
        hidden: (R, J) float32 inputs of the linear layer.
        weight: (V, J) float32 weight of the layer.
        bias: (V,) float32 bias of the layer.
        best_tokens: (R,) output with the largest float32 score of each row.
        candidates: (P,) row, ascending, (P,) output and (P,) float32 score of each output that could be the largest of
            its row.
        rough_scores: the rough scores of all outputs.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    best_tokens: Tensor
    candidates: tuple[Tensor, Tensor, Tensor]
    rough_scores: RoughScores

    def list_best(self, frames: Array) -> tuple[Array, Array, Array]:
        """List the labels whose rough scores are close to the largest, see `LabelScores`.

        Args:
            frames: (N,) rows, ascending.
        """
        rows, outputs, scores = (tensor.numpy() for tensor in self.candidates)
        index_of_row = np.full(len(self.hidden), -1)
        index_of_row[frames] = np.arange(len(frames))
        indices = index_of_row[rows]
        is_listed = ((indices >= 0) & (outputs < len(self.weight) - 1)).nonzero()[0]
        return indices[is_listed], outputs[is_listed], scores[is_listed]

    def list_above(self, frames: Array, thresholds: Array) -> tuple[Array, Array, Array]:
        """List all labels whose float32 score may be at least a threshold, see `LabelScores`.

        Args:
            frames: (N,) rows.
            thresholds: (N,) thresholds.
        """
        # a score s may be too low by `fixed_errors` + RELATIVE_ERROR * |s|
        thresholds = thresholds - self.rough_scores.fixed_errors.numpy()[frames]
        thresholds -= RELATIVE_ERROR / (1 - RELATIVE_ERROR) * np.abs(thresholds)
        # first the groups with labels above the threshold, then the labels
        maxima = self.rough_scores.group_maxima.float().numpy()[frames]
        group_indices, groups = (maxima >= thresholds[:, None]).nonzero()
        rows = frames[group_indices]
        members = self.rough_scores.scores[torch.from_numpy(rows), :, torch.from_numpy(groups)].float().numpy()
        selected, positions = (members >= thresholds[group_indices, None]).nonzero()
        outputs = positions * maxima.shape[1] + groups[selected]
        is_label = (outputs < len(self.weight) - 1).nonzero()[0]
        selected, outputs = selected[is_label], outputs[is_label]
        scores = members[selected, positions[is_label]]
        bounds = scores + RELATIVE_ERROR * np.abs(scores) + self.rough_scores.fixed_errors.numpy()[rows[selected]]
        return group_indices[selected], outputs, bounds

    def compute_logits(self, frames: Array, labels: Array) -> Array:
        """Compute the (P,) float32 scores of (P,) labels in (P,) rows."""
        rows, outputs = torch.from_numpy(frames), torch.from_numpy(labels)
        scores: Array = score_outputs(self.hidden, self.weight, self.bias, rows, outputs).numpy()
        return scores

    def compute_all_logits(self, frames: Array) -> Tensor:
        """Compute the (N, V - 1) float32 scores of all labels in (N,) rows."""
        return F.linear(self.hidden[torch.from_numpy(frames)], self.weight[:-1], self.bias[:-1])
