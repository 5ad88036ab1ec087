"""Inputs of the searches from the arguments of users: the fusion of token scorers, and the allowed tokens.

The searches are in `greedy.py`, `label_looping.py`, `beam.py` and `ctc_beam.py`, the fusion in `fusion.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .automaton import BackoffAutomaton, stack_automata
from .fusion import Fusion, TokenScorer
from .options import Joint


def build_fusion(
    language_model: TokenScorer | None,
    lm_weight: float,
    boosting: TokenScorer | Sequence[TokenScorer | None] | None,
    boosting_weight: float,
    blank_id: int,
    vocab_size: int,
) -> Fusion | None:
    """Combine a language model and phrase boosting.

    Args:
        language_model: scores the next token; `None` for no language model.
        lm_weight: weight of the scores of the language model; 0 for no language model.
        boosting: boosting tree of all clips, or a list with one tree per clip, in which `None` stands for no boosting
            of a clip; `None` for no boosting.
        boosting_weight: weight of the scores of the boosting tree; 0 for no boosting.
        blank_id: id of the blank of the model.
        vocab_size: number of tokens of the model, with the blank.

    Returns:
        The fusion; `None` if there is no language model and no boosting.

    Raises:
        ValueError: a weight is not a finite number, the blank is not the last token, or a scorer has another number of
            labels than the model.
        TypeError: an object is not a scorer, such as the path of a language model.
    """
    for name, weight in (("lm_weight", lm_weight), ("boosting_weight", boosting_weight)):
        if not math.isfinite(weight):
            raise ValueError(f"`{name}` must be a finite number, got {weight}: pass for example 0.3")
    unused_state = -1
    if boosting is not None and isinstance(boosting, Sequence):
        boosting, unused_state = combine_boosting(boosting, vocab_size - 1)
    entries = [(language_model, lm_weight, -1), (boosting, boosting_weight, unused_state)]
    used = [(scorer, float(weight), state) for scorer, weight, state in entries if scorer is not None and weight != 0]
    if not used:
        return None
    scorers, weights, unused_states = zip(*used, strict=True)
    for scorer in scorers:
        if not hasattr(scorer, "num_labels"):
            raise TypeError(
                "a language model or a boosting tree must be an object that scores tokens, got "
                f"{type(scorer).__name__}: build it with `processor.load_language_model` or `processor.boosting_tree`"
            )
    fusion = Fusion(scorers, weights, None if set(unused_states) == {-1} else unused_states)
    fusion.check_vocabulary(blank_id, vocab_size)
    return fusion


def combine_boosting(trees: Sequence[TokenScorer | None], num_labels: int) -> tuple[BackoffAutomaton | None, int]:
    """Combine the boosting trees of the clips of a batch.

    Args:
        trees: the boosting tree of each clip; `None` for a clip without boosting.
        num_labels: number of labels V of the model.

    Returns:
        A tree with one start state per clip, `None` if no clip has boosting; and the state of the clips without
        boosting, -1 if all clips have boosting.

    Raises:
        ValueError: the trees have different numbers of labels.
        TypeError: an entry is neither a `BackoffAutomaton` nor `None`.
    """
    used_trees = []
    for tree in trees:
        if tree is not None and not isinstance(tree, BackoffAutomaton):
            raise TypeError(
                f"each entry of a list of boosting trees must be a tree or `None`, got {type(tree).__name__}: build "
                "trees with `processor.boosting_tree`"
            )
        if tree is not None:
            used_trees.append(tree)
    if not used_trees:
        return None, -1
    # the trees may be on a GPU; all clips without boosting share one object and thus one state
    empty_tree = build_empty_automaton(num_labels).to(used_trees[0].start_states.device)
    remaining_trees = iter(used_trees)
    automaton = stack_automata([empty_tree if tree is None else next(remaining_trees) for tree in trees])
    starts = zip(trees, automaton.start_states.tolist(), strict=True)
    return automaton, next((state for tree, state in starts if tree is None), -1)


def build_empty_automaton(num_labels: int) -> BackoffAutomaton:
    """Build an automaton whose scores are all 0.

    Args:
        num_labels: number of labels V.
    """
    no_arcs, one_state = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return BackoffAutomaton(
        start_states=one_state,
        roots=one_state,
        root_scores=torch.zeros(1, num_labels),
        root_targets=torch.zeros(1, num_labels, dtype=torch.int64),
        backoff_states=one_state,
        backoff_scores=torch.zeros(1),
        end_scores=torch.zeros(1),
        score_bounds=torch.zeros(1),
        arc_offsets=torch.zeros(2, dtype=torch.int64),
        arc_keys=no_arcs,
        arc_scores=torch.zeros(0),
        arc_targets=no_arcs,
        max_backoffs=0,
    )


def prepare_allowed_tokens(allowed_tokens: Tensor, blank_id: int, vocab_size: int) -> Tensor:
    """Check a mask of allowed tokens, and allow the blank.

    Args:
        allowed_tokens: (V,) bool, whether a token is allowed; V is the number of tokens with the blank.
        blank_id: id of the blank, which is always allowed.
        vocab_size: number of tokens V of the model.

    Returns:
        (V,) bool, a copy in which the blank is allowed.

    Raises:
        TypeError: the mask is not a bool tensor.
        ValueError: the mask has another shape, or allows no label.
    """
    if not isinstance(allowed_tokens, Tensor) or allowed_tokens.dtype != torch.bool:
        kind = allowed_tokens.dtype if isinstance(allowed_tokens, Tensor) else type(allowed_tokens).__name__
        raise TypeError(
            f"`allowed_tokens` must be a tensor of type bool, got {kind}: pass one truth value per token of the model"
        )
    if allowed_tokens.shape != (vocab_size,):
        raise ValueError(
            f"`allowed_tokens` must have one truth value per token of the model, with the blank, {(vocab_size,)}, got "
            f"the shape {tuple(allowed_tokens.shape)}: build it for the tokenizer of the model"
        )
    allowed = allowed_tokens.clone()
    allowed[blank_id] = False
    if not allowed.any():
        raise ValueError(
            "`allowed_tokens` must allow at least one label, got a mask that allows none: set the entries to True of "
            "the labels that the result may contain"
        )
    allowed[blank_id] = True
    return allowed


def mask_logits(logits: Tensor, allowed_tokens: Tensor, blank_id: int) -> Tensor:
    """Set the scores of a CTC head for tokens that are not allowed to -inf, so that no search can emit them.

    Args:
        logits: (..., V) scores of V tokens.
        allowed_tokens: (V,) bool, whether a token is allowed; the blank is always allowed.
        blank_id: id of the blank.

    Returns:
        The scores, in a new tensor.

    Raises:
        TypeError: the mask is not a bool tensor.
        ValueError: the mask has another shape, or allows no label.
    """
    return fill_masked(logits, prepare_allowed_tokens(allowed_tokens, blank_id, logits.shape[-1]))


def fill_masked(logits: Tensor, is_allowed: Tensor) -> Tensor:
    """Set the scores of tokens that are not allowed to -inf.

    Args:
        logits: (..., V) scores of V tokens, or (..., V + D) scores of V tokens and D durations, which do not change.
        is_allowed: (V,) bool, whether a token is allowed; True for the blank.

    Returns:
        The scores, in a new tensor.
    """
    # the outputs after the first V are durations
    num_durations = logits.shape[-1] - len(is_allowed)
    mask = F.pad(is_allowed.to(logits.device), (0, num_durations), value=True)
    return logits.masked_fill(~mask, -torch.inf)


def mask_joint(joint: Joint, allowed_tokens: Tensor, blank_id: int, vocab_size: int) -> Joint:
    """Wrap a joint network so that tokens that are not allowed have the score -inf.

    A search with this joint network must not use the shortcut `find_best_tokens`, which does not call the joint
    network.

    Args:
        joint: joint network: (encoder states, predictor states) -> scores of tokens and durations.
        allowed_tokens: (V,) bool, whether a token is allowed; the blank is always allowed.
        blank_id: id of the blank.
        vocab_size: number of tokens V with the blank; the outputs after the first V are durations.

    Returns:
        The joint network with the mask, which applies to all clips of a batch.

    Raises:
        TypeError: the mask is not a bool tensor.
        ValueError: the mask has another shape, or allows no label.
    """
    is_allowed = prepare_allowed_tokens(allowed_tokens, blank_id, vocab_size)

    def masked_joint(encoder_states: Tensor, predictor_states: Tensor) -> Tensor:
        """Compute the scores, with -inf for tokens that are not allowed."""
        logits = joint(encoder_states, predictor_states)
        return fill_masked(logits, is_allowed)

    return masked_joint
