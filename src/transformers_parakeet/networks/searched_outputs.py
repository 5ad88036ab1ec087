"""The outputs of a large linear layer on some rows: rough scores of all outputs, and float32 scores on request.

`int8_search.py` computes the rough scores. Decoding with a language model or phrase boosting reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Array = NDArray[Any]

# number of labels per clip that are scored first, because the best label is often among them
NUM_GOOD_LABELS = 4


@dataclass(frozen=True)
class RoughScores:
    """Scores of all outputs of a linear layer in R rows, with a bound of their errors.

    Args:
        scores: (R, num_groups, GROUP_SIZE) scores: output g * GROUP_SIZE + i is member i of group g.
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
    is_found = scores[group_rows, groups] >= thresholds.index_select(0, group_rows)[:, None]
    selected, members = is_found.nonzero(as_tuple=True)
    outputs = torch.add(members, groups.index_select(0, selected), alpha=scores.shape[2])
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
    """Where the last output of a linear layer, the blank, is the largest in R rows, and rough scores of all outputs.

    Args:
        layer: (V, J) float32 weight and (V,) float32 bias of the layer.
        hidden: (R, J) float32 inputs of the layer.
        is_blank: (R,) whether the blank is the largest output.
        rough_scores: the rough scores of all outputs; -inf for the blank.
    """

    layer: tuple[Tensor, Tensor]
    hidden: Tensor
    is_blank: Array
    rough_scores: RoughScores

    @property
    def tokens(self) -> Array:
        """(R,) the blank where it is the largest output, and label 0 in all other rows."""
        return np.where(self.is_blank, len(self.layer[1]) - 1, 0)

    def select(self, rows: Sequence[int]) -> SelectedOutputs:
        """Select N rows in which the blank is not the largest output.

        Args:
            rows: the rows, ascending.
        """
        return SelectedOutputs(((self, np.array(rows)),))


@dataclass(frozen=True)
class SelectedOutputs:
    """Rough scores of the labels in N rows, one row per clip. It implements `LabelScores` of `decoding`.

    Args:
        parts: searched outputs of the same layer, and the rows of each.
    """

    parts: tuple[tuple[SearchedOutputs, Array], ...]

    @cached_property
    def hidden(self) -> Tensor:
        """(N, J) inputs of the layer."""
        return torch.cat([outputs.hidden.index_select(0, torch.from_numpy(rows)) for outputs, rows in self.parts])

    @cached_property
    def group_maxima(self) -> Array:
        """(N, num_groups) largest rough score of each group."""
        return self._join(lambda outputs, rows: outputs.rough_scores.group_maxima.numpy()[rows])

    @cached_property
    def errors(self) -> Array:
        """(N,) error bounds of the rough scores."""
        return self._join(lambda outputs, rows: outputs.rough_scores.errors.numpy()[rows])

    def join(self, others: Sequence[SelectedOutputs]) -> SelectedOutputs:
        """Append the clips of other selections of the same layer.

        Args:
            others: the other selections.
        """
        return SelectedOutputs(sum((other.parts for other in others), self.parts))

    def list_good(self) -> tuple[Array, Array, Array]:
        """List a few labels of each clip with large rough scores, and their float32 scores, see `LabelScores`."""
        group_maxima = self.group_maxima
        num_clips, num_groups = group_maxima.shape
        # the group of the blank may have no label, so at least one group is left out
        num_good = max(1, min(NUM_GOOD_LABELS, num_groups - 1))
        groups = group_maxima.argpartition(-num_good, axis=1)[:, -num_good:].ravel()
        clips = np.arange(num_clips).repeat(num_good)
        members = self._gather_groups(clips, groups)
        labels = groups * members.shape[1] + members.argmax(1)
        return clips, labels, self.compute_logits(clips, labels)

    def list_above(self, thresholds: Array) -> tuple[Array, Array, Array]:
        """List all labels whose rough score is at least a threshold, see `LabelScores`.

        Args:
            thresholds: (N,) thresholds.
        """
        # first the groups with labels above the threshold, then the labels
        group_clips, groups = (self.group_maxima >= thresholds[:, None]).nonzero()
        members = self._gather_groups(group_clips, groups)
        selected, positions = (members >= thresholds[group_clips, None]).nonzero()
        outputs = groups[selected] * members.shape[1] + positions
        return group_clips[selected], outputs, members[selected, positions]

    def compute_logits(self, clips: Array, labels: Array) -> Array:
        """Compute the (P,) float32 scores of (P,) labels of (P,) clips.

        Args:
            clips: (P,) clips, ascending.
            labels: (P,) labels.
        """
        layer, rows, outputs = self.parts[0][0].layer, torch.from_numpy(clips), torch.from_numpy(labels)
        scores: Array = score_outputs(self.hidden, *layer, rows, outputs).numpy()
        return scores

    def compute_all_logits(self) -> Tensor:
        """Compute the (N, V - 1) float32 scores of all labels."""
        weight, bias = self.parts[0][0].layer
        return F.linear(self.hidden, weight[:-1], bias[:-1])

    def _join(self, get_values: Callable[[SearchedOutputs, Array], Array]) -> Array:
        """Join values of the rows of all parts, which a function returns for each part."""
        values = [get_values(outputs, rows) for outputs, rows in self.parts]
        return values[0] if len(values) == 1 else np.concatenate(values)

    def _gather_groups(self, clips: Array, groups: Array) -> Array:
        """Return the (P, GROUP_SIZE) rough scores of (P,) groups of (P,) clips, ascending."""
        ends = clips.searchsorted(np.cumsum([0] + [len(rows) for _, rows in self.parts]))
        members, first_clip = [], 0
        for (outputs, rows), start, end in zip(self.parts, ends[:-1], ends[1:], strict=True):
            part_rows = rows[clips[start:end] - first_clip]
            members.append(outputs.rough_scores.scores.numpy()[part_rows, groups[start:end]])
            first_clip += len(rows)
        return members[0] if len(members) == 1 else np.concatenate(members)
