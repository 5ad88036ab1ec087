"""The candidates of one step of a transducer beam search: the best tokens and durations of every hypothesis.

The search that selects among the candidates of all hypotheses is in `beam.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .fusion import Fusion
from .options import BeamOptions, TransducerOptions

# largest probability of the blank in the logarithm of the probability of a label, as in NeMo
MAX_BLANK_PROBABILITY = 0.99

# Tokens per group. With the maximum of each group, selecting 4 of 8193 tokens for 64 hypotheses takes 0.2 ms instead of
# 2.1 ms with `topk` over all tokens (one thread of an Intel Xeon).
GROUP_SIZE = 64


@dataclass(frozen=True)
class Candidates:
    """C possible next steps of each of R hypotheses.

    Args:
        scores: (R, C) log-probability of each step with its duration, and the scores of the fusion; -inf if a
            hypothesis has fewer steps.
        tokens: (R, C) label or blank.
        durations: (R, C) duration in frames, at least 1 for a blank.
    """

    scores: Tensor
    tokens: Tensor
    durations: Tensor


def compute_candidates(
    logits: Tensor,
    must_be_blank: Tensor,
    fusion: Fusion | None,
    fusion_states: Tensor | None,
    options: TransducerOptions,
    beam: BeamOptions,
) -> Candidates:
    """Compute the best next steps of every hypothesis.

    Args:
        logits: (R, V + D) scores of the joint network for R hypotheses; (R, V) for RNN-T.
        must_be_blank: (R,) whether the only step is a blank, because the hypothesis has the maximum number of labels
            on its frame.
        fusion: language models and phrase boosting; `None` for no fusion.
        fusion_states: (R, number of scorers) states of the fusion; `None` without fusion.
        options: settings of the transducer.
        beam: settings of the search; `num_beams` is the maximum number of candidates.
    """
    token_logits = logits[:, : options.vocab_size]
    if fusion is None or fusion_states is None:
        log_normalisers = token_logits.logsumexp(-1, keepdim=True)
        scores, tokens = select_best_tokens(token_logits, beam.num_beams)
        scores, blank_scores = scores - log_normalisers, token_logits[:, options.blank_id] - log_normalisers[:, 0]
    else:
        total_weights = fusion.sum_weights(fusion_states, token_logits.dtype)
        scores, tokens, blank_scores = score_tokens_with_fusion(
            token_logits, fusion.score(fusion_states), total_weights, options.blank_id, beam
        )
    # a forced blank replaces the first candidate, and the others are removed
    scores = scores.masked_fill(must_be_blank[:, None], -torch.inf)
    scores[:, 0] = torch.where(must_be_blank, blank_scores, scores[:, 0])
    tokens = tokens.masked_fill(must_be_blank[:, None], options.blank_id)
    if options.durations is None:
        # RNN-T: a label has duration 0 and a blank has duration 1
        return Candidates(scores, tokens, (tokens == options.blank_id).long())
    duration_scores = logits[:, options.vocab_size :].log_softmax(-1)
    return add_durations(scores, tokens, duration_scores, must_be_blank, options, beam.num_beams)


def score_tokens_with_fusion(
    token_logits: Tensor, fusion_scores: Tensor, total_weights: Tensor, blank_id: int, beam: BeamOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the best tokens of every hypothesis, with the scores of language models and phrase boosting.

    Args:
        token_logits: (R, V) scores of the joint network.
        fusion_scores: (R, V - 1) weighted scores of the labels.
        total_weights: (R,) sum of the weights of the scorers that the clip of each hypothesis uses.
        blank_id: id of the blank, V - 1.
        beam: settings of the search.

    Returns:
        (R, C) scores, (R, C) token ids, and the (R,) score of a forced blank.
    """
    log_probabilities = token_logits - token_logits.logsumexp(-1, keepdim=True)
    blank_scores = log_probabilities[:, blank_id, None]
    # the blank has no score of the fusion
    fusion_scores = nn.functional.pad(fusion_scores, (0, 1))
    if beam.blank_score_mode == "no_score":
        total_weights = torch.zeros_like(total_weights)
    if beam.pruning_mode == "late":
        # (1, V)
        is_blank = (torch.arange(blank_id + 1, device=token_logits.device) == blank_id)[None]
        scores = add_fusion_scores(log_probabilities, fusion_scores, blank_scores, is_blank, total_weights[:, None])
        return *select_best_tokens(scores, beam.num_beams), scores[:, blank_id]
    scores, tokens = select_best_tokens(log_probabilities, beam.num_beams)
    fusion_scores = fusion_scores.gather(1, tokens)
    scores = add_fusion_scores(scores, fusion_scores, blank_scores, tokens == blank_id, total_weights[:, None])
    # with early pruning NeMo does not scale the log-probability of a forced blank
    return scores, tokens, blank_scores[:, 0]


