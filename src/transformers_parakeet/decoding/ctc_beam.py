"""CTC prefix beam search: the best label sequences of a batch of clips.

One frame of the search is in `ctc_prefixes.py`. Greedy decoding of CTC is in `greedy.py`, the scores of language models
and phrase boosting are in `fusion.py`, and the beam search of transducers is in `beam.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .confidence import check_confidence_method, compute_token_confidence, scale_probabilities
from .ctc_prefixes import (
    PrefixBeam,
    advance_beam,
    compare_hypotheses,
    extend_beam,
    keep_best_of_equal,
    merge_hypotheses,
    remove_second,
    start_beam,
)
from .fusion import Fusion
from .hypotheses import Hypotheses, collapse_ctc
from .options import BeamOptions


def beam_decode_ctc(
    logits: Tensor,
    frame_lengths: Tensor | None,
    blank_id: int,
    beam: BeamOptions,
    pad_id: int = 0,
    fusion: Fusion | None = None,
    confidence: str | None = None,
) -> tuple[Hypotheses, Tensor]:
    """Search the best label sequences of a batch of clips with CTC prefix beam search.

    With `beam.sum_alignments`, hypotheses with the same labels and the same ending, blank or label, are merged before
    the beam is pruned, and their probabilities are summed. The two endings of the same labels are combined after the
    last frame. Without it, the search follows NeMo: it prunes first, then keeps the best of equal hypotheses, and it
    returns both endings of the same labels.

    With one beam and without fusion and label bonus, the result is that of greedy decoding. The result of a clip does
    not depend on padding frames and on the other clips.

    Source: Graves, "Supervised Sequence Labelling with Recurrent Neural Networks", section 7.5.3, and
    `ctc_batched_beam_decoding.py` in NeMo.

    Args:
        logits: (B, N, V) raw scores or log-probabilities.
        frame_lengths: (B,) number of valid frames; `None` if all frames are valid.
        blank_id: id of the blank.
        beam: settings of the search; the hypotheses are ordered by their scores, and `length_penalty` has no effect.
        pad_id: token id that pads short hypotheses.
        fusion: language models and phrase boosting, on the device of the logits; `None` for none.
        confidence: method of `compute_token_confidence`; `None` for no confidence. With `"max_prob"`, the probability
            is that of the token of the best alignment.

    Returns:
        The hypotheses, `num_return_sequences` consecutive rows per clip, best first. Frames, durations and confidence
        are those of the best alignment of each hypothesis. `scores` are not divided by the length. A clip with fewer
        hypotheses gets empty rows with the score -inf. A clip without frames gets an empty row with the score 0.
        (B * num_return_sequences, N) token of each frame in the best alignment; the blank at padding frames.

    Raises:
        ValueError: `confidence` is not a method, or `fusion` does not fit the tokens.
    """
    check_arguments(logits, blank_id, fusion, confidence)
    num_clips, num_frames, _ = logits.shape
    if frame_lengths is None:
        frame_lengths = torch.full((num_clips,), num_frames, device=logits.device)
    scores, alignments = search_alignments(logits, frame_lengths, blank_id, beam, fusion)
    frame_confidence = compute_alignment_confidence(logits, alignments, confidence) if confidence else None
    hypotheses = collapse_alignments(alignments, scores, blank_id, pad_id, frame_confidence)
    return hypotheses, alignments.flatten(0, 1)


def search_alignments(
    logits: Tensor, frame_lengths: Tensor, blank_id: int, beam: BeamOptions, fusion: Fusion | None
) -> tuple[Tensor, Tensor]:
    """Search the best label sequences, and the best alignment of each.

    Args:
        logits: (B, N, V) raw scores or log-probabilities.
        frame_lengths: (B,) number of valid frames.
        blank_id: id of the blank.
        beam: settings of the search.
        fusion: language models and phrase boosting.

    Returns:
        (B, R) scores, best first, where R is `num_return_sequences`; -inf for a missing hypothesis.
        (B, R, N) token of each frame in the best alignment.
    """
    num_clips, num_frames, _ = logits.shape
    state = start_beam(num_clips, beam.num_beams, blank_id, fusion, logits.device)
    # log-probability of the best token, summed over the valid frames
    best_scores = torch.zeros(num_clips, device=logits.device)
    steps = []
    for frame in range(int(frame_lengths.max()) if num_clips else 0):
        frame_logits = logits[:, frame].float()
        best_logits = frame_logits.amax(1)
        # scores relative to the best token keep the order of the logits exactly, which log-probabilities do not
        candidates = extend_beam(state, frame_logits - best_logits[:, None], blank_id, beam, fusion)
        is_valid = frame < frame_lengths
        best_scores = best_scores + torch.where(is_valid, best_logits - frame_logits.logsumexp(1), 0.0)
        state, path_sources = advance_beam(state, candidates, is_valid, blank_id, fusion)
        steps.append((path_sources, state.last_tokens))
        if not beam.sum_alignments:
            state = keep_best_of_equal(state)
    scores, indices = rank_hypotheses(state, frame_lengths, blank_id, beam, fusion)
    alignments = trace_alignments(steps, indices, frame_lengths, num_frames, blank_id)
    # a missing hypothesis has no label
    alignments = torch.where(scores[..., None] > -torch.inf, alignments, blank_id)
    return scores + best_scores[:, None], alignments


def check_arguments(logits: Tensor, blank_id: int, fusion: Fusion | None, confidence: str | None) -> None:
    """Check the arguments of `beam_decode_ctc`.

    Args:
        logits: (B, N, V) scores.
        blank_id: id of the blank.
        fusion: language models and phrase boosting.
        confidence: method of `compute_token_confidence`.

    Raises:
        ValueError: `confidence` is not a method, or `fusion` does not fit the tokens.
    """
    if confidence is not None:
        check_confidence_method(confidence)
    if fusion is not None:
        fusion.check_vocabulary(blank_id, logits.shape[-1])


def rank_hypotheses(
    state: PrefixBeam, frame_lengths: Tensor, blank_id: int, beam: BeamOptions, fusion: Fusion | None
) -> tuple[Tensor, Tensor]:
    """Add the scores of the end of the clips, combine the two endings of the same labels, and order the hypotheses.

    Args:
        state: K hypotheses of each clip after the last frame.
        frame_lengths: (B,) number of valid frames; a clip without frames gets no score of its end.
        blank_id: id of the blank.
        beam: settings of the search.
        fusion: language models and phrase boosting.

    Returns:
        (B, R) scores, best first, where R is `num_return_sequences`.
        (B, R) index in the beam of the best alignment of each.
    """
    if fusion is not None and state.fusion_states is not None:
        end_scores = fusion.score_end(state.fusion_states.flatten(0, 1)).view_as(state.scores)
        end_scores = torch.where(frame_lengths[:, None] > 0, end_scores, 0.0)
        state = replace(state, scores=state.scores + end_scores, path_scores=state.path_scores + end_scores)
    same_labels, _ = compare_hypotheses(state, blank_id, beam.sum_alignments)
    merged = merge_hypotheses(state, torch.zeros_like(state.scores)[:, None], same_labels)
    scores, order = remove_second(merged.scores, same_labels).sort(dim=1, descending=True, stable=True)
    indices = merged.path_sources.gather(1, order)
    return scores[:, : beam.num_return_sequences], indices[:, : beam.num_return_sequences]


def trace_alignments(
    steps: Sequence[tuple[Tensor, Tensor]], indices: Tensor, frame_lengths: Tensor, num_frames: int, blank_id: int
) -> Tensor:
    """Follow the best alignments from the last frame to the first.

    Args:
        steps: for each frame, the (B, K) index of the hypothesis before the frame, and the (B, K) token of the frame.
        indices: (B, R) index of each hypothesis after the last frame.
        frame_lengths: (B,) number of valid frames.
        num_frames: number of frames N.
        blank_id: id of the blank, the token of padding frames.

    Returns:
        (B, R, N) token of each frame.
    """
    alignments = torch.full((*indices.shape, num_frames), blank_id, device=indices.device)
    for frame in reversed(range(len(steps))):
        sources, tokens = steps[frame]
        is_valid = frame < frame_lengths[:, None]
        alignments[..., frame] = torch.where(is_valid, tokens.gather(1, indices), blank_id)
        indices = sources.gather(1, indices)
    return alignments


def compute_alignment_confidence(logits: Tensor, alignments: Tensor, method: str) -> Tensor:
    """Compute the confidence of the token of each frame of an alignment.

    Args:
        logits: (B, N, V) scores.
        alignments: (B, R, N) token of each frame.
        method: `"max_prob"`: (p V - 1) / (V - 1), where p is the probability of the token, and 0 if this is negative.
            `"entropy"`: as in `compute_token_confidence`, which does not depend on the token.

    Returns:
        (B, R, N) float32, from 0 to 1.
    """
    if method == "entropy":
        return compute_token_confidence(logits, method)[:, None].expand(alignments.shape)
    # one softmax for all hypotheses of a clip
    probabilities = logits.float().softmax(-1).gather(2, alignments.transpose(1, 2)).transpose(1, 2)
    return scale_probabilities(probabilities, logits.shape[-1])


def collapse_alignments(
    alignments: Tensor, scores: Tensor, blank_id: int, pad_id: int, frame_confidence: Tensor | None
) -> Hypotheses:
    """Collapse alignments to hypotheses, padded to the largest number of labels.

    Args:
        alignments: (B, R, N) token of each frame.
        scores: (B, R) scores.
        blank_id: id of the blank.
        pad_id: token id that pads short hypotheses.
        frame_confidence: (B, R, N) confidence of each frame; `None` for no confidence.

    Returns:
        B * R hypotheses.
    """
    rows_confidence = None if frame_confidence is None else frame_confidence.flatten(0, 1)
    hypotheses = collapse_ctc(alignments.flatten(0, 1), blank_id, rows_confidence)
    num_tokens = int(hypotheses.lengths.max()) if len(hypotheses) else 0
    is_padding = torch.arange(num_tokens, device=scores.device) >= hypotheses.lengths[:, None]

    def pad(values: Tensor, padding_value: int) -> Tensor:
        """Shorten (B * R, N) values to the largest number of labels and fill the padding."""
        return values[:, :num_tokens].masked_fill(is_padding, padding_value)

    return Hypotheses(
        tokens=pad(hypotheses.tokens, pad_id),
        frames=pad(hypotheses.frames, 0),
        durations=pad(hypotheses.durations, 0),
        lengths=hypotheses.lengths,
        confidence=None if hypotheses.confidence is None else pad(hypotheses.confidence, 0),
        scores=scores.flatten(),
    )
