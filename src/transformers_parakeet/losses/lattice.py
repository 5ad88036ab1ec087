"""The lattice of a transducer: its cells, and how much of a clip's probability goes through each.

Where the scores of a cell come from is for `losses.py` and `fused_loss.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# score of a label arc that cannot be: small enough to vanish in any sum, large enough that a running sum over thousands
# of labels keeps the digits of the others in float64
BLOCKED = -1e7


@dataclass(frozen=True)
class Task:
    """What is to be emitted, and the cells (clip, frame, labels emitted so far) at which that happens.

    Args:
        shape: B, T and W = U+1 of the grid of cells.
        targets: (B, W) label that each cell would emit next; 0 where there is none.
        frames: (B,) valid frames.
        labels: (B,) valid labels.
        cells: (C,) flat indices of the valid cells.
        blank: id of the blank.
        durations: frames of each kind of step; RNN-T is the lattice (0, 1) in which a label stays and a blank moves.
        timed: durations have scores of their own (TDT).
        sigma: subtracted from every token score.
        fastemit: weight of FastEmit.
    """

    shape: tuple[int, int, int]
    targets: Tensor
    frames: Tensor
    labels: Tensor
    cells: Tensor
    blank: int
    durations: tuple[int, ...]
    timed: bool
    sigma: float
    fastemit: float


def make_task(
    shape: Sequence[int],
    device: torch.device,
    tokens: int,
    labels: Tensor,
    frame_lengths: Tensor,
    label_lengths: Tensor,
    blank_id: int,
    durations: Sequence[int] | None,
    sigma: float,
    fastemit_lambda: float,
) -> Task:
    """Check the arguments against each other and find the valid cells."""
    batch, frames, width = shape
    if tuple(labels.shape) != (batch, width - 1):
        raise ValueError(
            f"`labels` must have one column less than the {width} predictor states of each of {batch} clips, got "
            f"{tuple(labels.shape)}: prepend the blank to the predictor's input, and nothing to the labels"
        )
    lengths = frame_lengths.to(device, torch.long), label_lengths.to(device, torch.long)
    for name, values, limit in (("frame", lengths[0], frames), ("label", lengths[1], width - 1)):
        if values.shape != (batch,) or bool(((values < 0) | (values > limit)).any()):
            raise ValueError(f"{name} lengths must be {batch} numbers from 0 to {limit}, got {values.tolist()}")
    columns = torch.arange(width, device=device)
    emits = columns < lengths[1][:, None]
    targets = F.pad(labels.to(device, torch.long), (0, 1)).masked_fill(~emits, 0)
    wrong = emits & ((targets < 0) | (targets >= tokens) | (targets == blank_id))
    if bool(wrong.any()):
        raise ValueError(
            f"labels must be ids below {tokens} other than the blank ({blank_id}), got "
            f"{targets[wrong].unique().tolist()}: give the number of labels of each clip without its padding"
        )
    inside = torch.arange(frames, device=device)[:, None] < lengths[0][:, None, None]
    cells = (inside & (columns <= lengths[1][:, None])[:, None]).flatten().nonzero()[:, 0]
    steps = (0, 1) if durations is None else tuple(durations)
    # sigma belongs to TDT
    return Task(
        (batch, frames, width), targets, *lengths, cells, blank_id, steps, durations is not None,
        sigma if durations is not None else 0.0, fastemit_lambda,
    )  # fmt: skip


@dataclass(frozen=True)
class Located:
    """Where cells read: (C,) clip, row of the flattened frames, row of the flattened prefixes, and next label."""

    clip: Tensor
    frame: Tensor
    prefix: Tensor
    next_label: Tensor


def locate(task: Task, cells: Tensor) -> Located:
    """Find clip, frame, prefix and next label of cells."""
    _, frames, width = task.shape
    clip = cells // (frames * width)
    prefix = clip * width + cells % width
    return Located(clip, cells // width, prefix, task.targets.flatten()[prefix])


def of_cells(task: Task, per_clip: Tensor, dimensions: int = 1) -> Tensor:
    """Repeat (B,) numbers for the valid cells of each clip: (C,), or (C, 1)."""
    values = per_clip[task.cells // (task.shape[1] * task.shape[2])]
    return values.view(-1, *[1] * (dimensions - 1))


@dataclass(frozen=True)
class Flow:
    """How much of a clip's probability goes through each cell: expected numbers of arcs, float32 (C, ...).

    Args:
        blank: (C,) arcs that emit the blank.
        label: (C,) arcs that emit the label, weighted as FastEmit asks.
        spans: (C, D) arcs of each duration.
    """

    blank: Tensor
    label: Tensor
    spans: Tensor


def solve(task: Task, blank: Tensor, label: Tensor, spans: Tensor | None) -> tuple[Tensor, Flow]:
    """Sum over all paths of the lattice, in double precision: it is small beside the scores.

    Args:
        task: what is to be emitted.
        blank: (C,) log-probability of the blank at each valid cell.
        label: (C,) log-probability of the next label, of any value where there is none.
        spans: (C, D) log-probability of each duration.

    Returns:
        (B,) losses and the flow through the cells.
    """
    batch, frames, width = task.shape
    arcs = _arcs(task, blank, label, spans)
    positive = torch.tensor([d for d in task.durations if d > 0], device=blank.device)
    scores = _sum_paths(task, arcs, positive)
    rows = torch.arange(batch, device=blank.device)[:, None, None]
    # read the second half back: from the end to the start
    back = task.frames[:, None, None] - torch.arange(frames + 1, device=blank.device)[:, None]
    left = task.labels[:, None, None] - torch.arange(width, device=blank.device)
    rests = scores[back.clamp(min=0), batch + rows, left.clamp(min=0)].masked_fill((back < 0) | (left < 0), -math.inf)
    totals = rests[:, 0, 0]
    hopeless = (totals < BLOCKED / 2) | (task.frames == 0)
    arrived = scores[:frames, :batch].transpose(0, 1) - totals.masked_fill(hopeless, math.inf)[:, None, None]
    # (B, T + longest, U+2), so that every arc has an end to read
    ends = F.pad(rests, (0, 1, 0, max(task.durations)), value=-math.inf)
    taken: list[list[Tensor]] = [[], []]
    for index, duration in enumerate(task.durations):
        for kind in (0, 1):
            there = ends[:, duration : duration + frames, kind : kind + width]
            taken[kind].append((arrived + arcs[kind][:, :-1, :-1, index] + there).exp_().flatten()[task.cells])
    blanks, labels = (torch.stack(of_kind, dim=-1) for of_kind in taken)
    single = accurate(blank.dtype)
    flow = Flow(
        blanks.sum(-1).to(single), ((1 + task.fastemit) * labels.sum(-1)).to(single), (blanks + labels).to(single)
    )
    return (-totals).masked_fill(hopeless, math.inf).to(single), flow


def _arcs(task: Task, blank: Tensor, label: Tensor, spans: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores (B, T+1, U+2, D) of the blank and label arcs that leave each cell, minus infinity where there is none."""
    batch, frames, width = task.shape
    durations = torch.tensor(task.durations, device=blank.device)
    never = blank.new_tensor(-math.inf, dtype=torch.double)
    if spans is None:
        spans = torch.zeros(len(blank), len(durations), dtype=torch.double, device=blank.device)
        label_moves, blank_moves = durations == 0, durations == 1
    else:
        spans, label_moves, blank_moves = spans.double(), durations >= 0, durations > 0
    clip = task.cells // (frames * width)
    frame, column = task.cells // width % frames, task.cells % width
    # a label never lands on the end: only a blank does
    lands = frame[:, None] + durations < task.frames[clip][:, None]
    emits = (column < task.labels[clip])[:, None] & lands & label_moves
    grids = []
    for score, allowed in ((blank, blank_moves), (label, emits)):
        values = (score.double() - task.sigma)[:, None] + spans
        grid = never.expand(batch, frames + 1, width + 1, len(durations)).clone()
        grid[clip, frame, column] = torch.where(allowed, values, never)
        grids.append(grid)
    return grids[0], grids[1]


