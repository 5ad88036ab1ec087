"""Shallow fusion: the scores of language models and phrase boosting, added to the scores of the model.

The scorers are built in `ngram.py` and `biasing.py`. The searches that use them are in `label_looping.py`, `beam.py`
and `ctc_beam.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TokenScorer(Protocol):
    """Scores the next token after the tokens so far. The tokens so far are an integer, the state of a clip.

    `BackoffAutomaton` is a token scorer. A scorer keeps nothing between calls, so threads can share it.
    """

    @property
    def num_labels(self) -> int:
        """Number of labels V, without the blank."""

    def to(self, device: torch.device | str) -> TokenScorer:
        """Return the scorer with all tensors on a device."""

    def start(self, num_clips: int) -> Tensor:
        """Return the (B,) int64 states before the first token of B clips."""

    def score(self, states: Tensor) -> Tensor:
        """Return the (N, V) float32 scores of all tokens after each of (N,) states."""

    def step(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (N,) scores of (N,) tokens after (N,) states, and the (N,) next states."""

    def score_end(self, states: Tensor) -> Tensor:
        """Return the (N,) scores of the end of the clip after (N,) states."""


@dataclass(frozen=True)
class Fusion:
    """Several token scorers with weights.

    The state of a clip is a row of a tensor (N, number of scorers), so a search selects and repeats states as rows.

    Args:
        scorers: at least one scorer; all have the same number of labels.
        weights: weight of each scorer.
    """

    scorers: tuple[TokenScorer, ...]
    weights: tuple[float, ...]

    @property
    def total_weight(self) -> float:
        """Sum of the weights."""
        return sum(self.weights)

    def to(self, device: torch.device | str) -> Fusion:
        """Return the fusion with all tensors on a device.

        Args:
            device: the device.
        """
        return Fusion(tuple(scorer.to(device) for scorer in self.scorers), self.weights)

    def start(self, num_clips: int) -> Tensor:
        """Return the states before the first token.

        Args:
            num_clips: number of clips B.

        Returns:
            (B, number of scorers) int64 states.
        """
        return torch.stack([scorer.start(num_clips) for scorer in self.scorers], dim=1)

    def score(self, states: Tensor) -> Tensor:
        """Return the weighted sum of the scores of all tokens.

        Args:
            states: (N, number of scorers) states.

        Returns:
            (N, V) float32 scores.
        """
        scores = [
            scorer.score(states[:, index]) * weight
            for index, (scorer, weight) in enumerate(zip(self.scorers, self.weights, strict=True))
        ]
        return torch.stack(scores).sum(0) if len(scores) > 1 else scores[0]

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states after one more token.

        Args:
            states: (N, number of scorers) states.
            tokens: (N,) one token per state.

        Returns:
            (N, number of scorers) next states.
        """
        next_states = [scorer.step(states[:, index], tokens)[1] for index, scorer in enumerate(self.scorers)]
        return torch.stack(next_states, dim=1)

    def score_end(self, states: Tensor) -> Tensor:
        """Return the weighted sum of the scores of the end of the clip.

        Args:
            states: (N, number of scorers) states.

        Returns:
            (N,) float32 scores.
        """
        scores = [
            scorer.score_end(states[:, index]) * weight
            for index, (scorer, weight) in enumerate(zip(self.scorers, self.weights, strict=True))
        ]
        return torch.stack(scores).sum(0)