def select_best_tokens(scores: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Select the tokens with the highest scores.

    Args:
        scores: (R, V) scores.
        num_tokens: number of tokens to select; all tokens if there are fewer.

    Returns:
        (R, C) scores and (R, C) token ids, best first.
    """
    vocab_size = scores.shape[1]
    num_tokens, num_groups = min(num_tokens, vocab_size), vocab_size // GROUP_SIZE
    if num_groups <= num_tokens:
        values, tokens = scores.topk(num_tokens, dim=-1)
        return values, tokens
    # the best tokens are in the groups with the highest maxima, or among the last tokens, which fill no group
    # transposed, because the scores of `small_batch_linear` are column-major in memory
    maxima = scores.t()[: num_groups * GROUP_SIZE].unflatten(0, (num_groups, GROUP_SIZE)).amax(1)
    groups = maxima.t().topk(num_tokens, dim=-1).indices
    members = torch.arange(GROUP_SIZE, device=scores.device)
    tokens = (groups[:, :, None] * GROUP_SIZE + members).flatten(1)
    last_tokens = torch.arange(num_groups * GROUP_SIZE, vocab_size, device=scores.device)
    tokens = torch.cat([tokens, last_tokens.expand(len(scores), -1)], dim=1)
    values, positions = scores.gather(1, tokens).topk(num_tokens, dim=-1)
    return values, tokens.gather(1, positions)


def add_fusion_scores(
    scores: Tensor, fusion_scores: Tensor, blank_scores: Tensor, is_blank: Tensor, total_weights: Tensor
) -> Tensor:
    """Add the scores of the fusion to the scores of the model.

    The log-probability of "blank" or "no blank" is multiplied by 1 + `total_weights`, so a label and a blank are scaled
    alike. Source: NeMo, `blank_lm_score_mode` of the batched beam searches.

    Args:
        scores: (R, C) log-probabilities of C tokens of each of R hypotheses.
        fusion_scores: (R, C) weighted scores of the fusion.
        blank_scores: (R, 1) log-probability of the blank.
        is_blank: (R, C) or (1, C) which tokens are the blank.
        total_weights: (R, 1) sum of the weights of the scorers; 0 leaves the log-probabilities of the model unchanged.
    """
    no_blank_scores = torch.log1p(-blank_scores.exp().clamp(max=MAX_BLANK_PROBABILITY))
    label_scores = scores + fusion_scores + total_weights * no_blank_scores
    return torch.where(is_blank, scores * (1 + total_weights), label_scores)


def add_durations(
    scores: Tensor,
    tokens: Tensor,
    duration_scores: Tensor,
    must_be_blank: Tensor,
    options: TransducerOptions,
    num_candidates: int,
) -> Candidates:
    """Select the best pairs of a token and a duration of a TDT model.

    Args:
        scores: (R, C) scores of C tokens.
        tokens: (R, C) token ids.
        duration_scores: (R, D) log-probabilities of the durations.
        must_be_blank: (R,) whether the only step is a blank with the best duration.
        options: settings of the transducer.
        num_candidates: maximum number of pairs to select.
    """
    num_durations = duration_scores.shape[1]
    pair_scores = (scores[:, :, None] + duration_scores[:, None, :]).flatten(1)
    pair_scores, pairs = pair_scores.topk(min(num_candidates, pair_scores.shape[1]), dim=-1)
    # a forced blank has one candidate; the others are blanks with a worse duration
    pair_scores[:, 1:] = pair_scores[:, 1:].masked_fill(must_be_blank[:, None], -torch.inf)
    tokens = tokens.gather(1, pairs // num_durations)
    durations = torch.tensor(options.durations, device=pairs.device)[pairs % num_durations]
    # a blank always advances, even if its predicted duration is 0
    return Candidates(pair_scores, tokens, torch.where(tokens == options.blank_id, durations.clamp(min=1), durations))
