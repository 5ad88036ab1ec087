"""The result of decoding: the emitted tokens of a batch with their frames, durations and confidence.

The search itself is in `greedy.py`. Text and times in seconds are made by the processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """Every step of a transducer search, blanks included, as `generate` of transformers lists them.

    Columns past the length of a row hold `pad_id` in `tokens` and 0 elsewhere.

    Args:
        tokens: (B, S) label or blank of each step.
        durations: (B, S) frames that each step advances, as the model predicted them; at least 1 for a blank.
        forced_moves: (B, S) 1 after the step at which the limit of labels per frame forced the search to move one more
            frame, else 0.
        lengths: (B,) number of steps.
        confidence: (B, S) confidence of the labels, 0 for blanks; `None` if it was not requested.
        logits: (B, S, V + D) scores of each step; `None` if they were not requested.
    """

    tokens: Tensor
    durations: Tensor
    forced_moves: Tensor
    lengths: Tensor
    confidence: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Hypotheses:
    """The recognised tokens of a batch, without blanks and repeated CTC frames. Indexing selects one row.

    Columns past the length of a row hold padding.

    Args:
        tokens: (B, L) token ids.
        frames: (B, L) encoder frame at which each token was emitted.
        durations: (B, L) frames: for TDT the predicted duration, for RNN-T 0, for CTC the number of frames that repeat
            the token.
        lengths: (B,) number of tokens.
        confidence: (B, L) confidence of each token, from 0 to 1; `None` if it was not requested.
        steps: the steps of a transducer search; `None` for CTC and for selected rows.
    """

    tokens: Tensor
    frames: Tensor
    durations: Tensor
    lengths: Tensor
    confidence: Tensor | None = None
    steps: Steps | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def __getitem__(self, row: int) -> Hypotheses:
        """Return one row as a batch of its own, without padding and without `steps`."""
        length = int(self.lengths[row])

        def select(values: Tensor) -> Tensor:
            """Return the valid columns of the row as (1, length)."""
            return values[row : row + 1, :length]

        return Hypotheses(
            tokens=select(self.tokens),
            frames=select(self.frames),
            durations=select(self.durations),
            lengths=self.lengths[row : row + 1],
            confidence=None if self.confidence is None else select(self.confidence),
        )

    def cpu(self) -> Hypotheses:
        """Return the hypotheses, without `steps`, in the memory of the CPU."""
        return Hypotheses(
            tokens=self.tokens.cpu(),
            frames=self.frames.cpu(),
            durations=self.durations.cpu(),
            lengths=self.lengths.cpu(),
            confidence=None if self.confidence is None else self.confidence.cpu(),
        )

    def to_lists(self, row: int = 0) -> dict[str, Any]:
        """Return one row as plain Python lists.

        Args:
            row: index of the row.

        Returns:
            `tokens`, `frames`, `durations` and `confidence`, each a list with one entry per token; `confidence` is
            `None` if it was not requested.
        """
        selected = self[row]
        return {
            "tokens": selected.tokens[0].tolist(),
            "frames": selected.frames[0].tolist(),
            "durations": selected.durations[0].tolist(),
            "confidence": None if selected.confidence is None else selected.confidence[0].tolist(),
        }


@dataclass
class RowSteps:
    """The steps of one row while it is decoded; every list has one entry per step.

    Args:
        tokens: label or blank.
        frames: encoder frame of the step.
        durations: frames that the step advances, as predicted.
        forced_moves: 1 if the search was forced to move one more frame after the step, else 0.
        confidence: confidence of a label, 0 for a blank.
        logits: (V + D,) scores; empty if they were not requested.
    """

    tokens: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)
    forced_moves: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def append(self, token: int, frame: int, duration: int, is_forced: bool, confidence: float = 0.0) -> None:
        """Add one step.

        Args:
            token: label or blank.
            frame: encoder frame of the step.
            duration: frames that the step advances, as predicted.
            is_forced: the search moves one more frame because of the limit of labels per frame.
            confidence: confidence of a label.
        """
        self.tokens.append(token)
        self.frames.append(frame)
        self.durations.append(duration)
        self.forced_moves.append(int(is_forced))
        self.confidence.append(confidence)

    def without_blanks(self, blank_id: int) -> RowSteps:
        """Return the steps that emitted a label, without their logits.

        Args:
            blank_id: id of the blank; every other token is a label.
        """
        labels = RowSteps()
        for step, token in enumerate(self.tokens):
            if token != blank_id:
                is_forced = bool(self.forced_moves[step])
                labels.append(token, self.frames[step], self.durations[step], is_forced, self.confidence[step])
        return labels


def collect_hypotheses(
    rows: Sequence[RowSteps], blank_id: int, pad_id: int, device: torch.device, has_confidence: bool, has_logits: bool
) -> Hypotheses:
    """Pad the decoded rows of a transducer to one batch.

    Args:
        rows: the steps of each row.
        blank_id: id of the blank; every other token is a label.
        pad_id: token id past the end of a row.
        device: device of the result.
        has_confidence: confidence was requested.
        has_logits: the scores of the steps were requested.

    Returns:
        The labels of every row; the field `steps` holds the blanks as well.
    """
    labels = [row.without_blanks(blank_id) for row in rows]
    return Hypotheses(
        tokens=pad_rows([row.tokens for row in labels], pad_id, device),
        frames=pad_rows([row.frames for row in labels], 0, device),
        durations=pad_rows([row.durations for row in labels], 0, device),
        lengths=torch.tensor([len(row.tokens) for row in labels], device=device),
        confidence=pad_rows([row.confidence for row in labels], 0.0, device) if has_confidence else None,
        steps=Steps(
            tokens=pad_rows([row.tokens for row in rows], pad_id, device),
            durations=pad_rows([row.durations for row in rows], 0, device),
            forced_moves=pad_rows([row.forced_moves for row in rows], 0, device),
            lengths=torch.tensor([len(row.tokens) for row in rows], device=device),
            confidence=pad_rows([row.confidence for row in rows], 0.0, device) if has_confidence else None,
            logits=pad_logits([row.logits for row in rows], device) if has_logits else None,
        ),
    )


def pad_rows(rows: Sequence[Sequence[float]], padding: float, device: torch.device) -> Tensor:
    """Pad lists of numbers to one tensor.

    Args:
        rows: B lists of numbers.
        padding: value past the end of a list; a float makes a float32 tensor, an int an int64 tensor.
        device: device of the result.

    Returns:
        (B, length of the longest list).
    """
    width = max(map(len, rows), default=0)
    dtype = torch.float32 if isinstance(padding, float) else torch.int64
    padded = [[*row, *[padding] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=dtype, device=device).reshape(len(rows), width)


def pad_logits(rows: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Pad the scores of the steps of every row to one tensor.

    Args:
        rows: B lists of (V + D,) scores, one per step.
        device: device of the result.

    Returns:
        (B, S, V + D) float32 with zeros past the end of a row; (B, 0, 1) if there are no steps.
    """
    num_steps = max(map(len, rows), default=0)
    num_outputs = max((len(row[0]) for row in rows if row), default=1)
    padded = torch.zeros(len(rows), num_steps, num_outputs, device=device)
    for index, row in enumerate(rows):
        if row:
            padded[index, : len(row)] = torch.stack(list(row))
    return padded


