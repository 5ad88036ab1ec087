"""The result of decoding: the recognised tokens of a batch with their frames, durations and confidence.

The search itself is in `greedy.py` and `label_looping.py`. The processor computes text and times in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """All steps of a transducer search, blanks included, in the layout of transformers' `generate`.

    `num_steps` is the largest number of steps of a clip. Shorter clips are padded with `pad_id` in `tokens` and with 0
    in the remaining fields.

    Args:
        tokens: (B, num_steps) label or blank of each step.
        durations: (B, num_steps) predicted duration of each step in frames; at least 1 for a blank.
        forced_advances: (B, num_steps) 1 if the search was forced to the next frame after the step because the
            maximum number of labels per frame was reached, 0 otherwise.
        lengths: (B,) number of steps.
        confidence: (B, num_steps) confidence of each label, 0 for blanks; `None` if it was not requested.
        logits: (B, num_steps, V + D) scores of each step; `None` if they were not requested.
    """

    tokens: Tensor
    durations: Tensor
    forced_advances: Tensor
    lengths: Tensor
    confidence: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Hypotheses:
    """The recognised tokens of a batch, without blanks and repeated CTC frames; an index selects one clip.

    `num_tokens` is the largest number of tokens of a clip. Shorter clips are padded.

    Args:
        tokens: (B, num_tokens) token ids.
        frames: (B, num_tokens) encoder frame at which each token was emitted.
        durations: (B, num_tokens) number of frames: the predicted duration for TDT, 0 for RNN-T, the number of
            frames that repeat the token for CTC.
        lengths: (B,) number of tokens.
        confidence: (B, num_tokens) confidence of each token, from 0 to 1; `None` if it was not requested.
        steps: all steps of a transducer search; `None` for CTC and after selecting a clip.
        scores: (B,) sum of the log-probabilities of the steps, and of the weighted scores of language models and phrase
            boosting; `None` for greedy decoding.
    """

    tokens: Tensor
    frames: Tensor
    durations: Tensor
    lengths: Tensor
    confidence: Tensor | None = None
    steps: Steps | None = None
    scores: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.lengths)

    def __getitem__(self, clip_index: int) -> Hypotheses:
        """Return the hypothesis of one clip as a batch of size 1, without padding and without `steps`."""
        length = int(self.lengths[clip_index])

        def select(values: Tensor) -> Tensor:
            """Select the (1, length) valid entries of the clip from a (B, num_tokens) tensor."""
            return values[clip_index : clip_index + 1, :length]

        return Hypotheses(
            tokens=select(self.tokens),
            frames=select(self.frames),
            durations=select(self.durations),
            lengths=self.lengths[clip_index : clip_index + 1],
            confidence=None if self.confidence is None else select(self.confidence),
            scores=None if self.scores is None else self.scores[clip_index : clip_index + 1],
        )

    def cpu(self) -> Hypotheses:
        """Copy the hypotheses to the CPU, without `steps`, which only `generate` needs."""
        return Hypotheses(
            tokens=self.tokens.cpu(),
            frames=self.frames.cpu(),
            durations=self.durations.cpu(),
            lengths=self.lengths.cpu(),
            confidence=None if self.confidence is None else self.confidence.cpu(),
            scores=None if self.scores is None else self.scores.cpu(),
        )

    def to_lists(self, clip_index: int = 0) -> dict[str, Any]:
        """Convert the hypothesis of one clip to Python lists.

        Args:
            clip_index: index of the clip in the batch.

        Returns:
            The keys `tokens`, `frames`, `durations` and `confidence`, each with a list of one value per token;
            `confidence` is `None` if it was not requested.
        """
        hypothesis = self[clip_index]
        return {
            "tokens": hypothesis.tokens[0].tolist(),
            "frames": hypothesis.frames[0].tolist(),
            "durations": hypothesis.durations[0].tolist(),
            "confidence": None if hypothesis.confidence is None else hypothesis.confidence[0].tolist(),
        }


@dataclass
class ClipSteps:
    """The decoding steps of one clip during the search; every list has one entry per step.

    Args:
        tokens: label or blank.
        frames: encoder frame of the step.
        durations: predicted duration in frames.
        forced_advances: 1 if the search was forced to the next frame after the step, 0 otherwise.
        confidences: confidence of the label; 0 for a blank.
        logits: (V + D,) scores; the list is empty if scores were not requested.
    """

    tokens: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)
    forced_advances: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def append(self, token: int, frame: int, duration: int, is_forced_advance: bool, confidence: float = 0.0) -> None:
        """Append one decoding step.

        Args:
            token: label or blank.
            frame: encoder frame of the step.
            duration: predicted duration in frames.
            is_forced_advance: whether the search is forced to the next frame because the maximum number of labels per
                frame is reached.
            confidence: confidence of the label; 0 for a blank.
        """
        self.tokens.append(token)
        self.frames.append(frame)
        self.durations.append(duration)
        self.forced_advances.append(int(is_forced_advance))
        self.confidences.append(confidence)

    def remove_blanks(self, blank_id: int) -> ClipSteps:
        """Return a copy that contains only the steps with a label, without their scores.

        Args:
            blank_id: id of the blank; every other token is a label.
        """
        label_steps = ClipSteps()
        for step, token in enumerate(self.tokens):
            if token != blank_id:
                is_forced_advance = bool(self.forced_advances[step])
                label_steps.append(
                    token, self.frames[step], self.durations[step], is_forced_advance, self.confidences[step]
                )
        return label_steps


def collect_hypotheses(
    all_steps: Sequence[ClipSteps],
    blank_id: int,
    pad_id: int,
    device: torch.device,
    has_confidence: bool,
    has_logits: bool,
) -> Hypotheses:
    """Combine the decoding steps of all clips of a transducer into padded tensors.

    Args:
        all_steps: the steps of each clip, blanks included.
        blank_id: id of the blank; every other token is a label.
        pad_id: token id that pads short hypotheses.
        device: device of the result.
        has_confidence: whether confidence was requested.
        has_logits: whether the scores of the steps were requested.

    Returns:
        The labels of all clips; the field `steps` contains all steps, blanks included.
    """
    label_steps = [steps.remove_blanks(blank_id) for steps in all_steps]
    return Hypotheses(
        tokens=pad_lists([steps.tokens for steps in label_steps], pad_id, device),
        frames=pad_lists([steps.frames for steps in label_steps], 0, device),
        durations=pad_lists([steps.durations for steps in label_steps], 0, device),
        lengths=torch.tensor([len(steps.tokens) for steps in label_steps], device=device),
        confidence=pad_lists([steps.confidences for steps in label_steps], 0.0, device) if has_confidence else None,
        steps=Steps(
            tokens=pad_lists([steps.tokens for steps in all_steps], pad_id, device),
            durations=pad_lists([steps.durations for steps in all_steps], 0, device),
            forced_advances=pad_lists([steps.forced_advances for steps in all_steps], 0, device),
            lengths=torch.tensor([len(steps.tokens) for steps in all_steps], device=device),
            confidence=pad_lists([steps.confidences for steps in all_steps], 0.0, device) if has_confidence else None,
            logits=pad_logits([steps.logits for steps in all_steps], device) if has_logits else None,
        ),
    )


def pad_lists(lists: Sequence[Sequence[float]], padding_value: float, device: torch.device) -> Tensor:
    """Pad lists of numbers at the end and stack them as the rows of a tensor.

    Args:
        lists: lists of numbers.
        padding_value: value of the padding; its type decides the dtype: float32 for a float, int64 for an int.
        device: device of the result.

    Returns:
        (number of lists, length of the longest list).
    """
    max_length = max(map(len, lists), default=0)
    dtype = torch.float32 if isinstance(padding_value, float) else torch.int64
    padded_lists = [[*values, *[padding_value] * (max_length - len(values))] for values in lists]
    # `reshape` sets the shape (0, 0) if there are no lists
    return torch.tensor(padded_lists, dtype=dtype, device=device).reshape(len(lists), max_length)


def pad_logits(clips: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Pad the scores of the steps of all clips to one tensor.

    Args:
        clips: for each of B clips, one (V + D,) tensor of scores per step.
        device: device of the result.

    Returns:
        (B, num_steps, V + D) float32, where `num_steps` is the largest number of steps of a clip. Shorter
        clips are padded with zeros.
        (B, 0, 1) if no clip has a step.
    """
    num_steps = max(map(len, clips), default=0)
    num_outputs = max((len(step_logits[0]) for step_logits in clips if step_logits), default=1)
    padded_logits = torch.zeros(len(clips), num_steps, num_outputs, device=device)
    for clip_index, step_logits in enumerate(clips):
        if step_logits:
            padded_logits[clip_index, : len(step_logits)] = torch.stack(list(step_logits))
    return padded_logits


