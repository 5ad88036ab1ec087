"""What runs on the device for the lattice: one program per row of logits, per frame, or per utterance.

Who launches it, with which memory and in which order, is in `lattice.py`.

Words: a cell is a point (t, u) of an utterance's lattice, frame t with u labels emitted. Cells of a minibatch are
numbered in one row, utterance by utterance, frame by frame, without padding: cell = start[b] + t * width[b] + u, where
width = labels + 1. A plane is a float32 array with one number per cell. Sums over paths are kept in float64 (additions
are cheap there, and a long utterance has scores of thousands), their exponentials are float32: the differences that are
exponentiated are small.
"""

import triton
import triton.language as tl

# log-probability of what cannot happen: finite, so that differences are never NaN
NEVER = tl.constexpr(-1e30)
# below this a sum over paths has no path in it
NO_PATH = tl.constexpr(-1e29)


@triton.jit
def describe_cells(
    frame_lengths,
    label_lengths,
    starts,
    labels,
    encoder_row,
    predictor_row,
    next_label,
    row_cell,
    frames,
    columns,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write for each cell its rows in the flattened inputs and its next label (-1 after the last one).

    One program per padded frame. With `DENSE`, `row_cell` (B * T * (U+1),) gets each row's cell, -1 for padding.
    """
    frame_row = tl.program_id(0)
    clip = frame_row // frames
    frame = frame_row % frames
    width = tl.load(label_lengths + clip) + 1
    first = tl.load(starts + clip) + frame * width
    # no column of a padded frame is inside
    end = tl.where(frame < tl.load(frame_lengths + clip), width, 0)
    base = 0
    while base < columns:
        column = base + tl.arange(0, BLOCK)
        inside = column < end
        cell = first + column
        label = tl.load(labels + clip * (columns - 1) + column, mask=column < end - 1, other=-1)
        tl.store(encoder_row + cell, tl.zeros_like(column) + frame_row, mask=inside)
        tl.store(predictor_row + cell, clip * columns + column, mask=inside)
        tl.store(next_label + cell, label, mask=inside)
        if DENSE:
            row = frame_row.to(tl.int64) * columns + column
            tl.store(row_cell + row, tl.where(inside, cell, -1), mask=column < columns)
        base += BLOCK


@triton.jit
def _log_sum_exp(logits, size: tl.constexpr, BLOCK: tl.constexpr):
    """Logarithm of the sum of exponentials of one row, in one pass."""
    peak = tl.full((), NEVER, tl.float32)
    total = tl.zeros((), tl.float32)
    for base in range(0, size, BLOCK):
        column = base + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < size, other=float("-inf")).to(tl.float32)
        top = tl.maximum(peak, tl.max(value, axis=0))
        total = total * tl.exp(peak - top) + tl.sum(tl.exp(value - top), axis=0)
        peak = top
    return peak + tl.log(total)


@triton.jit
def score_cells(
    token_logits,
    token_stride,
    duration_logits,
    duration_stride,
    row_cell,
    next_label,
    normaliser,
    blank_score,
    label_score,
    duration_score,
    cell_count,
    blank_id,
    sigma,
    V: tl.constexpr,
    D: tl.constexpr,
    TIMED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Reduce each row of logits to the few numbers that the lattice needs; one program per row.

    Log-sum-exp over the tokens, log-probability of the blank and of the next label less sigma, and with `TIMED` those
    of the durations, (D, cells).
    """
    row = tl.program_id(0).to(tl.int64)
    cell = tl.load(row_cell + row)
    if cell >= 0:
        tokens = token_logits + row * token_stride
        total = _log_sum_exp(tokens, V, BLOCK_V)
        label = tl.load(next_label + cell)
        blank = tl.load(tokens + blank_id).to(tl.float32) - total - sigma
        spoken = tl.load(tokens + tl.maximum(label, 0)).to(tl.float32) - total - sigma
        # written so that NaN stays NaN, and a score of -inf becomes finite
        blank = tl.where(blank < NEVER, NEVER, blank)
        spoken = tl.where(label < 0, NEVER, tl.where(spoken < NEVER, NEVER, spoken))
        tl.store(normaliser + cell, total)
        tl.store(blank_score + cell, blank)
        tl.store(label_score + cell, spoken)
        if TIMED:
            which = tl.arange(0, BLOCK_D)
            there = which < D
            value = tl.load(duration_logits + row * duration_stride + which, mask=there, other=float("-inf"))
            value = value.to(tl.float32)
            shifted = value - tl.max(value, axis=0)
            value = shifted - tl.log(tl.sum(tl.exp(shifted), axis=0))
            value = tl.where(value < NEVER, NEVER, value)
            tl.store(duration_score + which.to(tl.int64) * cell_count + cell, value, mask=there)


@triton.jit
def _add(peak, total, score):
    """Add exp(score) to total * exp(peak)."""
    top = tl.maximum(peak, score)
    total = total * tl.exp((peak - top).to(tl.float32)) + tl.exp((score - top).to(tl.float32))
    return top, total


@triton.jit
def _log_add(left, right):
    peak = tl.maximum(left, right)
    total = tl.exp((left - peak).to(tl.float32)) + tl.exp((right - peak).to(tl.float32))
    return peak + tl.log(total).to(tl.float64)


@triton.jit
def _chain(step, value, next_step, next_value):
    """Compose x -> log(exp(value) + exp(step + x)) with the next map of the same kind."""
    return step + next_step, _log_add(next_value, next_step + value)


@triton.jit
def _stay(value, step, lane, base, carry, BLOCK: tl.constexpr):
    """Sum the paths along a frame: x[i] = log(exp(value[i]) + exp(step[i] + x[i-1])); `carry` is x before the tile."""
    value = tl.where(lane == tl.where(base > 0, 0, -1), _log_add(value, step + carry), value)
    _, value = tl.associative_scan((step, value), 0, _chain)
    return value, tl.sum(tl.where(lane == BLOCK - 1, value, 0.0), axis=0)


@triton.jit
def _duration_score(duration_score, index, cell_count, cell, mask, TIMED: tl.constexpr):
    """Log-probability of a duration in some cells; nothing where durations follow from the token."""
    if TIMED:
        score = tl.load(duration_score + index * cell_count + cell, mask=mask, other=0.0).to(tl.float64)
    else:
        score = tl.zeros_like(cell).to(tl.float64)
    return score


@triton.jit
def _forward_frame(
    frame, start, width, alpha, blank_score, label_score, duration_score, durations, cell_count,
    D: tl.constexpr, ZERO: tl.constexpr, TIMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write alpha of one frame: all paths from the beginning to each of its cells."""
    lane = tl.arange(0, BLOCK)
    carry = tl.full((), NEVER, tl.float64)
    base = 0
    while base < width:
        column = base + lane
        inside = column < width
        cell = start + frame.to(tl.int64) * width + column
        begins = column == tl.where(frame == 0, 0, -1)
        peak = tl.where(begins, 0.0, NEVER).to(tl.float64)
        # an impossible path of its own: no sum is below NEVER
        total = tl.full((BLOCK,), 1.0, tl.float32)
        for index in tl.static_range(D):
            if index != ZERO:
                duration = tl.load(durations + index)
                source = cell - duration * width
                there = column < tl.where(frame >= duration, width, 0)
                score = tl.load(alpha + source, mask=there, other=NEVER)
                score += tl.load(blank_score + source, mask=there, other=0.0).to(tl.float64)
                score += _duration_score(duration_score, index, cell_count, source, there, TIMED)
                peak, total = _add(peak, total, score)
                if TIMED:
                    source -= 1
                    there = there & (column > 0)
                    score = tl.load(alpha + source, mask=there, other=NEVER)
                    score += tl.load(label_score + source, mask=there, other=0.0).to(tl.float64)
                    score += _duration_score(duration_score, index, cell_count, source, there, TIMED)
                    peak, total = _add(peak, total, score)
        value = peak + tl.log(total).to(tl.float64)
        if ZERO >= 0:
            there = inside & (column > 0)
            step = tl.load(label_score + cell - 1, mask=there, other=NEVER).to(tl.float64)
            step += _duration_score(duration_score, ZERO, cell_count, cell - 1, there, TIMED)
            value, carry = _stay(value, step, lane, base, carry, BLOCK)
        tl.store(alpha + cell, value, mask=inside)
        base += BLOCK


@triton.jit
def _backward_frame(
    frame, frames, start, width, beta, blank_score, label_score, duration_score, durations, cell_count,
    D: tl.constexpr, ZERO: tl.constexpr, TIMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write beta of one frame: all paths from its cells to the end. Lanes run from the last label to the first."""
    lane = tl.arange(0, BLOCK)
    carry = tl.full((), NEVER, tl.float64)
    base = 0
    while base < width:
        column = width - 1 - base - lane
        inside = column >= 0
        cell = start + frame.to(tl.int64) * width + column
        blank = tl.load(blank_score + cell, mask=inside, other=0.0).to(tl.float64)
        # NEVER after the last label
        label = tl.load(label_score + cell, mask=inside, other=NEVER).to(tl.float64)
        peak = tl.full((BLOCK,), NEVER, tl.float64)
        total = tl.full((BLOCK,), 1.0, tl.float32)
        for index in tl.static_range(D):
            if index != ZERO:
                duration = tl.load(durations + index)
                target = cell + duration * width
                there = inside & (column < tl.where(frame + duration < frames, width, 0))
                ends = column == tl.where(frame + duration == frames, width - 1, width)
                timing = _duration_score(duration_score, index, cell_count, cell, inside, TIMED)
                score = tl.load(beta + target, mask=there, other=NEVER)
                score = tl.where(ends, 0.0, score) + blank + timing
                peak, total = _add(peak, total, score)
                if TIMED:
                    there = there & (column < width - 1)
                    score = tl.load(beta + target + 1, mask=there, other=NEVER) + label + timing
                    peak, total = _add(peak, total, score)
        value = peak + tl.log(total).to(tl.float64)
        if ZERO >= 0:
            step = label + _duration_score(duration_score, ZERO, cell_count, cell, inside, TIMED)
            value, carry = _stay(value, step, lane, base, carry, BLOCK)
        tl.store(beta + cell, value, mask=inside)
        base += BLOCK


@triton.jit
def sum_paths(
    frame_lengths,
    label_lengths,
    starts,
    alpha,
    beta,
    blank_score,
    label_score,
    duration_score,
    durations,
    cell_count,
    D: tl.constexpr,
    ZERO: tl.constexpr,
    TIMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Run alpha (direction 1) or beta (direction 0) of one utterance; one program per utterance and direction.

    A frame reads the frames up to the longest duration before (or after) it back from memory: they are in the cache,
    and the gradient needs them all. The barrier between frames makes one frame's stores visible to the program's other
    threads; no program reads what another one writes.
    """
    clip = tl.program_id(0)
    frames = tl.load(frame_lengths + clip)
    width = tl.load(label_lengths + clip) + 1
    start = tl.load(starts + clip)
    if tl.program_id(1) == 1:
        frame = frames * 0
        while frame < frames:
            _forward_frame(
                frame, start, width, alpha, blank_score, label_score, duration_score, durations, cell_count,
                D, ZERO, TIMED, BLOCK,
            )  # fmt: skip
            tl.debug_barrier()
            frame += 1
    else:
        frame = frames - 1
        while frame >= 0:
            _backward_frame(
                frame, frames, start, width, beta, blank_score, label_score, duration_score, durations, cell_count,
                D, ZERO, TIMED, BLOCK,
            )  # fmt: skip
            tl.debug_barrier()
            frame -= 1


@triton.jit
def weigh_arcs(
    frame_lengths,
    label_lengths,
    starts,
    loss_gradient,
    alpha,
    beta,
    blank_score,
    label_score,
    duration_score,
    durations,
    occupancy,
    blank_weight,
    label_weight,
    duration_gradient,
    kept,
    frames_padded,
    cell_count,
    label_scale,
    negligible,
    D: tl.constexpr,
    TIMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn path sums into posterior probabilities of the arcs that leave each cell; one program per padded frame.

    Writes what the gradient of a cell's logits needs, times the gradient of the utterance's loss: the sum over its
    arcs, of its blanks, of its labels (times 1 + fastemit), and with `TIMED` the finished gradient of its duration
    logits. `kept` is 1 where the sum, before that factor, is above `negligible` / cells of the utterance. An utterance
    without a path gets zeros.
    """
    clip = tl.program_id(0) // frames_padded
    frame = tl.program_id(0) % frames_padded
    frames = tl.load(frame_lengths + clip)
    if frame < frames:
        width = tl.load(label_lengths + clip) + 1
        start = tl.load(starts + clip)
        evidence = tl.load(beta + start)
        scale = tl.load(loss_gradient + clip).to(tl.float32)
        # false for NaN, which must reach the gradients
        lost = evidence < NO_PATH
        limit = negligible / (frames * width).to(tl.float32)
        base = 0
        while base < width:
            column = base + tl.arange(0, BLOCK)
            inside = column < width
            cell = start + frame.to(tl.int64) * width + column
            before = tl.load(alpha + cell, mask=inside, other=NEVER) - evidence
            blank = tl.load(blank_score + cell, mask=inside, other=NEVER).to(tl.float64) + before
            label = tl.load(label_score + cell, mask=inside, other=NEVER).to(tl.float64) + before
            blanks = tl.zeros((BLOCK,), tl.float32)
            labels = tl.zeros((BLOCK,), tl.float32)
            for index in tl.static_range(D):
                blank_arc, label_arc = _arc_weights(
                    index, frame, frames, width, column, cell, inside, blank, label, beta, duration_score, durations,
                    cell_count, TIMED,
                )  # fmt: skip
                blanks += blank_arc
                labels += label_arc
            leaves = blanks + labels
            if TIMED:
                for index in tl.static_range(D):
                    blank_arc, label_arc = _arc_weights(
                        index, frame, frames, width, column, cell, inside, blank, label, beta, duration_score,
                        durations, cell_count, TIMED,
                    )  # fmt: skip
                    at = index * cell_count + cell
                    chance = tl.exp(tl.load(duration_score + at, mask=inside, other=NEVER))
                    value = (leaves * chance - blank_arc - label_arc) * scale
                    tl.store(duration_gradient + at, tl.where(lost, 0.0, value), mask=inside)
            # NaN is kept too
            above = tl.where(leaves <= limit, 0, 1)
            # FastEmit is about tokens: durations have their gradient by now
            labels *= label_scale
            leaves = blanks + labels
            tl.store(occupancy + cell, tl.where(lost, 0.0, leaves * scale), mask=inside)
            tl.store(blank_weight + cell, tl.where(lost, 0.0, blanks * scale), mask=inside)
            tl.store(label_weight + cell, tl.where(lost, 0.0, labels * scale), mask=inside)
            tl.store(kept + cell, tl.where(lost, 0, tl.where(scale == 0.0, 0, above)).to(tl.int8), mask=inside)
            base += BLOCK


@triton.jit
def _arc_weights(
    index, frame, frames, width, column, cell, inside, blank, label, beta, duration_score, durations, cell_count,
    TIMED: tl.constexpr,
):  # fmt: skip
    """Posterior probabilities of the blank and the label of one duration that leave some cells."""
    duration = tl.load(durations + index)
    target = cell + duration * width
    end = tl.where(frame + duration < frames, width, 0)
    ends = column == tl.where(frame + duration == frames, width - 1, width)
    timing = _duration_score(duration_score, index, cell_count, cell, inside, TIMED)
    moves = duration > 0
    after = tl.where(ends, 0.0, tl.load(beta + target, mask=column < end, other=NEVER))
    blank_arc = tl.where(moves, tl.exp((blank + timing + after).to(tl.float32)), 0.0)
    if not TIMED:
        # a plain transducer's labels stay on their frame
        end = tl.where(duration == 0, end, 0)
    after = tl.load(beta + target + 1, mask=column < end - 1, other=NEVER)
    return blank_arc, tl.exp((label + timing + after).to(tl.float32))


@triton.jit
def differentiate_logits(
    token_logits,
    token_stride,
    token_gradient,
    token_gradient_stride,
    duration_gradient_out,
    duration_gradient_stride,
    row_cell,
    next_label,
    normaliser,
    occupancy,
    blank_weight,
    label_weight,
    duration_gradient,
    cell_count,
    blank_id,
    V: tl.constexpr,
    D: tl.constexpr,
    TIMED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the gradient of each row of logits, over the logits themselves if `token_gradient` is that memory.

    One program per row: occupancy times probability, less the weight of the blank and of the next label. Rows without a
    cell (padding) get zeros and are not read.
    """
    row = tl.program_id(0).to(tl.int64)
    cell = tl.load(row_cell + row)
    exists = cell >= 0
    leaves = tl.load(occupancy + cell, mask=exists, other=0.0)
    blank = tl.load(blank_weight + cell, mask=exists, other=0.0)
    spoken = tl.load(label_weight + cell, mask=exists, other=0.0)
    label = tl.load(next_label + cell, mask=exists, other=-1)
    total = tl.load(normaliser + cell, mask=exists, other=0.0)
    for base in range(0, V, BLOCK_V):
        column = base + tl.arange(0, BLOCK_V)
        given = column < tl.where(exists, V, 0)
        value = tl.load(token_logits + row * token_stride + column, mask=given, other=0.0).to(tl.float32)
        value = leaves * tl.exp(value - total)
        value -= tl.where(column == blank_id, blank, 0.0) + tl.where(column == label, spoken, 0.0)
        into = token_gradient + row * token_gradient_stride + column
        tl.store(into, value.to(token_gradient.dtype.element_ty), mask=column < V)
    if TIMED:
        which = tl.arange(0, BLOCK_D)
        given = which < tl.where(exists, D, 0)
        value = tl.load(duration_gradient + which.to(tl.int64) * cell_count + cell, mask=given, other=0.0)
        into = duration_gradient_out + row * duration_gradient_stride + which
        tl.store(into, value.to(duration_gradient_out.dtype.element_ty), mask=which < D)
