"""One frame of CTC prefix beam search: extend the hypotheses of all clips, merge equal ones, and prune them.

The loop over the frames and the result are in `ctc_beam.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .fusion import Fusion
from .options import BeamOptions

# odd multiplier of the hash of the labels, 2^64 divided by the golden ratio, as a signed 64-bit integer
HASH_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)


@dataclass(frozen=True)
class PrefixBeam:
    """The hypotheses of all clips after a frame, K per clip.

    A hypothesis is a sequence of labels together with the token of the last frame, which is the last label or the
    blank. Hypotheses with the same labels have the same hash. Two different sequences have the same 64-bit hash with a
    probability of about 2^-64, so the search does not compare the labels themselves. A hypothesis with the score -inf
    does not exist.

    Args:
        scores: (B, K) scores of the hypotheses, without the log-probability of the best token of each frame.
        path_scores: (B, K) scores of the best alignment of each hypothesis.
        last_tokens: (B, K) token of the last frame, a label or the blank.
        label_hashes: (B, K) int64 hash of the labels.
        fusion_states: (B, K, number of scorers) fusion states after the labels; `None` without fusion.
    """

    scores: Tensor
    path_scores: Tensor
    last_tokens: Tensor
    label_hashes: Tensor
    fusion_states: Tensor | None


@dataclass(frozen=True)
class PrefixCandidates:
    """Hypotheses after one more frame: each is a hypothesis of the beam and the token of the frame.

    Args:
        scores: (B, C) scores.
        path_scores: (B, C) scores of the best alignment.
        tokens: (B, C) token of the frame.
        sources: (B, C) index in the beam of the hypothesis that the token follows.
        path_sources: (B, C) index in the beam of the hypothesis that the token follows in the best alignment.
    """

    scores: Tensor
    path_scores: Tensor
    tokens: Tensor
    sources: Tensor
    path_sources: Tensor

    def select(self, indices: Tensor) -> PrefixCandidates:
        """Return the candidates at some indices.

        Args:
            indices: (B, K) indices of candidates.
        """
        return PrefixCandidates(
            scores=self.scores.gather(1, indices),
            path_scores=self.path_scores.gather(1, indices),
            tokens=self.tokens.gather(1, indices),
            sources=self.sources.gather(1, indices),
            path_sources=self.path_sources.gather(1, indices),
        )


def start_beam(
    num_clips: int, num_beams: int, blank_id: int, fusion: Fusion | None, device: torch.device
) -> PrefixBeam:
    """Return the beam before the first frame: one hypothesis without labels per clip.

    Args:
        num_clips: number of clips B.
        num_beams: number of hypotheses K of each clip.
        blank_id: id of the blank.
        fusion: language models and phrase boosting.
        device: device of the tensors.
    """
    scores = torch.full((num_clips, num_beams), -torch.inf, device=device)
    scores[:, 0] = 0.0
    last_tokens = torch.full((num_clips, num_beams), blank_id, device=device)
    fusion_states = None if fusion is None else fusion.start(num_clips)[:, None].repeat(1, num_beams, 1)
    return PrefixBeam(scores, scores.clone(), last_tokens, torch.zeros_like(last_tokens), fusion_states)


def extend_beam(
    state: PrefixBeam, frame_scores: Tensor, blank_id: int, beam: BeamOptions, fusion: Fusion | None
) -> PrefixCandidates:
    """Extend the hypotheses by one frame, merge them and prune them.

    Only the K + 1 best labels of each hypothesis are candidates for a new label, which loses nothing: one of them can
    be the repeated last label, so at least K remain. Each of the K leads to another label sequence, also after a merge,
    and scores at least as much as any label that is left out.

    Args:
        state: K hypotheses of each clip.
        frame_scores: (B, V) scores of the tokens of the frame.
        blank_id: id of the blank.
        beam: settings of the search.
        fusion: language models and phrase boosting.

    Returns:
        (B, K) candidates, best first.
    """
    num_beams = state.scores.shape[1]
    label_scores = score_new_labels(state, frame_scores, blank_id, beam.label_bonus, fusion)
    new_labels = select_labels(label_scores, num_beams)
    label_scores = label_scores.expand(-1, num_beams, -1)
    same_labels, one_label_more = compare_hypotheses(state, blank_id, beam.sum_alignments)
    blanks = add_blank(state, frame_scores[:, blank_id], blank_id, same_labels)
    repeats = add_repeat(state, frame_scores, label_scores, blank_id, one_label_more)
    extensions = add_new_labels(state, label_scores, new_labels, blank_id, same_labels)
    if beam.sum_alignments:
        extensions = remove_existing(state, extensions, blank_id)
    return prune_candidates(join_candidates([blanks, repeats, extensions]), num_beams, beam.score_threshold)


def score_new_labels(
    state: PrefixBeam, frame_scores: Tensor, blank_id: int, label_bonus: float, fusion: Fusion | None
) -> Tensor:
    """Score each token as a new label of each hypothesis.

    Args:
        state: K hypotheses of each clip.
        frame_scores: (B, V) scores of the tokens of the frame.
        blank_id: id of the blank, which gets the score -inf.
        label_bonus: score that is added for each label.
        fusion: language models and phrase boosting.

    Returns:
        (B, K, V) scores; (B, 1, V) without fusion, because all hypotheses of a clip have the same.
    """
    label_scores = frame_scores[:, None] + label_bonus
    label_scores[..., blank_id] = -torch.inf
    if fusion is None or state.fusion_states is None:
        return label_scores
    label_scores = label_scores.repeat(1, state.scores.shape[1], 1)
    # the blank is the last token
    label_scores[..., :-1] += fusion.score(state.fusion_states.flatten(0, 1)).unflatten(0, state.scores.shape)
    return label_scores


def select_labels(label_scores: Tensor, num_beams: int) -> Tensor:
    """Select the K + 1 best labels of each hypothesis, or all tokens if there are fewer.

    Args:
        label_scores: (B, K, V) scores, or (B, 1, V) if all hypotheses of a clip have the same.
        num_beams: number K of hypotheses of each clip.

    Returns:
        (B, K, K + 1) labels.
    """
    labels = label_scores.topk(min(num_beams + 1, label_scores.shape[-1])).indices
    if num_beams == 1:
        # one beam equals greedy decoding: `argmax` selects the first of several equal labels, `topk` any of them
        first_best = label_scores.max(-1).indices
        is_missing = (labels != first_best[..., None]).all(-1)
        labels[..., -1] = torch.where(is_missing, first_best, labels[..., -1])
    return labels.expand(-1, num_beams, -1)


def compare_hypotheses(state: PrefixBeam, blank_id: int, sum_alignments: bool) -> tuple[Tensor, Tensor]:
    """Compare the labels of each pair of hypotheses of a clip.

    Args:
        state: K hypotheses of each clip.
        blank_id: id of the blank.
        sum_alignments: `False` to treat all hypotheses as different.

    Returns:
        (B, K, K) whether hypotheses i and j have the same labels.
        (B, K, K) whether hypothesis j ends in a label, and a new label after hypothesis i gives the labels of j.
    """
    num_beams = state.scores.shape[1]
    same_labels = torch.eye(num_beams, dtype=torch.bool, device=state.scores.device).expand(len(state.scores), -1, -1)
    if not sum_alignments:
        return same_labels, torch.zeros_like(same_labels)
    hashes, last_tokens = state.label_hashes, state.last_tokens
    same_labels = hashes[:, :, None] == hashes[:, None]
    longer_hashes = hash_next_label(hashes[:, :, None], last_tokens[:, None])
    is_new_label = last_tokens[:, :, None] != last_tokens[:, None]
    one_label_more = (longer_hashes == hashes[:, None]) & is_new_label & ends_in_label(state, blank_id)[:, None]
    return same_labels, one_label_more


def ends_in_label(state: PrefixBeam, blank_id: int) -> Tensor:
    """Check which hypotheses exist and have a label as the token of the last frame.

    Args:
        state: K hypotheses of each clip.
        blank_id: id of the blank.

    Returns:
        (B, K) bool.
    """
    return (state.last_tokens != blank_id) & (state.scores > -torch.inf)


def hash_next_label(label_hashes: Tensor, labels: Tensor) -> Tensor:
    """Return the hash of a sequence of labels with one more label.

    Args:
        label_hashes: int64 hash of each sequence; 0 for no labels.
        labels: the next label of each sequence.
    """
    # the product wraps at 64 bits; the shift brings its high bits into the low bits of the next product
    product = (label_hashes + labels + 1) * HASH_MULTIPLIER
    return product ^ (product >> 32)


def merge_hypotheses(state: PrefixBeam, step_scores: Tensor, is_source: Tensor) -> PrefixCandidates:
    """Merge hypotheses that become equal by the next token.

    Args:
        state: K hypotheses of each clip.
        step_scores: (B, K, K) score of the token that turns hypothesis i into merged hypothesis j.
        is_source: (B, K, K) whether hypothesis i becomes merged hypothesis j.

    Returns:
        (B, K) merged hypotheses with the log of the summed probabilities; `tokens` are those of the state.
    """
    scores = torch.where(is_source, state.scores[:, :, None] + step_scores, -torch.inf)
    path_scores = torch.where(is_source, state.path_scores[:, :, None] + step_scores, -torch.inf)
    best_path_scores, path_sources = path_scores.max(1)
    sources = torch.arange(scores.shape[1], device=scores.device).expand_as(path_sources)
    return PrefixCandidates(scores.logsumexp(1), best_path_scores, state.last_tokens, sources, path_sources)


def remove_second(scores: Tensor, is_equal: Tensor) -> Tensor:
    """Set the score of each hypothesis that equals an earlier hypothesis of its clip to -inf.

    Args:
        scores: (B, K) scores.
        is_equal: (B, K, K) whether two hypotheses are equal.
    """
    return scores.masked_fill(is_equal.triu(diagonal=1).any(1), -torch.inf)


def add_blank(state: PrefixBeam, blank_scores: Tensor, blank_id: int, same_labels: Tensor) -> PrefixCandidates:
    """Extend each hypothesis by a blank, and merge the two endings of the same labels.

    Args:
        state: K hypotheses of each clip.
        blank_scores: (B,) score of the blank on the frame.
        blank_id: id of the blank.
        same_labels: (B, K, K) whether two hypotheses have the same labels and are merged.

    Returns:
        (B, K) candidates.
    """
    merged = merge_hypotheses(state, blank_scores[:, None, None], same_labels)
    return replace(
        merged,
        scores=remove_second(merged.scores, same_labels),
        tokens=torch.full_like(merged.tokens, blank_id),
    )


def add_repeat(
    state: PrefixBeam, frame_scores: Tensor, label_scores: Tensor, blank_id: int, one_label_more: Tensor
) -> PrefixCandidates:
    """Repeat the last label of each hypothesis, and merge with shorter hypotheses that emit this label.

    Args:
        state: K hypotheses of each clip.
        frame_scores: (B, V) scores of the tokens of the frame.
        label_scores: (B, K, V) score of each token as a new label.
        blank_id: id of the blank.
        one_label_more: (B, K, K) whether a new label after hypothesis i gives hypothesis j and is merged.

    Returns:
        (B, K) candidates.
    """
    num_beams = state.scores.shape[1]
    is_same = torch.eye(num_beams, dtype=torch.bool, device=frame_scores.device)
    repeat_scores = frame_scores.gather(1, state.last_tokens)[:, None]
    # (B, K, K) score of the last label of hypothesis j as a new label of hypothesis i
    new_scores = label_scores.gather(2, state.last_tokens[:, None].expand(-1, num_beams, -1))
    step_scores = torch.where(is_same, repeat_scores, new_scores)
    is_source = (is_same & ends_in_label(state, blank_id)[:, None]) | one_label_more
    return merge_hypotheses(state, step_scores, is_source)


def add_new_labels(
    state: PrefixBeam, label_scores: Tensor, new_labels: Tensor, blank_id: int, same_labels: Tensor
) -> PrefixCandidates:
    """Extend each hypothesis by new labels, and merge the extensions of the two endings of the same labels.

    Where both endings exist, the hypothesis that ends in a blank gets the candidates of both. Its extension by the
    last label comes from the blank only, because this label after itself is a repeat.

    Args:
        state: K hypotheses of each clip.
        label_scores: (B, K, V) score of each token as a new label.
        new_labels: (B, K, L) the L labels to try.
        blank_id: id of the blank.
        same_labels: (B, K, K) whether two hypotheses have the same labels and are merged.

    Returns:
        (B, K * L) candidates.
    """
    is_label = ends_in_label(state, blank_id)
    is_blank = (state.scores > -torch.inf) & ~is_label
    merged = merge_hypotheses(state, torch.zeros_like(state.scores)[:, None], same_labels)
    # (B, K) last label of the ending of the same labels that is a label; -1 if there is none
    last_labels = torch.where(same_labels & is_label[:, :, None], state.last_tokens[:, :, None], -1).amax(1)
    is_last_label = new_labels == last_labels[..., None]
    is_extended = is_blank | (is_label & ~(same_labels & is_blank[:, :, None]).any(1))
    is_possible = is_extended[..., None] & ~(is_last_label & is_label[..., None])
    step_scores = label_scores.gather(2, new_labels).masked_fill(~is_possible, -torch.inf)
    sources = merged.sources[..., None].expand_as(new_labels)

    def add(scores: Tensor, merged_scores: Tensor) -> Tensor:
        """Add the scores of the new labels to (B, K) scores of the hypotheses alone and merged."""
        return (torch.where(is_last_label, scores[..., None], merged_scores[..., None]) + step_scores).flatten(1)

    return PrefixCandidates(
        scores=add(state.scores, merged.scores),
        path_scores=add(state.path_scores, merged.path_scores),
        tokens=new_labels.flatten(1),
        sources=sources.flatten(1),
        path_sources=torch.where(is_last_label, sources, merged.path_sources[..., None]).flatten(1),
    )


def remove_existing(state: PrefixBeam, candidates: PrefixCandidates, blank_id: int) -> PrefixCandidates:
    """Remove the new labels that give the labels of another hypothesis of the beam, which `add_repeat` covers.

    Args:
        state: K hypotheses of each clip.
        candidates: (B, C) candidates with a new label.
        blank_id: id of the blank.

    Returns:
        The candidates; those that are removed have the score -inf.
    """
    hashes = hash_next_label(state.label_hashes.gather(1, candidates.sources), candidates.tokens)
    is_equal = (hashes[:, :, None] == state.label_hashes[:, None]) & ends_in_label(state, blank_id)[:, None]
    return replace(candidates, scores=candidates.scores.masked_fill(is_equal.any(-1), -torch.inf))


def join_candidates(groups: Sequence[PrefixCandidates]) -> PrefixCandidates:
    """Join groups of candidates to one group.

    Args:
        groups: groups of (B, C_i) candidates.

    Returns:
        (B, sum of C_i) candidates.
    """
    return PrefixCandidates(
        scores=torch.cat([group.scores for group in groups], dim=1),
        path_scores=torch.cat([group.path_scores for group in groups], dim=1),
        tokens=torch.cat([group.tokens for group in groups], dim=1),
        sources=torch.cat([group.sources for group in groups], dim=1),
        path_sources=torch.cat([group.path_sources for group in groups], dim=1),
    )


def prune_candidates(candidates: PrefixCandidates, num_beams: int, score_threshold: float) -> PrefixCandidates:
    """Select the best candidates of each clip.

    Candidates with the same score are ordered by token, as `argmax` does in greedy decoding.

    Args:
        candidates: (B, C) candidates.
        num_beams: number K of candidates to select.
        score_threshold: a candidate this much below the best one gets the score -inf.

    Returns:
        (B, K) candidates, best first.
    """
    by_token = candidates.tokens.argsort(dim=1, stable=True)
    by_score = candidates.scores.gather(1, by_token).argsort(dim=1, descending=True, stable=True)
    best = candidates.select(by_token.gather(1, by_score[:, :num_beams]))
    is_below = best.scores <= best.scores[:, :1] - score_threshold
    return replace(best, scores=best.scores.masked_fill(is_below, -torch.inf))


def advance_beam(
    state: PrefixBeam, candidates: PrefixCandidates, is_valid: Tensor, blank_id: int, fusion: Fusion | None
) -> tuple[PrefixBeam, Tensor]:
    """Replace the hypotheses of the beam by the selected candidates.

    Args:
        state: K hypotheses of each clip.
        candidates: (B, K) candidates.
        is_valid: (B,) whether the frame is valid; on a padding frame, the hypotheses of a clip stay the same.
        blank_id: id of the blank.
        fusion: language models and phrase boosting.

    Returns:
        The new hypotheses.
        (B, K) index of the hypothesis before the frame that the best alignment comes from.
    """
    tokens, sources = candidates.tokens, candidates.sources
    is_new_label = (tokens != blank_id) & (tokens != state.last_tokens.gather(1, sources))
    label_hashes = state.label_hashes.gather(1, sources)
    label_hashes = torch.where(is_new_label, hash_next_label(label_hashes, tokens), label_hashes)
    path_scores = torch.where(candidates.scores > -torch.inf, candidates.path_scores, -torch.inf)
    is_valid = is_valid[:, None]
    fusion_states = state.fusion_states
    if fusion is not None and fusion_states is not None:
        states = fusion_states.gather(1, sources[..., None].expand_as(fusion_states))
        labels = torch.where(is_new_label, tokens, 0)
        next_states = fusion.advance(states.flatten(0, 1), labels.flatten()).view_as(states)
        states = torch.where(is_new_label[..., None], next_states, states)
        fusion_states = torch.where(is_valid[..., None], states, fusion_states)
    next_state = PrefixBeam(
        scores=torch.where(is_valid, candidates.scores, state.scores),
        path_scores=torch.where(is_valid, path_scores, state.path_scores),
        last_tokens=torch.where(is_valid, tokens, state.last_tokens),
        label_hashes=torch.where(is_valid, label_hashes, state.label_hashes),
        fusion_states=fusion_states,
    )
    same_indices = torch.arange(tokens.shape[1], device=tokens.device)
    return next_state, torch.where(is_valid, candidates.path_sources, same_indices)


def keep_best_of_equal(state: PrefixBeam) -> PrefixBeam:
    """Drop each hypothesis that has the labels and the last token of a better one.

    Args:
        state: K hypotheses of each clip, best first.
    """
    hashes, last_tokens = state.label_hashes, state.last_tokens
    is_equal = (hashes[:, :, None] == hashes[:, None]) & (last_tokens[:, :, None] == last_tokens[:, None])
    return replace(
        state, scores=remove_second(state.scores, is_equal), path_scores=remove_second(state.path_scores, is_equal)
    )
