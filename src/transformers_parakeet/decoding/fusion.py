"""Shallow fusion: the scores of language models and phrase boosting, added to the scores of the model.

The scorers are built in `ngram.py` and `biasing.py`. `search_inputs.py` builds a fusion from the arguments of users.
The searches that use it are in `greedy.py`, `label_looping.py`, `beam.py` and `ctc_beam.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


class TokenScorer(Protocol):
    """Scores the next token after the tokens so far. The tokens so far are an integer, the state of a clip.

    `BackoffAutomaton` is a token scorer. A scorer keeps nothing between calls, so threads can share it.
    """

    @property
    def num_labels(self) -> int:
        """Number of labels V, without the blank."""

    def to(self, device: torch.device | str) -> TokenScorer:
        """Return the scorer with all tensors on a device.

        Args:
            device: the device.
        """

    def start(self, num_clips: int) -> Tensor:
        """Return the (B,) int64 states before the first token.

        Args:
            num_clips: number of clips B.
        """

    def score(self, states: Tensor) -> Tensor:
        """Return the (N, V) float32 scores of all tokens in every state, as a new tensor that the caller may change.

        Args:
            states: (N,) states.
        """

    def step(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (N,) float32 scores of one token in every state, and the (N,) next states.

        Args:
            states: (N,) states.
            tokens: (N,) one token per state, from 0 to V - 1.
        """

    def bound_scores(self, states: Tensor) -> Tensor:
        """Return (N,) float32 upper bounds: no token has a larger score in the state.

        Args:
            states: (N,) states.
        """

    def score_end(self, states: Tensor) -> Tensor:
        """Return the (N,) float32 scores of the end of the clip in every state.

        Args:
            states: (N,) states.
        """


@dataclass(frozen=True)
class Fusion:
    """Several token scorers with weights.

    The state of a clip is a row of a tensor (N, number of scorers), so a search selects and repeats states as rows.

    Args:
        scorers: at least one scorer; all have the same number of labels.
        weights: weight of each scorer.
        unused_states: for each scorer, the state of clips that do not use the scorer, or -1; `None` if all clips use
            all scorers. The score of every token is 0 in this state.
    """

    scorers: tuple[TokenScorer, ...]
    weights: tuple[float, ...]
    unused_states: tuple[int, ...] | None = None

    def sum_weights(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum the weights of the scorers that the clip of each state uses.

        Args:
            states: (N, number of scorers) states.
            dtype: type of the result.

        Returns:
            (N,) sums.
        """
        weights = torch.tensor(self.weights, dtype=dtype, device=states.device)
        if self.unused_states is None:
            return weights.sum().expand(len(states))
        return (weights * (states != states.new_tensor(self.unused_states))).sum(1)

    def check_vocabulary(self, blank_id: int, vocab_size: int) -> None:
        """Check that the scorers and the model have the same labels.

        Args:
            blank_id: id of the blank of the model.
            vocab_size: number of tokens of the model, with the blank.

        Raises:
            ValueError: the blank is not the last token, or a scorer has another number of labels.
        """
        if blank_id != vocab_size - 1:
            raise ValueError(
                "language models and phrase boosting need a model whose blank is the last token, got a model with the "
                f"blank {blank_id} and {vocab_size} tokens: decode this model without them"
            )
        for scorer in self.scorers:
            if scorer.num_labels != vocab_size - 1:
                raise ValueError(
                    "a language model or a boosting tree must have the labels of the model, got "
                    f"{scorer.num_labels} labels for a model with {vocab_size - 1}: build it with the tokenizer of the "
                    "model"
                )

    def to(self, device: torch.device | str) -> Fusion:
        """Return the fusion with all tensors on a device.

        Args:
            device: the device.
        """
        return replace(self, scorers=tuple(scorer.to(device) for scorer in self.scorers))

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
        columns = split_states(states)
        scores = [
            scorer.score(column).mul_(weight)
            for scorer, weight, column in zip(self.scorers, self.weights, columns, strict=True)
        ]
        return torch.stack(scores).sum(0) if len(scores) > 1 else scores[0]

    def score_labels(self, states: Array, labels: Array) -> tuple[Array, Array]:
        """Return the weighted sum of the scores of one label in every state on the CPU, and the states after it.

        Args:
            states: (N, number of scorers) states.
            labels: (N,) one label per state.

        Returns:
            (N,) float32 scores, and the (N, number of scorers) next states.
        """
        tokens, next_states = torch.from_numpy(labels), np.empty_like(states)
        sums: Array | None = None
        for index, (scorer, weight) in enumerate(zip(self.scorers, self.weights, strict=True)):
            scores, next_column = scorer.step(torch.from_numpy(states[:, index].copy()), tokens)
            weighted = scores.numpy() * weight
            sums = weighted if sums is None else sums + weighted
            next_states[:, index] = next_column.numpy()
        # a fusion has at least one scorer
        assert sums is not None
        return sums, next_states

    def bound_scores(self, states: Array) -> Array:
        """Return an upper bound of the weighted sum of the scores of a label on the CPU, if no weight is negative.

        Args:
            states: (N, number of scorers) states.

        Returns:
            (N,) float32 bounds.
        """
        bounds = [
            scorer.bound_scores(torch.from_numpy(states[:, index].copy())).numpy() * weight
            for index, (scorer, weight) in enumerate(zip(self.scorers, self.weights, strict=True))
        ]
        return sum(bounds[1:], bounds[0])

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states after one more token.

        Args:
            states: (N, number of scorers) states.
            tokens: (N,) one token per state.

        Returns:
            (N, number of scorers) next states.
        """
        columns = split_states(states)
        next_states = [scorer.step(column, tokens)[1] for scorer, column in zip(self.scorers, columns, strict=True)]
        return torch.stack(next_states, dim=1)

    def choose_labels(self, states: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the label with the largest sum of logit and weighted scores in every state.

        Args:
            states: (N, number of scorers) states.
            logits: (N, V) logits of the labels, without the blank.

        Returns:
            (N,) labels, and the (N, number of scorers) states after these labels.
        """
        # `max` is faster than `argmax` on a CPU
        labels = (logits + self.score(states)).max(-1).indices
        return labels, self.advance(states, labels)

    def score_end(self, states: Tensor) -> Tensor:
        """Return the weighted sum of the scores of the end of the clip.

        Args:
            states: (N, number of scorers) states.

        Returns:
            (N,) float32 scores.
        """
        columns = split_states(states)
        scores = [
            scorer.score_end(column) * weight
            for scorer, weight, column in zip(self.scorers, self.weights, columns, strict=True)
        ]
        return torch.stack(scores).sum(0)


def split_states(states: Tensor) -> tuple[Tensor, ...]:
    """Split the states of a fusion into the states of its scorers.

    Args:
        states: (N, number of scorers) states.

    Returns:
        One contiguous (N,) tensor per scorer.
    """
    return states.t().contiguous().unbind()
