"""What runs on the device for the joint network: sums of states, activation and dropout, and the way back.

Who launches it, with which memory and in which order, is in `joint.py`; cells are explained in `lattice_programs.py`.
"""

import triton
import triton.language as tl


@triton.jit
def _joined(encoder, predictor, encoder_row, predictor_row, cell, inside, unit, size):
    """Sum of encoder and predictor states of some cells, (cells, units) in float32, and which of it exists."""
    encoder_at = tl.load(encoder_row + cell, mask=inside, other=0).to(tl.int64)
    predictor_at = tl.load(predictor_row + cell, mask=inside, other=0).to(tl.int64)
    mask = inside[:, None] & (unit < size)[None, :]
    left = tl.load(encoder + encoder_at[:, None] * size + unit[None, :], mask=mask, other=0.0)
    right = tl.load(predictor + predictor_at[:, None] * size + unit[None, :], mask=mask, other=0.0)
    # round the sum as the input type would, then go on in float32
    return (left.to(tl.float32) + right.to(tl.float32)).to(left.dtype).to(tl.float32), mask


@triton.jit
def _kept_units(cell, unit, size, seed, dropout):
    """1 / (1 - dropout) where a hidden unit stays, 0 where it is dropped; the same in every pass."""
    offset = cell.to(tl.int64)[:, None] * size + unit[None, :]
    return tl.where(tl.rand(seed, offset) >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def join_states(
    encoder,
    predictor,
    encoder_row,
    predictor_row,
    cells,
    hidden,
    count,
    size,
    seed,
    dropout,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Write act(encoder + predictor), with dropout, of a chunk of cells: (count, J)."""
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    inside = index < count
    cell = tl.load(cells + index, mask=inside, other=0)
    state, mask = _joined(encoder, predictor, encoder_row, predictor_row, cell, inside, unit, size)
    if ACTIVATION == "relu":
        value = tl.maximum(state, 0.0)
        # a maximum forgets NaN
        value = tl.where(state == state, value, state)
    elif ACTIVATION == "tanh":
        value = 2.0 * tl.sigmoid(2.0 * state) - 1.0
    else:
        value = tl.sigmoid(state)
    if DROPOUT:
        value *= _kept_units(cell, unit, size, seed, dropout)
    tl.store(hidden + index.to(tl.int64)[:, None] * size + unit[None, :], value.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def unjoin_gradient(
    encoder,
    predictor,
    encoder_row,
    predictor_row,
    cells,
    gradient,
    count,
    size,
    seed,
    dropout,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Multiply gradients of hidden units (count, J), in place, by the derivative of `join_states`."""
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    inside = index < count
    cell = tl.load(cells + index, mask=inside, other=0)
    state, mask = _joined(encoder, predictor, encoder_row, predictor_row, cell, inside, unit, size)
    if ACTIVATION == "relu":
        slope = tl.where(state > 0.0, 1.0, 0.0)
    elif ACTIVATION == "tanh":
        value = 2.0 * tl.sigmoid(2.0 * state) - 1.0
        slope = 1.0 - value * value
    else:
        value = tl.sigmoid(state)
        slope = value * (1.0 - value)
    if DROPOUT:
        slope *= _kept_units(cell, unit, size, seed, dropout)
    at = gradient + index.to(tl.int64)[:, None] * size + unit[None, :]
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32) * slope
    tl.store(at, value.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def sum_over_labels(
    gradient, row_first, encoder_gradient, chunk_first, chunk_end, size, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Add a chunk's gradients of hidden units to the frames that they come from; one program per frame and unit block.

    `row_first` (B * T + 1,): for each frame the first of its cells in the list of cells that the chunks are cut from.
    """
    frame_row = tl.program_id(0)
    unit = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    index = tl.maximum(tl.load(row_first + frame_row), chunk_first)
    end = tl.minimum(tl.load(row_first + frame_row + 1), chunk_end)
    if index < end:
        total = tl.zeros((BLOCK_J,), tl.float32)
        while index < end:
            row = index + tl.arange(0, BLOCK_N)
            mask = (row < end)[:, None] & (unit < size)[None, :]
            at = gradient + (row - chunk_first).to(tl.int64)[:, None] * size + unit[None, :]
            total += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32), axis=0)
            index += BLOCK_N
        into = encoder_gradient + frame_row.to(tl.int64) * size + unit
        tl.store(into, tl.load(into, mask=unit < size, other=0.0) + total, mask=unit < size)


@triton.jit
def sum_over_frames(
    gradient,
    position,
    cells,
    encoder_row,
    frame_lengths,
    label_lengths,
    starts,
    predictor_gradient,
    chunk_first,
    chunk_end,
    frames,
    columns,
    size,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Add a chunk's gradients of hidden units to the predictor states that they come from.

    One program per predictor state and unit block. `position` (cells,): each cell's place in the list that the chunks
    are cut from, -1 if it is not there.
    """
    predictor_at = tl.program_id(0)
    unit = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    clip = predictor_at // columns
    column = predictor_at % columns
    width = tl.load(label_lengths + clip) + 1
    start = tl.load(starts + clip)
    # the frames of this utterance that the chunk touches
    lowest = tl.load(encoder_row + tl.load(cells + chunk_first)) - clip * frames
    highest = tl.load(encoder_row + tl.load(cells + chunk_end - 1)) - clip * frames
    frame = tl.maximum(lowest, 0)
    end = tl.minimum(highest + 1, tl.load(frame_lengths + clip))
    end = tl.where(column < width, end, 0)
    if frame < end:
        total = tl.zeros((BLOCK_J,), tl.float32)
        while frame < end:
            at = frame + tl.arange(0, BLOCK_N)
            row = tl.load(position + start + at * width + column, mask=at < end, other=-1)
            taken = (row >= chunk_first) & (row < chunk_end)
            mask = taken[:, None] & (unit < size)[None, :]
            value = tl.load(
                gradient + (row - chunk_first).to(tl.int64)[:, None] * size + unit[None, :], mask=mask, other=0.0
            )
            total += tl.sum(value.to(tl.float32), axis=0)
            frame += BLOCK_N
        into = predictor_gradient + predictor_at.to(tl.int64) * size + unit
        tl.store(into, tl.load(into, mask=unit < size, other=0.0) + total, mask=unit < size)