def _sum_paths(task: Task, arcs: tuple[Tensor, Tensor], positive: Tensor) -> Tensor:
    """Sum the paths from the start to every cell, and from every cell to the end, in one pass over the frames.

    Backwards, a clip is the same lattice with frames and labels counted from its end, so it is one more row.

    Args:
        task: what is to be emitted.
        arcs: of `_arcs`.
        positive: durations above 0.

    Returns:
        (T+1, 2B, U+1) log-probabilities: of arriving, for rows up to B; after them, of the rest, counted from the end.
    """
    batch, frames, width = task.shape
    device, reach = positive.device, max(task.durations)
    arriving, staying = _arrivals(task, arcs)
    running = F.pad(staying.clamp(min=BLOCKED)[..., 1:].cumsum(-1), (1, 0)) if 0 in task.durations else None
    # one column before the first label, which nothing leaves
    history = torch.full((frames + 1 + reach, 2 * batch, width + 1), -math.inf, dtype=torch.double, device=device)
    # (time, rows, 2, U+1): what a label brings, then what a blank brings
    windows = history.unfold(-1, width, 1)
    start = torch.full((2 * batch, width), -math.inf, dtype=torch.double, device=device)
    start[:, 0] = 0.0
    for time in range(frames + 1):
        arrived = (windows[reach + time - positive] + arriving[time]).logsumexp((0, 2)) if time else start
        if running is not None:
            # labels that stay: a recurrence along U, which is a scan in the log semiring
            arrived = running[time] + (arrived - running[time]).logcumsumexp(-1)
        history[reach + time, :, 1:] = arrived
    return history[reach:, :, 1:]


