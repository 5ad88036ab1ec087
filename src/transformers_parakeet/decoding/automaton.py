"""A weighted automaton with back-off: the common form of n-gram models and of phrase boosting.

A state stands for the last tokens that matter. An arc is a token that a state knows, with a score and the next state. A
state without an arc for a token backs off to a shorter state, until the root, which knows every token. `ngram.py` and
`biasing.py` build automata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# bound of the relative error of a sum of a few float32 numbers, each of which has a relative error of 2^-24
SUM_ERROR = 2.0**-20


@dataclass(frozen=True)
class BackoffAutomaton:
    """A weighted automaton over the labels 0 to V - 1, held as arrays. It has no state of its own, so threads share it.

    S is the number of states, A the number of arcs, and R the number of roots: 1, or more after `stack_automata`. The
    states of one root are consecutive and start with the root. Roots have no arcs: their scores are in `root_scores`.

    Args:
        start_states: (1,) state before the first token; (B,) if each of B clips has its own.
        roots: (R,) the roots, ascending.
        root_scores: (R, V) score of each token in a root.
        root_targets: (R, V) next state of each token in a root.
        backoff_states: (S,) the next shorter state; a root backs off to itself.
        backoff_scores: (S,) score that is added when a state backs off; 0 for a root.
        end_scores: (S,) score of the end of the clip after a state.
        score_bounds: (S,) upper bound of the scores of all tokens in a state, from `compute_score_bounds`.
        arc_offsets: (S + 1,) the arcs of state s are those from `arc_offsets[s]` to `arc_offsets[s + 1] - 1`.
        arc_keys: (A,) state * V + token of each arc, ascending.
        arc_scores: (A,) score of each arc.
        arc_targets: (A,) next state of each arc.
        max_backoffs: largest number of times that a state backs off before it is a root.
    """

    start_states: Tensor
    roots: Tensor
    root_scores: Tensor
    root_targets: Tensor
    backoff_states: Tensor
    backoff_scores: Tensor
    end_scores: Tensor
    score_bounds: Tensor
    arc_offsets: Tensor
    arc_keys: Tensor
    arc_scores: Tensor
    arc_targets: Tensor
    max_backoffs: int

    @property
    def num_labels(self) -> int:
        """Number of labels V, without the blank."""
        return self.root_scores.shape[1]

    def to(self, device: torch.device | str) -> BackoffAutomaton:
        """Return the automaton with all tensors on a device.

        Args:
            device: the device.
        """
        tensors: dict[str, Any] = {
            field.name: getattr(self, field.name).to(device) for field in fields(self) if field.name != "max_backoffs"
        }
        return replace(self, **tensors)

    def start(self, num_clips: int) -> Tensor:
        """Return the states before the first token.

        Args:
            num_clips: number of clips B.

        Returns:
            (B,) int64 states.

        Raises:
            ValueError: the automaton has the start states of another number of clips.
        """
        num_starts = len(self.start_states)
        if num_starts not in (1, num_clips):
            raise ValueError(
                f"there must be one automaton for all clips, or one per clip; got {num_starts} automata for "
                f"{num_clips} clips: pass one per clip of the batch"
            )
        return self.start_states.expand(num_clips).clone()

    def score(self, states: Tensor) -> Tensor:
        """Score every token in every state.

        Args:
            states: (N,) states.

        Returns:
            (N, V) float32 scores.
        """
        chains, chain_scores = self._back_off(states)
        if len(self.roots) == 1:
            scores = self.root_scores + chain_scores[-1][:, None]
        else:
            scores = self.root_scores[self._index_roots(states)] + chain_scores[-1][:, None]
        if self.max_backoffs and len(self.arc_keys):
            # the arcs of longer states replace the scores of shorter states
            self._write_arc_scores(scores, chains[-2::-1], chain_scores[-2::-1])
        return scores

    def step(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Score one token in every state, and return the next states.

        Args:
            states: (N,) states.
            tokens: (N,) one token per state, from 0 to V - 1.

        Returns:
            (N,) float32 scores and (N,) int64 next states.
        """
        if states.device.type == "cpu":
            return self._step_on_cpu(states, tokens)
        return self._step_plainly(states, tokens)

    def bound_scores(self, states: Tensor) -> Tensor:
        """Return an upper bound of the scores of all tokens in every state.

        Args:
            states: (N,) states.

        Returns:
            (N,) float32 bounds.
        """
        return self.score_bounds[states]

    def score_end(self, states: Tensor) -> Tensor:
        """Score the end of the clip.

        Args:
            states: (N,) states.

        Returns:
            (N,) float32 scores.
        """
        return self.end_scores[states]

    def _step_plainly(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `step` with operations of PyTorch, on any device."""
        root_indices = self._index_roots(states)
        chains, chain_scores = self._back_off(states)
        scores = self.root_scores[root_indices, tokens] + chain_scores[-1]
        targets = self.root_targets[root_indices, tokens].long()
        if not self.max_backoffs or not len(self.arc_keys):
            return scores, targets
        # (max_backoffs, N) key of the arc of every state before the root
        keys = torch.stack(chains[:-1]) * self.num_labels + tokens
        arcs = torch.searchsorted(self.arc_keys, keys).clamp_(max=len(self.arc_keys) - 1)
        has_arc = self.arc_keys[arcs] == keys
        # the longest state with an arc, because `max` returns the first of equal values
        has_any_arc, level = has_arc.byte().max(0, keepdim=True)
        arcs = arcs.gather(0, level)[0]
        arc_scores = torch.stack(chain_scores[:-1]).gather(0, level)[0] + self.arc_scores[arcs]
        is_arc = has_any_arc[0].bool()
        return torch.where(is_arc, arc_scores, scores), torch.where(is_arc, self.arc_targets[arcs].long(), targets)

    def _step_on_cpu(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `step` with NumPy, whose operations take less time than those of PyTorch for few states."""
        token_array, all_keys = tokens.numpy(), self.arc_keys.numpy()
        backoff_states, backoff_scores = self.backoff_states.numpy(), self.backoff_scores.numpy()
        # (max_backoffs + 1, N) states and sums of back-off scores for 0, 1, ... back-offs
        chains = np.empty((self.max_backoffs + 1, len(token_array)), np.int64)
        chain_scores = np.zeros(chains.shape, np.float32)
        chains[0] = states.numpy()
        for level in range(self.max_backoffs):
            chain_scores[level + 1] = chain_scores[level] + backoff_scores.take(chains[level])
            chains[level + 1] = backoff_states.take(chains[level])
        root_indices = 0 if len(self.roots) == 1 else self._index_roots(states).numpy()
        scores = self.root_scores.numpy()[root_indices, token_array] + chain_scores[-1]
        targets = self.root_targets.numpy()[root_indices, token_array].astype(np.int64)
        if len(all_keys):
            keys = chains[:-1] * self.num_labels + token_array
            arcs = all_keys.searchsorted(keys)
            levels, rows = (all_keys.take(arcs, mode="clip") == keys).nonzero()
            # the arcs of longer states come first, and the last value that is written to a row remains
            levels, rows = levels[::-1], rows[::-1]
            arcs = arcs[levels, rows]
            scores[rows] = chain_scores[levels, rows] + self.arc_scores.numpy()[arcs]
            targets[rows] = self.arc_targets.numpy()[arcs]
        return torch.from_numpy(scores), torch.from_numpy(targets)

    def _index_roots(self, states: Tensor) -> Tensor:
        """Return the (N,) index in `roots` of the root of each of (N,) states."""
        if len(self.roots) == 1:
            return torch.zeros_like(states)
        return torch.searchsorted(self.roots, states, right=True) - 1

    def _back_off(self, states: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Follow the back-off states to the roots.

        Args:
            states: (N,) states.

        Returns:
            For 0 to `max_backoffs` back-offs, the (N,) states, and the (N,) sums of the back-off scores.
        """
        chains = [states]
        chain_scores = [torch.zeros_like(states, dtype=torch.float32)]
        for _ in range(self.max_backoffs):
            chain_scores.append(chain_scores[-1] + self.backoff_scores[chains[-1]])
            chains.append(self.backoff_states[chains[-1]].long())
        return chains, chain_scores

    def _write_arc_scores(self, scores: Tensor, chains: list[Tensor], chain_scores: list[Tensor]) -> None:
        """Write the scores of the arcs of several states per row to a table of scores.

        All arcs are collected in one pass and then written state by state, because a later state replaces the scores of
        an earlier one.

        Args:
            scores: (N, V) scores, changed in place.
            chains: (N,) one state per row of the table, for each of K back-offs.
            chain_scores: (N,) score that is added to all arcs of a state, for each of K back-offs.
        """
        states = torch.cat(chains)
        num_rows = len(scores)
        first_arcs = self.arc_offsets[states].long()
        num_arcs = self.arc_offsets[states + 1].long() - first_arcs
        last_arcs = num_arcs.cumsum(0)
        # indices 0 0 0 2 2 for 3, 0 and 2 arcs
        indices = torch.repeat_interleave(num_arcs)
        arcs = torch.arange(len(indices), device=states.device) + (first_arcs - last_arcs + num_arcs)[indices]
        # an arc key is state * V + token; the position in the table is row * V + token
        rows = torch.arange(num_rows, device=states.device).repeat(len(chains))
        positions = self.arc_keys[arcs] + ((rows - states) * self.num_labels)[indices]
        values = self.arc_scores[arcs] + torch.cat(chain_scores)[indices]
        flat_scores = scores.view(-1)
        sizes = num_arcs.view(len(chains), num_rows).sum(1).tolist()
        for level_positions, level_values in zip(positions.split(sizes), values.split(sizes), strict=True):
            flat_scores.scatter_(0, level_positions, level_values)


def compute_score_bounds(
    roots: Tensor,
    root_scores: Tensor,
    backoff_states: Tensor,
    backoff_scores: Tensor,
    arc_offsets: Tensor,
    arc_scores: Tensor,
    max_backoffs: int,
) -> Tensor:
    """Compute an upper bound of the scores of all tokens in every state of an automaton.

    Args:
        roots: see `BackoffAutomaton`; all tensors are on the CPU.
        root_scores: see `BackoffAutomaton`.
        backoff_states: see `BackoffAutomaton`.
        backoff_scores: see `BackoffAutomaton`.
        arc_offsets: see `BackoffAutomaton`.
        arc_scores: see `BackoffAutomaton`.
        max_backoffs: see `BackoffAutomaton`.

    Returns:
        (S,) float32 bounds. The rounding of the scores that the automaton computes does not exceed them.
    """
    offsets, chains = arc_offsets.numpy(), backoff_states.numpy()
    # largest score of an arc of each state
    largest = np.full(len(chains), -np.inf)
    with_arcs = np.flatnonzero(np.diff(offsets))
    if len(with_arcs):
        largest[with_arcs] = np.maximum.reduceat(arc_scores.numpy(), offsets[with_arcs])
    largest[roots.numpy()] = root_scores.numpy().max(1)
    bounds = largest
    for _ in range(max_backoffs):
        bounds = np.maximum(largest, backoff_scores.numpy() + bounds[chains])
    magnitude = max(float(scores.abs().max()) for scores in (root_scores, backoff_scores, arc_scores) if len(scores))
    return torch.from_numpy(bounds + (max_backoffs + 1) * SUM_ERROR * magnitude).float()


def stack_automata(automata: Sequence[BackoffAutomaton]) -> BackoffAutomaton:
    """Combine automata to one that starts each clip in its own automaton.

    Args:
        automata: one automaton per clip; the same object may stand for several clips. All must have the same number of
            labels.

    Returns:
        An automaton with one start state per clip.

    Raises:
        ValueError: the automata have different numbers of labels.
    """
    unique = list({id(automaton): automaton for automaton in automata}.values())
    num_labels = unique[0].num_labels
    if any(automaton.num_labels != num_labels for automaton in unique):
        sizes = sorted({automaton.num_labels for automaton in unique})
        raise ValueError(f"all automata must have the same number of labels, got {sizes}: build them for one tokenizer")
    first_states, first_arcs = [0], [0]
    for automaton in unique:
        first_states.append(first_states[-1] + len(automaton.backoff_states))
        first_arcs.append(first_arcs[-1] + len(automaton.arc_keys))
    offset_of = {id(automaton): offset for automaton, offset in zip(unique, first_states, strict=False)}
    shifts = list(zip(unique, first_states, strict=False))
    return BackoffAutomaton(
        start_states=torch.cat([automaton.start_states + offset_of[id(automaton)] for automaton in automata]),
        roots=torch.cat([automaton.roots + shift for automaton, shift in shifts]),
        root_scores=torch.cat([automaton.root_scores for automaton in unique]),
        root_targets=torch.cat([automaton.root_targets + shift for automaton, shift in shifts]),
        backoff_states=torch.cat([automaton.backoff_states + shift for automaton, shift in shifts]),
        backoff_scores=torch.cat([automaton.backoff_scores for automaton in unique]),
        end_scores=torch.cat([automaton.end_scores for automaton in unique]),
        score_bounds=torch.cat([automaton.score_bounds for automaton in unique]),
        arc_offsets=torch.cat(
            [automaton.arc_offsets[:-1] + shift for automaton, shift in zip(unique, first_arcs, strict=False)]
            + [unique[-1].arc_offsets[-1:] + first_arcs[-2]]
        ),
        arc_keys=torch.cat([automaton.arc_keys + shift * num_labels for automaton, shift in shifts]),
        arc_scores=torch.cat([automaton.arc_scores for automaton in unique]),
        arc_targets=torch.cat([automaton.arc_targets + shift for automaton, shift in shifts]),
        max_backoffs=max(automaton.max_backoffs for automaton in unique),
    )
