"""Greedy transducer decoding by label looping: many clips and several frames per call of the networks.

`greedy_decode_transducer_reference` in `greedy.py` returns the same result, one clip and one frame at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .confidence import compute_token_confidence
from .frame_scoring import FramePlan, FrameScores, NewLabels, Shortcuts, choose_lookahead, follow_blanks
from .fusion import Fusion
from .hypotheses import ClipSteps, Hypotheses, collect_hypotheses
from .label_choice import LabelChooser
from .options import Joint, Predict, TransducerOptions

# Fraction of the unfinished clips that must have a new label before the prediction network runs. The time of a run
# depends little on the number of clips, so it is cheaper to wait and run it once for several clips.
MIN_LABEL_FRACTION = 0.6

# Callback after every step: receives one list of all tokens so far per clip, returns per clip whether to stop decoding.
OnStep = Callable[[list[list[int]]], Sequence[bool]]


def greedy_decode_transducer(
    encoder_states: Tensor,
    frame_lengths: Tensor,
    predict: Predict,
    joint: Joint,
    options: TransducerOptions,
    pad_id: int = 0,
    shortcuts: Shortcuts | None = None,
    on_step: OnStep | None = None,
    fusion: Fusion | None = None,
) -> Hypotheses:
    """Decode a batch of RNN-T or TDT clips greedily by label looping (arXiv 2406.06220).

    Args:
        encoder_states: (B, N, J) encoder frames after the projection to the width of the joint network.
        frame_lengths: (B,) number of valid frames.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        joint: joint network: (encoder states, predictor states) -> scores of tokens and durations.
        options: settings of the search.
        pad_id: token id that pads short hypotheses.
        shortcuts: functions that find the best outputs of the joint network faster; `None` for no such functions.
        on_step: called after every step with the tokens of all clips; returns which clips to stop. `None` for no call.
        fusion: language model and phrase boosting, on the device of the encoder states. They change which label is
            emitted, but not whether a label is emitted. `None` for the labels of the model alone.

    Returns:
        The hypotheses of all clips with the predicted durations.

    Raises:
        ValueError: the scorers of `fusion` and the model have different labels.
    """
    batch, num_frames = encoder_states.shape[:2]
    searches = [ClipSearch(min(length, num_frames), options) for length in frame_lengths.tolist()]
    start_tokens = torch.full((batch,), options.blank_id, device=encoder_states.device)
    predictor_states, lstm_state = predict(start_tokens, None)
    scorer = FrameScorer(encoder_states, joint, shortcuts or Shortcuts(), options, has_fusion=fusion is not None)
    label_chooser = None
    if fusion is not None:
        fusion.check_vocabulary(options.blank_id, options.vocab_size)
        label_chooser = LabelChooser(fusion, fusion.start(batch))
    search_labels(searches, scorer, predict, predictor_states, lstm_state, on_step, label_chooser)
    all_steps = [search.steps for search in searches]
    has_confidence = options.confidence is not None
    return collect_hypotheses(
        all_steps, options.blank_id, pad_id, encoder_states.device, has_confidence, options.keep_logits
    )


def search_labels(
    searches: Sequence[ClipSearch],
    scorer: FrameScorer,
    predict: Predict,
    predictor_states: Tensor,
    lstm_state: Any,
    on_step: OnStep | None = None,
    label_chooser: LabelChooser | None = None,
) -> tuple[Tensor, Any]:
    """Continue the search in every clip of a batch until all clips are finished.

    Args:
        searches: the search state of every clip of the batch, changed in place.
        scorer: scores the frames of the batch.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        predictor_states: (B, J) predictor states before the first step.
        lstm_state: LSTM state of the prediction network before the first step.
        on_step: called after every step with the tokens of all clips; returns which clips to stop. `None` for no call.
        label_chooser: chooses the labels with a fusion, changed in place; `None` without a fusion.

    Returns:
        The last (B, J) predictor states and the last LSTM state. They do not include a label that finished its clip.
    """
    needs_label_logits = label_chooser is not None or scorer.options.confidence is not None
    unfinished = select_unfinished(searches, range(len(searches)))
    while unfinished:
        # inner loop: score frames until enough clips have a new label
        without_label, new_labels = unfinished, NewLabels(needs_label_logits)
        while not has_enough_labels(len(without_label), len(unfinished)):
            plan = scorer.plan_frames(searches, without_label, predictor_states)
            without_label = advance_clips(searches, plan, scorer.score(plan), scorer.options, new_labels)
            if on_step is not None:
                complete_labels(searches, new_labels, scorer.options.confidence, label_chooser)
                stop_clips(searches, on_step)
                without_label, new_labels = select_unfinished(searches, without_label), NewLabels(needs_label_logits)
        complete_labels(searches, new_labels, scorer.options.confidence, label_chooser)
        with_label = select_unfinished(searches, sorted(set(unfinished) - set(without_label)))
        if with_label:
            predictor_states, lstm_state = predict_clips(predict, predictor_states, lstm_state, searches, with_label)
        unfinished = select_unfinished(searches, unfinished)
    return predictor_states, lstm_state


@dataclass
class ClipSearch:
    """The state of the search in one clip.

    Args:
        frame_length: number of valid frames.
        options: settings of the search.
        next_frame: the frame of the next step.
        labels_on_frame: number of labels emitted so far on `next_frame`.
        is_stopped: whether the `on_step` callback has stopped the clip.
        last_label: the last emitted label.
        last_label_step: index of the step that emitted `last_label`.
        steps: all steps so far.
    """

    frame_length: int
    options: TransducerOptions
    next_frame: int = 0
    labels_on_frame: int = 0
    is_stopped: bool = False
    last_label: int = 0
    last_label_step: int = 0
    steps: ClipSteps = field(default_factory=ClipSteps)

    @property
    def is_finished(self) -> bool:
        """Whether the clip was stopped, has no more frames, or has reached the maximum number of steps."""
        max_steps = self.options.max_steps
        has_max_steps = max_steps is not None and len(self.steps.tokens) >= max_steps
        return self.is_stopped or self.next_frame >= self.frame_length or has_max_steps

    def advance(self, frames: list[int], tokens: list[int], durations: list[int], logits: Tensor | None) -> int | None:
        """Append the steps on the scored frames to `self.steps`, up to and including the first label.

        `self.next_frame` is the frame of the next step. After a label the remaining scores are invalid, because the
        predictor state changes.

        Args:
            frames: indices of the K scored frames, in chronological order. Frames that a duration jumps over are
                ignored.
            tokens: best token of each frame.
            durations: predicted duration of each frame.
            logits: (K, V + D) scores to store with the steps; `None` to store no scores.

        Returns:
            The index of the label in `frames`; `None` if no label was emitted.
        """
        for position, frame in enumerate(frames):
            if frame != self.next_frame or self.is_finished:
                continue
            if logits is not None:
                self.steps.logits.append(logits[position])
            token, duration = tokens[position], durations[position]
            if token == self.options.blank_id:
                # a blank always advances, even if its predicted duration is 0
                self._append_step(token, max(duration, 1))
                continue
            self.last_label, self.last_label_step = token, len(self.steps.tokens)
            self._append_step(token, duration)
            return position
        return None

    def replace_last_label(self, label: int) -> None:
        """Replace the last emitted label; its frame and its duration do not change.

        Args:
            label: the new label.
        """
        self.last_label = self.steps.tokens[self.last_label_step] = label

    def _append_step(self, token: int, duration: int) -> None:
        """Append a step and advance `next_frame` by its duration.

        If the maximum number of labels per frame is reached, the search is forced to the next frame.

        Args:
            token: label or blank.
            duration: predicted duration in frames.
        """
        self.labels_on_frame = 0 if duration > 0 else self.labels_on_frame + 1
        is_forced_advance = self.labels_on_frame == self.options.max_symbols
        self.steps.append(token, self.next_frame, duration, is_forced_advance)
        self.next_frame += duration
        if is_forced_advance:
            self.next_frame += 1
            self.labels_on_frame = 0


def select_unfinished(searches: Sequence[ClipSearch], clip_indices: Sequence[int]) -> list[int]:
    """Select the clips whose search is not finished.

    Args:
        searches: the search state of every clip of the batch.
        clip_indices: indices of the clips to select from.

    Returns:
        The indices of the unfinished clips, in the order of `clip_indices`.
    """
    return [clip_index for clip_index in clip_indices if not searches[clip_index].is_finished]


def stop_clips(searches: Sequence[ClipSearch], on_step: OnStep) -> None:
    """Call `on_step` with the tokens of all clips and stop the clips for which it returns True.

    Args:
        searches: the search state of every clip of the batch, changed in place.
        on_step: receives one list of all tokens so far per clip, and returns one truth value per clip.
    """
    tokens = [search.steps.tokens for search in searches]
    for search, must_stop in zip(searches, on_step(tokens), strict=True):
        search.is_stopped = search.is_stopped or bool(must_stop)


def has_enough_labels(num_without_label: int, num_unfinished: int) -> bool:
    """Return whether enough clips have a new label to run the prediction network.

    Args:
        num_without_label: number of clips that are still searching for the next label.
        num_unfinished: number of clips that were unfinished when the search for the next label began.
    """
    return num_without_label <= (1 - MIN_LABEL_FRACTION) * num_unfinished


class FrameScorer:
    """Chooses which frames to score, and scores them with the joint network.

    Args:
        encoder_states: (B, N, J) encoder frames after the projection to the width of the joint network.
        joint: joint network: (encoder states, predictor states) -> scores of tokens and durations.
        shortcuts: functions that find the best outputs of the joint network faster.
        options: settings of the search.
        has_fusion: whether a fusion chooses the labels, which needs the scores of all tokens.
    """

    def __init__(
        self,
        encoder_states: Tensor,
        joint: Joint,
        shortcuts: Shortcuts,
        options: TransducerOptions,
        has_fusion: bool = False,
    ) -> None:
        self.num_frames = encoder_states.shape[1]
        # (B * N, J): frame n of clip b is at index b * N + n
        self.flat_encoder_states = encoder_states.flatten(0, 1)
        self.joint, self.options = joint, options
        self.duration_values = options.durations or ()
        self.find_best_durations = shortcuts.find_best_durations
        needs_duration_scores = options.durations is not None and shortcuts.find_best_durations is None
        needs_logits = needs_duration_scores or options.confidence is not None or options.keep_logits
        self.find_best_tokens = None if needs_logits or has_fusion else shortcuts.find_best_tokens
        can_search = not needs_logits and has_fusion and shortcuts.find_best_tokens is not None
        self.search_tokens = shortcuts.search_tokens if can_search else None

    def plan_frames(
        self, searches: Sequence[ClipSearch], clip_indices: list[int], predictor_states: Tensor
    ) -> FramePlan:
        """Choose the frames to score next in every clip that searches for a label.

        Without the function `self.find_best_durations`, choose consecutive frames. With it, choose only the frames that
        a clip visits while it emits blanks.

        Args:
            searches: the search state of every clip of the batch.
            clip_indices: indices of the R clips that search for a label.
            predictor_states: (B, J) predictor states of all clips, where J is the width of the joint network.

        Returns:
            The plan for K frames of each of the R clips.
        """
        lookahead = choose_lookahead(self.options, len(clip_indices))
        first_frames = [searches[clip_index].next_frame for clip_index in clip_indices]
        clip_indices_tensor = torch.tensor(clip_indices, device=predictor_states.device)
        # (R, 1, J) predictor states of these clips
        clip_states = predictor_states.index_select(0, clip_indices_tensor)[:, None]
        if self.find_best_durations is None:
            return FramePlan(clip_indices, self._list_consecutive_frames(first_frames, lookahead), clip_states)
        # a blank advances by at most the largest duration, so this covers all frames that `lookahead` blanks can visit
        num_candidates = 1 + (lookahead - 1) * max(1, *self.duration_values)
        candidates = self._list_consecutive_frames(first_frames, num_candidates)
        candidate_states = self._gather_encoder_states(clip_indices, candidates)
        candidate_durations = self._to_durations(self.find_best_durations(candidate_states, clip_states))
        frames, durations = [], []
        for clip_frames, clip_durations in zip(candidates, candidate_durations, strict=True):
            offsets = follow_blanks(clip_durations, lookahead)
            frames.append([clip_frames[offset] for offset in offsets])
            durations.append([clip_durations[offset] for offset in offsets])
        return FramePlan(clip_indices, frames, clip_states, durations)

    def score(self, plan: FramePlan) -> FrameScores:
        """Find the best token and the best duration of every planned frame.

        If `self.search_tokens` is set, a token that is not the blank need not be the best, because a fusion chooses it.
        If `self.find_best_tokens` or `self.search_tokens` is set, it replaces the call of the joint network.

        Args:
            plan: K frames of each of R clips.

        Returns:
            The best outputs, and the scores if the joint network was called.
        """
        options = self.options
        encoder_states = self._gather_encoder_states(plan.clip_indices, plan.frames)
        logits, inputs = None, (encoder_states, plan.predictor_states)
        searched_tokens = None if self.search_tokens is None else self.search_tokens(*inputs)
        if searched_tokens is not None:
            tokens = searched_tokens.tokens.reshape(encoder_states.shape[:2]).tolist()
        elif self.find_best_tokens is not None:
            tokens = self.find_best_tokens(*inputs).tolist()
        else:
            logits = self.joint(*inputs)
            # `max` is faster than `argmax` on this slice, which is not contiguous in memory
            tokens = logits[..., : options.vocab_size].max(-1).indices.tolist()
        durations = plan.durations
        if options.durations is None:
            # RNN-T: a label has duration 0 and a blank has duration 1
            durations = [[int(token == options.blank_id) for token in clip_tokens] for clip_tokens in tokens]
        elif durations is None and logits is not None:
            durations = self._to_durations(logits[..., options.vocab_size :].argmax(-1))
        # `__init__` sets the functions that replace the joint network for TDT only if the plan contains durations
        assert durations is not None
        return FrameScores(tokens, durations, logits, searched_tokens)

    def _list_consecutive_frames(self, first_frames: Sequence[int], num_frames: int) -> list[list[int]]:
        """List `num_frames` consecutive frame indices from each first frame on.

        Indices after the last frame of the batch are replaced by the last frame, because the lists must have equal
        lengths.
        """
        last_frame = self.num_frames - 1
        return [[min(first + offset, last_frame) for offset in range(num_frames)] for first in first_frames]

    def _gather_encoder_states(self, clip_indices: Sequence[int], frames: Sequence[Sequence[int]]) -> Tensor:
        """Gather the encoder states of K frames of each of R clips.

        Args:
            clip_indices: indices of the R clips.
            frames: K frame indices of each clip.

        Returns:
            (R, K, J) encoder states, where J is the width of the joint network.
        """
        # frame n of clip b is at index b * N + n of `self.flat_encoder_states`
        flat_indices = [
            clip_index * self.num_frames + frame
            for clip_index, clip_frames in zip(clip_indices, frames, strict=True)
            for frame in clip_frames
        ]
        flat_indices_tensor = torch.tensor(flat_indices, device=self.flat_encoder_states.device)
        return self.flat_encoder_states.index_select(0, flat_indices_tensor).unflatten(0, (len(clip_indices), -1))

    def _to_durations(self, duration_indices: Tensor) -> list[list[int]]:
        """Convert (R, K) indices of duration outputs to durations in frames."""
        return [[self.duration_values[index] for index in indices] for indices in duration_indices.tolist()]


def advance_clips(
    searches: Sequence[ClipSearch],
    plan: FramePlan,
    scores: FrameScores,
    options: TransducerOptions,
    new_labels: NewLabels,
) -> list[int]:
    """Append the scored steps to every planned clip, up to the first label of the clip.

    Args:
        searches: the search state of every clip of the batch, changed in place.
        plan: the R clips and K frames of each that were scored.
        scores: the best outputs of the joint network on these frames.
        options: settings of the search.
        new_labels: the new labels are appended to it, if the scores on their frames are needed.

    Returns:
        Indices of the clips that have no new label and are not finished.
    """
    without_label: list[int] = []
    # (index of the clip in the plan, index of the frame in the plan) of every new label
    label_plan_rows: list[int] = []
    label_positions: list[int] = []
    stored_logits = scores.logits if options.keep_logits else None
    for plan_row, clip_index in enumerate(plan.clip_indices):
        search = searches[clip_index]
        label_position = search.advance(
            plan.frames[plan_row],
            scores.tokens[plan_row],
            scores.durations[plan_row],
            None if stored_logits is None else stored_logits[plan_row],
        )
        if label_position is not None:
            label_plan_rows.append(plan_row)
            label_positions.append(label_position)
        elif not search.is_finished:
            without_label.append(clip_index)
    if label_plan_rows and new_labels.needs_logits:
        clip_indices = [plan.clip_indices[plan_row] for plan_row in label_plan_rows]
        if scores.searched_tokens is not None:
            lookahead = len(plan.frames[0])
            frames = [
                row * lookahead + position for row, position in zip(label_plan_rows, label_positions, strict=True)
            ]
            new_labels.rough_clip_indices.extend(clip_indices)
            new_labels.rough_scores.append(scores.searched_tokens.select(frames))
        elif scores.logits is not None:
            new_labels.clip_indices.extend(clip_indices)
            new_labels.logits.append(scores.logits[label_plan_rows, label_positions, : options.vocab_size])
    return without_label


def complete_labels(
    searches: Sequence[ClipSearch],
    new_labels: NewLabels,
    confidence_method: str | None,
    label_chooser: LabelChooser | None,
) -> None:
    """Choose the new labels of clips with a fusion, and compute the confidence of the labels.

    Args:
        searches: the search state of every clip of the batch, changed in place.
        new_labels: the new labels, at most one per clip.
        confidence_method: method of `compute_token_confidence`; `None` for no confidence.
        label_chooser: chooses the labels with a fusion, changed in place; `None` to keep the labels.
    """
    if label_chooser is not None and new_labels.rough_scores:
        rough_scores = new_labels.rough_scores[0].join(new_labels.rough_scores[1:])
        labels = label_chooser.choose_from(new_labels.rough_clip_indices, rough_scores)
        _replace_labels(searches, new_labels.rough_clip_indices, labels)
    if not new_labels.logits or (label_chooser is None and confidence_method is None):
        return
    # (R, V) scores on the frames of R labels
    logits, new_tokens = torch.cat(new_labels.logits), None
    if label_chooser is not None:
        # the blank is the last of the V tokens
        best_labels = [searches[clip_index].last_label for clip_index in new_labels.clip_indices]
        new_tokens = label_chooser.choose(new_labels.clip_indices, logits[:, :-1], best_labels)
        _replace_labels(searches, new_labels.clip_indices, new_tokens)
    if confidence_method is not None:
        confidences = compute_token_confidence(logits, confidence_method, new_tokens).tolist()
        for clip_index, confidence in zip(new_labels.clip_indices, confidences, strict=True):
            search = searches[clip_index]
            search.steps.confidences[search.last_label_step] = confidence


def _replace_labels(searches: Sequence[ClipSearch], clip_indices: list[int], labels: Tensor) -> None:
    """Replace the last label of R clips by the (R,) labels that the fusion chose."""
    for clip_index, label in zip(clip_indices, labels.tolist(), strict=True):
        searches[clip_index].replace_last_label(label)


def predict_clips(
    predict: Predict,
    predictor_states: Tensor,
    lstm_state: Any,
    searches: Sequence[ClipSearch],
    clip_indices: list[int],
) -> tuple[Tensor, Any]:
    """Run the prediction network for the clips with a new label; the states of all other clips do not change.

    Args:
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        predictor_states: (B, J) last outputs of the prediction network, where J is the width of the joint network.
        lstm_state: LSTM state of the prediction network, a tuple of tensors (num_layers, B, LSTM width).
        searches: the search state of every clip of the batch.
        clip_indices: indices of the clips with a new label.

    Returns:
        The new (B, J) predictor states and the new LSTM state.
    """
    device = predictor_states.device
    labels = torch.tensor([searches[clip_index].last_label for clip_index in clip_indices], device=device)
    if len(clip_indices) == len(searches):
        return predict(labels, lstm_state)
    indices = torch.tensor(clip_indices, device=device)
    selected_lstm_state = tuple(tensor[:, indices] for tensor in lstm_state)
    new_predictor_states, new_lstm_state = predict(labels, selected_lstm_state)
    updated_lstm_state = tuple(
        tensor.index_copy(1, indices, new_tensor) for tensor, new_tensor in zip(lstm_state, new_lstm_state, strict=True)
    )
    return predictor_states.index_copy(0, indices, new_predictor_states), updated_lstm_state
