"""Batched beam search for transducers: modified alignment-length synchronous decoding.

`beam_candidates.py` computes the candidates of a step, and `beam_state.py` contains the hypotheses.
`beam_decode_clip_reference` in `beam_reference.py` returns the same hypotheses, one clip and one hypothesis at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .beam_candidates import Candidates, compute_candidates
from .beam_state import (
    NO_TOKEN,
    BeamState,
    BeamStep,
    compare_labels,
    extend_hypotheses,
    list_steps,
    merge_scores,
    predict_new_labels,
    select,
    start_beams,
    to_rows,
)
from .confidence import check_confidence_method, compute_token_confidence
from .fusion import Fusion
from .hypotheses import ClipSteps, Hypotheses, collect_hypotheses, penalise_length
from .options import BeamOptions, Joint, Predict, TransducerOptions


def beam_decode_transducer(
    encoder_states: Tensor,
    frame_lengths: Tensor,
    predict: Predict,
    joint: Joint,
    options: TransducerOptions,
    beam: BeamOptions,
    pad_id: int = 0,
    fusion: Fusion | None = None,
) -> Hypotheses:
    """Decode a batch of RNN-T or TDT clips with a beam search.

    Every step of the search extends each hypothesis by a label or a blank, at the frame of that hypothesis, and keeps
    the best hypotheses of each clip. Hypotheses with the same labels and the same frame are merged: their
    probabilities are added. The search of a clip ends when all of its hypotheses are finished.

    A hypothesis with `options.max_symbols` labels on its frame must continue with a blank, whose log-probability is
    added to the score, and whose duration is the best duration. With one beam it advances by one frame without a
    blank instead, so the result equals that of `greedy_decode_transducer`, if there is no fusion.

    Source: modified ALSD of NeMo (`malsd_batch`); Saon et al., ICASSP 2020, for alignment-length synchronous decoding.

    Args:
        encoder_states: (B, N, J) encoder frames after the projection to the width of the joint network.
        frame_lengths: (B,) number of valid frames.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        joint: joint network: (encoder states, predictor states) -> scores of tokens and durations.
        options: settings of the transducer; `lookahead` has no effect.
        beam: settings of the beam search.
        pad_id: token id that pads short hypotheses.
        fusion: language models and phrase boosting; `None` for no fusion.

    Returns:
        R = `beam.num_return_sequences` hypotheses of each clip in B * R rows: the rows of one clip are consecutive,
        best first. If the search has fewer hypotheses, the remaining rows are empty with the score -inf. A clip without
        frames has one empty hypothesis with the score 0.

    Raises:
        ValueError: `options.keep_logits` is set, or the fusion does not have one score for each label.
    """
    check_options(options, fusion)
    batch = len(encoder_states)
    start_tokens = torch.full((batch,), options.blank_id, device=encoder_states.device)
    fusion_states = None if fusion is None else fusion.start(batch).to(encoder_states.device)
    state = start_beams(*predict(start_tokens, None), fusion_states, beam.num_beams)
    search = BeamSearch(encoder_states, frame_lengths, predict, joint, options, beam, fusion)
    state, history = search.run(state)
    return collect_best_hypotheses(state, history, options, beam, pad_id)


def check_options(options: TransducerOptions, fusion: Fusion | None) -> None:
    """Check the settings of a beam search.

    Args:
        options: settings of the transducer.
        fusion: language models and phrase boosting; `None` for no fusion.

    Raises:
        ValueError: the search does not support the settings.
    """
    if options.keep_logits:
        raise ValueError("a beam search does not return scores of steps: set `keep_logits` to False")
    if options.confidence is not None:
        check_confidence_method(options.confidence)
    if fusion is not None:
        fusion.check_vocabulary(options.blank_id, options.vocab_size)


@dataclass(frozen=True)
class BeamSearch:
    """The inputs of a beam search; the hypotheses are passed from step to step.

    Args:
        encoder_states: (B, N, J) encoder frames after the projection to the width of the joint network.
        frame_lengths: (B,) number of valid frames.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        joint: joint network: (encoder states, predictor states) -> scores of tokens and durations.
        options: settings of the transducer.
        beam: settings of the beam search.
        fusion: language models and phrase boosting; `None` for no fusion.
    """

    encoder_states: Tensor
    frame_lengths: Tensor
    predict: Predict
    joint: Joint
    options: TransducerOptions
    beam: BeamOptions
    fusion: Fusion | None

    def run(self, state: BeamState) -> tuple[BeamState, list[BeamStep]]:
        """Search until all hypotheses are finished or have the maximum number of steps.

        Args:
            state: the hypotheses before the first step.

        Returns:
            The last hypotheses, and all steps.
        """
        frame_lengths = self.frame_lengths.to(state.frames.device).clamp(max=self.encoder_states.shape[1])
        history: list[BeamStep] = []
        while len(history) != self.options.max_steps:
            is_active = (state.scores > -torch.inf) & (state.frames < frame_lengths[:, None])
            active_rows = is_active.flatten().nonzero()[:, 0]
            if not len(active_rows):
                break
            logits = self.score_rows(state, active_rows)
            candidates = self.compute_candidates(state, active_rows, logits)
            step, scores = select_candidates(candidates, state, active_rows)
            step = self.complete_step(step, state, active_rows, logits)
            state = self.advance(state, step, scores, len(history))
            history.append(step)
        return state, history

    def score_rows(self, state: BeamState, active_rows: Tensor) -> Tensor:
        """Call the joint network for the hypotheses that are not finished.

        Args:
            state: the hypotheses.
            active_rows: (R,) rows of the hypotheses that are not finished.

        Returns:
            (R, V + D) scores.
        """
        num_frames = self.encoder_states.shape[1]
        frame_rows = active_rows // self.beam.num_beams * num_frames + state.frames.flatten()[active_rows]
        encoder_states = self.encoder_states.flatten(0, 1)[frame_rows]
        # one frame per hypothesis
        logits = self.joint(encoder_states[:, None], state.predictor_states[active_rows][:, None])[:, 0]
        return logits.to(state.scores.dtype)

    def compute_candidates(self, state: BeamState, active_rows: Tensor, logits: Tensor) -> Candidates:
        """Compute the candidates of the hypotheses that are not finished.

        Args:
            state: the hypotheses.
            active_rows: (R,) rows of the hypotheses that are not finished.
            logits: (R, V + D) scores of the joint network.
        """
        labels_on_frame = state.labels_on_frame.flatten()[active_rows]
        fusion_states = None if state.fusion_states is None else state.fusion_states[active_rows]
        must_be_blank = labels_on_frame >= self.options.max_symbols
        return compute_candidates(logits, must_be_blank, self.fusion, fusion_states, self.options, self.beam)

    def complete_step(self, step: BeamStep, state: BeamState, active_rows: Tensor, logits: Tensor) -> BeamStep:
        """Add the forced advances of a search with one beam, and the confidence, to a step.

        Args:
            step: the step.
            state: the hypotheses before the step.
            active_rows: (R,) rows of the hypotheses that are not finished.
            logits: (R, V + D) scores of the joint network.
        """
        options = self.options
        is_label = step.is_label(options.blank_id)
        if self.beam.num_beams == 1:
            # greedy decoding advances without a blank, so the limit is never exceeded before a step
            is_forced = is_label & (step.durations == 0) & (state.labels_on_frame + 1 >= options.max_symbols)
            step = replace(step, forced_advances=is_forced.long())
        if options.confidence is None:
            return step
        label_rows = is_label.flatten().nonzero()[:, 0]
        # row of `logits` of each hypothesis
        logits_rows = torch.searchsorted(active_rows, to_rows(step.parents)[label_rows])
        token_logits = logits[logits_rows, : options.vocab_size]
        tokens = step.tokens.flatten()[label_rows]
        confidences = compute_token_confidence(token_logits, options.confidence, tokens)
        return replace(
            step, confidences=step.confidences.flatten().index_copy(0, label_rows, confidences).view_as(is_label)
        )

    def advance(self, state: BeamState, step: BeamStep, scores: Tensor, step_index: int) -> BeamState:
        """Return the merged hypotheses after a step.

        Args:
            state: the hypotheses before the step.
            step: the step.
            scores: (B, K) scores after the step.
            step_index: number of steps before this step.
        """
        blank_id = self.options.blank_id
        state = extend_hypotheses(state, step, scores, step_index, blank_id)
        has_equal_labels = compare_labels(state)
        has_equal_frames = state.frames[:, :, None] == state.frames[:, None, :]
        state = replace(state, scores=merge_scores(state.scores, has_equal_labels & has_equal_frames))
        state = predict_new_labels(state, step, has_equal_labels, self.predict, blank_id)
        if self.fusion is None or state.fusion_states is None:
            return state
        label_rows = step.is_label(blank_id).flatten().nonzero()[:, 0]
        new_states = self.fusion.advance(state.fusion_states[label_rows], step.tokens.flatten()[label_rows])
        return replace(state, fusion_states=state.fusion_states.index_copy(0, label_rows, new_states))


def select_candidates(candidates: Candidates, state: BeamState, active_rows: Tensor) -> tuple[BeamStep, Tensor]:
    """Select the best candidates of each clip. A finished hypothesis is a candidate itself.

    Args:
        candidates: C candidates of each of R hypotheses.
        state: the hypotheses before the step.
        active_rows: (R,) rows of the hypotheses that are not finished.

    Returns:
        The selected step, without forced advances and confidence, and the (B, K) scores after it, best first.
    """
    batch, num_beams = state.scores.shape
    num_candidates = candidates.scores.shape[1]

    def fill(values: Tensor, padding_value: float) -> Tensor:
        """Write (R, C) values to the active rows of a table (B * K, C)."""
        table = values.new_full((batch * num_beams, num_candidates), padding_value)
        return table.index_copy(0, active_rows, values)

    scores = fill(candidates.scores + state.scores.flatten()[active_rows, None], -torch.inf)
    # the score of a finished hypothesis does not change
    is_active = torch.zeros(batch * num_beams, dtype=torch.bool, device=scores.device)
    is_active[active_rows] = True
    scores[:, 0] = torch.where(is_active, scores[:, 0], state.scores.flatten())
    best_scores, choices = scores.view(batch, -1).topk(num_beams, dim=1)
    parents = choices // num_candidates
    tokens = fill(candidates.tokens, NO_TOKEN).view(batch, -1).gather(1, choices)
    step = BeamStep(
        parents=parents,
        # an unused place has no step
        tokens=tokens.masked_fill(best_scores == -torch.inf, NO_TOKEN),
        frames=select(state.frames, to_rows(parents)),
        durations=fill(candidates.durations, 0).view(batch, -1).gather(1, choices),
        forced_advances=torch.zeros_like(parents),
        confidences=torch.zeros(parents.shape, device=scores.device),
    )
    return step, best_scores


def collect_best_hypotheses(
    state: BeamState, history: list[BeamStep], options: TransducerOptions, beam: BeamOptions, pad_id: int
) -> Hypotheses:
    """Order the hypotheses of each clip, and collect the best ones.

    Args:
        state: the hypotheses after the last step.
        history: all steps of the search.
        options: settings of the transducer.
        beam: settings of the beam search.
        pad_id: token id that pads short hypotheses.

    Returns:
        The best hypotheses of each clip in consecutive rows.
    """
    scores = state.scores
    if beam.merge_finished:
        scores = merge_scores(scores, compare_labels(state))
    ranking_scores = penalise_length(scores, state.num_labels, beam.length_penalty)
    best = ranking_scores.sort(dim=1, descending=True, stable=True).indices[:, : beam.num_return_sequences]
    scores = scores.gather(1, best).flatten()
    is_unused = (scores == -torch.inf).tolist()
    all_steps = [
        ClipSteps() if unused else steps for unused, steps in zip(is_unused, list_steps(history, best), strict=True)
    ]
    has_confidence = options.confidence is not None
    hypotheses = collect_hypotheses(
        all_steps, options.blank_id, pad_id, state.scores.device, has_confidence, has_logits=False
    )
    return replace(hypotheses, scores=scores)
