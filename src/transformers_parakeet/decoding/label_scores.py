"""The scores of the labels on the frames of new labels, of which most need not be computed.

`label_choice.py` chooses a label with them. The class for rough scores is in the sub-package `networks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


class LabelScores(Protocol):
    """The scores of the labels of N clips on one frame each, of which most need not be exact.

    The labels 0 to V - 1 are those without the blank. A list of P labels consists of the (P,) clips, ascending, the
    (P,) labels and (P,) values.
    """

    @property
    def errors(self) -> Array:
        """(N,) upper bound of the absolute difference between a rough score and the logit, for each clip."""

    def join(self, others: Sequence[Any]) -> LabelScores:
        """Append the clips of other scores of the same class.

        Args:
            others: the other scores.
        """

    def list_good(self) -> tuple[Array, Array, Array]:
        """List at least one label with a large logit of each clip, and the logits."""

    def list_above(self, thresholds: Array) -> tuple[Array, Array, Array]:
        """List all labels whose rough score is at least the threshold, and their rough scores.

        Args:
            thresholds: (N,) threshold of each clip; no label of a clip is listed if it is NaN.
        """

    def compute_logits(self, clips: Array, labels: Array) -> Array:
        """Compute the (P,) logits of (P,) labels of (P,) clips.

        Args:
            clips: (P,) clips, ascending.
            labels: (P,) labels.
        """

    def compute_all_logits(self) -> Tensor:
        """Compute the (N, V) logits of all labels."""


class SearchedTokens(Protocol):
    """Whether the blank is the best token on R frames, from a search that does not compute all scores."""

    @property
    def tokens(self) -> Array:
        """(R,) the blank on each frame where it has the largest logit, and any label on all other frames."""

    def select(self, rows: Sequence[int]) -> LabelScores:
        """Select the scores of N frames, each a new label of a clip.

        Args:
            rows: the frames, ascending.
        """


class KnownLogits:
    """Label scores that are known for all labels.

    Args:
        logits: (N, V) logits of the labels, on the CPU.
        best_labels: (N,) the label with the largest logit of each clip.
    """

    def __init__(self, logits: Tensor, best_labels: Sequence[int]) -> None:
        self.logits, self.best_labels = logits, np.array(best_labels)
        # NumPy has no bfloat16
        is_16_bit = logits.dtype.itemsize == 2
        self.array: Array = (logits.float() if is_16_bit else logits).detach().numpy()
        self.errors: Array = np.zeros(len(self.array), self.array.dtype)

    def join(self, others: Sequence[KnownLogits]) -> KnownLogits:
        """Append the clips of other scores.

        Args:
            others: the other scores.
        """
        parts = [self, *others]
        return KnownLogits(torch.cat([part.logits for part in parts]), [i for part in parts for i in part.best_labels])

    def list_good(self) -> tuple[Array, Array, Array]:
        """List the best label of each clip, see `LabelScores`."""
        clips = np.arange(len(self.array))
        return clips, self.best_labels, self.array[clips, self.best_labels]

    def list_above(self, thresholds: Array) -> tuple[Array, Array, Array]:
        """List all labels whose logit is at least the threshold, see `LabelScores`.

        Args:
            thresholds: (N,) threshold of each clip.
        """
        is_above = self.array >= thresholds[:, None]
        clips, labels = np.divmod(is_above.ravel().nonzero()[0], is_above.shape[1])
        return clips, labels, self.array[clips, labels]

    def compute_logits(self, clips: Array, labels: Array) -> Array:
        """Return the logits of (P,) labels of (P,) clips.

        Args:
            clips: (P,) clips, ascending.
            labels: (P,) labels.
        """
        logits: Array = self.array[clips, labels]
        return logits

    def compute_all_logits(self) -> Tensor:
        """Return the logits of all labels."""
        return self.logits
