"""Triton programs of the transducer lattice: node numbers, scores and path sums.

`lattice.py` allocates their memory and launches them; `gradient_programs.py` has the gradient.

A node (t, u) of an utterance stands for frame t after u labels. The nodes of a batch are numbered without padding:
node = first_node[utterance] + t * num_positions + u, where num_positions is the number of labels + 1. Path sums are
float64, because a long utterance has log-probabilities of thousands. Only differences are exponentiated; they are small
enough for float32.
"""

import triton
import triton.language as tl

# log-probability of an impossible event; finite, so that a difference of two is not NaN
IMPOSSIBLE = tl.constexpr(-1e30)
# a path sum below this has no path
NO_PATH = tl.constexpr(-1e29)


@triton.jit
def index_nodes(
    frame_lengths,
    label_lengths,
    first_node,
    labels,
    encoder_row,
    predictor_row,
    next_label,
    row_node,
    num_frames,
    num_positions_padded,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write where each node reads its inputs; one program per padded frame.

    Args:
        frame_lengths: (B,) frames of each utterance.
        label_lengths: (B,) labels of each utterance.
        first_node: (B,) number of the first node of each utterance.
        labels: (B, U).
        encoder_row: (nodes,) is written: row of the flattened encoder states (B * T, J).
        predictor_row: (nodes,) is written: row of the flattened predictor states (B * (U+1), J).
        next_label: (nodes,) is written: the label that the node can emit, -1 after the last one.
        row_node: (B * T * (U+1),) is written with `HAS_ROWS`: node of each row of padded logits, -1 for padding.
        num_frames: T.
        num_positions_padded: U + 1.
    """
    frame_row = tl.program_id(0)
    utterance = frame_row // num_frames
    frame = frame_row % num_frames
    num_positions = tl.load(label_lengths + utterance) + 1
    frame_node = tl.load(first_node + utterance) + frame * num_positions
    # a padded frame has no position
    end = tl.where(frame < tl.load(frame_lengths + utterance), num_positions, 0)
    first_position = 0
    while first_position < num_positions_padded:
        position = first_position + tl.arange(0, BLOCK)
        is_node = position < end
        node = frame_node + position
        label_offset = utterance * (num_positions_padded - 1) + position
        label = tl.load(labels + label_offset, mask=position < end - 1, other=-1)
        tl.store(encoder_row + node, tl.zeros_like(position) + frame_row, mask=is_node)
        tl.store(predictor_row + node, utterance * num_positions_padded + position, mask=is_node)
        tl.store(next_label + node, label, mask=is_node)
        if HAS_ROWS:
            row = frame_row.to(tl.int64) * num_positions_padded + position
            tl.store(row_node + row, tl.where(is_node, node, -1), mask=position < num_positions_padded)
        first_position += BLOCK


@triton.jit
def _log_sum_exp(logits, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return log(sum(exp(logits))) of `SIZE` consecutive values, read once in blocks."""
    maximum = tl.full((), IMPOSSIBLE, tl.float32)
    total = tl.zeros((), tl.float32)
    for first_column in range(0, SIZE, BLOCK):
        column = first_column + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < SIZE, other=float("-inf")).to(tl.float32)
        new_maximum = tl.maximum(maximum, tl.max(value, axis=0))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(value - new_maximum), axis=0)
        maximum = new_maximum
    return maximum + tl.log(total)