def insert_forced_blanks(steps: Steps, blank_id: int, pad_id: int, max_steps: int | None) -> Steps:
    """Insert a blank step of one frame after every step at which the search was forced to move.

    A search is forced to move one more frame at the limit of labels per frame; `steps.forced_moves` is 1 there.

    Args:
        steps: the steps of a search.
        blank_id: token of the inserted steps.
        pad_id: token past the end of a row.
        max_steps: number of steps after which a row is cut; `None` for no limit.

    Returns:
        Steps whose `forced_moves` are 0. Inserted steps have duration 1, confidence 0 and scores 0.
    """
    if not steps.forced_moves.any():
        return steps
    batch, num_steps = steps.tokens.shape
    num_inserted = steps.forced_moves.sum(1)
    lengths = steps.lengths + num_inserted
    if max_steps is not None:
        lengths = lengths.clamp(max=max_steps)
    width = num_steps + int(num_inserted.max())
    rows = torch.arange(batch, device=steps.tokens.device)[:, None].expand(batch, num_steps)
    # (B, S) new column of every step: blanks inserted before it move it to the right
    columns = torch.arange(num_steps, device=rows.device) + steps.forced_moves.cumsum(1) - steps.forced_moves
    is_forced = steps.forced_moves.bool()
    blank_rows, blank_columns = rows[is_forced], columns[is_forced] + 1

    def move(values: Tensor, padding: int, blank_value: int) -> Tensor:
        """Move (B, S, ...) values to their new columns and write `blank_value` for the inserted steps."""
        moved = values.new_full((batch, width, *values.shape[2:]), padding)
        moved[rows, columns] = values
        moved[blank_rows, blank_columns] = blank_value
        return moved[:, : int(lengths.max())]

    return Steps(
        tokens=move(steps.tokens, pad_id, blank_id),
        durations=move(steps.durations, 0, 1),
        forced_moves=move(torch.zeros_like(steps.forced_moves), 0, 0),
        lengths=lengths,
        confidence=None if steps.confidence is None else move(steps.confidence, 0, 0),
        logits=None if steps.logits is None else move(steps.logits, 0, 0),
    )


def collapse_ctc(frame_tokens: Tensor, blank_id: int, frame_confidence: Tensor | None = None) -> Hypotheses:
    """Turn the best tokens of all frames into hypotheses: merge repeats, then remove blanks (Graves et al., ICML 2006).

    All shapes depend on the shape of the input alone, so that the function can be compiled.

    Args:
        frame_tokens: (B, N) best token of every frame, `blank_id` past the end of a clip.
        blank_id: id of the blank.
        frame_confidence: (B, N) confidence of every frame; a token gets the smallest of its frames, as in NeMo. `None`
            for no confidence.

    Returns:
        Hypotheses with L = N columns.
    """
    starts_run = torch.ones_like(frame_tokens, dtype=torch.bool)
    starts_run[:, 1:] = frame_tokens[:, 1:] != frame_tokens[:, :-1]
    # (B, N) index of the run to which each frame belongs
    runs = starts_run.cumsum(1) - 1
    run_lengths = torch.zeros_like(frame_tokens).scatter_add(1, runs, torch.ones_like(frame_tokens))
    starts_token = starts_run & (frame_tokens != blank_id)
    # a stable sort moves the first frame of every token to the left, in order of time
    frames = starts_token.int().argsort(dim=1, descending=True, stable=True)
    token_runs = runs.gather(1, frames)
    confidence = None
    if frame_confidence is not None:
        no_frame = torch.full_like(frame_confidence, torch.inf)
        run_confidence = no_frame.scatter_reduce(1, runs, frame_confidence, "amin")
        confidence = run_confidence.gather(1, token_runs)
    return Hypotheses(
        tokens=frame_tokens.gather(1, frames),
        frames=frames,
        durations=run_lengths.gather(1, token_runs),
        lengths=starts_token.sum(1),
        confidence=confidence,
    )
