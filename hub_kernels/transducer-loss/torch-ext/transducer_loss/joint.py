"""The joint network in chunks of lattice nodes: logits, and the gradients of its inputs and its output layer.

Matrix products are PyTorch's. The workspace for the hidden units and logits of one chunk is allocated once and has a
fixed size.
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

# nodes and hidden units of one program
BLOCK_N = 16
BLOCK_J = 128


@dataclass(frozen=True)
class JointSettings:
    """How hidden units are computed, and in how much memory.

    Args:
        activation: `relu`, `tanh` or `sigmoid`.
        dropout: probability of dropping a hidden unit.
        seed: seed of the dropout.
        workspace_bytes: memory for the hidden units and logits of one chunk.
    """

    activation: str
    dropout: float
    seed: int
    workspace_bytes: int


@dataclass(frozen=True)
class JointInputs:
    """Inputs and output layer of the joint network, contiguous and of one dtype.

    Args:
        encoder: (B * T, J) encoder states.
        predictor: (B * (U+1), J) predictor states.
        weight: (R, J) output layer: V + D rows, then rows of zeros.
        bias: (R,), or None.
        num_outputs: V + D.
    """

    encoder: Tensor
    predictor: Tensor
    weight: Tensor
    bias: Tensor | None
    num_outputs: int


@dataclass(frozen=True)
class JointGradients:
    """Gradients of `JointInputs`, float32; None where no gradient is needed."""

    encoder: Tensor | None
    predictor: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Chunk:
    """Consecutive nodes of a list, and memory for their hidden units and logits.

    Args:
        start: index of the first node in the list.
        nodes: (n,) int32 numbers of the nodes.
        hidden: (n, J) hidden units.
        logits: (n, R) logits; zero after the V + D outputs.
        hidden_gradient: (n, J) gradients of the hidden units; empty if they are not needed.
    """

    start: int
    nodes: Tensor
    hidden: Tensor
    logits: Tensor
    hidden_gradient: Tensor


@dataclass(frozen=True)
class NodeList:
    """The nodes from which chunks are cut in backward.

    Args:
        nodes: (n,) int32 numbers of the nodes, ascending.
        list_index: (all nodes,) int32 index of each node in `nodes`, -1 if it is not in the list.
        row_start: (B * T + 1,) int32 index of the first node of each frame in `nodes`.
    """

    nodes: Tensor
    list_index: Tensor
    row_start: Tensor


def prepare_inputs(
    encoder_states: Tensor, predictor_states: Tensor, weight: Tensor, bias: Tensor | None
) -> JointInputs:  # fmt: skip
    """Flatten the states and pad the output layer.

    The padded rows of the logits start at multiples of 16 bytes, for which matrix products are faster.

    Args:
        encoder_states: (B, T, J).
        predictor_states: (B, U+1, J).
        weight: (V + D, J).
        bias: (V + D,), or None.

    Returns:
        The inputs of the joint network.
    """
    num_outputs, joint_size = weight.shape
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
    """Split a list of nodes into chunks that fit into the workspace. All chunks share one memory.

    Args:
        node_list: (n,) int32 numbers of the nodes, ascending.
        inputs: inputs of the joint network.
        joint: settings of the joint network.
        needs_hidden_gradient: whether a chunk has memory for gradients of its hidden units.

    Yields:
        The chunks in order.
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
    """Write the hidden units and the logits of a chunk."""
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
    """Return the token columns and the duration columns of (n, R) logits, without the padding."""
    vocab_size = num_outputs - (len(settings.arc_durations) if settings.has_durations else 0)
    return logits[:, :vocab_size], logits[:, vocab_size:num_outputs]


