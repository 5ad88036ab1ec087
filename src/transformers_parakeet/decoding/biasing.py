"""Phrase boosting: an Aho-Corasick automaton over tokens that adds a bonus to phrases and their beginnings.

`phrases.py` converts texts to tokens. `fusion.py` adds the scores to those of the model. The rules are those of NeMo
(`context_graph_universal.py` and `boosting_graph_batched.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .automaton import BackoffAutomaton

# value after the last token of a phrase in a table of phrases
NO_TOKEN = -1


@dataclass(frozen=True)
class BoostedPhrase:
    """A phrase as tokens.

    Args:
        tokens: token ids, at least one.
        score: score of the first token, in place of `context_score`; `None` for `context_score`.
    """

    tokens: tuple[int, ...]
    score: float | None = None


@dataclass(frozen=True)
class PhraseTrie:
    """All beginnings of phrases as states. State 0 is the empty beginning, and state i + 1 is the target of arc i.

    S is the number of states. The states are ordered by depth, which is their number of tokens.

    Args:
        arc_keys: (S - 1,) parent state * number of labels + token of each arc, ascending.
        arc_scores: (S - 1,) float64 score of each arc.
        gains: (S,) float64 sum of the scores of the arcs from state 0 to each state.
        is_end: (S,) whether a phrase ends in each state.
        level_ends: number of states with a depth of at most 0, 1, 2, ...
        num_labels: number of labels.
    """

    arc_keys: Tensor
    arc_scores: Tensor
    gains: Tensor
    is_end: Tensor
    level_ends: tuple[int, ...]
    num_labels: int


def build_boosting_tree(
    phrases: Sequence[BoostedPhrase],
    num_labels: int,
    context_score: float = 1.0,
    depth_scaling: float = 2.0,
    unk_score: float = 0.0,
) -> BackoffAutomaton:
    """Build the automaton that boosts phrases.

    The first token of a phrase gets `context_score`. Token n > 1 gets `context_score * depth_scaling + ln(n)`. If
    several phrases begin with the same tokens, such a token gets the largest of their scores. A token that does not
    continue the phrase takes back the bonus of the phrase so far, except the bonus of the longest end of these tokens
    with which a phrase begins; matching continues from there. After a complete phrase no bonus is taken back.

    As in NeMo, the bonus of a complete phrase is taken back in two cases. If the phrase begins a longer phrase and the
    next tokens continue the longer phrase without completing it, the whole bonus is taken back. If the phrase ends
    with the beginning of another phrase that does not follow, the bonus of this beginning is taken back.

    Args:
        phrases: the phrases, at least one.
        num_labels: number of labels V, without the blank.
        context_score: score of the first token of a phrase, in nats; above 0.
        depth_scaling: factor of `context_score` for all further tokens; 0 or more.
        unk_score: score in nats of a token that neither begins nor continues a phrase.

    Returns:
        The automaton. Its scores of the end of a clip are 0.

    Raises:
        ValueError: there are no phrases, a phrase has no tokens or a token that is not a label, or a score is out of
            range.
    """
    _check_scores(phrases, context_score, depth_scaling, unk_score)
    scores = [context_score if phrase.score is None else phrase.score for phrase in phrases]
    first_scores = torch.tensor(scores, dtype=torch.float64)
    trie = _build_trie(_tabulate_tokens(phrases, num_labels), first_scores, depth_scaling, num_labels)
    return _to_automaton(trie, _find_fail_states(trie), unk_score)


def _check_scores(
    phrases: Sequence[BoostedPhrase], context_score: float, depth_scaling: float, unk_score: float
) -> None:
    """Check the settings of `build_boosting_tree`.

    Raises:
        ValueError: there are no phrases, or a score is out of range.
    """
    if not phrases:
        raise ValueError("there must be at least one phrase to boost, got none: pass phrases, or no boosting")
    for name, value, is_valid in (
        ("context_score", context_score, context_score > 0),
        ("depth_scaling", depth_scaling, depth_scaling >= 0),
        ("unk_score", unk_score, True),
    ):
        if not (math.isfinite(value) and is_valid):
            raise ValueError(
                f"`context_score` must be above 0, `depth_scaling` at least 0, and both and `unk_score` finite, got "
                f"{name}={value}: use for example context_score=1.0, depth_scaling=2.0, unk_score=0.0"
            )
    scores = [phrase.score for phrase in phrases if phrase.score is not None]
    invalid = [score for score in scores if not (math.isfinite(score) and score > 0)]
    if invalid:
        raise ValueError(
            f"the score of a phrase must be a finite number above 0, got {invalid[0]}: use for example 1.0"
        )


def _tabulate_tokens(phrases: Sequence[BoostedPhrase], num_labels: int) -> Tensor:
    """Return the (P, longest phrase) tokens of P phrases, with `NO_TOKEN` after the end of shorter phrases.

    Raises:
        ValueError: a phrase has no tokens, or a token is not a label.
    """
    lengths = torch.tensor([len(phrase.tokens) for phrase in phrases])
    if (lengths == 0).any():
        index = int((lengths == 0).nonzero()[0])
        raise ValueError(f"a phrase must have at least one token, got none in phrase {index}: remove it")
    flat_tokens = torch.tensor([token for phrase in phrases for token in phrase.tokens])
    if flat_tokens.min() < 0 or flat_tokens.max() >= num_labels:
        raise ValueError(
            f"the tokens of a phrase must be labels from 0 to {num_labels - 1}, got tokens from {flat_tokens.min()} to "
            f"{flat_tokens.max()}: use the tokenizer of the model, without special tokens"
        )
    tokens = torch.full((len(phrases), int(lengths.max())), NO_TOKEN)
    tokens[torch.arange(tokens.shape[1]) < lengths[:, None]] = flat_tokens
    return tokens


def _build_trie(tokens: Tensor, scores: Tensor, depth_scaling: float, num_labels: int) -> PhraseTrie:
    """Build the trie of the phrases, one depth at a time.

    Args:
        tokens: (P, longest phrase) tokens, with `NO_TOKEN` after the end of a phrase.
        scores: (P,) score of the first token of each phrase.
        depth_scaling: factor of the score for all further tokens.
        num_labels: number of labels.
    """
    # state of each phrase after its tokens so far
    states = torch.zeros(len(tokens), dtype=torch.int64)
    keys, arc_scores, gains, level_ends = [], [], [torch.zeros(1, dtype=torch.float64)], [1]
    for depth in range(1, tokens.shape[1] + 1):
        is_active = tokens[:, depth - 1] != NO_TOKEN
        level_keys, arcs = torch.unique(
            states[is_active] * num_labels + tokens[is_active, depth - 1], return_inverse=True
        )
        phrase_scores = scores[is_active] if depth == 1 else scores[is_active] * depth_scaling + math.log(depth)
        level_scores = torch.full((len(level_keys),), -math.inf, dtype=torch.float64)
        level_scores.scatter_reduce_(0, arcs, phrase_scores, "amax")
        # all parents have the depth before, whose first state is the number of states with a smaller depth
        first_parent = level_ends[-2] if depth > 1 else 0
        gains.append(gains[-1][level_keys // num_labels - first_parent] + level_scores)
        keys.append(level_keys)
        arc_scores.append(level_scores)
        states[is_active] = level_ends[-1] + arcs
        level_ends.append(level_ends[-1] + len(level_keys))
    is_end = torch.zeros(level_ends[-1], dtype=torch.bool)
    is_end[states] = True
    return PhraseTrie(torch.cat(keys), torch.cat(arc_scores), torch.cat(gains), is_end, tuple(level_ends), num_labels)


def _find_fail_states(trie: PhraseTrie) -> Tensor:
    """Find the fail state of each state: the longest proper end of its tokens with which a phrase begins.

    The fail state of a target is the target of the same token in the fail state of the parent, or in the fail state of
    that state, and so on (Aho and Corasick 1975, algorithm 3).

    Returns:
        (S,) int64 states; 0 for state 0 and for the states of depth 1.
    """
    fail_states = torch.zeros(len(trie.gains), dtype=torch.int64)
    for first_state, end_state in zip(trie.level_ends[1:], trie.level_ends[2:], strict=False):
        keys = trie.arc_keys[first_state - 1 : end_state - 1]
        tokens = keys % trie.num_labels
        candidates = fail_states[keys // trie.num_labels]
        # indices of the states of this depth that have no fail state yet
        pending = torch.arange(len(keys))
        while len(pending):
            candidate_keys = candidates[pending] * trie.num_labels + tokens[pending]
            arcs = torch.searchsorted(trie.arc_keys, candidate_keys).clamp(max=len(trie.arc_keys) - 1)
            has_arc = trie.arc_keys[arcs] == candidate_keys
            fail_states[first_state + pending[has_arc]] = arcs[has_arc] + 1
            # a state whose last candidate was the root keeps the root
            pending = pending[~has_arc & (candidates[pending] != 0)]
            candidates[pending] = fail_states[candidates[pending]]
    return fail_states


def _to_automaton(trie: PhraseTrie, fail_states: Tensor, unk_score: float) -> BackoffAutomaton:
    """Convert a trie and its fail states to an automaton, whose states are those of the trie.

    Args:
        trie: the trie.
        fail_states: (S,) fail state of each state.
        unk_score: score of a token that neither begins nor continues a phrase.
    """
    num_labels, num_states = trie.num_labels, len(trie.gains)
    # the first arcs start in the root, whose scores the automaton stores as a table
    num_root_arcs = trie.level_ends[1] - 1
    root_tokens, arc_keys = trie.arc_keys[:num_root_arcs], trie.arc_keys[num_root_arcs:]
    root_scores = torch.full((1, num_labels), unk_score)
    root_scores[0, root_tokens] = trie.arc_scores[:num_root_arcs].float()
    root_targets = torch.zeros(1, num_labels, dtype=torch.int64)
    root_targets[0, root_tokens] = torch.arange(1, num_root_arcs + 1)
    return BackoffAutomaton(
        start_states=torch.zeros(1, dtype=torch.int64),
        roots=torch.zeros(1, dtype=torch.int64),
        root_scores=root_scores,
        root_targets=root_targets,
        backoff_states=fail_states,
        backoff_scores=torch.where(trie.is_end, 0.0, trie.gains[fail_states] - trie.gains).float(),
        end_scores=torch.zeros(num_states),
        arc_offsets=torch.searchsorted(arc_keys, torch.arange(num_states + 1) * num_labels),
        arc_keys=arc_keys,
        arc_scores=trie.arc_scores[num_root_arcs:].float(),
        arc_targets=torch.arange(num_root_arcs + 1, num_states),
        max_backoffs=_count_backoffs(fail_states),
    )


def _count_backoffs(fail_states: Tensor) -> int:
    """Return the largest number of fail states from a state to state 0."""
    states, num_backoffs = fail_states, 1
    while states.any():
        states, num_backoffs = fail_states[states], num_backoffs + 1
    return num_backoffs