@triton.jit
def score_nodes(
    token_logits,
    token_stride,
    duration_logits,
    duration_stride,
    row_node,
    next_label,
    log_normalizer,
    blank_log_prob,
    label_log_prob,
    duration_log_prob,
    num_nodes,
    blank_id,
    sigma,
    VOCAB_SIZE: tl.constexpr,
    NUM_DURATIONS: tl.constexpr,
    HAS_DURATIONS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Reduce each row of logits to the log-probabilities that the lattice needs; one program per row.

    Args:
        token_logits: (rows, V), with the stride `token_stride` between rows.
        duration_logits: (rows, D), with the stride `duration_stride`; read with `HAS_DURATIONS`.
        row_node: (rows,) node of each row, -1 for padding.
        next_label: (nodes,) from `index_nodes`.
        log_normalizer: (nodes,) is written: log-sum-exp of the token logits.
        blank_log_prob: (nodes,) is written: log-probability of the blank, minus sigma.
        label_log_prob: (nodes,) is written: log-probability of the next label, minus sigma.
        duration_log_prob: (D, nodes) is written with `HAS_DURATIONS`.
        num_nodes: number of nodes.
        blank_id: id of the blank.
        sigma: logit under-normalisation of TDT.
    """
    row = tl.program_id(0).to(tl.int64)
    node = tl.load(row_node + row)
    if node >= 0:
        tokens = token_logits + row * token_stride
        normalizer = _log_sum_exp(tokens, VOCAB_SIZE, BLOCK_V)
        label_id = tl.load(next_label + node)
        blank = tl.load(tokens + blank_id).to(tl.float32) - normalizer - sigma
        label = tl.load(tokens + tl.maximum(label_id, 0)).to(tl.float32) - normalizer - sigma
        # these comparisons keep NaN and make -inf finite
        blank = tl.where(blank < IMPOSSIBLE, IMPOSSIBLE, blank)
        label = tl.where(label_id < 0, IMPOSSIBLE, tl.where(label < IMPOSSIBLE, IMPOSSIBLE, label))
        tl.store(log_normalizer + node, normalizer)
        tl.store(blank_log_prob + node, blank)
        tl.store(label_log_prob + node, label)
        if HAS_DURATIONS:
            index = tl.arange(0, BLOCK_D)
            is_duration = index < NUM_DURATIONS
            logits = duration_logits + row * duration_stride + index
            value = tl.load(logits, mask=is_duration, other=float("-inf")).to(tl.float32)
            shifted = value - tl.max(value, axis=0)
            value = shifted - tl.log(tl.sum(tl.exp(shifted), axis=0))
            value = tl.where(value < IMPOSSIBLE, IMPOSSIBLE, value)
            tl.store(duration_log_prob + index.to(tl.int64) * num_nodes + node, value, mask=is_duration)


@triton.jit
def _add_term(maximum, total, term):
    """Add exp(term) to the running sum total * exp(maximum); return the new maximum and total."""
    new_maximum = tl.maximum(maximum, term)
    total = total * tl.exp((maximum - new_maximum).to(tl.float32)) + tl.exp((term - new_maximum).to(tl.float32))
    return new_maximum, total


@triton.jit
def _log_add(left, right):
    """Return log(exp(left) + exp(right)) in float64."""
    maximum = tl.maximum(left, right)
    total = tl.exp((left - maximum).to(tl.float32)) + tl.exp((right - maximum).to(tl.float32))
    return maximum + tl.log(total).to(tl.float64)


@triton.jit
def _compose(weight, value, next_weight, next_value):
    """Compose the map x -> log(exp(value) + exp(weight + x)) with the next map of this form."""
    return weight + next_weight, _log_add(next_value, next_weight + value)


@triton.jit
def _scan_labels(value, weight, lane, first_lane, carry, BLOCK: tl.constexpr):
    """Solve x[i] = log(exp(value[i]) + exp(weight[i] + x[i-1])) along the label positions of one frame.

    Args:
        value: (BLOCK,) path sums over arcs from other frames.
        weight: (BLOCK,) log-weight of the label arc with duration 0 that enters each position.
        lane: (BLOCK,) 0, 1, 2, ...
        first_lane: number of positions in earlier tiles of this frame.
        carry: x of the last position of the earlier tile.

    Returns:
        (BLOCK,) x, and its last value.
    """
    value = tl.where(lane == tl.where(first_lane > 0, 0, -1), _log_add(value, weight + carry), value)
    _, value = tl.associative_scan((weight, value), 0, _compose)
    return value, tl.sum(tl.where(lane == BLOCK - 1, value, 0.0), axis=0)


@triton.jit
def load_duration(duration_log_prob, index, num_nodes, node, mask, HAS_DURATIONS: tl.constexpr):
    """Load the log-probability of the duration with an index at a block of nodes; 0 without duration outputs."""
    if HAS_DURATIONS:
        log_prob = tl.load(duration_log_prob + index * num_nodes + node, mask=mask, other=0.0).to(tl.float64)
    else:
        log_prob = tl.zeros_like(node).to(tl.float64)
    return log_prob


@triton.jit
def _forward_frame(
    frame, first_node, num_positions, log_alpha, blank_log_prob, label_log_prob, duration_log_prob, durations,
    num_nodes, NUM_DURATIONS: tl.constexpr, ZERO_INDEX: tl.constexpr, HAS_DURATIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write log_alpha of one frame: the sum over all paths from the start to each of its nodes.

    The arguments are those of `sum_paths`, for one utterance.
    """
    lane = tl.arange(0, BLOCK)
    carry = tl.full((), IMPOSSIBLE, tl.float64)
    first_position = 0
    while first_position < num_positions:
        position = first_position + lane
        is_node = position < num_positions
        node = first_node + frame.to(tl.int64) * num_positions + position
        is_start = position == tl.where(frame == 0, 0, -1)
        maximum = tl.where(is_start, 0.0, IMPOSSIBLE).to(tl.float64)
        # one impossible path, so that no sum is below IMPOSSIBLE
        total = tl.full((BLOCK,), 1.0, tl.float32)
        for index in tl.static_range(NUM_DURATIONS):
            if index != ZERO_INDEX:
                duration = tl.load(durations + index)
                source = node - duration * num_positions
                has_source = position < tl.where(frame >= duration, num_positions, 0)
                path = tl.load(log_alpha + source, mask=has_source, other=IMPOSSIBLE)
                path += tl.load(blank_log_prob + source, mask=has_source, other=0.0).to(tl.float64)
                path += load_duration(duration_log_prob, index, num_nodes, source, has_source, HAS_DURATIONS)
                maximum, total = _add_term(maximum, total, path)
                if HAS_DURATIONS:
                    source -= 1
                    has_source = has_source & (position > 0)
                    path = tl.load(log_alpha + source, mask=has_source, other=IMPOSSIBLE)
                    path += tl.load(label_log_prob + source, mask=has_source, other=0.0).to(tl.float64)
                    path += load_duration(duration_log_prob, index, num_nodes, source, has_source, HAS_DURATIONS)
                    maximum, total = _add_term(maximum, total, path)
        value = maximum + tl.log(total).to(tl.float64)
        if ZERO_INDEX >= 0:
            has_source = is_node & (position > 0)
            weight = tl.load(label_log_prob + node - 1, mask=has_source, other=IMPOSSIBLE).to(tl.float64)
            weight += load_duration(duration_log_prob, ZERO_INDEX, num_nodes, node - 1, has_source, HAS_DURATIONS)
            value, carry = _scan_labels(value, weight, lane, first_position, carry, BLOCK)
        tl.store(log_alpha + node, value, mask=is_node)
        first_position += BLOCK


@triton.jit
def _backward_frame(
    frame, num_frames, first_node, num_positions, log_beta, blank_log_prob, label_log_prob, duration_log_prob,
    durations, num_nodes, NUM_DURATIONS: tl.constexpr, ZERO_INDEX: tl.constexpr, HAS_DURATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write log_beta of one frame: the sum over all paths from each of its nodes to the end.

    Lanes run from the last label position to the first. The arguments are those of `sum_paths`, for one utterance.
    """
    lane = tl.arange(0, BLOCK)
    carry = tl.full((), IMPOSSIBLE, tl.float64)
    first_lane = 0
    while first_lane < num_positions:
        position = num_positions - 1 - first_lane - lane
        is_node = position >= 0
        node = first_node + frame.to(tl.int64) * num_positions + position
        blank = tl.load(blank_log_prob + node, mask=is_node, other=0.0).to(tl.float64)
        # IMPOSSIBLE after the last label
        label = tl.load(label_log_prob + node, mask=is_node, other=IMPOSSIBLE).to(tl.float64)
        maximum = tl.full((BLOCK,), IMPOSSIBLE, tl.float64)
        total = tl.full((BLOCK,), 1.0, tl.float32)
        for index in tl.static_range(NUM_DURATIONS):
            if index != ZERO_INDEX:
                duration = tl.load(durations + index)
                target = node + duration * num_positions
                has_target = is_node & (position < tl.where(frame + duration < num_frames, num_positions, 0))
                # the last blank leads from the last position exactly to the end of the frames
                is_last = position == tl.where(frame + duration == num_frames, num_positions - 1, num_positions)
                timing = load_duration(duration_log_prob, index, num_nodes, node, is_node, HAS_DURATIONS)
                path = tl.load(log_beta + target, mask=has_target, other=IMPOSSIBLE)
                path = tl.where(is_last, 0.0, path) + blank + timing
                maximum, total = _add_term(maximum, total, path)
                if HAS_DURATIONS:
                    has_target = has_target & (position < num_positions - 1)
                    path = tl.load(log_beta + target + 1, mask=has_target, other=IMPOSSIBLE) + label + timing
                    maximum, total = _add_term(maximum, total, path)
        value = maximum + tl.log(total).to(tl.float64)
        if ZERO_INDEX >= 0:
            weight = label + load_duration(
                duration_log_prob, ZERO_INDEX, num_nodes, node, is_node, HAS_DURATIONS
            )  # fmt: skip
            value, carry = _scan_labels(value, weight, lane, first_lane, carry, BLOCK)
        tl.store(log_beta + node, value, mask=is_node)
        first_lane += BLOCK


@triton.jit
def sum_paths(
    frame_lengths,
    label_lengths,
    first_node,
    log_alpha,
    log_beta,
    blank_log_prob,
    label_log_prob,
    duration_log_prob,
    durations,
    num_nodes,
    NUM_DURATIONS: tl.constexpr,
    ZERO_INDEX: tl.constexpr,
    HAS_DURATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute log_beta (program axis 1 = 0) or log_alpha (program axis 1 = 1) of one utterance, frame by frame.

    A frame reads earlier frames back from memory, up to the longest duration. The barrier between frames makes the
    stores of one frame visible to all threads of the program. No program reads what another program writes.

    Args:
        frame_lengths: (B,) frames of each utterance.
        label_lengths: (B,) labels of each utterance.
        first_node: (B,) number of the first node of each utterance.
        log_alpha: (nodes,) float64, is written.
        log_beta: (nodes,) float64, is written.
        blank_log_prob: (nodes,) from `score_nodes`.
        label_log_prob: (nodes,) from `score_nodes`.
        duration_log_prob: (D, nodes) from `score_nodes`; read with `HAS_DURATIONS`.
        durations: (D,) frames of each duration; 0 and 1 for RNN-T.
        num_nodes: number of nodes.
        ZERO_INDEX: index of duration 0, -1 if there is none.
    """
    utterance = tl.program_id(0)
    num_frames = tl.load(frame_lengths + utterance)
    num_positions = tl.load(label_lengths + utterance) + 1
    node = tl.load(first_node + utterance)
    if tl.program_id(1) == 1:
        frame = num_frames * 0
        while frame < num_frames:
            _forward_frame(
                frame, node, num_positions, log_alpha, blank_log_prob, label_log_prob, duration_log_prob, durations,
                num_nodes, NUM_DURATIONS, ZERO_INDEX, HAS_DURATIONS, BLOCK,
            )  # fmt: skip
            tl.debug_barrier()
            frame += 1
    else:
        frame = num_frames - 1
        while frame >= 0:
            _backward_frame(
                frame, num_frames, node, num_positions, log_beta, blank_log_prob, label_log_prob, duration_log_prob,
                durations, num_nodes, NUM_DURATIONS, ZERO_INDEX, HAS_DURATIONS, BLOCK,
            )  # fmt: skip
            tl.debug_barrier()
            frame -= 1
