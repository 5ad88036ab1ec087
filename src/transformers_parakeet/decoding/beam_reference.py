"""The reference implementation of the transducer beam search: one clip and one hypothesis at a time.

`beam_decode_transducer` in `beam.py` returns the same hypotheses for a batch, and is tested against this search. Only
that function computes confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .beam_candidates import MAX_BLANK_PROBABILITY
from .fusion import Fusion
from .options import BeamOptions, Joint, Predict, TransducerOptions


@dataclass(frozen=True)
class ReferenceHypothesis:
    """A hypothesis of the reference search.

    Args:
        score: sum of the log-probabilities of all merged alignments, and of the scores of the fusion.
        labels: labels so far.
        label_frames: frame of each label.
        frame: frame of the next step.
        labels_on_frame: number of labels so far on `frame`.
        predictor_state: (1, J) output of the prediction network after the labels.
        lstm_state: state of the prediction network after the labels.
        fusion_state: (1, number of scorers) state of the fusion after the labels; `None` without fusion.
    """

    score: float
    labels: tuple[int, ...]
    label_frames: tuple[int, ...]
    frame: int
    labels_on_frame: int
    predictor_state: Tensor
    lstm_state: Any
    fusion_state: Tensor | None


def beam_decode_clip_reference(
    encoder_states: Tensor,
    predict: Predict,
    joint: Joint,
    options: TransducerOptions,
    beam: BeamOptions,
    fusion: Fusion | None = None,
) -> list[ReferenceHypothesis]:
    """Decode one clip with a beam search, one hypothesis at a time.

    Args:
        encoder_states: (N, J) encoder frames of the clip.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        joint: joint network: (encoder states, predictor states) -> scores of tokens and durations.
        options: settings of the transducer.
        beam: settings of the beam search.
        fusion: language models and phrase boosting; `None` for no fusion.

    Returns:
        At most `beam.num_beams` hypotheses, best first.
    """
    start_token = torch.tensor([options.blank_id], device=encoder_states.device)
    fusion_state = None if fusion is None else fusion.start(1)
    hypotheses = [ReferenceHypothesis(0.0, (), (), 0, 0, *predict(start_token, None), fusion_state)]
    num_frames, num_steps = len(encoder_states), 0
    while any(hypothesis.frame < num_frames for hypothesis in hypotheses) and num_steps != options.max_steps:
        candidates: list[ReferenceHypothesis] = []
        for hypothesis in hypotheses:
            if hypothesis.frame >= num_frames:
                candidates.append(hypothesis)
                continue
            state = hypothesis.predictor_state[:, None]
            logits = joint(encoder_states[None, hypothesis.frame, None], state)[0, 0]
            for token, duration, score in list_next_steps(hypothesis, logits, options, beam, fusion):
                candidates.append(extend_hypothesis(hypothesis, token, duration, score, predict, options, beam, fusion))
        candidates.sort(key=lambda candidate: candidate.score, reverse=True)
        hypotheses = merge_equal_hypotheses(candidates[: beam.num_beams], must_have_equal_frames=True)
        num_steps += 1
    if beam.merge_finished:
        hypotheses = merge_equal_hypotheses(hypotheses, must_have_equal_frames=False)

    def rank(hypothesis: ReferenceHypothesis) -> float:
        """Return the score divided by the length penalty."""
        return hypothesis.score / (len(hypothesis.labels) + 1) ** beam.length_penalty

    return sorted(hypotheses, key=rank, reverse=True)


def list_next_steps(
    hypothesis: ReferenceHypothesis,
    logits: Tensor,
    options: TransducerOptions,
    beam: BeamOptions,
    fusion: Fusion | None,
) -> list[tuple[int, int, float]]:
    """List the possible next steps of a hypothesis: token, duration in frames, and score.

    Args:
        hypothesis: the hypothesis.
        logits: (V + D,) scores of the joint network.
        options: settings of the transducer.
        beam: settings of the beam search.
        fusion: language models and phrase boosting; `None` for no fusion.
    """
    blank_id, vocab_size = options.blank_id, options.vocab_size
    model_scores = logits[:vocab_size].log_softmax(-1).tolist()
    tokens = list(range(vocab_size))
    scores = list(model_scores)
    if fusion is not None and hypothesis.fusion_state is not None:
        scales_blank = beam.blank_score_mode == "lm_weighted_full"
        weight = float(fusion.sum_weights(hypothesis.fusion_state, torch.float64)) if scales_blank else 0.0
        no_blank_score = math.log(1 - min(math.exp(model_scores[blank_id]), MAX_BLANK_PROBABILITY))
        fusion_scores = fusion.score(hypothesis.fusion_state)[0].tolist()
        scores = [scores[token] + weight * no_blank_score + fusion_scores[token] for token in tokens[:blank_id]]
        scores.append(model_scores[blank_id] * (1 + weight))
        if beam.pruning_mode == "early":
            tokens = sorted(tokens, key=lambda token: model_scores[token], reverse=True)[: beam.num_beams]
    must_be_blank = hypothesis.labels_on_frame >= options.max_symbols
    if must_be_blank:
        tokens = [blank_id]
        if beam.pruning_mode == "early":
            # NeMo does not scale the log-probability of a forced blank
            scores[blank_id] = model_scores[blank_id]
    if options.durations is None:
        return [(token, int(token == blank_id), scores[token]) for token in tokens]
    duration_scores = list(zip(options.durations, logits[vocab_size:].log_softmax(-1).tolist(), strict=True))
    if must_be_blank:
        duration_scores = [max(duration_scores, key=lambda pair: pair[1])]
    return [
        (token, max(duration, 1) if token == blank_id else duration, scores[token] + duration_score)
        for token in tokens
        for duration, duration_score in duration_scores
    ]


def extend_hypothesis(
    hypothesis: ReferenceHypothesis,
    token: int,
    duration: int,
    score: float,
    predict: Predict,
    options: TransducerOptions,
    beam: BeamOptions,
    fusion: Fusion | None,
) -> ReferenceHypothesis:
    """Return a hypothesis after one more step.

    Args:
        hypothesis: the hypothesis before the step.
        token: label or blank.
        duration: duration of the step in frames.
        score: score of the step.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        options: settings of the transducer.
        beam: settings of the beam search.
        fusion: language models and phrase boosting; `None` for no fusion.
    """
    score, frame = hypothesis.score + score, hypothesis.frame + duration
    if token == options.blank_id:
        return replace(hypothesis, score=score, frame=frame, labels_on_frame=0)
    labels_on_frame = hypothesis.labels_on_frame + 1 if duration == 0 else 0
    if beam.num_beams == 1 and labels_on_frame == options.max_symbols:
        # as in greedy decoding, one beam advances without a blank
        frame, labels_on_frame = frame + 1, 0
    label = torch.tensor([token], device=hypothesis.predictor_state.device)
    predictor_state, lstm_state = predict(label, hypothesis.lstm_state)
    fusion_state = hypothesis.fusion_state
    if fusion is not None and fusion_state is not None:
        fusion_state = fusion.advance(fusion_state, label)
    labels, label_frames = (*hypothesis.labels, token), (*hypothesis.label_frames, hypothesis.frame)
    return ReferenceHypothesis(
        score, labels, label_frames, frame, labels_on_frame, predictor_state, lstm_state, fusion_state
    )


def merge_equal_hypotheses(
    hypotheses: list[ReferenceHypothesis], must_have_equal_frames: bool
) -> list[ReferenceHypothesis]:
    """Add the probabilities of hypotheses with the same labels to the one with the highest score.

    Args:
        hypotheses: the hypotheses.
        must_have_equal_frames: whether hypotheses must also have the same next frame to be merged.
    """
    merged: dict[tuple[tuple[int, ...], int], ReferenceHypothesis] = {}
    for hypothesis in sorted(hypotheses, key=lambda hypothesis: hypothesis.score, reverse=True):
        key = hypothesis.labels, hypothesis.frame if must_have_equal_frames else 0
        if key in merged:
            score = torch.tensor([merged[key].score, hypothesis.score], dtype=torch.float64).logsumexp(0)
            merged[key] = replace(merged[key], score=float(score))
        else:
            merged[key] = hypothesis
    return list(merged.values())