def insert_forced_blanks(steps: Steps, blank_id: int, pad_id: int, max_steps: int | None) -> Steps:
    """Insert a blank with duration 1 after every step at which the search was forced to the next frame.

    The search is forced to the next frame when the maximum number of labels per frame is reached.

    Args:
        steps: the steps of a search; the blanks are inserted after steps with `forced_advances` 1.
        blank_id: token of the inserted steps.
        pad_id: token that pads short clips.
        max_steps: maximum number of steps of a clip, later steps are removed; `None` for no limit.

    Returns:
        The steps with the inserted blanks. All `forced_advances` are 0, and confidence and scores of the inserted
        steps are 0.
    """
    if not steps.forced_advances.any():
        return steps
    batch, num_steps = steps.tokens.shape
    num_inserted = steps.forced_advances.sum(1)
    lengths = steps.lengths + num_inserted
    if max_steps is not None:
        lengths = lengths.clamp(max=max_steps)
    max_length = num_steps + int(num_inserted.max())
    clip_indices = torch.arange(batch, device=steps.tokens.device)[:, None].expand(batch, num_steps)
    # (B, num_steps) new position of every step: its old position plus the number of blanks inserted before it,
    # for example forced_advances 0 1 0 1 0 -> new positions 0 1 3 4 6
    num_inserted_before = steps.forced_advances.cumsum(1) - steps.forced_advances
    positions = torch.arange(num_steps, device=clip_indices.device) + num_inserted_before
    is_forced_advance = steps.forced_advances.bool()
    blank_clips, blank_positions = clip_indices[is_forced_advance], positions[is_forced_advance] + 1

    def move(values: Tensor, padding_value: int, blank_value: int) -> Tensor:
        """Move (B, num_steps, ...) values to their new positions and write `blank_value` at the inserted steps."""
        moved = values.new_full((batch, max_length, *values.shape[2:]), padding_value)
        moved[clip_indices, positions] = values
        moved[blank_clips, blank_positions] = blank_value
        return moved[:, : int(lengths.max())]

    return Steps(
        tokens=move(steps.tokens, pad_id, blank_id),
        durations=move(steps.durations, 0, 1),
        forced_advances=move(torch.zeros_like(steps.forced_advances), 0, 0),
        lengths=lengths,
        confidence=None if steps.confidence is None else move(steps.confidence, 0, 0),
        logits=None if steps.logits is None else move(steps.logits, 0, 0),
    )


