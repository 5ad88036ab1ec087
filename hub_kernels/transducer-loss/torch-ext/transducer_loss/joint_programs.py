"""Triton programs of the joint network: hidden units of lattice nodes, and the gradients of the states they come from.

`joint.py` allocates their memory and launches them. Lattice nodes are explained in `lattice_programs.py`.
"""

import triton
import triton.language as tl


@triton.jit
def _add_states(encoder, predictor, encoder_row, predictor_row, node, is_node, unit, joint_size):
    """Return encoder state + predictor state of a block of nodes, and which of its elements exist.

    Args:
        encoder: (B * T, J) encoder states.
        predictor: (B * (U+1), J) predictor states.
        encoder_row: (nodes,) row of each node in `encoder`.
        predictor_row: (nodes,) row of each node in `predictor`.
        node: (BLOCK_N,) numbers of the nodes.
        is_node: (BLOCK_N,) which of them exist.
        unit: (BLOCK_J,) hidden units.
        joint_size: J.

    Returns:
        (BLOCK_N, BLOCK_J) float32 sums, and a mask of this shape.
    """
    encoder_index = tl.load(encoder_row + node, mask=is_node, other=0).to(tl.int64)
    predictor_index = tl.load(predictor_row + node, mask=is_node, other=0).to(tl.int64)
    mask = is_node[:, None] & (unit < joint_size)[None, :]
    left = tl.load(encoder + encoder_index[:, None] * joint_size + unit[None, :], mask=mask, other=0.0)
    right = tl.load(predictor + predictor_index[:, None] * joint_size + unit[None, :], mask=mask, other=0.0)
    # the sum is rounded to the dtype of the inputs, as PyTorch rounds it
    return (left.to(tl.float32) + right.to(tl.float32)).to(left.dtype).to(tl.float32), mask


@triton.jit
def _dropout_scale(node, unit, joint_size, seed, dropout):
    """Return 1 / (1 - dropout) for hidden units that stay and 0 for those that are dropped; the same in every pass."""
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
    """Write activation(encoder + predictor), with dropout, of a chunk of nodes.

    One program per block of nodes and block of hidden units.

    Args:
        encoder: (B * T, J) encoder states.
        predictor: (B * (U+1), J) predictor states.
        encoder_row: (all nodes,) row of each node in `encoder`.
        predictor_row: (all nodes,) row of each node in `predictor`.
        nodes: (count,) numbers of the nodes of the chunk.
        hidden: (count, J) is written.
        count: number of nodes of the chunk.
        joint_size: J.
        seed: seed of the dropout.
        dropout: probability of dropping a hidden unit.
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
        value *= _dropout_scale(node, unit, joint_size, seed, dropout)
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
    """Multiply gradients of hidden units, in place, by the derivative of activation and dropout.

    Args:
        gradient: (count, J) gradients of the hidden units; becomes the gradients of encoder + predictor.

    The other arguments are those of `compute_hidden`.
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
        derivative *= _dropout_scale(node, unit, joint_size, seed, dropout)
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
    """Add a chunk's gradients to the gradients of encoder states; one program per frame and block of hidden units.

    Args:
        gradient: (nodes of the chunk, J) gradients of encoder + predictor.
        row_start: (B * T + 1,) index of the first node of each frame in the list from which chunks are cut.
        encoder_gradient: (B * T, J) float32, is added to.
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
    """Add a chunk's gradients to the gradients of predictor states.

    One program per predictor state and block of hidden units.

    Args:
        gradient: (nodes of the chunk, J) gradients of encoder + predictor.
        list_index: (all nodes,) index of each node in the list from which chunks are cut, -1 if it is not in the list.
        nodes: (listed nodes,) the list.
        encoder_row: (all nodes,) row of each node in the flattened encoder states.
        frame_lengths: (B,) frames of each utterance.
        label_lengths: (B,) labels of each utterance.
        first_node: (B,) number of the first node of each utterance.
        predictor_gradient: (B * (U+1), J) float32, is added to.
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
    # frames of this utterance with nodes in the chunk
    lowest = tl.load(encoder_row + tl.load(nodes + chunk_start)) - utterance * num_frames
    highest = tl.load(encoder_row + tl.load(nodes + chunk_end - 1)) - utterance * num_frames
    first_frame = tl.maximum(lowest, 0)
    end = tl.minimum(highest + 1, tl.load(frame_lengths + utterance))
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
