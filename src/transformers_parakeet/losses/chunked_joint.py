"""The joint network for the fused transducer loss: logits and gradients, computed for a chunk of nodes at a time.

Only one chunk of logits is stored at a time, plus the chunks that fit into the workspace. Nodes are explained in
`lattice.py`; the autograd function of the fused loss is in `transducer.py`.

Letters: B clips, T frames, U labels, J width of the joint network, V tokens with the blank, D durations. `num_nodes` is
the number of valid nodes in the batch, `chunk_nodes` is the number of nodes of a chunk. `num_outputs` is V + D for
TDT and V for RNN-T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .lattice import (
    ArcPosteriors,
    Lattice,
    NodeLogProbs,
    compute_duration_gradient,
    get_accumulation_dtype,
    repeat_per_node,
    replace_by_token_gradient_,
    scale_posteriors,
)

# A row of token logits is padded to a multiple of this number of values, a cache line of 64 bytes in float32. With
# V = 1025, the matrix product of the output layer then takes 0.63 times as long (AMD EPYC, torch 2.13).
LOGIT_ROW_ALIGNMENT = 16


@dataclass(frozen=True)
class JointSettings:
    """Settings of the joint network.

    Args:
        vocab_size: V, number of tokens with the blank. The outputs after the first V are durations.
        activation: name of the activation in `transformers.activations.ACT2FN`.
        dropout: dropout probability of the inputs of the output layer.
        dropout_seed: seed of the dropout masks.
        workspace_bytes: memory for hidden values and logits, in bytes.
        dtype: dtype of the matrix products.
    """

    vocab_size: int
    activation: str
    dropout: float
    dropout_seed: int
    workspace_bytes: int
    dtype: torch.dtype

    @property
    def padded_vocab_size(self) -> int:
        """V rounded up to a multiple of `LOGIT_ROW_ALIGNMENT`: number of columns of the token logits."""
        return math.ceil(self.vocab_size / LOGIT_ROW_ALIGNMENT) * LOGIT_ROW_ALIGNMENT


@dataclass(frozen=True)
class NodeInputs:
    """Indices of the inputs of a chunk of nodes.

    Args:
        encoder_rows: (chunk_nodes,) row of each node's encoder state in the flattened (B * T, J) encoder states.
        predictor_rows: (chunk_nodes,) row of each node's predictor state in the flattened (B * (U+1), J) predictor
            states.
        next_labels: (chunk_nodes,) label that each node can emit; 0 after the last label.
    """

    encoder_rows: Tensor
    predictor_rows: Tensor
    next_labels: Tensor


@dataclass(frozen=True)
class ChunkPlan:
    """Division of the valid nodes into chunks.

    Args:
        chunk_size: number of nodes of a chunk; the last chunk may be smaller.
        num_cached: number of chunks whose token log-probabilities are kept for the backward pass.
    """

    chunk_size: int
    num_cached: int


def locate_inputs(lattice: Lattice, nodes: Tensor) -> NodeInputs:
    """Find the encoder state, the predictor state and the next label of each node.

    Args:
        lattice: the lattices of the batch.
        nodes: (chunk_nodes,) indices of the nodes in the flattened (B, T, U+1) grid.

    Returns:
        Rows of the states, and next labels.
    """
    _, num_frames, num_positions = lattice.grid_shape
    clip_indices = nodes // (num_frames * num_positions)
    predictor_rows = clip_indices * num_positions + nodes % num_positions
    return NodeInputs(
        encoder_rows=nodes // num_positions,
        predictor_rows=predictor_rows,
        next_labels=lattice.next_labels.flatten()[predictor_rows],
    )


def plan_chunks(num_nodes: int, joint_width: int, settings: JointSettings, device_type: str) -> ChunkPlan:
    """Divide the workspace between the chunk that is being computed and the chunks that are kept for the backward pass.

    Args:
        num_nodes: number of valid nodes.
        joint_width: J.
        settings: settings of the joint network.
        device_type: type of the torch device, such as `cpu` or `cuda`.

    Returns:
        The plan. A chunk has at least one node, even if the workspace is too small for it.
    """
    accumulation_dtype = get_accumulation_dtype(settings.dtype)
    is_half_precision = settings.dtype != accumulation_dtype
    logit_bytes = settings.padded_vocab_size * accumulation_dtype.itemsize
    if is_half_precision:
        # the matrix product gives half-precision logits, which are copied to the float32 buffer
        logit_bytes += settings.vocab_size * settings.dtype.itemsize
    # hidden values, their gradients and temporary copies take about six rows of J values
    node_bytes = logit_bytes + 6 * joint_width * accumulation_dtype.itemsize
    # a CPU is as fast with small chunks, which leave more of the workspace for cached chunks
    chunk_bytes = settings.workspace_bytes // (8 if device_type == "cpu" else 2)
    chunk_size = min(max(1, chunk_bytes // node_bytes), max(1, num_nodes))
    if is_half_precision:
        # matrix products in half precision are cheap, so the backward pass recomputes all logits
        return ChunkPlan(chunk_size, num_cached=0)
    free_bytes = settings.workspace_bytes - chunk_size * node_bytes
    return ChunkPlan(chunk_size, num_cached=max(0, free_bytes // (chunk_size * logit_bytes)))


class ChunkedJoint:
    """The joint network, evaluated for a chunk of lattice nodes at a time.

    Args:
        encoder_states: (B, T, J) projected encoder states.
        predictor_states: (B, U+1, J) projected predictor states.
        head_weight: (num_outputs, J) weight of the output layer.
        head_bias: (num_outputs,) bias of the output layer, or None.
        lattice: the lattices of the batch.
        settings: settings of the joint network.
    """

    def __init__(
        self,
        encoder_states: Tensor,
        predictor_states: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        lattice: Lattice,
        settings: JointSettings,
    ) -> None:
        self.lattice = lattice
        self.settings = settings
        # (B * T, J) and (B * (U+1), J)
        self.flat_encoder_states = encoder_states.flatten(0, 1)
        self.flat_predictor_states = predictor_states.flatten(0, 1)
        self.head_weight = head_weight.to(settings.dtype)
        if head_bias is None:
            self.head_bias = self.head_weight.new_zeros(len(head_weight))
        else:
            self.head_bias = head_bias.to(settings.dtype)
        self.plan = plan_chunks(len(lattice.nodes), head_weight.shape[1], settings, head_weight.device.type)

    def allocate_logits(self) -> Tensor:
        """Allocate (chunk_size, padded V) memory for the token logits of one chunk."""
        dtype = get_accumulation_dtype(self.settings.dtype)
        return self.head_weight.new_empty(self.plan.chunk_size, self.settings.padded_vocab_size, dtype=dtype)

    def add_states(self, inputs: NodeInputs) -> Tensor:
        """Add the encoder state and the predictor state of each node; returns (chunk_nodes, J).

        Args:
            inputs: rows of the encoder state and the predictor state of each node.
        """
        return self.flat_encoder_states[inputs.encoder_rows] + self.flat_predictor_states[inputs.predictor_rows]

    def activate(self, state_sums: Tensor, nodes: Tensor) -> Tensor:
        """Apply the activation and the dropout of the joint network.

        Args:
            state_sums: (chunk_nodes, J) sums of encoder state and predictor state.
            nodes: (chunk_nodes,) indices of the nodes in the flattened grid, from which the dropout mask is computed.

        Returns:
            (chunk_nodes, J) inputs of the output layer.
        """
        hidden = ACT2FN[self.settings.activation](state_sums)
        if self.settings.dropout > 0:
            mask = draw_dropout_mask(nodes, state_sums.shape[1], self.settings.dropout, self.settings.dropout_seed)
            hidden = hidden * mask.to(hidden.dtype) / (1 - self.settings.dropout)
        return hidden.to(self.settings.dtype)

    def compute_token_logits(self, hidden: Tensor, logits_buffer: Tensor) -> Tensor:
        """Compute the token logits of a chunk in preallocated memory.

        Args:
            hidden: (chunk_nodes, J) inputs of the output layer.
            logits_buffer: (chunk_nodes or more, padded V) memory that is overwritten.

        Returns:
            (chunk_nodes, padded V) view of `logits_buffer`. The padding columns are minus infinity and therefore have
            probability 0.
        """
        vocab_size = self.settings.vocab_size
        logits, weight, bias = logits_buffer[: len(hidden)], self.head_weight[:vocab_size], self.head_bias[:vocab_size]
        if logits.dtype == self.settings.dtype:
            torch.addmm(bias, hidden, weight.t(), out=logits[:, :vocab_size])
        else:
            # `out=` does not convert half precision to float32
            logits[:, :vocab_size] = F.linear(hidden, weight, bias)
        logits[:, vocab_size:] = -math.inf
        return logits

    def compute_duration_logits(self, hidden: Tensor) -> Tensor:
        """Compute (chunk_nodes, D) duration logits from the (chunk_nodes, J) inputs of the output layer.

        Args:
            hidden: (chunk_nodes, J) inputs of the output layer.
        """
        vocab_size = self.settings.vocab_size
        logits = F.linear(hidden, self.head_weight[vocab_size:], self.head_bias[vocab_size:])
        return logits.to(get_accumulation_dtype(self.settings.dtype))


def draw_dropout_mask(nodes: Tensor, joint_width: int, dropout: float, seed: int) -> Tensor:
    """Compute the dropout mask of each node as a hash of seed, node and channel.

    The backward pass computes the same mask again, so the mask need not be stored.

    Args:
        nodes: (chunk_nodes,) indices of the nodes in the flattened grid.
        joint_width: J.
        dropout: dropout probability.
        seed: seed of the hash.

    Returns:
        (chunk_nodes, J) boolean mask, False where a hidden value is zeroed.
    """
    bits = nodes[:, None] * joint_width + torch.arange(joint_width, device=nodes.device) + seed
    # the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), with signed constants because torch has no uint64
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        # `>>` copies the sign bit into the upper bits: clear these bits to get an unsigned shift
        shifted = bits >> shift & (1 << 64 - shift) - 1
        bits = (bits ^ shifted) * factor
    # the upper 24 bits are a uniform random integer from 0 to 2^24 - 1
    return (bits >> 40 & 0xFFFFFF) >= dropout * 2**24


def choose_dtype(encoder_states: Tensor, head_weight: Tensor) -> torch.dtype:
    """Choose the dtype of the matrix products: autocast's dtype under autocast, otherwise the dtype of the inputs.

    Args:
        encoder_states: (B, T, J) encoder states.
        head_weight: weight of the output layer.
    """
    device_type = encoder_states.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(encoder_states.dtype, head_weight.dtype)


def _softmax_in_place(softmax_function: Callable[..., Tensor], logits: Tensor) -> None:
    """Overwrite logits by the result of a softmax over the vocabulary.

    Args:
        softmax_function: `torch.softmax` or `torch.log_softmax`.
        logits: (chunk_nodes, padded V) token logits.
    """
    if logits.device.type == "cpu":
        # torch's CPU kernel reads a row before it writes the row, so input and output can share memory
        softmax_function(logits, -1, out=logits)
    else:
        logits.copy_(softmax_function(logits, -1))


def compute_node_log_probs(joint: ChunkedJoint, num_cached: int) -> tuple[NodeLogProbs, list[Tensor]]:
    """Compute the log-probabilities of blank, next label and durations at every valid node, chunk by chunk.

    Args:
        joint: the joint network.
        num_cached: number of chunks whose token log-probabilities are kept for the backward pass.

    Returns:
        Log-probabilities at the valid nodes, and a list with the (chunk_size, padded V) token log-probabilities of the
        first `num_cached` chunks.
    """
    lattice, chunk_size = joint.lattice, joint.plan.chunk_size
    num_nodes, num_durations = len(lattice.nodes), len(lattice.options.arc_durations)
    dtype, device = get_accumulation_dtype(joint.settings.dtype), lattice.nodes.device
    blank, label = (torch.empty(num_nodes, dtype=dtype, device=device) for _ in range(2))
    durations = torch.empty(num_nodes, num_durations, dtype=dtype, device=device) if lattice.options.is_tdt else None
    cached_log_probs: list[Tensor] = []
    logits_buffer = None
    for start in range(0, num_nodes, chunk_size):
        chunk = slice(start, start + chunk_size)
        nodes = lattice.nodes[chunk]
        inputs = locate_inputs(lattice, nodes)
        hidden = joint.activate(joint.add_states(inputs), nodes)
        if logits_buffer is None:
            logits_buffer = joint.allocate_logits()
        token_log_probs = joint.compute_token_logits(hidden, logits_buffer)
        _softmax_in_place(torch.log_softmax, token_log_probs)
        blank[chunk] = token_log_probs[:, lattice.options.blank_id]
        label[chunk] = token_log_probs.gather(1, inputs.next_labels[:, None])[:, 0]
        if durations is not None:
            durations[chunk] = joint.compute_duration_logits(hidden).log_softmax(-1)
        if len(cached_log_probs) < num_cached:
            cached_log_probs.append(token_log_probs)
            # the next chunk gets new memory, so it does not overwrite the cached chunk
            logits_buffer = None
    return NodeLogProbs(blank, label, durations), cached_log_probs


def compute_joint_gradients(
    joint: ChunkedJoint,
    posteriors: ArcPosteriors,
    loss_grad: Tensor,
    cached_log_probs: Sequence[Tensor],
    needs_gradient: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of encoder states, predictor states, and weight and bias of the output layer.

    Args:
        joint: the joint network.
        posteriors: posteriors of the arcs that leave each valid node.
        loss_grad: (B,) upstream gradient of the loss of each clip.
        cached_log_probs: (chunk_size, padded V) token log-probabilities of the first chunks; they are overwritten.
        needs_gradient: whether each of the four tensors needs a gradient. Only the first four values are used.

    Returns:
        Four gradients; None for a tensor that needs no gradient.
    """
    # nodes whose gradient is not negligible
    active_nodes = find_active_nodes(joint.lattice, posteriors, loss_grad)
    scaled_posteriors = scale_posteriors(joint.lattice, posteriors, loss_grad)
    accumulator = GradientAccumulator(joint, scaled_posteriors, needs_gradient)
    chunk_size = joint.plan.chunk_size
    for chunk_index, log_probs in enumerate(cached_log_probs):
        start = chunk_index * chunk_size
        active_chunk = active_nodes[(active_nodes >= start) & (active_nodes < start + len(log_probs))]
        # indexing copies the chunk, so index it only if some of its nodes are skipped
        is_complete = len(active_chunk) == len(log_probs)
        active_log_probs = log_probs if is_complete else log_probs[active_chunk - start]
        if len(active_chunk) > 0:
            accumulator.add_chunk(active_chunk, token_probs=active_log_probs.exp_())
    uncached_nodes = active_nodes[active_nodes >= len(cached_log_probs) * chunk_size]
    if len(uncached_nodes) > 0:
        logits_buffer = joint.allocate_logits()
        for active_chunk in uncached_nodes.split(chunk_size):
            accumulator.add_chunk(active_chunk, logits_buffer=logits_buffer)
    return accumulator.get_gradients()


