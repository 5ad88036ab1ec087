"""Phrase boosting: an Aho-Corasick automaton over tokens that adds scores to phrases and their prefixes.

`phrases.py` converts texts to tokens. `fusion.py` adds the scores to those of the model. The rules are those of NeMo
(`context_graph_universal.py` and `boosting_graph_batched.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .automaton import BackoffAutomaton, compute_score_bounds


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
    """All prefixes of phrases as states. State 0 is the empty prefix, the root. State i + 1 is the target of arc i.

    S is the number of states. The states are ordered by depth, which is the number of tokens of the prefix.

    Args:
        arc_keys: (S - 1,) parent state * number of labels + token of each arc, ascending.
        arc_scores: (S - 1,) float64 score of each arc.
        gains: (S,) float64 sum of the scores of the arcs from the root to each state.
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

    The first token of a phrase gets `context_score`, and token n > 1 gets `context_score * depth_scaling + ln(n)`. If
    phrases with different scores have the same first tokens, these tokens get the larger score.

    A token that does not continue a phrase subtracts the scores of the phrase so far, so an incomplete phrase has no
    effect on the total. If a suffix of the tokens so far is a prefix of a phrase, the longest such suffix keeps its
    scores, and the search for phrases continues from there. Nothing is subtracted after the last token of a phrase.

    As in NeMo, the scores of a complete phrase can be subtracted later in two cases. If the phrase is a prefix of a
    longer phrase, they are subtracted when further tokens of the longer phrase follow, but not all. If a suffix of the
    phrase is a prefix of another phrase that does not follow, the scores of this prefix are subtracted.

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
    _check_phrases(phrases, num_labels)
    _check_scores(context_score, depth_scaling, unk_score)
    scores = [context_score if phrase.score is None else phrase.score for phrase in phrases]
    first_scores = torch.tensor(scores, dtype=torch.float64)
    trie = _build_trie([phrase.tokens for phrase in phrases], first_scores, depth_scaling, num_labels)
    return _to_automaton(trie, _find_fail_states(trie), unk_score)


def _check_phrases(phrases: Sequence[BoostedPhrase], num_labels: int) -> None:
    """Check the phrases.

    Raises:
        ValueError: there are no phrases, a phrase has no tokens or a token that is not a label, or its score is not a
            finite number above 0.
    """
    if not phrases:
        raise ValueError("there must be at least one phrase to boost, got none: pass phrases, or no boosting")
    for index, phrase in enumerate(phrases):
        if not phrase.tokens:
            raise ValueError(f"a phrase must have at least one token, got none in phrase {index}: remove it")
        if min(phrase.tokens) < 0 or max(phrase.tokens) >= num_labels:
            raise ValueError(
                f"the tokens of a phrase must be labels from 0 to {num_labels - 1}, got {phrase.tokens}: use the "
                "tokenizer of the model, without special tokens"
            )
        if phrase.score is not None and not (math.isfinite(phrase.score) and phrase.score > 0):
            raise ValueError(
                f"the score of a phrase must be a finite number above 0, got {phrase.score} in phrase {index}: use for "
                "example 1.0"
            )


def _check_scores(context_score: float, depth_scaling: float, unk_score: float) -> None:
    """Check the settings of `build_boosting_tree`.

    Raises:
        ValueError: a setting is out of range.
    """
    if not (math.isfinite(context_score) and context_score > 0):
        raise ValueError(f"`context_score` must be a finite number above 0, got {context_score}: use for example 1.0")
    if not (math.isfinite(depth_scaling) and depth_scaling >= 0):
        raise ValueError(f"`depth_scaling` must be a finite number of at least 0, got {depth_scaling}: use 2.0")
    if not math.isfinite(unk_score):
        raise ValueError(f"`unk_score` must be a finite number, got {unk_score}: use 0.0")


def _build_trie(
    token_lists: Sequence[Sequence[int]], first_scores: Tensor, depth_scaling: float, num_labels: int
) -> PhraseTrie:
    """Build the trie of P phrases, one depth at a time.

    Args:
        token_lists: tokens of each phrase.
        first_scores: (P,) float64 score of the first token of each phrase.
        depth_scaling: factor of the score for all further tokens.
        num_labels: number of labels.
    """
    lengths = torch.tensor([len(tokens) for tokens in token_lists])
    all_tokens = torch.tensor([token for tokens in token_lists for token in tokens])
    starts = lengths.cumsum(0) - lengths
    # state of each phrase after its tokens so far
    states = torch.zeros_like(lengths)
    keys, arc_scores, gains, level_ends = [], [], [torch.zeros(1, dtype=torch.float64)], [1]
    for depth in range(1, int(lengths.max()) + 1):
        phrases = (lengths >= depth).nonzero()[:, 0]
        tokens = all_tokens[starts[phrases] + depth - 1]
        level_keys, arcs = torch.unique(states[phrases] * num_labels + tokens, return_inverse=True)
        phrase_scores = first_scores[phrases]
        if depth > 1:
            phrase_scores = phrase_scores * depth_scaling + math.log(depth)
        level_scores = torch.full((len(level_keys),), -math.inf, dtype=torch.float64)
        level_scores.scatter_reduce_(0, arcs, phrase_scores, "amax")
        # the parents are the states of the depth before, whose first state is `level_ends[-2]`
        parents = level_keys // num_labels - (level_ends[-2] if depth > 1 else 0)
        gains.append(gains[-1][parents] + level_scores)
        keys.append(level_keys)
        arc_scores.append(level_scores)
        states[phrases] = level_ends[-1] + arcs
        level_ends.append(level_ends[-1] + len(level_keys))
    is_end = torch.zeros(level_ends[-1], dtype=torch.bool)
    is_end[states] = True
    return PhraseTrie(torch.cat(keys), torch.cat(arc_scores), torch.cat(gains), is_end, tuple(level_ends), num_labels)


def _find_fail_states(trie: PhraseTrie) -> Tensor:
    """Find the fail state of each state: the longest proper suffix of its tokens that is a prefix of a phrase.

    The fail state of a target is the target of the same token in the fail state of the parent, or in the fail state of
    that state, and so on (Aho and Corasick 1975, algorithm 3).

    Returns:
        (S,) int64 states; the root for itself and for the states of depth 1.
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
    roots, max_backoffs = torch.zeros(1, dtype=torch.int64), _count_backoffs(fail_states)
    backoffs = fail_states, torch.where(trie.is_end, 0.0, trie.gains[fail_states] - trie.gains).float()
    arcs = (
        torch.searchsorted(arc_keys, torch.arange(num_states + 1) * num_labels),
        trie.arc_scores[num_root_arcs:].float(),
    )
    return BackoffAutomaton(
        start_states=torch.zeros(1, dtype=torch.int64),
        roots=roots,
        root_scores=root_scores,
        root_targets=root_targets,
        backoff_states=backoffs[0],
        backoff_scores=backoffs[1],
        end_scores=torch.zeros(num_states),
        score_bounds=compute_score_bounds(roots, root_scores, *backoffs, *arcs, max_backoffs),
        arc_offsets=arcs[0],
        arc_keys=arc_keys,
        arc_scores=arcs[1],
        arc_targets=torch.arange(num_root_arcs + 1, num_states),
        max_backoffs=max_backoffs,
    )


def _count_backoffs(fail_states: Tensor) -> int:
    """Return the largest number of fail states from a state to the root."""
    states, num_backoffs = fail_states, 1
    while states.any():
        states, num_backoffs = fail_states[states], num_backoffs + 1
    return num_backoffs
