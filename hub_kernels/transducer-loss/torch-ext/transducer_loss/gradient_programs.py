"""Triton programs of the gradient: posteriors of the arcs of the lattice, and gradients of the logits.

`lattice.py` allocates the memory and launches the programs. The docstring of `lattice_programs.py` explains the nodes.
"""

import triton
import triton.language as tl

from .lattice_programs import IMPOSSIBLE, NO_PATH, load_duration


@triton.jit
def compute_posteriors(
    frame_lengths,
    label_lengths,
    first_node,
    loss_gradient,
    log_alpha,
    log_beta,
    blank_log_prob,
    label_log_prob,
    duration_log_prob,
    durations,
    node_posterior,
    blank_posterior,
    label_posterior,
    duration_gradient,
    is_relevant,
    num_frames_padded,
    num_nodes,
    label_scale,
    negligible,
    NUM_DURATIONS: tl.constexpr,
    HAS_DURATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the posterior probabilities of the arcs that leave each node; one program per padded frame.

    All results are multiplied by the gradient of the utterance's loss. They are 0 for an utterance without a path.

    Args:
        frame_lengths: (B,) number of frames of each utterance.
        label_lengths: (B,) number of labels of each utterance.
        first_node: (B,) number of the first node of each utterance.
        loss_gradient: (B,) gradient of the loss of each utterance.
        log_alpha: (nodes,) log-sum over the paths from the start to each node.
        log_beta: (nodes,) log-sum over the paths from each node to the end.
        blank_log_prob: (nodes,) log-probability of the blank.
        label_log_prob: (nodes,) log-probability of the next label.
        duration_log_prob: (D, nodes) log-probability of each duration; read only with `HAS_DURATIONS`.
        durations: (D,) number of frames of each duration; 0 and 1 for RNN-T.
        node_posterior: (nodes,) output: `blank_posterior` + `label_posterior`.
        blank_posterior: (nodes,) output: sum over the blank arcs.
        label_posterior: (nodes,) output: sum over the label arcs, times `label_scale`.
        duration_gradient: (D, nodes) output, only with `HAS_DURATIONS`: gradient of the duration logits.
        is_relevant: (nodes,) output: 1 if the sum over all arcs of the node exceeds `negligible` divided by the number
            of nodes of the utterance, otherwise 0.
        num_frames_padded: T.
        num_nodes: number of nodes.
        label_scale: 1 + lambda of FastEmit.
        negligible: largest allowed sum of the posteriors of the irrelevant nodes of an utterance.
    """
    utterance = tl.program_id(0) // num_frames_padded
    frame = tl.program_id(0) % num_frames_padded
    num_frames = tl.load(frame_lengths + utterance)
    if frame < num_frames:
        num_positions = tl.load(label_lengths + utterance) + 1
        utterance_node = tl.load(first_node + utterance)
        log_likelihood = tl.load(log_beta + utterance_node)
        scale = tl.load(loss_gradient + utterance).to(tl.float32)
        # False for NaN, so NaN reaches the gradients
        has_no_path = log_likelihood < NO_PATH
        limit = negligible / (num_frames * num_positions).to(tl.float32)
        first_position = 0
        while first_position < num_positions:
            position = first_position + tl.arange(0, BLOCK)
            is_node = position < num_positions
            node = utterance_node + frame.to(tl.int64) * num_positions + position
            source_score = tl.load(log_alpha + node, mask=is_node, other=IMPOSSIBLE) - log_likelihood
            blank = tl.load(blank_log_prob + node, mask=is_node, other=IMPOSSIBLE).to(tl.float64) + source_score
            label = tl.load(label_log_prob + node, mask=is_node, other=IMPOSSIBLE).to(tl.float64) + source_score
            blank_sum = tl.zeros((BLOCK,), tl.float32)
            label_sum = tl.zeros((BLOCK,), tl.float32)
            for index in tl.static_range(NUM_DURATIONS):
                blank_arc, label_arc = _compute_arc_posteriors(
                    index, frame, num_frames, num_positions, position, node, is_node, blank, label, log_beta,
                    duration_log_prob, durations, num_nodes, HAS_DURATIONS,
                )  # fmt: skip
                blank_sum += blank_arc
                label_sum += label_arc
            node_sum = blank_sum + label_sum
            if HAS_DURATIONS:
                for index in tl.static_range(NUM_DURATIONS):
                    blank_arc, label_arc = _compute_arc_posteriors(
                        index, frame, num_frames, num_positions, position, node, is_node, blank, label, log_beta,
                        duration_log_prob, durations, num_nodes, HAS_DURATIONS,
                    )  # fmt: skip
                    offset = index * num_nodes + node
                    probability = tl.exp(tl.load(duration_log_prob + offset, mask=is_node, other=IMPOSSIBLE))
                    value = (node_sum * probability - blank_arc - label_arc) * scale
                    tl.store(duration_gradient + offset, tl.where(has_no_path, 0.0, value), mask=is_node)
            # 1 for NaN
            exceeds_limit = tl.where(node_sum <= limit, 0, 1)
            # FastEmit scales the gradients of token logits; it does not scale the gradients of duration logits
            label_sum *= label_scale
            node_sum = blank_sum + label_sum
            relevant = tl.where(has_no_path, 0, tl.where(scale == 0.0, 0, exceeds_limit))
            tl.store(node_posterior + node, tl.where(has_no_path, 0.0, node_sum * scale), mask=is_node)
            tl.store(blank_posterior + node, tl.where(has_no_path, 0.0, blank_sum * scale), mask=is_node)
            tl.store(label_posterior + node, tl.where(has_no_path, 0.0, label_sum * scale), mask=is_node)
            tl.store(is_relevant + node, relevant.to(tl.int8), mask=is_node)
            first_position += BLOCK


@triton.jit
def _compute_arc_posteriors(
    index, frame, num_frames, num_positions, position, node, is_node, blank, label, log_beta, duration_log_prob,
    durations, num_nodes, HAS_DURATIONS: tl.constexpr,
):  # fmt: skip
    """Compute the posteriors of the blank arcs and label arcs of one duration that leave a block of nodes.

    Args:
        index: index of the duration.
        position: (BLOCK,) label positions of the nodes.
        node: (BLOCK,) numbers of the nodes.
        is_node: (BLOCK,) whether each of the nodes exists.
        blank: (BLOCK,) log_alpha + log-probability of the blank - log-likelihood.
        label: (BLOCK,) log_alpha + log-probability of the next label - log-likelihood.

    The other arguments are described in `compute_posteriors`, but `num_frames` and `num_positions` are the numbers of
    frames and label positions of the utterance.

    Returns:
        (BLOCK,) posteriors of the blank arcs, and (BLOCK,) posteriors of the label arcs.
    """
    duration = tl.load(durations + index)
    target = node + duration * num_positions
    # number of label positions of the target's frame; 0 after the last frame
    end = tl.where(frame + duration < num_frames, num_positions, 0)
    is_last = position == tl.where(frame + duration == num_frames, num_positions - 1, num_positions)
    duration_score = load_duration(duration_log_prob, index, num_nodes, node, is_node, HAS_DURATIONS)
    target_log_beta = tl.where(is_last, 0.0, tl.load(log_beta + target, mask=position < end, other=IMPOSSIBLE))
    # a blank must advance
    blank_arc = tl.where(duration > 0, tl.exp((blank + duration_score + target_log_beta).to(tl.float32)), 0.0)
    if not HAS_DURATIONS:
        # a label of RNN-T does not advance
        end = tl.where(duration == 0, end, 0)
    target_log_beta = tl.load(log_beta + target + 1, mask=position < end - 1, other=IMPOSSIBLE)
    return blank_arc, tl.exp((label + duration_score + target_log_beta).to(tl.float32))


@triton.jit
def differentiate_logits(
    token_logits,
    token_stride,
    token_gradient,
    token_gradient_stride,
    duration_gradient_rows,
    duration_gradient_stride,
    row_node,
    next_label,
    log_normalizer,
    node_posterior,
    blank_posterior,
    label_posterior,
    duration_gradient,
    num_nodes,
    blank_id,
    VOCAB_SIZE: tl.constexpr,
    NUM_DURATIONS: tl.constexpr,
    HAS_DURATIONS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradient of each row of logits; one program per row.

    The gradient of a token logit is the posterior of the node times the probability of the token. For the blank, the
    posterior of the blank arcs is subtracted; for the next label, the posterior of the label arcs is subtracted. Padded
    rows are not read and get the gradient 0.

    Args:
        token_logits: (rows, V) logits.
        token_stride: distance between two rows of `token_logits`.
        token_gradient: (rows, V) output; may be the memory of `token_logits`.
        token_gradient_stride: distance between two rows of `token_gradient`.
        duration_gradient_rows: (rows, D) output, only with `HAS_DURATIONS`.
        duration_gradient_stride: distance between two rows of `duration_gradient_rows`.
        row_node: (rows,) node of each row; -1 for padding.
        next_label: (nodes,) label that the node can emit; -1 after the last label.
        log_normalizer: (nodes,) log-sum-exp of the token logits.
        node_posterior: (nodes,) sum of the posteriors of all arcs.
        blank_posterior: (nodes,) sum of the posteriors of the blank arcs.
        label_posterior: (nodes,) sum of the posteriors of the label arcs.
        duration_gradient: (D, nodes) gradient of the duration logits, from `compute_posteriors`.
        num_nodes: number of nodes.
        blank_id: id of the blank.
    """
    row = tl.program_id(0).to(tl.int64)
    node = tl.load(row_node + row)
    is_node = node >= 0
    posterior = tl.load(node_posterior + node, mask=is_node, other=0.0)
    blank = tl.load(blank_posterior + node, mask=is_node, other=0.0)
    label = tl.load(label_posterior + node, mask=is_node, other=0.0)
    label_id = tl.load(next_label + node, mask=is_node, other=-1)
    normalizer = tl.load(log_normalizer + node, mask=is_node, other=0.0)
    for first_column in range(0, VOCAB_SIZE, BLOCK_V):
        column = first_column + tl.arange(0, BLOCK_V)
        is_read = column < tl.where(is_node, VOCAB_SIZE, 0)
        value = tl.load(token_logits + row * token_stride + column, mask=is_read, other=0.0).to(tl.float32)
        value = posterior * tl.exp(value - normalizer)
        value -= tl.where(column == blank_id, blank, 0.0) + tl.where(column == label_id, label, 0.0)
        output = token_gradient + row * token_gradient_stride + column
        tl.store(output, value.to(token_gradient.dtype.element_ty), mask=column < VOCAB_SIZE)
    if HAS_DURATIONS:
        index = tl.arange(0, BLOCK_D)
        is_read = index < tl.where(is_node, NUM_DURATIONS, 0)
        value = tl.load(duration_gradient + index.to(tl.int64) * num_nodes + node, mask=is_read, other=0.0)
        output = duration_gradient_rows + row * duration_gradient_stride + index
        tl.store(output, value.to(duration_gradient_rows.dtype.element_ty), mask=index < NUM_DURATIONS)