def _arrivals(task: Task, arcs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sort the arcs by where they arrive, forwards (rows up to B) and backwards (the rows after).

    Returns:
        (T+1, P, 2B, 2, U+1) label and blank arcs of the P positive durations, and (T+1, 2B, U+1) of labels that stay.
    """
    batch, frames, width = task.shape
    device = task.frames.device
    moves = [index for index, duration in enumerate(task.durations) if duration > 0]
    stays = [index for index, duration in enumerate(task.durations) if duration == 0]
    which = torch.tensor(moves + stays, device=device)
    spans = torch.tensor([task.durations[index] for index in moves + stays], device=device)
    # (T+1, D, 2B, 1): the frame that an arc leaves; the row behind the last holds no arcs
    times = torch.arange(frames + 1, device=device)[:, None, None, None]
    ahead = (times - spans[:, None, None]).expand(-1, -1, batch, -1)
    behind = (task.frames[:, None] - times).expand(-1, len(which), -1, -1)
    source = torch.cat([ahead, behind], dim=2)
    source = torch.where((source < 0), frames, source)
    # (2B, U+1): the column that it leaves
    columns = torch.arange(width, device=device)
    left = task.labels[:, None] - columns
    by_blank, by_label = (torch.cat([(columns - kind).expand(batch, -1), left]) for kind in (0, 1))
    rows = torch.arange(2 * batch, device=device)[:, None] % batch
    index = which[:, None, None]
    blanks, labels = (
        grid[rows, source, torch.where(column < 0, width, column), index]
        for grid, column in zip(arcs, (by_blank, by_label), strict=True)
    )
    arriving = torch.stack([labels[:, : len(moves)], blanks[:, : len(moves)]], dim=3)
    return arriving, labels[:, len(moves) :].logsumexp(1)


def accurate(dtype: torch.dtype) -> torch.dtype:
    """The type of log-probabilities: float32, or float64 if the scores are."""
    return torch.double if dtype == torch.double else torch.float32


def to_gradient(probabilities: Tensor, blank: int, next_label: Tensor, by_blank: Tensor, by_label: Tensor) -> None:
    """Turn (C, V) token probabilities in place into gradients: probability times occupancy, minus the arcs taken."""
    probabilities.mul_((by_blank + by_label)[:, None])
    probabilities[:, blank] -= by_blank
    probabilities.scatter_add_(1, next_label[:, None], -by_label[:, None])


def refuse_second_derivative() -> None:
    """Raise where the gradient itself is to be differentiated: its graph would lack the scores."""
    if torch.is_grad_enabled():
        raise RuntimeError("the transducer loss has no second derivative: call backward without `create_graph=True`")