def score_all_nodes(
    inputs: JointInputs, nodes: Nodes, settings: LatticeSettings, joint: JointSettings, scores: Scores
) -> None:
    """Write the scores of all nodes, chunk by chunk.

    Args:
        inputs: inputs of the joint network.
        nodes: the nodes of the batch.
        settings: which arcs leave a node.
        joint: settings of the joint network.
        scores: is written.
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
    """Compute the gradients of the joint network's inputs and output layer from the relevant nodes.

    Args:
        inputs: inputs of the joint network.
        nodes: the nodes of the batch.
        settings: which arcs leave a node.
        joint: settings of the joint network.
        scores: scores of all nodes.
        posteriors: posteriors of all nodes.
        needs_gradient: whether encoder states, predictor states, weight and bias need a gradient.

    Returns:
        The gradients, without padding.
    """
    gradients = _allocate_gradients(inputs, needs_gradient)
    listed = _list_relevant_nodes(inputs, nodes, posteriors)
    needs_hidden_gradient = gradients.encoder is not None or gradients.predictor is not None
    for chunk in split_into_chunks(listed.nodes, inputs, joint, needs_hidden_gradient):
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
            _add_state_gradients(chunk, inputs, nodes, joint, listed, gradients)
    return JointGradients(
        gradients.encoder,
        gradients.predictor,
        None if gradients.weight is None else gradients.weight[: inputs.num_outputs],
        None if gradients.bias is None else gradients.bias[: inputs.num_outputs],
    )


def _allocate_gradients(inputs: JointInputs, needs_gradient: tuple[bool, ...]) -> JointGradients:
    """Allocate zeros for the gradients that are needed."""
    tensors = (inputs.encoder, inputs.predictor, inputs.weight, inputs.bias)
    return JointGradients(
        *(
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and needed else None
            for tensor, needed in zip(tensors, needs_gradient, strict=True)
        )
    )


def _list_relevant_nodes(inputs: JointInputs, nodes: Nodes, posteriors: Posteriors) -> NodeList:
    """List the nodes whose logits have a gradient that is not negligible."""
    is_relevant = posteriors.is_relevant
    relevant = is_relevant.nonzero()[:, 0].to(torch.int32)
    list_index = torch.where(is_relevant > 0, is_relevant.cumsum(0, dtype=torch.int32) - 1, -1)
    rows = torch.arange(len(inputs.encoder) + 1, dtype=torch.int32, device=relevant.device)
    row_start = torch.searchsorted(nodes.encoder_row[relevant], rows, out_int32=True)
    return NodeList(relevant, list_index, row_start)


def _add_state_gradients(
    chunk: Chunk, inputs: JointInputs, nodes: Nodes, joint: JointSettings, listed: NodeList, gradients: JointGradients
) -> None:
    """Add a chunk's gradients of hidden units to the gradients of encoder and predictor states.

    Each state has its own program, so sums have a fixed order and need no atomic additions.

    Args:
        chunk: nodes with `hidden_gradient`, which is overwritten.
        inputs: inputs of the joint network.
        nodes: the nodes of the batch.
        joint: settings of the joint network.
        listed: the list from which the chunk was cut.
        gradients: encoder and predictor gradients are added to.
    """
    count, joint_size = chunk.hidden_gradient.shape
    unit_blocks = triton.cdiv(joint_size, BLOCK_J)
    end = chunk.start + count
    with use_device(chunk.hidden_gradient):
        differentiate_hidden[(triton.cdiv(count, BLOCK_N), unit_blocks)](
            inputs.encoder, inputs.predictor, nodes.encoder_row, nodes.predictor_row, chunk.nodes,
            chunk.hidden_gradient, count, joint_size, joint.seed, joint.dropout, ACTIVATION=joint.activation,
            DROPOUT=joint.dropout > 0, BLOCK_N=BLOCK_N, BLOCK_J=BLOCK_J,
        )  # fmt: skip
        if gradients.encoder is not None:
            sum_over_labels[(len(inputs.encoder), unit_blocks)](
                chunk.hidden_gradient, listed.row_start, gradients.encoder, chunk.start, end, joint_size,
                BLOCK_N=BLOCK_N, BLOCK_J=BLOCK_J,
            )  # fmt: skip
        if gradients.predictor is not None:
            sum_over_frames[(len(inputs.predictor), unit_blocks)](
                chunk.hidden_gradient, listed.list_index, listed.nodes, nodes.encoder_row, nodes.frame_lengths,
                nodes.label_lengths, nodes.first_node, gradients.predictor, chunk.start, end, nodes.num_frames,
                nodes.num_positions, joint_size, BLOCK_N=BLOCK_N, BLOCK_J=BLOCK_J,
            )  # fmt: skip
