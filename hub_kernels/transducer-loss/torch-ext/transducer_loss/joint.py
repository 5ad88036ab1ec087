"""The joint network in chunks of cells: logits forward, and gradients of its inputs and its output layer.

The products are cuBLAS's; the workspace for hidden units and logits of one chunk is allocated once and has a fixed
size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from .joint_programs import join_states, sum_over_frames, sum_over_labels, unjoin_gradient
from .lattice import Arcs, Cells, Scores, Weights, on_device, read_logits, write_gradient

# cells and hidden units of one program
BLOCK_N = 16
BLOCK_J = 128


@dataclass(frozen=True)
class Joint:
    """How hidden units are made, and in how much memory.

    Args:
        activation: `relu`, `tanh` or `sigmoid`.
        dropout: probability of dropping a hidden unit.
        seed: of the dropout.
        workspace_bytes: for hidden units and logits of one chunk.
    """

    activation: str
    dropout: float
    seed: int
    workspace_bytes: int


@dataclass(frozen=True)
class States:
    """Inputs of the joint network, contiguous and of one dtype.

    Args:
        encoder: (B * T, J).
        predictor: (B * (U+1), J).
        weight: (R, J), V + D rows and zeros.
        bias: (R,), or None.
        outputs: V + D.
    """

    encoder: Tensor
    predictor: Tensor
    weight: Tensor
    bias: Tensor | None
    outputs: int


@dataclass(frozen=True)
class Gradients:
    """Gradients of `States`, float32; None where nobody asks."""

    encoder: Tensor | None
    predictor: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Chunk:
    """A run of the list of cells, and room for its hidden units and logits.

    Args:
        first: place of its first cell in the list.
        cells: (n,) int32.
        hidden: (n, J).
        logits: (n, R); what stands behind V + D is zero.
        slope: (n, J) room for gradients of the hidden units; empty if not asked for.
    """

    first: int
    cells: Tensor
    hidden: Tensor
    logits: Tensor
    slope: Tensor


def prepare(encoder_states: Tensor, predictor_states: Tensor, weight: Tensor, bias: Tensor | None) -> States:
    """Flatten the inputs; pad the output layer to rows that start at multiples of 16 bytes, which cuBLAS is fast on.

    Args:
        encoder_states: (B, T, J).
        predictor_states: (B, U+1, J).
        weight: (V + D, J).
        bias: (V + D,), or None.
    """
    outputs, size = weight.shape
    extra = -outputs % (16 // weight.element_size())
    return States(
        encoder=encoder_states.reshape(-1, size).contiguous(),
        predictor=predictor_states.reshape(-1, size).contiguous(),
        weight=F.pad(weight, (0, 0, 0, extra)).contiguous(),
        bias=None if bias is None else F.pad(bias, (0, extra)),
        outputs=outputs,
    )


def chunk_cells(listed: Tensor, states: States, joint: Joint, slopes: bool) -> Iterator[Chunk]:
    """Cut a list of cells into chunks that fit the workspace.

    Args:
        listed: (n,) int32 cells, ascending.
        states: inputs of the joint network.
        joint: how hidden units are made.
        slopes: also make room for gradients of the hidden units.
    """
    rows, size = states.weight.shape
    per_cell = (rows + size * (2 if slopes else 1)) * states.weight.element_size()
    length = min(len(listed), max(1, joint.workspace_bytes // per_cell))
    room = {"dtype": states.weight.dtype, "device": states.weight.device}
    hidden = torch.empty((length, size), **room)
    logits = torch.empty((length, rows), **room)
    slope = torch.empty((length if slopes else 0, size), **room)
    for first in range(0, len(listed), max(1, length)):
        cells = listed[first : first + length]
        count = len(cells)
        yield Chunk(first, cells, hidden[:count], logits[:count], slope[:count])


def compute_logits(chunk: Chunk, states: States, cells: Cells, joint: Joint) -> None:
    """Fill in the hidden units and the logits of a chunk."""
    count, size = chunk.hidden.shape
    with on_device(chunk.hidden):
        join_states[(triton.cdiv(count, BLOCK_N), triton.cdiv(size, BLOCK_J))](
            states.encoder, states.predictor, cells.encoder_row, cells.predictor_row, chunk.cells, chunk.hidden, count,
            size, joint.seed, joint.dropout, ACTIVATION=joint.activation, DROPOUT=joint.dropout > 0, BLOCK_N=BLOCK_N,
            BLOCK_J=BLOCK_J,
        )  # fmt: skip
    if states.bias is None:
        torch.mm(chunk.hidden, states.weight.t(), out=chunk.logits)
    else:
        torch.addmm(states.bias, chunk.hidden, states.weight.t(), out=chunk.logits)


def split(logits: Tensor, outputs: int, arcs: Arcs) -> tuple[Tensor, Tensor]:
    """Token and duration columns."""
    tokens = outputs - (len(arcs.spans) if arcs.timed else 0)
    return logits[:, :tokens], logits[:, tokens:outputs]


def score_joint(states: States, cells: Cells, arcs: Arcs, joint: Joint, scores: Scores) -> None:
    """Fill in the scores of all cells, chunk by chunk.

    Args:
        states: inputs of the joint network.
        cells: the minibatch.
        arcs: what leaves a cell.
        joint: how hidden units are made.
        scores: is written.
    """
    every = torch.arange(cells.count, dtype=torch.int32, device=cells.starts.device)
    for chunk in chunk_cells(every, states, joint, slopes=False):
        compute_logits(chunk, states, cells, joint)
        read_logits(*split(chunk.logits, states.outputs, arcs), chunk.cells, cells, arcs, scores)


def differentiate_joint(
    states: States, cells: Cells, arcs: Arcs, joint: Joint, scores: Scores, weights: Weights, wanted: tuple[bool, ...]
) -> Gradients:
    """Compute the gradients of the joint network's inputs and output layer from the cells worth one.

    Args:
        states: inputs of the joint network.
        cells: the minibatch.
        arcs: what leaves a cell.
        joint: how hidden units are made.
        scores: of all cells.
        weights: of all cells.
        wanted: whether the encoder's, predictor's, weight's and bias's gradients are needed.
    """
    into = Gradients(
        *(
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and needed else None
            for tensor, needed in zip(
                (states.encoder, states.predictor, states.weight, states.bias), wanted, strict=True
            )
        )
    )
    listed = weights.kept.nonzero()[:, 0].to(torch.int32)
    position = torch.where(weights.kept > 0, weights.kept.cumsum(0, dtype=torch.int32) - 1, -1)
    rows = torch.arange(len(states.encoder) + 1, dtype=torch.int32, device=listed.device)
    row_first = torch.searchsorted(cells.encoder_row[listed], rows, out_int32=True)
    slopes = into.encoder is not None or into.predictor is not None
    for chunk in chunk_cells(listed, states, joint, slopes):
        compute_logits(chunk, states, cells, joint)
        tokens, timing = split(chunk.logits, states.outputs, arcs)
        write_gradient(tokens, tokens, timing, chunk.cells, cells, arcs, scores, weights)
        if into.weight is not None:
            into.weight.add_(torch.mm(chunk.logits.t(), chunk.hidden))
        if into.bias is not None:
            into.bias.add_(chunk.logits.sum(0, dtype=torch.float32))
        if slopes:
            torch.mm(chunk.logits, states.weight, out=chunk.slope)
            _spread(chunk, states, cells, joint, listed, position, row_first, into)
    return Gradients(
        into.encoder,
        into.predictor,
        None if into.weight is None else into.weight[: states.outputs],
        None if into.bias is None else into.bias[: states.outputs],
    )


def _spread(
    chunk: Chunk, states: States, cells: Cells, joint: Joint, listed: Tensor, position: Tensor, row_first: Tensor,
    into: Gradients,
) -> None:  # fmt: skip
    """Add a chunk's gradients of hidden units to the frames and predictor states they come from; no atomics."""
    count, size = chunk.slope.shape
    units = triton.cdiv(size, BLOCK_J)
    end = chunk.first + count
    with on_device(chunk.slope):
        unjoin_gradient[(triton.cdiv(count, BLOCK_N), units)](
            states.encoder, states.predictor, cells.encoder_row, cells.predictor_row, chunk.cells, chunk.slope, count,
            size, joint.seed, joint.dropout, ACTIVATION=joint.activation, DROPOUT=joint.dropout > 0, BLOCK_N=BLOCK_N,
            BLOCK_J=BLOCK_J,
        )  # fmt: skip
        if into.encoder is not None:
            sum_over_labels[(len(states.encoder), units)](
                chunk.slope, row_first, into.encoder, chunk.first, end, size, BLOCK_N=BLOCK_N, BLOCK_J=BLOCK_J
            )
        if into.predictor is not None:
            sum_over_frames[(len(states.predictor), units)](
                chunk.slope, position, listed, cells.encoder_row, cells.frame_lengths, cells.label_lengths,
                cells.starts, into.predictor, chunk.first, end, cells.frames, cells.columns, size, BLOCK_N=BLOCK_N,
            BLOCK_J=BLOCK_J, )  # fmt: skip
