"""Greedy transducer decoding by label looping: many rows and several frames per call of the networks.

`greedy_transducer_reference` in `greedy.py` is the plain search with the same result. The choices that affect the speed
alone are in `choose_lookahead`, `is_prediction_due` and `FrameScorer.plan_frames`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .confidence import token_confidence
from .hypotheses import Hypotheses, RowSteps, collect_hypotheses
from .options import Joint, Predict, TransducerOptions

# Frames that one call of the joint network scores, over all rows. On a CPU a call is bound by reading the weights, so
# that up to this number of frames costs little more than one frame.
FRAMES_PER_CALL = 32
# Frames that one call scores in one row. The next label is rarely further away.
FRAMES_PER_ROW = 4

# Share of the unfinished rows that must have a new label before the prediction network runs. Its cost hardly depends on
# the number of rows, so it is cheaper to run it once for several rows.
WAIT_FOR = 0.6

# Called after every step with the tokens of all rows; returns for every row whether it must stop.
OnStep = Callable[[list[list[int]]], Sequence[bool]]


@dataclass(frozen=True)
class Shortcuts:
    """Faster ways to the best outputs of a joint network. Both callables have the arguments of `Joint`.

    Args:
        durations: returns the index of the best duration output (R, K). The search uses it to find the frames that a
            row visits as long as it emits blanks, and scores no other frames. `None` if there is no shortcut.
        tokens: returns the best token (R, K). It is used if no scores are requested. `None` if there is no shortcut.
    """

    durations: Callable[[Tensor, Tensor], Tensor] | None = None
    tokens: Callable[[Tensor, Tensor], Tensor] | None = None


def greedy_transducer(
    encoded: Tensor,
    frame_lengths: Tensor,
    predict: Predict,
    joint: Joint,
    options: TransducerOptions,
    pad_id: int = 0,
    shortcuts: Shortcuts = Shortcuts(),
    on_step: OnStep | None = None,
) -> Hypotheses:
    """Decode RNN-T or TDT scores greedily, all rows together, by label looping (arXiv 2406.06220).

    The joint network scores several frames ahead in every row. The prediction network runs only for rows with a new
    label. The result equals that of `greedy_transducer_reference`.

    Args:
        encoded: (B, N, J) encoder frames, projected to the width of the joint network.
        frame_lengths: (B,) number of valid frames.
        predict: the prediction network, see `Predict`.
        joint: the joint network, see `Joint`.
        options: the settings of the search.
        pad_id: token id past the end of a row.
        shortcuts: faster ways to the best outputs of the joint network.
        on_step: called after every step with the tokens of all rows; `None` to call nothing.

    Returns:
        The hypotheses of all rows; durations are the predicted ones, as in NeMo.
    """
    batch, num_frames = encoded.shape[:2]
    rows = [RowSearch(min(length, num_frames), options) for length in frame_lengths.tolist()]
    start_tokens = torch.full((batch,), options.blank_id, device=encoded.device)
    predictor_states, lstm_state = predict(start_tokens, None)
    scorer = FrameScorer(encoded, joint, shortcuts, options)
    unfinished = select_unfinished(rows, range(batch))
    while unfinished:
        searching = unfinished
        while not is_prediction_due(len(searching), len(unfinished)):
            plan = scorer.plan_frames(rows, searching, predictor_states)
            searching = advance_rows(rows, plan, scorer.score(plan), options)
            if on_step is not None:
                stop_rows(rows, on_step)
                searching = select_unfinished(rows, searching)
        with_new_label = select_unfinished(rows, sorted(set(unfinished) - set(searching)))
        if with_new_label:
            predictor_states, lstm_state = predict_rows(predict, predictor_states, lstm_state, rows, with_new_label)
        unfinished = select_unfinished(rows, unfinished)
    has_confidence = options.confidence is not None
    steps = [row.steps for row in rows]
    return collect_hypotheses(steps, options.blank_id, pad_id, encoded.device, has_confidence, options.keep_logits)


@dataclass
class RowSearch:
    """The state of the search in one row.

    Args:
        frame_length: number of valid frames.
        options: the settings of the search.
        frame: the next frame to decide on.
        labels_on_frame: labels emitted on this frame so far.
        is_stopped: the row was stopped from outside.
        last_label: the last emitted label.
        last_label_step: index of its step in `steps`.
        steps: all steps so far.
    """

    frame_length: int
    options: TransducerOptions
    frame: int = 0
    labels_on_frame: int = 0
    is_stopped: bool = False
    last_label: int = 0
    last_label_step: int = 0
    steps: RowSteps = field(default_factory=RowSteps)

    @property
    def is_finished(self) -> bool:
        """Whether the row was stopped, has passed its last frame, or has reached the limit of steps."""
        max_steps = self.options.max_steps
        is_full = max_steps is not None and len(self.steps.tokens) >= max_steps
        return self.is_stopped or self.frame >= self.frame_length or is_full

    def advance(self, frames: list[int], tokens: list[int], durations: list[int], logits: Tensor | None) -> int | None:
        """Take the steps that were scored on the frames ahead, up to and including the first label.

        `self.frame` is the next frame to decide on. Scored frames that a duration has jumped over are skipped, and so
        are all frames after the row is finished.

        Args:
            frames: K scored frames, in order of time.
            tokens: best token of each frame.
            durations: duration of each frame, as predicted.
            logits: (K, V + D) scores to keep; `None` to keep none.

        Returns:
            The position of the label among the K frames; `None` if there was no label.
        """
        for position, frame in enumerate(frames):
            if frame != self.frame or self.is_finished:
                continue
            if logits is not None:
                self.steps.logits.append(logits[position])
            token, duration = tokens[position], durations[position]
            if token == self.options.blank_id:
                self._take_step(token, max(duration, 1))
                continue
            self.last_label, self.last_label_step = token, len(self.steps.tokens)
            self._take_step(token, duration)
            return position
        return None

    def _take_step(self, token: int, duration: int) -> None:
        """Record a step and move on by its duration, or by one frame if the frame has reached `max_symbols` labels.

        Args:
            token: label or blank.
            duration: frames to advance.
        """
        self.labels_on_frame = 0 if duration > 0 else self.labels_on_frame + 1
        is_forced = self.labels_on_frame == self.options.max_symbols
        self.steps.append(token, self.frame, duration, is_forced)
        self.frame += duration
        if is_forced:
            self.frame += 1
            self.labels_on_frame = 0


def select_unfinished(rows: Sequence[RowSearch], indices: Sequence[int]) -> list[int]:
    """Return those indices whose rows are not finished.

    Args:
        rows: the state of all rows.
        indices: indices into `rows`.
    """
    return [index for index in indices if not rows[index].is_finished]


def stop_rows(rows: Sequence[RowSearch], on_step: OnStep) -> None:
    """Call `on_step` with the tokens of all rows and stop the rows for which it returns true.

    Args:
        rows: the state of all rows.
        on_step: gets one list of tokens per row and returns one truth value per row.
    """
    for row, must_stop in zip(rows, on_step([row.steps.tokens for row in rows]), strict=True):
        row.is_stopped = row.is_stopped or bool(must_stop)


def is_prediction_due(num_searching: int, num_unfinished: int) -> bool:
    """Tell whether enough rows have a new label to run the prediction network.

    Args:
        num_searching: rows that are still searching for their next label.
        num_unfinished: rows that were unfinished when the search for the next label began.
    """
    return num_searching <= (1 - WAIT_FOR) * num_unfinished


def choose_lookahead(options: TransducerOptions, num_rows: int) -> int:
    """Return the number of frames to score in every row by one call of the joint network.

    Args:
        options: `lookahead` overrides the choice if it is not 0.
        num_rows: number of rows in the call.
    """
    return options.lookahead or min(FRAMES_PER_ROW, max(1, FRAMES_PER_CALL // num_rows))


@dataclass(frozen=True)
class FramePlan:
    """The frames to score by one call of the joint network.

    Args:
        rows: R indices of rows.
        frames: K frames of each of these rows, in order of time.
        predictor_states: (R, 1, J) predictor states of these rows.
        durations: duration of each frame, if a shortcut has predicted them; `None` otherwise.
    """

    rows: list[int]
    frames: list[list[int]]
    predictor_states: Tensor
    durations: list[list[int]] | None = None


@dataclass(frozen=True)
class FrameScores:
    """The best outputs of the joint network on the frames of a `FramePlan`.

    Args:
        tokens: best token of each of the (R, K) frames.
        durations: duration of each frame, as predicted; for RNN-T 1 for a blank and 0 for a label.
        logits: (R, K, V + D) scores; `None` if a shortcut found the tokens.
    """

    tokens: list[list[int]]
    durations: list[list[int]]
    logits: Tensor | None


class FrameScorer:
    """Plans which frames to score, and scores them.

    Args:
        encoded: (B, N, J) encoder frames.
        joint: the joint network.
        shortcuts: faster ways to its best outputs.
        options: the settings of the search.
    """

    def __init__(self, encoded: Tensor, joint: Joint, shortcuts: Shortcuts, options: TransducerOptions) -> None:
        self.num_frames = encoded.shape[1]
        # (B * N, J)
        self.flat_frames = encoded.flatten(0, 1)
        self.joint, self.options = joint, options
        self.duration_values = options.durations or ()
        self.best_durations = shortcuts.durations
        needs_durations = options.durations is not None and shortcuts.durations is None
        needs_logits = needs_durations or options.confidence is not None or options.keep_logits
        self.best_tokens = None if needs_logits else shortcuts.tokens

    def plan_frames(self, rows: Sequence[RowSearch], searching: list[int], predictor_states: Tensor) -> FramePlan:
        """Choose the next frames of every row that searches for a label.

        Without the shortcut `self.best_durations` these are consecutive frames. With it, they are the frames that the
        row visits as long as it emits blanks, so that frames that a blank jumps over are not scored.

        Args:
            rows: the state of all rows.
            searching: R indices of the rows that search.
            predictor_states: (B, J) predictor states of all rows.

        Returns:
            K frames of each of the R rows.
        """
        lookahead = choose_lookahead(self.options, len(searching))
        first_frames = [rows[index].frame for index in searching]
        states = predictor_states.index_select(0, torch.tensor(searching, device=predictor_states.device))[:, None]
        if self.best_durations is None:
            return FramePlan(searching, self._consecutive_frames(first_frames, lookahead), states)
        # a blank advances at least one frame and at most the largest duration
        reach = 1 + (lookahead - 1) * max(1, *self.duration_values)
        candidates = self._consecutive_frames(first_frames, reach)
        best_durations = self._to_frames(self.best_durations(self._gather_frames(searching, candidates), states))
        frames, durations = [], []
        for row_frames, row_durations in zip(candidates, best_durations, strict=True):
            positions = follow_blanks(row_durations, lookahead)
            frames.append([row_frames[position] for position in positions])
            durations.append([row_durations[position] for position in positions])
        return FramePlan(searching, frames, states, durations)

    def score(self, plan: FramePlan) -> FrameScores:
        """Find the best token and duration of every planned frame, by the shortcut `self.best_tokens` if there is one.

        Args:
            plan: R rows with K frames each.

        Returns:
            The best outputs; with the scores, unless the shortcut was used.
        """
        options = self.options
        encoded = self._gather_frames(plan.rows, plan.frames)
        if self.best_tokens is not None:
            logits = None
            tokens = self.best_tokens(encoded, plan.predictor_states).tolist()
        else:
            logits = self.joint(encoded, plan.predictor_states)
            # `max` is faster than `argmax` on scores that are not contiguous in memory
            tokens = logits[..., : options.vocab_size].max(-1).indices.tolist()
        durations = plan.durations
        if options.durations is None:
            durations = [[int(token == options.blank_id) for token in row] for row in tokens]
        elif durations is None and logits is not None:
            durations = self._to_frames(logits[..., options.vocab_size :].argmax(-1))
        # without planned durations the joint network was called, see `needs_durations` in `__init__`
        assert durations is not None
        return FrameScores(tokens, durations, logits)

    def _consecutive_frames(self, first_frames: Sequence[int], count: int) -> list[list[int]]:
        """Return `count` frame indices from every first frame on; past the end the last frame of the batch repeats."""
        last_frame = self.num_frames - 1
        return [[min(first + offset, last_frame) for offset in range(count)] for first in first_frames]

    def _gather_frames(self, rows: Sequence[int], frames: Sequence[Sequence[int]]) -> Tensor:
        """Return the encoder frames (R, K, J) at K frame indices of each of R rows."""
        positions = [
            row * self.num_frames + frame for row, row_frames in zip(rows, frames, strict=True) for frame in row_frames
        ]
        selected = self.flat_frames.index_select(0, torch.tensor(positions, device=self.flat_frames.device))
        return selected.unflatten(0, (len(rows), -1))

    def _to_frames(self, best_outputs: Tensor) -> list[list[int]]:
        """Return the frame counts of the indices (R, K) of duration outputs."""
        return [[self.duration_values[output] for output in row] for row in best_outputs.tolist()]


def follow_blanks(durations: Sequence[int], count: int) -> list[int]:
    """Return the positions that a row visits if it emits a blank on each of them.

    Args:
        durations: duration on each of consecutive frames; a blank of duration 0 advances one frame.
        count: number of positions to return, the first of which is 0.
    """
    positions = [0]
    for _ in range(count - 1):
        positions.append(positions[-1] + max(1, durations[positions[-1]]))
    return positions


def advance_rows(
    rows: Sequence[RowSearch], plan: FramePlan, scores: FrameScores, options: TransducerOptions
) -> list[int]:
    """Take the scored steps in every planned row, up to its first label.

    Args:
        rows: the state of all rows, which is changed.
        plan: the planned rows and frames.
        scores: the best outputs on these frames.
        options: the settings of the search.

    Returns:
        Indices of the rows that found no label and are not finished.
    """
    searching: list[int] = []
    # index into the plan, and position among the scored frames, of every new label
    label_rows: list[int] = []
    label_positions: list[int] = []
    for plan_row, index in enumerate(plan.rows):
        kept_logits = scores.logits[plan_row] if scores.logits is not None and options.keep_logits else None
        position = rows[index].advance(
            plan.frames[plan_row], scores.tokens[plan_row], scores.durations[plan_row], kept_logits
        )
        if position is not None:
            label_rows.append(plan_row)
            label_positions.append(position)
        elif not rows[index].is_finished:
            searching.append(index)
    if label_rows and options.confidence is not None and scores.logits is not None:
        label_logits = scores.logits[label_rows, label_positions, : options.vocab_size]
        confidences = token_confidence(label_logits, options.confidence).tolist()
        for plan_row, confidence in zip(label_rows, confidences, strict=True):
            row = rows[plan.rows[plan_row]]
            row.steps.confidence[row.last_label_step] = confidence
    return searching


def predict_rows(
    predict: Predict, predictor_states: Tensor, lstm_state: Any, rows: Sequence[RowSearch], indices: list[int]
) -> tuple[Tensor, Any]:
    """Run the prediction network for rows with a new label; the other rows keep their states.

    Args:
        predict: the prediction network.
        predictor_states: (B, J) its last outputs.
        lstm_state: its LSTM state, a tuple of tensors (layers, B, P).
        rows: the state of all rows.
        indices: R indices of the rows with a new label.

    Returns:
        The new predictor states (B, J) and the new LSTM state.
    """
    labels = torch.tensor([rows[index].last_label for index in indices], device=predictor_states.device)
    if len(indices) == len(rows):
        return predict(labels, lstm_state)
    row_index = torch.tensor(indices, device=predictor_states.device)
    new_states, new_lstm_state = predict(labels, tuple(part[:, row_index] for part in lstm_state))
    updated_lstm_state = tuple(
        part.index_copy(1, row_index, new_part) for part, new_part in zip(lstm_state, new_lstm_state, strict=True)
    )
    return predictor_states.index_copy(0, row_index, new_states), updated_lstm_state