def find_active_nodes(lattice: Lattice, posteriors: ArcPosteriors, loss_grad: Tensor) -> Tensor:
    """Select the nodes whose posteriors are large enough to change the gradients.

    Most nodes of a trained model have posteriors near 0. A node of a clip with n nodes is skipped if its posterior is
    at most eps / (2 n), so the sum over all skipped nodes is within the rounding error of one node with posterior 1.

    Args:
        lattice: the lattices of the batch.
        posteriors: posteriors of the arcs that leave each valid node.
        loss_grad: (B,) gradient with respect to the loss of each clip. The nodes of clips with gradient 0 are
            skipped.

    Returns:
        Indices into `lattice.nodes`, in ascending order. Nodes with a NaN posterior are never skipped.
    """
    nodes_per_clip = (lattice.frame_lengths * (lattice.label_lengths + 1)).clamp(min=1)
    threshold = torch.finfo(loss_grad.dtype).eps / 2 / nodes_per_clip.to(loss_grad.dtype)
    # the comparison is False for NaN
    is_negligible = (posteriors.blank + posteriors.label) <= repeat_per_node(lattice, threshold)
    has_gradient = repeat_per_node(lattice, loss_grad) != 0
    return (~is_negligible & has_gradient).nonzero()[:, 0]


class GradientAccumulator:
    """Gradients of the joint network's inputs and output layer, accumulated over chunks of nodes.

    Args:
        joint: the joint network.
        posteriors: posteriors of the arcs that leave each valid node, times the gradient of the clip's loss.
        needs_gradient: whether encoder states, predictor states, weight and bias need a gradient.
    """

    def __init__(self, joint: ChunkedJoint, posteriors: ArcPosteriors, needs_gradient: Sequence[bool]) -> None:
        self.joint = joint
        self.posteriors = posteriors
        dtype = get_accumulation_dtype(joint.settings.dtype)
        tensors = joint.flat_encoder_states, joint.flat_predictor_states, joint.head_weight, joint.head_bias
        # (B * T, J), (B * (U+1), J), (num_outputs, J) and (num_outputs,); None for a tensor that needs no gradient
        self.encoder_grad, self.predictor_grad, self.weight_grad, self.bias_grad = (
            torch.zeros_like(tensor, dtype=dtype) if is_needed else None
            for tensor, is_needed in zip(tensors, needs_gradient, strict=False)
        )

    def get_gradients(self) -> tuple[Tensor | None, ...]:
        """Return the accumulated gradients in the shapes of the inputs.

        Returns:
            Gradients of encoder states (B, T, J), predictor states (B, U+1, J), weight (V + D, J) and bias (V + D,);
            None for a tensor that needs no gradient. RNN-T has no durations, so D is 0.
        """
        batch_size, num_frames, num_positions = self.joint.lattice.grid_shape
        encoder_grad, predictor_grad = self.encoder_grad, self.predictor_grad
        if encoder_grad is not None:
            encoder_grad = encoder_grad.unflatten(0, (batch_size, num_frames))
        if predictor_grad is not None:
            predictor_grad = predictor_grad.unflatten(0, (batch_size, num_positions))
        return encoder_grad, predictor_grad, self.weight_grad, self.bias_grad

    def add_chunk(
        self, node_indices: Tensor, token_probs: Tensor | None = None, logits_buffer: Tensor | None = None
    ) -> None:
        """Add the gradients of a chunk of nodes to the accumulated gradients.

        Args:
            node_indices: (chunk_nodes,) indices into `lattice.nodes`.
            token_probs: (chunk_nodes, padded V) token probabilities, overwritten; None to compute them.
            logits_buffer: (chunk_nodes or more, padded V) memory to compute the token probabilities in; needed only if
                `token_probs` is None.
        """
        joint, lattice = self.joint, self.joint.lattice
        nodes = lattice.nodes[node_indices]
        inputs = locate_inputs(lattice, nodes)
        # record the activation and the dropout, which `_add_state_gradients` differentiates with autograd
        with torch.enable_grad():
            state_sums = joint.add_states(inputs).detach().requires_grad_()
            differentiable_hidden = joint.activate(state_sums, nodes)
        hidden = differentiable_hidden.detach()
        if token_probs is None:
            assert logits_buffer is not None
            token_probs = joint.compute_token_logits(hidden, logits_buffer)
            _softmax_in_place(torch.softmax, token_probs)
        blank, label = self.posteriors.blank[node_indices], self.posteriors.label[node_indices]
        replace_by_token_gradient_(token_probs, lattice.options.blank_id, inputs.next_labels, blank, label)
        vocab_size = joint.settings.vocab_size
        token_grad = token_probs[:, :vocab_size]
        hidden_grad = torch.zeros_like(hidden)
        self._add_head_gradients(slice(0, vocab_size), token_grad, hidden, hidden_grad)
        if lattice.options.is_tdt:
            duration_logits = joint.compute_duration_logits(hidden)
            duration_grad = compute_duration_gradient(duration_logits, self.posteriors.durations[node_indices])
            self._add_head_gradients(slice(vocab_size, None), duration_grad, hidden, hidden_grad)
        self._add_state_gradients(inputs, state_sums, differentiable_hidden, hidden_grad)

    def _add_head_gradients(self, output_rows: slice, logit_grad: Tensor, hidden: Tensor, hidden_grad: Tensor) -> None:
        """Backpropagate token logits or duration logits through the output layer.

        The gradients of weight and bias are added to `self.weight_grad` and `self.bias_grad`.

        Args:
            output_rows: rows of the weight that compute these logits.
            logit_grad: (chunk_nodes, number of these rows) gradient of the logits.
            hidden: (chunk_nodes, J) inputs of the output layer.
            hidden_grad: (chunk_nodes, J) gradient of `hidden`, to which the gradient is added.
        """
        logit_grad = logit_grad.to(self.joint.settings.dtype)
        if self.weight_grad is not None and self.weight_grad.dtype == logit_grad.dtype:
            self.weight_grad[output_rows].addmm_(logit_grad.t(), hidden)
        elif self.weight_grad is not None:
            # `addmm_` does not accept half-precision factors and a float32 sum
            self.weight_grad[output_rows] += logit_grad.t() @ hidden
        if self.bias_grad is not None:
            self.bias_grad[output_rows] += logit_grad.sum(0, dtype=self.bias_grad.dtype)
        if self.encoder_grad is not None or self.predictor_grad is not None:
            hidden_grad.addmm_(logit_grad, self.joint.head_weight[output_rows])

    def _add_state_gradients(self, inputs: NodeInputs, state_sums: Tensor, hidden: Tensor, hidden_grad: Tensor) -> None:
        """Backpropagate through dropout and activation to the encoder states and predictor states.

        The gradients are added to `self.encoder_grad` and `self.predictor_grad`.

        Args:
            inputs: rows of the encoder state and predictor state of each node.
            state_sums: (chunk_nodes, J) sums of encoder state and predictor state.
            hidden: (chunk_nodes, J) inputs of the output layer, computed from `state_sums` with autograd enabled.
            hidden_grad: (chunk_nodes, J) gradient of `hidden`.
        """
        if self.encoder_grad is None and self.predictor_grad is None:
            return
        (sum_grad,) = torch.autograd.grad(hidden, state_sums, hidden_grad)
        # the gradient of a sum is the gradient of each of its terms
        if self.encoder_grad is not None:
            self.encoder_grad.index_add_(0, inputs.encoder_rows, sum_grad.to(self.encoder_grad.dtype))
        if self.predictor_grad is not None:
            self.predictor_grad.index_add_(0, inputs.predictor_rows, sum_grad.to(self.predictor_grad.dtype))