def collapse_ctc(best_tokens: Tensor, blank_id: int, frame_confidence: Tensor | None = None) -> Hypotheses:
    """Collapse the best tokens of all frames to hypotheses: merge repeats, then remove blanks.

    Source: Graves et al., ICML 2006. The function can be compiled, because all shapes depend only on the input shape.

    Args:
        best_tokens: (B, N) best token of every frame; `blank_id` at padding frames.
        blank_id: id of the blank.
        frame_confidence: (B, N) confidence of every frame; `None` for no confidence. The confidence of a token is the
            minimum over its frames, as in NeMo.

    Returns:
        Hypotheses with tensors of shape (B, N), because N is the largest possible number of tokens. Only the first
        `lengths` entries of each clip are valid.
    """
    # a run is a group of consecutive frames with the same token, for example tokens 7 7 0 7 -> runs 0 0 1 2
    is_run_start = torch.ones_like(best_tokens, dtype=torch.bool)
    is_run_start[:, 1:] = best_tokens[:, 1:] != best_tokens[:, :-1]
    # (B, N) index of the run of each frame
    run_indices = is_run_start.cumsum(1) - 1
    run_lengths = torch.zeros_like(best_tokens).scatter_add(1, run_indices, torch.ones_like(best_tokens))
    is_label_start = is_run_start & (best_tokens != blank_id)
    # the stable sort moves the first frames of the labels to the left, in chronological order
    label_frames = is_label_start.int().argsort(dim=1, descending=True, stable=True)
    label_runs = run_indices.gather(1, label_frames)
    confidence = None
    if frame_confidence is not None:
        no_confidence = torch.full_like(frame_confidence, torch.inf)
        run_confidence = no_confidence.scatter_reduce(1, run_indices, frame_confidence, "amin")
        confidence = run_confidence.gather(1, label_runs)
    return Hypotheses(
        tokens=best_tokens.gather(1, label_frames),
        frames=label_frames,
        durations=run_lengths.gather(1, label_runs),
        lengths=is_label_start.sum(1),
        confidence=confidence,
    )


def penalise_length(scores: Tensor, num_labels: Tensor, length_penalty: float) -> Tensor:
    """Divide scores by (number of labels + 1)^length_penalty, which orders hypotheses of different lengths.

    Args:
        scores: (...) scores.
        num_labels: (...) number of labels of each hypothesis.
        length_penalty: the exponent.

    Returns:
        (...) scores.
    """
    # integers cannot have a negative integer exponent
    return scores / (num_labels + 1) ** float(length_penalty)
