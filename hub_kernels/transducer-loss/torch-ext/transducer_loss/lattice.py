"""The lattice of a minibatch: its cells, their scores, sums over paths, and what the gradient needs of them.

`lattice_programs.py` has the programs that run; this file gives them memory and launches them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .lattice_programs import describe_cells, differentiate_logits, score_cells, sum_paths, weigh_arcs

# columns of logits that a program holds at a time
BLOCK_V = 1024
# lattice columns that a program holds at a time; more labels are done in several tiles
BLOCK_U = 1024


@dataclass(frozen=True)
class Arcs:
    """What leaves a cell.

    Args:
        blank_id: id of the blank.
        durations: frames of each duration output; `None` for RNN-T, whose labels stay and whose blanks move one frame.
        sigma: subtracted from every token log-probability.
        fastemit_lambda: token gradients of labels are scaled by 1 + lambda.
    """

    blank_id: int
    durations: tuple[int, ...] | None
    sigma: float
    fastemit_lambda: float

    @property
    def timed(self) -> bool:
        """Whether durations have scores of their own."""
        return self.durations is not None

    @property
    def spans(self) -> tuple[int, ...]:
        """Frames that an arc can move."""
        return (0, 1) if self.durations is None else self.durations

    @property
    def zero(self) -> int:
        """Index of duration 0, -1 if there is none."""
        return self.spans.index(0) if 0 in self.spans else -1


@dataclass(frozen=True)
class Cells:
    """The cells of a minibatch, without padding.

    Args:
        frame_lengths: (B,) int32.
        label_lengths: (B,) int32.
        starts: (B,) int64 first cell of each utterance.
        encoder_row: (cells,) int32 row of (B * T, J).
        predictor_row: (cells,) int32 row of (B * (U+1), J).
        next_label: (cells,) int32, -1 after the last label.
        row_cell: (B * T * (U+1),) int32 cell of each row of padded logits, -1 for padding; empty if not asked for.
        count: number of cells.
        frames: T.
        columns: U + 1.
    """

    frame_lengths: Tensor
    label_lengths: Tensor
    starts: Tensor
    encoder_row: Tensor
    predictor_row: Tensor
    next_label: Tensor
    row_cell: Tensor
    count: int
    frames: int
    columns: int

    @property
    def batch(self) -> int:
        """Number of utterances."""
        return len(self.starts)

    @property
    def block(self) -> int:
        """Lattice columns that a program holds."""
        return min(BLOCK_U, max(16, triton.next_power_of_2(self.columns)))


@dataclass(frozen=True)
class Scores:
    """What the lattice keeps of the logits, float32.

    Args:
        normaliser: (cells,) log-sum-exp of the token logits.
        blank: (cells,) log-probability of the blank, less sigma.
        label: (cells,) log-probability of the next label, less sigma.
        durations: (D, cells) log-probabilities; empty for RNN-T.
    """

    normaliser: Tensor
    blank: Tensor
    label: Tensor
    durations: Tensor


@dataclass(frozen=True)
class Weights:
    """What the gradient of logits needs of the lattice, float32, times the gradient of the loss.

    Args:
        occupancy: (cells,) sum of the posteriors of a cell's arcs.
        blank: (cells,) of its blanks.
        label: (cells,) of its labels.
        durations: (D, cells) gradient of the duration logits; empty for RNN-T.
        kept: (cells,) int8, 1 where the occupancy is worth a gradient.
    """

    occupancy: Tensor
    blank: Tensor
    label: Tensor
    durations: Tensor
    kept: Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Launch on the device of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def lay_cells(
    labels: Tensor, frame_lengths: Tensor, label_lengths: Tensor, lengths: tuple[list[int], list[int]], frames: int,
    padded_rows: bool,
) -> Cells:  # fmt: skip
    """Number the cells of a minibatch.

    Args:
        labels: (B, U).
        frame_lengths: (B,).
        label_lengths: (B,).
        lengths: the same two, on the host.
        frames: T.
        padded_rows: make `row_cell` too.
    """
    batch, columns = labels.shape[0], labels.shape[1] + 1
    sizes = [rows * (width + 1) for rows, width in zip(*lengths, strict=True)]
    count = sum(sizes)
    if max(count, batch * max(frames, columns)) >= 2**31:
        raise ValueError(f"a minibatch must have fewer than 2**31 lattice cells, got {count}; make it smaller")
    starts = torch.tensor([sum(sizes[:clip]) for clip in range(batch)], dtype=torch.int64).to(labels.device)
    empty = {"dtype": torch.int32, "device": labels.device}
    cells = Cells(
        frame_lengths=frame_lengths.to(torch.int32).contiguous(),
        label_lengths=label_lengths.to(torch.int32).contiguous(),
        starts=starts,
        encoder_row=torch.empty(count, **empty),
        predictor_row=torch.empty(count, **empty),
        next_label=torch.empty(count, **empty),
        row_cell=torch.empty(batch * frames * columns if padded_rows else 0, **empty),
        count=count,
        frames=frames,
        columns=columns,
    )
    with on_device(labels):
        describe_cells[(batch * frames,)](
            cells.frame_lengths, cells.label_lengths, starts, labels.to(torch.int32).contiguous(), cells.encoder_row,
            cells.predictor_row, cells.next_label, cells.row_cell, frames, columns, DENSE=padded_rows,
            BLOCK=min(256, cells.block),
        )  # fmt: skip
    return cells


def empty_scores(cells: Cells, arcs: Arcs) -> Scores:
    """Make room for the scores of all cells."""
    plane = {"dtype": torch.float32, "device": cells.starts.device}
    return Scores(
        normaliser=torch.empty(cells.count, **plane),
        blank=torch.empty(cells.count, **plane),
        label=torch.empty(cells.count, **plane),
        durations=torch.empty((len(arcs.spans) if arcs.timed else 0, cells.count), **plane),
    )


def read_logits(
    token_logits: Tensor, duration_logits: Tensor, row_cell: Tensor, cells: Cells, arcs: Arcs, scores: Scores
) -> None:
    """Fill in the scores of the cells that some rows of logits belong to.

    Args:
        token_logits: (rows, V), last stride 1.
        duration_logits: (rows, D), last stride 1; not read for RNN-T.
        row_cell: (rows,) int32 cell of each row, -1 for none.
        cells: the minibatch.
        arcs: what leaves a cell.
        scores: is written.
    """
    tokens = token_logits.shape[1]
    with on_device(token_logits):
        score_cells[(len(row_cell),)](
            token_logits, token_logits.stride(0), duration_logits, duration_logits.stride(0), row_cell,
            cells.next_label, scores.normaliser, scores.blank, scores.label, scores.durations, cells.count,
            arcs.blank_id, arcs.sigma, V=tokens, D=len(arcs.spans), TIMED=arcs.timed, BLOCK_V=min(BLOCK_V,
            triton.next_power_of_2(tokens)), BLOCK_D=triton.next_power_of_2(len(arcs.spans)),
        )  # fmt: skip


def run_lattice(cells: Cells, arcs: Arcs, scores: Scores, both: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum over all paths.

    Args:
        cells: the minibatch.
        arcs: what leaves a cell.
        scores: of all cells.
        both: alpha as well as beta: the gradient needs both.

    Returns:
        Negative log-likelihoods (B,) float32, infinite where there is no path; alpha and beta (cells,) float64; and the
        durations (D,) int32 on the device.
    """
    plane = {"dtype": torch.float64, "device": cells.starts.device}
    beta = torch.empty(cells.count, **plane)
    alpha = torch.empty(cells.count if both else 0, **plane)
    spans = torch.tensor(arcs.spans, dtype=torch.int32).to(cells.starts.device)
    with on_device(cells.starts):
        sum_paths[(cells.batch, 2 if both else 1)](
            cells.frame_lengths, cells.label_lengths, cells.starts, alpha, beta, scores.blank, scores.label,
            scores.durations, spans, cells.count, D=len(arcs.spans), ZERO=arcs.zero, TIMED=arcs.timed,
            BLOCK=cells.block, num_warps=max(1, cells.block // 128), num_stages=1,
        )  # fmt: skip
    # an utterance without frames has no cell of its own
    evidence = beta[cells.starts.clamp(max=cells.count - 1)]
    # as NO_PATH in lattice_programs.py
    losses = torch.where((evidence < -1e29) | (cells.frame_lengths == 0), torch.inf, -evidence)
    return losses.to(torch.float32), alpha, beta, spans


def weigh(
    cells: Cells, arcs: Arcs, scores: Scores, alpha: Tensor, beta: Tensor, spans: Tensor, loss_gradient: Tensor,
    negligible: float,
) -> Weights:  # fmt: skip
    """Turn path sums into the weights of the gradient.

    Args:
        cells: the minibatch.
        arcs: what leaves a cell.
        scores: of all cells.
        alpha: (cells,) from `run_lattice`.
        beta: (cells,) from `run_lattice`.
        spans: (D,) from `run_lattice`.
        loss_gradient: (B,).
        negligible: share of an utterance's probability that its cells that are not kept may have; negative to keep all.
    """
    plane = {"dtype": torch.float32, "device": beta.device}
    weights = Weights(
        occupancy=torch.empty(cells.count, **plane),
        blank=torch.empty(cells.count, **plane),
        label=torch.empty(cells.count, **plane),
        durations=torch.empty_like(scores.durations),
        kept=torch.empty(cells.count, dtype=torch.int8, device=beta.device),
    )
    with on_device(beta):
        weigh_arcs[(cells.batch * cells.frames,)](
            cells.frame_lengths, cells.label_lengths, cells.starts, loss_gradient.contiguous(), alpha, beta,
            scores.blank, scores.label, scores.durations, spans, weights.occupancy, weights.blank, weights.label,
            weights.durations, weights.kept, cells.frames, cells.count, 1.0 + arcs.fastemit_lambda, negligible,
            D=len(arcs.spans), TIMED=arcs.timed, BLOCK=min(256, cells.block),
        )  # fmt: skip
    return weights


def write_gradient(
    token_logits: Tensor, token_gradient: Tensor, duration_gradient: Tensor, row_cell: Tensor, cells: Cells, arcs: Arcs,
    scores: Scores, weights: Weights,
) -> None:  # fmt: skip
    """Write the gradient of rows of logits.

    Args:
        token_logits: (rows, V), last stride 1.
        token_gradient: (rows, V), last stride 1; may be the logits themselves.
        duration_gradient: (rows, D), last stride 1; not written for RNN-T.
        row_cell: (rows,) int32 cell of each row, -1 for none: zeros.
        cells: the minibatch.
        arcs: what leaves a cell.
        scores: of all cells.
        weights: of all cells.
    """
    tokens = token_logits.shape[1]
    with on_device(token_logits):
        differentiate_logits[(len(row_cell),)](
            token_logits, token_logits.stride(0), token_gradient, token_gradient.stride(0), duration_gradient,
            duration_gradient.stride(0), row_cell, cells.next_label, scores.normaliser, weights.occupancy,
            weights.blank, weights.label, weights.durations, cells.count, arcs.blank_id, V=tokens, D=len(arcs.spans),
            TIMED=arcs.timed, BLOCK_V=min(BLOCK_V, triton.next_power_of_2(tokens)),
        BLOCK_D=triton.next_power_of_2(len(arcs.spans)), )  # fmt: skip
