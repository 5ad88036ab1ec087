"""The joint network, computed for a chunk of lattice nodes at a time: logits, and gradients of inputs and output layer.

PyTorch computes the matrix products. The workspace for the hidden units and logits of one chunk is allocated once and
has a fixed size. `num_rows` is the number of outputs V + D, rounded up for fast matrix products; `chunk_nodes` is the
number of nodes of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from .joint_programs import compute_hidden, differentiate_hidden, sum_over_frames, sum_over_labels
from .lattice import LatticeSettings, Nodes, Posteriors, Scores, use_device, write_logit_gradients, write_scores

# number of nodes and number of hidden units that one program computes
BLOCK_N = 16
BLOCK_J = 128


@dataclass(frozen=True)
class JointSettings:
    """Settings of the hidden units of the joint network.

    Args:
        activation: `relu`, `tanh` or `sigmoid`.
        dropout: dropout probability of a hidden unit.
        seed: seed of the dropout masks.
        workspace_bytes: memory for the hidden units and logits of one chunk, in bytes.
    """

    activation: str
    dropout: float
    seed: int
    workspace_bytes: int


@dataclass(frozen=True)
class JointInputs:
    """Inputs and output layer of the joint network, contiguous and in one dtype.

    Args:
        encoder: (B * T, J) encoder states.
        predictor: (B * (U+1), J) predictor states.
        weight: (num_rows, J) weight of the output layer; the rows after the first V + D are zeros.
        bias: (num_rows,) bias of the output layer, or None.
        num_outputs: V + D.
    """

    encoder: Tensor
    predictor: Tensor
    weight: Tensor
    bias: Tensor | None
    num_outputs: int


@dataclass(frozen=True)
class JointGradients:
    """float32 gradients of the tensors of `JointInputs`; None for a tensor that needs no gradient."""

    encoder: Tensor | None
    predictor: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Chunk:
    """Consecutive nodes of a list of nodes, with memory for their hidden units and logits.

    Args:
        start: index of the first node in the list.
        nodes: (chunk_nodes,) int32 numbers of the nodes.
        hidden: (chunk_nodes, J) hidden units.
        logits: (chunk_nodes, num_rows) logits; 0 after the first V + D outputs.
        hidden_gradient: (chunk_nodes, J) gradients of the hidden units; empty if no gradient is needed.
    """

    start: int
    nodes: Tensor
    hidden: Tensor
    logits: Tensor
    hidden_gradient: Tensor


@dataclass(frozen=True)
class NodeList:
    """List of the nodes that the backward pass splits into chunks.

    Args:
        nodes: (listed nodes,) int32 numbers of the nodes, in ascending order.
        list_index: (all nodes,) int32 index of each node in `nodes`; -1 for a node that is not in the list.
        row_start: (B * T + 1,) int32 index in `nodes` of the first node of each frame, then the length of `nodes`.
    """

    nodes: Tensor
    list_index: Tensor
    row_start: Tensor


def prepare_inputs(
    encoder_states: Tensor, predictor_states: Tensor, weight: Tensor, bias: Tensor | None
) -> JointInputs:  # fmt: skip
    """Flatten the states, and pad the output layer with rows of zeros.

    With the padding, each row of logits starts at a multiple of 16 bytes, which makes matrix products faster.

    Args:
        encoder_states: (B, T, J) projected encoder states.
        predictor_states: (B, U+1, J) projected predictor states.
        weight: (V + D, J) weight of the output layer.
        bias: (V + D,) bias of the output layer, or None.

    Returns:
        The flattened and padded tensors.
    """
    num_outputs, joint_size = weight.shape
    # number of rows to add, so the length of a row of logits is a multiple of 16 bytes
    padding = -num_outputs % (16 // weight.element_size())
    return JointInputs(
        encoder=encoder_states.reshape(-1, joint_size).contiguous(),
        predictor=predictor_states.reshape(-1, joint_size).contiguous(),
        weight=F.pad(weight, (0, 0, 0, padding)).contiguous(),
        bias=None if bias is None else F.pad(bias, (0, padding)),
        num_outputs=num_outputs,
    )


def split_into_chunks(
    node_list: Tensor, inputs: JointInputs, joint: JointSettings, needs_hidden_gradient: bool
) -> Iterator[Chunk]:
    """Split a list of nodes into chunks that fit into the workspace.

    All chunks use the same memory, so a chunk is valid only until the next one is requested.

    Args:
        node_list: (listed nodes,) int32 numbers of the nodes, in ascending order.
        inputs: inputs and output layer of the joint network.
        joint: settings of the joint network.
        needs_hidden_gradient: whether to allocate memory for the gradients of the hidden units.

    Yields:
        The chunks, in the order of the list.
    """
    num_rows, joint_size = inputs.weight.shape
    bytes_per_node = (num_rows + joint_size * (2 if needs_hidden_gradient else 1)) * inputs.weight.element_size()
    length = min(len(node_list), max(1, joint.workspace_bytes // bytes_per_node))
    options = {"dtype": inputs.weight.dtype, "device": inputs.weight.device}
    hidden = torch.empty((length, joint_size), **options)
    logits = torch.empty((length, num_rows), **options)
    hidden_gradient = torch.empty((length if needs_hidden_gradient else 0, joint_size), **options)
    for start in range(0, len(node_list), max(1, length)):
        nodes = node_list[start : start + length]
        count = len(nodes)
        yield Chunk(start, nodes, hidden[:count], logits[:count], hidden_gradient[:count])


def write_logits(chunk: Chunk, inputs: JointInputs, nodes: Nodes, joint: JointSettings) -> None:
    """Compute the hidden units and the logits of a chunk in `chunk.hidden` and `chunk.logits`.

    Args:
        chunk: chunk whose memory is written.
        inputs: inputs and output layer of the joint network.
        nodes: the lattice nodes of the batch.
        joint: settings of the joint network.
    """
    count, joint_size = chunk.hidden.shape
    with use_device(chunk.hidden):
        compute_hidden[(triton.cdiv(count, BLOCK_N), triton.cdiv(joint_size, BLOCK_J))](
            inputs.encoder, inputs.predictor, nodes.encoder_row, nodes.predictor_row, chunk.nodes, chunk.hidden, count,
            joint_size, joint.seed, joint.dropout, ACTIVATION=joint.activation, DROPOUT=joint.dropout > 0,
            BLOCK_N=BLOCK_N, BLOCK_J=BLOCK_J,
        )  # fmt: skip
    if inputs.bias is None:
        torch.mm(chunk.hidden, inputs.weight.t(), out=chunk.logits)
    else:
        torch.addmm(inputs.bias, chunk.hidden, inputs.weight.t(), out=chunk.logits)


def split_logits(logits: Tensor, num_outputs: int, settings: LatticeSettings) -> tuple[Tensor, Tensor]:
    """Split (chunk_nodes, num_rows) logits into (chunk_nodes, V) token logits and (chunk_nodes, D) duration logits."""
    vocab_size = num_outputs - (len(settings.arc_durations) if settings.has_durations else 0)
    return logits[:, :vocab_size], logits[:, vocab_size:num_outputs]


def score_all_nodes(
    inputs: JointInputs, nodes: Nodes, settings: LatticeSettings, joint: JointSettings, scores: Scores
) -> None:
    """Compute the scores of all nodes, chunk by chunk.

    Args:
        inputs: inputs and output layer of the joint network.
        nodes: the lattice nodes of the batch.
        settings: options of the lattice.
        joint: settings of the joint network.
        scores: memory for the scores of all nodes, which is written.
    """
    all_nodes = torch.arange(nodes.num_nodes, dtype=torch.int32, device=nodes.first_node.device)
    for chunk in split_into_chunks(all_nodes, inputs, joint, needs_hidden_gradient=False):
        write_logits(chunk, inputs, nodes, joint)
        token_logits, duration_logits = split_logits(chunk.logits, inputs.num_outputs, settings)
        write_scores(token_logits, duration_logits, chunk.nodes, nodes, settings, scores)


def differentiate_joint(
    inputs: JointInputs, nodes: Nodes, settings: LatticeSettings, joint: JointSettings, scores: Scores,
    posteriors: Posteriors, needs_gradient: tuple[bool, ...],
) -> JointGradients:  # fmt: skip
    """Compute the gradients of the joint network's inputs and output layer.

    Only the nodes with `posteriors.is_relevant` contribute; the other nodes are negligible.

    Args:
        inputs: inputs and output layer of the joint network.
        nodes: the lattice nodes of the batch.
        settings: options of the lattice.
        joint: settings of the joint network.
        scores: scores of all nodes.
        posteriors: posteriors of all nodes.
        needs_gradient: whether encoder states, predictor states, weight and bias need a gradient.

    Returns:
        The gradients, without the padding of the output layer.
    """
    gradients = _allocate_gradients(inputs, needs_gradient)
    node_list = _list_relevant_nodes(inputs, nodes, posteriors)
    needs_hidden_gradient = gradients.encoder is not None or gradients.predictor is not None
    for chunk in split_into_chunks(node_list.nodes, inputs, joint, needs_hidden_gradient):
        write_logits(chunk, inputs, nodes, joint)
        tokens, durations = split_logits(chunk.logits, inputs.num_outputs, settings)
        # the gradients replace the logits
        write_logit_gradients(tokens, tokens, durations, chunk.nodes, nodes, settings, scores, posteriors)
        if gradients.weight is not None:
            gradients.weight.add_(torch.mm(chunk.logits.t(), chunk.hidden))
        if gradients.bias is not None:
            gradients.bias.add_(chunk.logits.sum(0, dtype=torch.float32))
        if needs_hidden_gradient:
            torch.mm(chunk.logits, inputs.weight, out=chunk.hidden_gradient)
            _add_state_gradients(chunk, inputs, nodes, joint, node_list, gradients)
    return JointGradients(
        gradients.encoder,
        gradients.predictor,
        None if gradients.weight is None else gradients.weight[: inputs.num_outputs],
        None if gradients.bias is None else gradients.bias[: inputs.num_outputs],
    )


def _allocate_gradients(inputs: JointInputs, needs_gradient: tuple[bool, ...]) -> JointGradients:
    """Allocate a float32 tensor of zeros for each tensor that needs a gradient; None for the others.

    Args:
        inputs: inputs and output layer of the joint network.
        needs_gradient: whether encoder states, predictor states, weight and bias need a gradient.
    """
    tensors = (inputs.encoder, inputs.predictor, inputs.weight, inputs.bias)
    return JointGradients(
        *(
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and needed else None
            for tensor, needed in zip(tensors, needs_gradient, strict=True)
        )
    )


def _list_relevant_nodes(inputs: JointInputs, nodes: Nodes, posteriors: Posteriors) -> NodeList:
    """List the nodes whose gradient is not negligible.

    Args:
        inputs: inputs of the joint network, from which the number of frames B * T is read.
        nodes: the lattice nodes of the batch.
        posteriors: posteriors of all nodes.

    Returns:
        The list, with the index of the first listed node of each frame.
    """
    is_relevant = posteriors.is_relevant
    relevant_nodes = is_relevant.nonzero()[:, 0].to(torch.int32)
    list_index = torch.where(is_relevant > 0, is_relevant.cumsum(0, dtype=torch.int32) - 1, -1)
    rows = torch.arange(len(inputs.encoder) + 1, dtype=torch.int32, device=relevant_nodes.device)
    row_start = torch.searchsorted(nodes.encoder_row[relevant_nodes], rows, out_int32=True)
    return NodeList(relevant_nodes, list_index, row_start)


def _add_state_gradients(
    chunk: Chunk, inputs: JointInputs, nodes: Nodes, joint: JointSettings, node_list: NodeList,
    gradients: JointGradients,
) -> None:  # fmt: skip
    """Backpropagate the hidden units of a chunk to the encoder states and predictor states.

    One program adds up the gradient of each state, so the order of the sum is fixed and no atomic addition is needed.

    Args:
        chunk: chunk with the gradient of its hidden units, which is overwritten.
        inputs: inputs and output layer of the joint network.
        nodes: the lattice nodes of the batch.
        joint: settings of the joint network.
        node_list: the list of nodes that contains the chunk.
        gradients: gradients of encoder states and predictor states, to which the result is added.
    """
    count, joint_size = chunk.hidden_gradient.shape
    num_unit_blocks = triton.cdiv(joint_size, BLOCK_J)
    end = chunk.start + count
    with use_device(chunk.hidden_gradient):
        differentiate_hidden[(triton.cdiv(count, BLOCK_N), num_unit_blocks)](
            inputs.encoder, inputs.predictor, nodes.encoder_row, nodes.predictor_row, chunk.nodes,
            chunk.hidden_gradient, count, joint_size, joint.seed, joint.dropout, ACTIVATION=joint.activation,
            DROPOUT=joint.dropout > 0, BLOCK_N=BLOCK_N, BLOCK_J=BLOCK_J,
        )  # fmt: skip
        if gradients.encoder is not None:
            sum_over_labels[(len(inputs.encoder), num_unit_blocks)](
                chunk.hidden_gradient, node_list.row_start, gradients.encoder, chunk.start, end, joint_size,
                BLOCK_N=BLOCK_N, BLOCK_J=BLOCK_J,
            )  # fmt: skip
        if gradients.predictor is not None:
            sum_over_frames[(len(inputs.predictor), num_unit_blocks)](
                chunk.hidden_gradient, node_list.list_index, node_list.nodes, nodes.encoder_row, nodes.frame_lengths,
                nodes.label_lengths, nodes.first_node, gradients.predictor, chunk.start, end, nodes.num_frames,
                nodes.num_positions, joint_size, BLOCK_N=BLOCK_N, BLOCK_J=BLOCK_J,
            )  # fmt: skip
