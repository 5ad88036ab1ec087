"""Triton programs of the joint network: hidden units of lattice nodes, and gradients of encoder and predictor states.

`joint.py` allocates the memory and launches the programs. The docstring of `lattice_programs.py` explains the nodes.
"""

import triton
import triton.language as tl


@triton.jit
def _add_states(encoder, predictor, encoder_row, predictor_row, node, is_node, unit, joint_size):
    """Add the encoder state and the predictor state of each node of a block.

    Args:
        encoder: (B * T, J) encoder states.
        predictor: (B * (U+1), J) predictor states.
        encoder_row: (nodes,) row of each node in `encoder`.
        predictor_row: (nodes,) row of each node in `predictor`.
        node: (BLOCK_N,) numbers of the nodes.
        is_node: (BLOCK_N,) whether each of the nodes exists.
        unit: (BLOCK_J,) indices of the hidden units.
        joint_size: J.

    Returns:
        (BLOCK_N, BLOCK_J) float32 sums, and a mask of the same shape that is True for elements that exist.
    """
    encoder_index = tl.load(encoder_row + node, mask=is_node, other=0).to(tl.int64)
    predictor_index = tl.load(predictor_row + node, mask=is_node, other=0).to(tl.int64)
    mask = is_node[:, None] & (unit < joint_size)[None, :]
    encoder_state = tl.load(encoder + encoder_index[:, None] * joint_size + unit[None, :], mask=mask, other=0.0)
    predictor_state = tl.load(predictor + predictor_index[:, None] * joint_size + unit[None, :], mask=mask, other=0.0)
    # round the sum to the dtype of the inputs, as PyTorch does
    state_sum = (encoder_state.to(tl.float32) + predictor_state.to(tl.float32)).to(encoder_state.dtype)
    return state_sum.to(tl.float32), mask


