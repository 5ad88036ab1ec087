"""The hypotheses of a transducer beam search as tensors: selection, merging of equal hypotheses, and their history.

The search is in `beam.py`, the scores of candidates are computed in `beam_candidates.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .hypotheses import ClipSteps
from .options import Predict

# value of `BeamStep.tokens` for a hypothesis that was finished before the step
NO_TOKEN = -1


@dataclass(frozen=True)
class BeamState:
    """K hypotheses of each of B clips. Hypothesis k of clip b is row b * K + k of tensors with B * K rows.

    Args:
        scores: (B, K) sum of the log-probabilities of all merged alignments; -inf for an unused place.
        frames: (B, K) frame of the next step; at least the number of frames of the clip if the hypothesis is finished.
        labels_on_frame: (B, K) number of labels so far on `frames`.
        num_labels: (B, K) number of labels so far.
        labels: (B, K, U) labels so far, padded with `NO_TOKEN`; U is larger than the number of steps so far.
        predictor_states: (B * K, J) outputs of the prediction network after the labels.
        lstm_state: tuple of (num_layers, B * K, LSTM width) states of the prediction network after the labels.
        fusion_states: (B * K, number of scorers) states of the fusion after the labels; `None` without fusion.
    """

    scores: Tensor
    frames: Tensor
    labels_on_frame: Tensor
    num_labels: Tensor
    labels: Tensor
    predictor_states: Tensor
    lstm_state: Any
    fusion_states: Tensor | None


@dataclass(frozen=True)
class BeamStep:
    """What a step of the search did to produce the K hypotheses of each of B clips. All tensors are (B, K).

    Args:
        parents: index k of the hypothesis before the step.
        tokens: label or blank of the step; `NO_TOKEN` if the hypothesis was finished before the step.
        frames: frame of the step.
        durations: duration of the step in frames.
        forced_advances: 1 if the search was forced to the next frame after the step, 0 otherwise.
        confidences: confidence of the label; 0 for a blank, and if no confidence is requested.
    """

    parents: Tensor
    tokens: Tensor
    frames: Tensor
    durations: Tensor
    forced_advances: Tensor
    confidences: Tensor

    def is_label(self, blank_id: int) -> Tensor:
        """Return whether the step of each hypothesis is a label.

        Args:
            blank_id: id of the blank; every other token is a label.

        Returns:
            (B, K) truth values; false for a hypothesis that was finished before the step.
        """
        return (self.tokens != NO_TOKEN) & (self.tokens != blank_id)


def start_beams(predictor_states: Tensor, lstm_state: Any, fusion_states: Tensor | None, num_beams: int) -> BeamState:
    """Return the hypotheses before the first step: one empty hypothesis per clip, and unused places.

    Args:
        predictor_states: (B, J) outputs of the prediction network for the start token.
        lstm_state: tuple of (num_layers, B, LSTM width) states of the prediction network after the start token.
        fusion_states: (B, number of scorers) first states of the fusion; `None` without fusion.
        num_beams: number of hypotheses K of each clip.
    """
    batch = len(predictor_states)
    zeros = torch.zeros(batch, num_beams, dtype=torch.int64, device=predictor_states.device)
    # scores of 16-bit models are summed in float32
    dtype = torch.promote_types(predictor_states.dtype, torch.float32)
    scores = torch.full((batch, num_beams), -torch.inf, dtype=dtype, device=predictor_states.device)
    scores[:, 0] = 0.0
    return BeamState(
        scores=scores,
        frames=zeros,
        labels_on_frame=zeros,
        num_labels=zeros,
        labels=zeros.new_full((batch, num_beams, 1), NO_TOKEN),
        predictor_states=predictor_states.repeat_interleave(num_beams, 0),
        lstm_state=tuple(tensor.repeat_interleave(num_beams, 1) for tensor in lstm_state),
        fusion_states=None if fusion_states is None else fusion_states.repeat_interleave(num_beams, 0),
    )


def extend_hypotheses(state: BeamState, step: BeamStep, scores: Tensor, step_index: int, blank_id: int) -> BeamState:
    """Return the hypotheses after a step, with the states of the prediction network of the hypotheses before the step.

    Args:
        state: the hypotheses before the step.
        step: the step.
        scores: (B, K) scores after the step.
        step_index: number of steps before this step.
        blank_id: id of the blank.
    """
    rows = to_rows(step.parents)
    is_label = step.is_label(blank_id)
    labels_on_frame = torch.where(is_label & (step.durations == 0), select(state.labels_on_frame, rows) + 1, 0)
    labels = state.labels.flatten(0, 1)[rows]
    if step_index + 1 >= labels.shape[1]:
        # double the capacity, so that the copies of all steps together take little time
        labels = torch.nn.functional.pad(labels, (0, labels.shape[1]), value=NO_TOKEN)
    num_labels = select(state.num_labels, rows)
    # a step without a label writes padding to the first unused position
    new_entries = torch.where(is_label, step.tokens, NO_TOKEN)
    labels.scatter_(1, num_labels.flatten()[:, None], new_entries.flatten()[:, None])
    return BeamState(
        scores=scores,
        frames=select(state.frames, rows) + step.durations + step.forced_advances,
        labels_on_frame=torch.where(step.forced_advances == 1, 0, labels_on_frame),
        num_labels=num_labels + is_label,
        labels=labels.unflatten(0, step.tokens.shape),
        predictor_states=state.predictor_states,
        lstm_state=state.lstm_state,
        fusion_states=None if state.fusion_states is None else state.fusion_states[rows],
    )


def to_rows(beam_indices: Tensor) -> Tensor:
    """Convert indices of hypotheses within their clips to rows.

    Args:
        beam_indices: (B, K) indices k.

    Returns:
        (B * K) rows b * K + k.
    """
    batch, num_beams = beam_indices.shape
    return (beam_indices + torch.arange(batch, device=beam_indices.device)[:, None] * num_beams).flatten()


def select(values: Tensor, rows: Tensor) -> Tensor:
    """Select one value for each hypothesis.

    Args:
        values: (B, K) values.
        rows: (B * K) rows b * K + k to select.

    Returns:
        (B, K) selected values.
    """
    return values.flatten()[rows].view_as(values)


def compare_labels(state: BeamState) -> Tensor:
    """Find hypotheses of a clip with the same labels. The labels themselves are compared, so the result is exact.

    Args:
        state: the hypotheses.

    Returns:
        (B, K, K) whether two hypotheses have the same labels. An unused place is equal only to itself.
    """
    is_used = state.scores > -torch.inf
    last_labels = state.labels.gather(2, (state.num_labels - 1).clamp(min=0)[..., None])[..., 0]
    # pairs of used places with the same number of labels and the same last label
    is_candidate = is_used[:, :, None] & is_used[:, None, :]
    is_candidate &= state.num_labels[:, :, None] == state.num_labels[:, None, :]
    is_candidate &= last_labels[:, :, None] == last_labels[:, None, :]
    clips, first, second = is_candidate.triu(1).nonzero(as_tuple=True)
    has_equal_labels = (state.labels[clips, first] == state.labels[clips, second]).all(-1)
    is_equal = torch.eye(is_used.shape[1], dtype=torch.bool, device=is_used.device).repeat(len(is_used), 1, 1)
    is_equal[clips, first, second] = has_equal_labels
    is_equal[clips, second, first] = has_equal_labels
    return is_equal


def merge_scores(scores: Tensor, is_equal: Tensor) -> Tensor:
    """Add the probabilities of equal hypotheses. The one with the highest score gets the sum, the others get -inf.

    Args:
        scores: (B, K) scores.
        is_equal: (B, K, K) whether two hypotheses are equal.

    Returns:
        (B, K) scores after merging.
    """
    group_scores = scores[:, None, :].masked_fill(~is_equal, -torch.inf)
    # of several equal scores, `max` returns the index of one, which is the same for all hypotheses of the group
    best_indices = group_scores.max(-1).indices
    is_best = best_indices == torch.arange(scores.shape[1], device=scores.device)
    return group_scores.logsumexp(-1).masked_fill(~is_best, -torch.inf)


def predict_new_labels(
    state: BeamState, step: BeamStep, has_equal_labels: Tensor, predict: Predict, blank_id: int
) -> BeamState:
    """Run the prediction network once for every new label sequence.

    Hypotheses with the same labels at different frames have the same state of the prediction network. If the labels of
    one of them are older than this step, it has the state already, and the others copy it.

    Args:
        state: the result of `extend_hypotheses`, with merged scores.
        step: the last step.
        has_equal_labels: (B, K, K) whether two hypotheses have the same labels.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        blank_id: id of the blank.

    Returns:
        The hypotheses with their own states of the prediction network.
    """
    is_new = step.is_label(blank_id)
    num_beams = is_new.shape[1]
    indices = torch.arange(num_beams, device=is_new.device).expand_as(is_new)
    # (B, K) the hypothesis that provides the state: one with the same labels, if possible with older labels
    ranks = torch.where(is_new, indices + num_beams, indices)[:, None, :].masked_fill(~has_equal_labels, 2 * num_beams)
    provider_rows = to_rows(torch.where(is_new, ranks.amin(-1) % num_beams, indices))
    is_predicted = is_new.flatten() & (provider_rows == to_rows(indices))
    predicted_rows = is_predicted.nonzero()[:, 0]
    # the states of the parents of the providers; indexing copies them, so they can be changed in place
    rows = to_rows(step.parents)[provider_rows]
    predictor_states = state.predictor_states[rows]
    lstm_state = tuple(tensor[:, rows] for tensor in state.lstm_state)
    if len(predicted_rows):
        labels = step.tokens.flatten()[predicted_rows]
        new_states, new_lstm_state = predict(labels, tuple(tensor[:, predicted_rows] for tensor in lstm_state))
        # rows whose provider is predicted, and the position of the provider in `predicted_rows`
        changed_rows = is_predicted[provider_rows].nonzero()[:, 0]
        positions = (is_predicted.cumsum(0) - 1)[provider_rows[changed_rows]]
        predictor_states.index_copy_(0, changed_rows, new_states[positions])
        for tensor, new_tensor in zip(lstm_state, new_lstm_state, strict=True):
            tensor.index_copy_(1, changed_rows, new_tensor[:, positions])
    return replace(state, predictor_states=predictor_states, lstm_state=lstm_state)


def list_steps(history: Sequence[BeamStep], beam_indices: Tensor) -> list[ClipSteps]:
    """Follow the parents of hypotheses back to the first step, and list their steps.

    A merged hypothesis has the steps of the hypothesis with the highest score at the time of merging.

    Args:
        history: all steps of the search.
        beam_indices: (B, R) indices k of R hypotheses of each clip after the last step.

    Returns:
        The steps of the B * R hypotheses; those of one clip are consecutive.
    """
    if not history:
        return [ClipSteps() for _ in range(beam_indices.numel())]
    indices, all_indices = beam_indices, []
    for step in reversed(history):
        all_indices.append(indices)
        indices = step.parents.gather(1, indices)
    # (number of steps, B, R)
    path = torch.stack(all_indices[::-1])

    def gather(name: str) -> list[list[float]]:
        """Return one list per hypothesis with the values of a field of `BeamStep`, one per step."""
        values = torch.stack([getattr(step, name) for step in history]).gather(2, path)
        lists: list[list[float]] = values.flatten(1).t().tolist()
        return lists

    names = ("tokens", "frames", "durations", "forced_advances", "confidences")
    all_steps = []
    for tokens, *values in zip(*(gather(name) for name in names), strict=True):
        steps = ClipSteps()
        for token, frame, duration, forced_advance, confidence in zip(tokens, *values, strict=True):
            if token != NO_TOKEN:
                steps.append(int(token), int(frame), int(duration), bool(forced_advance), confidence)
        all_steps.append(steps)
    return all_steps
