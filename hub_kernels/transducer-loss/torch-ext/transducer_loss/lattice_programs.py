"""Triton programs of the transducer lattice: node numbers, scores and path sums.

`lattice.py` allocates the memory and launches the programs. The programs of the gradient are in `gradient_programs.py`.

Node (t, u) of an utterance means that u labels have been emitted and frame t is read next. The nodes of a batch are
numbered without padding: node = first_node[utterance] + t * num_positions + u, where num_positions is the number of
labels + 1. Path sums are float64, because the log-probabilities of a long utterance add up to several thousand.
Exponentials are computed in float32, because their arguments are small: they are differences of log-probabilities.
"""

import triton
import triton.language as tl

# log-probability of an impossible event; finite, because the difference of two infinities is NaN
IMPOSSIBLE = tl.constexpr(-1e30)
# a path sum below this value means that no path exists
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
    """Find the inputs of each node: its encoder state, predictor state and next label; one program per padded frame.

    Args:
        frame_lengths: (B,) number of frames of each utterance.
        label_lengths: (B,) number of labels of each utterance.
        first_node: (B,) number of the first node of each utterance.
        labels: (B, U) label ids.
        encoder_row: (nodes,) output: row of the flattened encoder states (B * T, J).
        predictor_row: (nodes,) output: row of the flattened predictor states (B * (U+1), J).
        next_label: (nodes,) output: label that the node can emit; -1 after the last label.
        row_node: (B * T * (U+1),) output, only with `HAS_ROWS`: node of each row of padded logits; -1 for padding.
        num_frames: T.
        num_positions_padded: U + 1.
    """
    frame_row = tl.program_id(0)
    utterance = frame_row // num_frames
    frame = frame_row % num_frames
    num_positions = tl.load(label_lengths + utterance) + 1
    frame_node = tl.load(first_node + utterance) + frame * num_positions
    # a padded frame has no nodes
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
    """Compute log(sum(exp(logits))) of `SIZE` consecutive values in one pass over blocks of `BLOCK` values."""
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
    """Compute the log-probabilities of blank, next label and durations from each row of logits; one program per row.

    Args:
        token_logits: (rows, V) logits.
        token_stride: distance between two rows of `token_logits`.
        duration_logits: (rows, D) logits; read only with `HAS_DURATIONS`.
        duration_stride: distance between two rows of `duration_logits`.
        row_node: (rows,) node of each row; -1 for padding.
        next_label: (nodes,) label that the node can emit; -1 after the last label.
        log_normalizer: (nodes,) output: log-sum-exp of the token logits.
        blank_log_prob: (nodes,) output: log-probability of the blank, minus sigma.
        label_log_prob: (nodes,) output: log-probability of the next label, minus sigma.
        duration_log_prob: (D, nodes) output, only with `HAS_DURATIONS`: log-probability of each duration.
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
        # replace -inf by a finite value; the comparisons are False for NaN, so NaN does not change
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
    """Add exp(term) to the sum total * exp(maximum); returns the new maximum and the new total."""
    new_maximum = tl.maximum(maximum, term)
    total = total * tl.exp((maximum - new_maximum).to(tl.float32)) + tl.exp((term - new_maximum).to(tl.float32))
    return new_maximum, total


@triton.jit
def _log_add(left, right):
    """Compute log(exp(left) + exp(right)) as float64."""
    maximum = tl.maximum(left, right)
    total = tl.exp((left - maximum).to(tl.float32)) + tl.exp((right - maximum).to(tl.float32))
    return maximum + tl.log(total).to(tl.float64)


@triton.jit
def _compose(weight, value, next_weight, next_value):
    """Compose two maps x -> log(exp(value) + exp(weight + x)); returns weight and value of the composed map."""
    return weight + next_weight, _log_add(next_value, next_weight + value)


@triton.jit
def _scan_labels(value, weight, lane, first_lane, carry, BLOCK: tl.constexpr):
    """Solve x[i] = log(exp(value[i]) + exp(weight[i] + x[i-1])) along the label positions of one frame.

    Args:
        value: (BLOCK,) path sums over arcs from other frames.
        weight: (BLOCK,) log-weight of the label arc with duration 0 that enters each position.
        lane: (BLOCK,) 0, 1, 2, ...
        first_lane: number of positions in earlier tiles of this frame.
        carry: x of the last position of the previous tile.

    Returns:
        (BLOCK,) x, and the last value of x.
    """
    value = tl.where(lane == tl.where(first_lane > 0, 0, -1), _log_add(value, weight + carry), value)
    _, value = tl.associative_scan((weight, value), 0, _compose)
    return value, tl.sum(tl.where(lane == BLOCK - 1, value, 0.0), axis=0)


@triton.jit
def load_duration(duration_log_prob, index, num_nodes, node, mask, HAS_DURATIONS: tl.constexpr):
    """Load the log-probability of one duration at a block of nodes.

    Args:
        duration_log_prob: (D, nodes) log-probabilities; read only with `HAS_DURATIONS`.
        index: index of the duration.
        num_nodes: number of nodes.
        node: (BLOCK,) numbers of the nodes.
        mask: (BLOCK,) whether each of the nodes exists.

    Returns:
        (BLOCK,) float64 log-probabilities; 0 without `HAS_DURATIONS`.
    """
    if HAS_DURATIONS:
        log_prob = tl.load(duration_log_prob + index * num_nodes + node, mask=mask, other=0.0).to(tl.float64)
    else:
        log_prob = tl.zeros_like(node).to(tl.float64)
    return log_prob


@triton.jit
def _compute_frame_log_alpha(
    frame, first_node, num_positions, log_alpha, blank_log_prob, label_log_prob, duration_log_prob, durations,
    num_nodes, NUM_DURATIONS: tl.constexpr, ZERO_INDEX: tl.constexpr, HAS_DURATIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute log_alpha of one frame: the log-sum over all paths from the start to each node of the frame.

    The arguments are described in `sum_paths`; `first_node` and `num_positions` are those of one utterance.
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
        # start with one impossible path, so no sum is below IMPOSSIBLE
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
def _compute_frame_log_beta(
    frame, num_frames, first_node, num_positions, log_beta, blank_log_prob, label_log_prob, duration_log_prob,
    durations, num_nodes, NUM_DURATIONS: tl.constexpr, ZERO_INDEX: tl.constexpr, HAS_DURATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute log_beta of one frame: the log-sum over all paths from each node of the frame to the end.

    Lanes run from the last label position to the first. The arguments are described in `sum_paths`; `num_frames`,
    `first_node` and `num_positions` are those of one utterance.
    """
    lane = tl.arange(0, BLOCK)
    carry = tl.full((), IMPOSSIBLE, tl.float64)
    first_lane = 0
    while first_lane < num_positions:
        position = num_positions - 1 - first_lane - lane
        is_node = position >= 0
        node = first_node + frame.to(tl.int64) * num_positions + position
        blank = tl.load(blank_log_prob + node, mask=is_node, other=0.0).to(tl.float64)
        # `label_log_prob` is IMPOSSIBLE after the last label
        label = tl.load(label_log_prob + node, mask=is_node, other=IMPOSSIBLE).to(tl.float64)
        maximum = tl.full((BLOCK,), IMPOSSIBLE, tl.float64)
        total = tl.full((BLOCK,), 1.0, tl.float32)
        for index in tl.static_range(NUM_DURATIONS):
            if index != ZERO_INDEX:
                duration = tl.load(durations + index)
                target = node + duration * num_positions
                has_target = is_node & (position < tl.where(frame + duration < num_frames, num_positions, 0))
                # the last arc of a path is a blank from the last label position to the end of the last frame
                is_last = position == tl.where(frame + duration == num_frames, num_positions - 1, num_positions)
                duration_score = load_duration(duration_log_prob, index, num_nodes, node, is_node, HAS_DURATIONS)
                path = tl.load(log_beta + target, mask=has_target, other=IMPOSSIBLE)
                path = tl.where(is_last, 0.0, path) + blank + duration_score
                maximum, total = _add_term(maximum, total, path)
                if HAS_DURATIONS:
                    has_target = has_target & (position < num_positions - 1)
                    path = tl.load(log_beta + target + 1, mask=has_target, other=IMPOSSIBLE) + label + duration_score
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

    A frame reads frames that were computed before, up to the longest duration. The barrier between frames makes the
    stores of one frame visible to all threads of the program. No program reads memory that another program writes.

    Args:
        frame_lengths: (B,) number of frames of each utterance.
        label_lengths: (B,) number of labels of each utterance.
        first_node: (B,) number of the first node of each utterance.
        log_alpha: (nodes,) float64 output of the programs with axis 1 = 1.
        log_beta: (nodes,) float64 output of the programs with axis 1 = 0.
        blank_log_prob: (nodes,) log-probability of the blank.
        label_log_prob: (nodes,) log-probability of the next label.
        duration_log_prob: (D, nodes) log-probability of each duration; read only with `HAS_DURATIONS`.
        durations: (D,) number of frames of each duration; 0 and 1 for RNN-T.
        num_nodes: number of nodes.
        ZERO_INDEX: index of duration 0; -1 if there is no duration 0.
    """
    utterance = tl.program_id(0)
    num_frames = tl.load(frame_lengths + utterance)
    num_positions = tl.load(label_lengths + utterance) + 1
    node = tl.load(first_node + utterance)
    if tl.program_id(1) == 1:
        frame = num_frames * 0
        while frame < num_frames:
            _compute_frame_log_alpha(
                frame, node, num_positions, log_alpha, blank_log_prob, label_log_prob, duration_log_prob, durations,
                num_nodes, NUM_DURATIONS, ZERO_INDEX, HAS_DURATIONS, BLOCK,
            )  # fmt: skip
            tl.debug_barrier()
            frame += 1
    else:
        frame = num_frames - 1
        while frame >= 0:
            _compute_frame_log_beta(
                frame, num_frames, node, num_positions, log_beta, blank_log_prob, label_log_prob, duration_log_prob,
                durations, num_nodes, NUM_DURATIONS, ZERO_INDEX, HAS_DURATIONS, BLOCK,
            )  # fmt: skip
            tl.debug_barrier()
            frame -= 1