@triton.jit
def _compute_dropout_scale(node, unit, joint_size, seed, dropout):
    """Compute the dropout factor of hidden units: 0 if the unit is dropped, otherwise 1 / (1 - dropout).

    The random number depends only on seed, node and unit, so the backward pass gets the same factors.
    """
    offset = node.to(tl.int64)[:, None] * joint_size + unit[None, :]
    return tl.where(tl.rand(seed, offset) >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def compute_hidden(
    encoder,
    predictor,
    encoder_row,
    predictor_row,
    nodes,
    hidden,
    count,
    joint_size,
    seed,
    dropout,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Compute the hidden units activation(encoder + predictor), with dropout, of a chunk of nodes.

    One program per block of nodes and block of hidden units.

    Args:
        encoder: (B * T, J) encoder states.
        predictor: (B * (U+1), J) predictor states.
        encoder_row: (all nodes,) row of each node in `encoder`.
        predictor_row: (all nodes,) row of each node in `predictor`.
        nodes: (count,) numbers of the nodes of the chunk.
        hidden: (count, J) output.
        count: number of nodes of the chunk.
        joint_size: J.
        seed: seed of the dropout masks.
        dropout: dropout probability of a hidden unit.
    """
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    is_node = index < count
    node = tl.load(nodes + index, mask=is_node, other=0)
    state, mask = _add_states(encoder, predictor, encoder_row, predictor_row, node, is_node, unit, joint_size)
    if ACTIVATION == "relu":
        value = tl.maximum(state, 0.0)
        # tl.maximum turns NaN into 0
        value = tl.where(state == state, value, state)
    elif ACTIVATION == "tanh":
        value = 2.0 * tl.sigmoid(2.0 * state) - 1.0
    else:
        value = tl.sigmoid(state)
    if DROPOUT:
        value *= _compute_dropout_scale(node, unit, joint_size, seed, dropout)
    output = hidden + index.to(tl.int64)[:, None] * joint_size + unit[None, :]
    tl.store(output, value.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def differentiate_hidden(
    encoder,
    predictor,
    encoder_row,
    predictor_row,
    nodes,
    gradient,
    count,
    joint_size,
    seed,
    dropout,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Multiply the gradients of hidden units by the derivative of activation and dropout, in place.

    Args:
        gradient: (count, J) gradients of the hidden units, overwritten by the gradients of encoder + predictor.

    The other arguments are described in `compute_hidden`.
    """
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    is_node = index < count
    node = tl.load(nodes + index, mask=is_node, other=0)
    state, mask = _add_states(encoder, predictor, encoder_row, predictor_row, node, is_node, unit, joint_size)
    if ACTIVATION == "relu":
        derivative = tl.where(state > 0.0, 1.0, 0.0)
    elif ACTIVATION == "tanh":
        value = 2.0 * tl.sigmoid(2.0 * state) - 1.0
        derivative = 1.0 - value * value
    else:
        value = tl.sigmoid(state)
        derivative = value * (1.0 - value)
    if DROPOUT:
        derivative *= _compute_dropout_scale(node, unit, joint_size, seed, dropout)
    elements = gradient + index.to(tl.int64)[:, None] * joint_size + unit[None, :]
    value = tl.load(elements, mask=mask, other=0.0).to(tl.float32) * derivative
    tl.store(elements, value.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def sum_over_labels(
    gradient,
    row_start,
    encoder_gradient,
    chunk_start,
    chunk_end,
    joint_size,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Sum the gradients of a chunk over labels and add them to the gradients of the encoder states.

    One program per frame and block of hidden units.

    Args:
        gradient: (nodes of the chunk, J) gradients of encoder + predictor.
        row_start: (B * T + 1,) index of the first node of each frame in the list that is split into chunks.
        encoder_gradient: (B * T, J) float32 gradients, to which the sums are added.
        chunk_start: index of the chunk's first node in the list.
        chunk_end: index after the chunk's last node.
        joint_size: J.
    """
    frame_row = tl.program_id(0)
    unit = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    index = tl.maximum(tl.load(row_start + frame_row), chunk_start)
    end = tl.minimum(tl.load(row_start + frame_row + 1), chunk_end)
    if index < end:
        total = tl.zeros((BLOCK_J,), tl.float32)
        while index < end:
            node_index = index + tl.arange(0, BLOCK_N)
            mask = (node_index < end)[:, None] & (unit < joint_size)[None, :]
            offset = (node_index - chunk_start).to(tl.int64)[:, None] * joint_size + unit[None, :]
            total += tl.sum(tl.load(gradient + offset, mask=mask, other=0.0).to(tl.float32), axis=0)
            index += BLOCK_N
        output = encoder_gradient + frame_row.to(tl.int64) * joint_size + unit
        tl.store(output, tl.load(output, mask=unit < joint_size, other=0.0) + total, mask=unit < joint_size)


@triton.jit
def sum_over_frames(
    gradient,
    list_index,
    nodes,
    encoder_row,
    frame_lengths,
    label_lengths,
    first_node,
    predictor_gradient,
    chunk_start,
    chunk_end,
    num_frames,
    num_positions_padded,
    joint_size,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Sum the gradients of a chunk over frames and add them to the gradients of the predictor states.

    One program per predictor state and block of hidden units.

    Args:
        gradient: (nodes of the chunk, J) gradients of encoder + predictor.
        list_index: (all nodes,) index of each node in the list that is split into chunks; -1 for a node that is not in
            the list.
        nodes: (listed nodes,) numbers of the nodes in the list.
        encoder_row: (all nodes,) row of each node in the flattened encoder states.
        frame_lengths: (B,) number of frames of each utterance.
        label_lengths: (B,) number of labels of each utterance.
        first_node: (B,) number of the first node of each utterance.
        predictor_gradient: (B * (U+1), J) float32 gradients, to which the sums are added.
        chunk_start: index of the chunk's first node in the list.
        chunk_end: index after the chunk's last node.
        num_frames: T.
        num_positions_padded: U + 1.
        joint_size: J.
    """
    predictor_index = tl.program_id(0)
    unit = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    utterance = predictor_index // num_positions_padded
    position = predictor_index % num_positions_padded
    num_positions = tl.load(label_lengths + utterance) + 1
    utterance_node = tl.load(first_node + utterance)
    # first and last frame of the chunk, counted from the first frame of this utterance
    first_chunk_frame = tl.load(encoder_row + tl.load(nodes + chunk_start)) - utterance * num_frames
    last_chunk_frame = tl.load(encoder_row + tl.load(nodes + chunk_end - 1)) - utterance * num_frames
    first_frame = tl.maximum(first_chunk_frame, 0)
    end = tl.minimum(last_chunk_frame + 1, tl.load(frame_lengths + utterance))
    end = tl.where(position < num_positions, end, 0)
    if first_frame < end:
        total = tl.zeros((BLOCK_J,), tl.float32)
        while first_frame < end:
            frame = first_frame + tl.arange(0, BLOCK_N)
            node = utterance_node + frame * num_positions + position
            node_index = tl.load(list_index + node, mask=frame < end, other=-1)
            is_in_chunk = (node_index >= chunk_start) & (node_index < chunk_end)
            mask = is_in_chunk[:, None] & (unit < joint_size)[None, :]
            offset = (node_index - chunk_start).to(tl.int64)[:, None] * joint_size + unit[None, :]
            total += tl.sum(tl.load(gradient + offset, mask=mask, other=0.0).to(tl.float32), axis=0)
            first_frame += BLOCK_N
        output = predictor_gradient + predictor_index.to(tl.int64) * joint_size + unit
        tl.store(output, tl.load(output, mask=unit < joint_size, other=0.0) + total, mask=unit < joint_size)
