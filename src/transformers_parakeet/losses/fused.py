"""The transducer loss fused with the joint network: logits exist for a chunk of lattice nodes at a time.

The sums over paths are in `lattice.py`, the public function is in `transducer.py`. Letters: B clips, T frames, U
labels, J joint width, V tokens with the blank, D durations, C nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .lattice import (
    ArcPosteriors,
    Lattice,
    NodeLogProbs,
    accumulation_dtype,
    compute_duration_gradient,
    compute_token_gradient_,
    refuse_second_derivative,
    repeat_per_node,
    scale_posteriors,
    sum_paths,
)

# rows of token logits are padded to whole cache lines of 64 bytes: with V = 1025, the product of the output layer takes
# 0.63 times as long as with rows of 1025 values (AMD EPYC, torch 2.13)
PADDED_VALUES = 16


@dataclass(frozen=True)
class JointSettings:
    """Settings of the joint network.

    Args:
        vocab_size: V, the number of outputs that are tokens with the blank; the outputs after them are durations.
        activation: name of the activation in `transformers.activations.ACT2FN`.
        dropout: probability of zeroing an input of the output layer.
        dropout_seed: seed of the dropout masks.
        workspace_bytes: memory for hidden values and logits.
        dtype: type of the matrix products.
    """

    vocab_size: int
    activation: str
    dropout: float
    dropout_seed: int
    workspace_bytes: int
    dtype: torch.dtype

    @property
    def padded_vocab_size(self) -> int:
        """V rounded up to a multiple of `PADDED_VALUES`: the length of a row of token logits."""
        return math.ceil(self.vocab_size / PADDED_VALUES) * PADDED_VALUES


@dataclass(frozen=True)
class NodePositions:
    """Where to find the inputs of C nodes.

    Args:
        frame_rows: (C,) rows of the encoder states, flattened to (B * T, J).
        prefix_rows: (C,) rows of the predictor states, flattened to (B * (U+1), J).
        next_labels: (C,) label that each node can emit; 0 where no label is left.
    """

    frame_rows: Tensor
    prefix_rows: Tensor
    next_labels: Tensor


@dataclass(frozen=True)
class ChunkPlan:
    """How the valid nodes are divided into chunks.

    Args:
        chunk_size: number of nodes of a chunk.
        num_cached: number of chunks whose token log-probabilities are kept for the backward pass.
    """

    chunk_size: int
    num_cached: int


def locate_nodes(lattice: Lattice, nodes: Tensor) -> NodePositions:
    """Find the encoder state, predictor state and next label of nodes.

    Args:
        lattice: the lattices of the batch.
        nodes: (C,) indices in the flattened (B, T, U+1) grid.

    Returns:
        Rows and labels, each (C,).
    """
    _, num_frames, num_columns = lattice.shape
    clips = nodes // (num_frames * num_columns)
    prefix_rows = clips * num_columns + nodes % num_columns
    return NodePositions(nodes // num_columns, prefix_rows, lattice.next_labels.flatten()[prefix_rows])


def plan_chunks(num_nodes: int, joint_width: int, settings: JointSettings, device_type: str) -> ChunkPlan:
    """Divide the workspace between one chunk that is being computed and chunks that are kept for the backward pass.

    Args:
        num_nodes: C, number of valid nodes.
        joint_width: J.
        settings: of the joint network.
        device_type: `cpu`, `cuda`, ...

    Returns:
        Size and number of the chunks. A chunk has at least one node, even if the workspace is too small for it.
    """
    exact_dtype = accumulation_dtype(settings.dtype)
    logit_bytes = settings.padded_vocab_size * exact_dtype.itemsize
    if settings.dtype != exact_dtype:
        # the product of the output layer in half precision
        logit_bytes += settings.vocab_size * settings.dtype.itemsize
    # the hidden values, their gradients and the copies between: about six rows of J values
    node_bytes = logit_bytes + 6 * joint_width * exact_dtype.itemsize
    # a CPU is as fast with small chunks, which leave more of the workspace for cached chunks
    chunk_bytes = settings.workspace_bytes // (8 if device_type == "cpu" else 2)
    chunk_size = min(max(1, chunk_bytes // node_bytes), max(1, num_nodes))
    if settings.dtype != exact_dtype:
        # matrix products in half precision are cheap: the backward pass computes all logits again
        return ChunkPlan(chunk_size, num_cached=0)
    free_bytes = settings.workspace_bytes - chunk_size * node_bytes
    return ChunkPlan(chunk_size, num_cached=max(0, free_bytes // (chunk_size * logit_bytes)))


class ChunkedJoint:
    """The joint network, evaluated at some nodes of the lattice.

    Args:
        encoder_states: (B, T, J).
        predictor_states: (B, U+1, J).
        head_weight: (V [+ D], J) weight of the output layer.
        head_bias: (V [+ D],), or None.
        lattice: the lattices of the batch.
        settings: of the joint network.
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
        self.encoder_rows = encoder_states.flatten(0, 1)
        self.predictor_rows = predictor_states.flatten(0, 1)
        self.weight = head_weight.to(settings.dtype)
        self.bias = self.weight.new_zeros(len(head_weight)) if head_bias is None else head_bias.to(settings.dtype)
        self.plan = plan_chunks(len(lattice.nodes), head_weight.shape[1], settings, head_weight.device.type)

    def allocate_buffer(self) -> Tensor:
        """Allocate memory for the token logits of one chunk: (chunk size, padded V)."""
        dtype = accumulation_dtype(self.settings.dtype)
        return self.weight.new_empty(self.plan.chunk_size, self.settings.padded_vocab_size, dtype=dtype)

    def add_states(self, positions: NodePositions) -> Tensor:
        """Add the encoder state and the predictor state of each node: (C, J)."""
        return self.encoder_rows[positions.frame_rows] + self.predictor_rows[positions.prefix_rows]

    def activate(self, inputs: Tensor, nodes: Tensor) -> Tensor:
        """Apply activation and dropout.

        Args:
            inputs: (C, J) sums of encoder and predictor states.
            nodes: (C,) indices of the nodes, which choose the dropout mask.

        Returns:
            (C, J) inputs of the output layer.
        """
        hidden = ACT2FN[self.settings.activation](inputs)
        if self.settings.dropout > 0:
            mask = draw_dropout_mask(nodes, inputs.shape[1], self.settings.dropout, self.settings.dropout_seed)
            hidden = hidden * mask.to(hidden.dtype) / (1 - self.settings.dropout)
        return hidden.to(self.settings.dtype)

    def compute_token_logits(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """Compute token logits in the first rows of a buffer; the columns of the padding have probability 0.

        Args:
            hidden: (C, J) inputs of the output layer.
            buffer: (C or more, padded V) memory.

        Returns:
            (C, padded V) logits, minus infinity in the padding.
        """
        vocab_size = self.settings.vocab_size
        rows, weight, bias = buffer[: len(hidden)], self.weight[:vocab_size], self.bias[:vocab_size]
        if rows.dtype == self.settings.dtype:
            torch.addmm(bias, hidden, weight.t(), out=rows[:, :vocab_size])
        else:
            rows[:, :vocab_size] = F.linear(hidden, weight, bias)
        rows[:, vocab_size:] = -math.inf
        return rows

    def compute_duration_logits(self, hidden: Tensor) -> Tensor:
        """Compute (C, D) duration logits."""
        vocab_size = self.settings.vocab_size
        logits = F.linear(hidden, self.weight[vocab_size:], self.bias[vocab_size:])
        return logits.to(accumulation_dtype(self.settings.dtype))


def draw_dropout_mask(nodes: Tensor, joint_width: int, dropout: float, seed: int) -> Tensor:
    """Draw the dropout mask of nodes as a hash of seed, node and channel, so that backward draws the same mask again.

    Args:
        nodes: (C,) indices of the nodes.
        joint_width: J.
        dropout: probability of False.
        seed: of the hash.

    Returns:
        (C, J) boolean mask, False where a hidden value is zeroed.
    """
    bits = nodes[:, None] * joint_width + torch.arange(joint_width, device=nodes.device) + seed
    # the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), with signed constants because torch has no uint64
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        shifted = bits >> shift & (1 << 64 - shift) - 1
        bits = (bits ^ shifted) * factor
    # 24 of the bits are a uniform number from 0 to 2^24 - 1
    return (bits >> 40 & 0xFFFFFF) >= dropout * 2**24


def choose_dtype(encoder_states: Tensor, head_weight: Tensor) -> torch.dtype:
    """Choose the type of the matrix products: autocast's type where autocast is on, otherwise that of the inputs."""
    device_type = encoder_states.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(encoder_states.dtype, head_weight.dtype)


class FusedLoss(torch.autograd.Function):
    """Losses (B,) of the inputs of the joint network, with an analytic gradient.

    Args:
        encoder_states: (B, T, J).
        predictor_states: (B, U+1, J).
        head_weight: (V [+ D], J) weight of the output layer.
        head_bias: (V [+ D],), or None.
        lattice: the lattices of the batch.
        settings: of the joint network.
    """

    @staticmethod
    def forward(
        ctx: Any,
        encoder_states: Tensor,
        predictor_states: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        lattice: Lattice,
        settings: JointSettings,
    ) -> Tensor:
        """Compute the log-probabilities of the nodes chunk by chunk, and sum over the paths of each lattice.

        Returns:
            (B,) losses, float64 for float64 inputs and otherwise float32.
        """
        with torch.autocast(head_weight.device.type, enabled=False):
            joint = ChunkedJoint(encoder_states, predictor_states, head_weight, head_bias, lattice, settings)
            num_cached = joint.plan.num_cached if any(ctx.needs_input_grad) else 0
            log_probs, ctx.cached_log_probs = _compute_node_log_probs(joint, num_cached)
            losses, posteriors = sum_paths(lattice, log_probs)
        ctx.lattice, ctx.settings = lattice, settings
        tensors = encoder_states, predictor_states, head_weight, head_bias
        ctx.save_for_backward(*tensors, posteriors.blank, posteriors.label, posteriors.durations)
        return losses

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the four tensors chunk by chunk from the (B,) gradient of the losses."""
        refuse_second_derivative()
        encoder_states, predictor_states, head_weight, head_bias, blank, label, durations = ctx.saved_tensors
        # the chunks are overwritten: with `retain_graph`, a second backward computes them again
        cached_log_probs, ctx.cached_log_probs = ctx.cached_log_probs, []
        posteriors = ArcPosteriors(blank, label, durations)
        with torch.autocast(loss_gradient.device.type, enabled=False):
            joint = ChunkedJoint(encoder_states, predictor_states, head_weight, head_bias, ctx.lattice, ctx.settings)
            gradients = _accumulate_gradients(joint, posteriors, loss_gradient, cached_log_probs, ctx.needs_input_grad)
        return (*gradients, None, None)


def _softmax_in_place(function: Callable[..., Tensor], logits: Tensor) -> None:
    """Overwrite (C, padded V) logits with the result of `torch.softmax` or `torch.log_softmax` over V."""
    if logits.device.type == "cpu":
        # torch's CPU kernel reads a row before it writes the row, so that the output needs no second buffer
        function(logits, -1, out=logits)
    else:
        logits.copy_(function(logits, -1))


def _compute_node_log_probs(joint: ChunkedJoint, num_cached: int) -> tuple[NodeLogProbs, list[Tensor]]:
    """Compute the log-probabilities of blank, next label and durations at every valid node.

    Args:
        joint: the joint network.
        num_cached: number of chunks whose token log-probabilities are kept for the backward pass.

    Returns:
        Log-probabilities of the C valid nodes, and the (chunk size, padded V) token log-probabilities of the first
        `num_cached` chunks.
    """
    lattice, chunk_size = joint.lattice, joint.plan.chunk_size
    num_nodes, num_durations = len(lattice.nodes), len(lattice.options.arc_durations)
    dtype, device = accumulation_dtype(joint.settings.dtype), lattice.nodes.device
    blank, label = (torch.empty(num_nodes, dtype=dtype, device=device) for _ in range(2))
    durations = torch.empty(num_nodes, num_durations, dtype=dtype, device=device) if lattice.options.is_tdt else None
    cached: list[Tensor] = []
    buffer = None
    for start in range(0, num_nodes, chunk_size):
        chunk = slice(start, start + chunk_size)
        nodes = lattice.nodes[chunk]
        positions = locate_nodes(lattice, nodes)
        hidden = joint.activate(joint.add_states(positions), nodes)
        buffer = joint.allocate_buffer() if buffer is None else buffer
        log_probs = joint.compute_token_logits(hidden, buffer)
        _softmax_in_place(torch.log_softmax, log_probs)
        blank[chunk] = log_probs[:, lattice.options.blank_id]
        label[chunk] = log_probs.gather(1, positions.next_labels[:, None])[:, 0]
        if durations is not None:
            durations[chunk] = joint.compute_duration_logits(hidden).log_softmax(-1)
        if len(cached) < num_cached:
            cached.append(log_probs)
            # the next chunk must not overwrite this buffer
            buffer = None
    return NodeLogProbs(blank, label, durations), cached


def _accumulate_gradients(
    joint: ChunkedJoint,
    posteriors: ArcPosteriors,
    loss_gradient: Tensor,
    cached_log_probs: Sequence[Tensor],
    needs_gradient: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of encoder states, predictor states, weight and bias.

    Args:
        joint: the joint network.
        posteriors: of the arcs of the C valid nodes.
        loss_gradient: (B,) gradient of the loss of each clip.
        cached_log_probs: (chunk size, padded V) token log-probabilities of the first chunks, overwritten.
        needs_gradient: whether each of the four tensors needs a gradient.

    Returns:
        Four gradients, None where no gradient is needed.
    """
    active = find_active_nodes(joint.lattice, posteriors, loss_gradient)
    scaled = scale_posteriors(joint.lattice, posteriors, loss_gradient)
    accumulator = GradientAccumulator(joint, scaled, needs_gradient)
    chunk_size = joint.plan.chunk_size
    for index, log_probs in enumerate(cached_log_probs):
        start = index * chunk_size
        chunk = active[(active >= start) & (active < start + len(log_probs))]
        # indexing would copy the chunk, which is needed only if some of its nodes are skipped
        rows = log_probs if len(chunk) == len(log_probs) else log_probs[chunk - start]
        if len(chunk) > 0:
            accumulator.add(chunk, rows.exp_())
    uncached = active[active >= len(cached_log_probs) * chunk_size]
    if len(uncached) > 0:
        buffer = joint.allocate_buffer()
        for chunk in uncached.split(chunk_size):
            accumulator.add(chunk, None, buffer)
    return accumulator.get_gradients()


def find_active_nodes(lattice: Lattice, posteriors: ArcPosteriors, loss_gradient: Tensor) -> Tensor:
    """Choose the nodes whose posteriors are large enough to change the gradients.

    Most nodes of a trained model have posteriors near 0. A clip with n nodes skips those below eps / (2 n): all skipped
    nodes together weigh less than the rounding error of a node with posterior 1.

    Args:
        lattice: the lattices of the batch.
        posteriors: of the arcs of the C valid nodes.
        loss_gradient: (B,) gradient of the loss of each clip; nodes of clips with gradient 0 are skipped.

    Returns:
        Positions in `lattice.nodes`, in ascending order. A node with a NaN is always among them.
    """
    num_nodes = (lattice.frame_lengths * (lattice.label_lengths + 1)).clamp(min=1)
    limit = torch.finfo(loss_gradient.dtype).eps / 2 / num_nodes.to(loss_gradient.dtype)
    is_negligible = (posteriors.blank + posteriors.label) <= repeat_per_node(lattice, limit)
    has_gradient = repeat_per_node(lattice, loss_gradient) != 0
    return (~is_negligible & has_gradient).nonzero()[:, 0]


class GradientAccumulator:
    """Sums of the gradients of the joint network's inputs and parameters over chunks of nodes.

    Args:
        joint: the joint network.
        posteriors: of the arcs of the C valid nodes, times the gradient of the clip's loss.
        needs_gradient: whether encoder states, predictor states, weight and bias need a gradient.
    """

    def __init__(self, joint: ChunkedJoint, posteriors: ArcPosteriors, needs_gradient: Sequence[bool]) -> None:
        self.joint = joint
        self.posteriors = posteriors
        dtype = accumulation_dtype(joint.settings.dtype)
        tensors = joint.encoder_rows, joint.predictor_rows, joint.weight, joint.bias
        self.encoder_rows, self.predictor_rows, self.weight, self.bias = (
            torch.zeros_like(tensor, dtype=dtype) if is_needed else None
            for tensor, is_needed in zip(tensors, needs_gradient, strict=False)
        )

    def get_gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of encoder states, predictor states, weight and bias; None where none is needed."""
        batch, num_frames, num_columns = self.joint.lattice.shape
        encoder_states = None if self.encoder_rows is None else self.encoder_rows.unflatten(0, (batch, num_frames))
        predictor_states = (
            None if self.predictor_rows is None else self.predictor_rows.unflatten(0, (batch, num_columns))
        )
        return encoder_states, predictor_states, self.weight, self.bias

    def add(self, chunk: Tensor, token_probs: Tensor | None, buffer: Tensor | None = None) -> None:
        """Add the gradients of a chunk of nodes to the sums of this object.

        Args:
            chunk: (C,) positions in `lattice.nodes`.
            token_probs: (C, padded V) token probabilities, overwritten; None computes them in the buffer.
            buffer: (C or more, padded V) memory, if `token_probs` is None.
        """
        joint, lattice = self.joint, self.joint.lattice
        nodes = lattice.nodes[chunk]
        positions = locate_nodes(lattice, nodes)
        # autograd differentiates activation and dropout in `_add_states`
        with torch.enable_grad():
            inputs = joint.add_states(positions).detach().requires_grad_()
            hidden = joint.activate(inputs, nodes)
        if token_probs is None:
            assert buffer is not None
            token_probs = joint.compute_token_logits(hidden.detach(), buffer)
            _softmax_in_place(torch.softmax, token_probs)
        blank, label = self.posteriors.blank[chunk], self.posteriors.label[chunk]
        compute_token_gradient_(token_probs, lattice.options.blank_id, positions.next_labels, blank, label)
        hidden_gradient = torch.zeros_like(hidden)
        vocab_size = joint.settings.vocab_size
        self._add_outputs(slice(0, vocab_size), token_probs[:, :vocab_size], hidden.detach(), hidden_gradient)
        if lattice.options.is_tdt:
            duration_logits = joint.compute_duration_logits(hidden.detach())
            duration_gradient = compute_duration_gradient(duration_logits, self.posteriors.durations[chunk])
            self._add_outputs(slice(vocab_size, None), duration_gradient, hidden.detach(), hidden_gradient)
        self._add_states(positions, inputs, hidden, hidden_gradient)

    def _add_outputs(self, output_rows: slice, logit_gradient: Tensor, hidden: Tensor, hidden_gradient: Tensor) -> None:
        """Add the gradients that flow through the token logits or the duration logits of a chunk.

        Args:
            output_rows: rows of the output layer that compute these logits.
            logit_gradient: (C, number of these rows) gradient of the logits.
            hidden: (C, J) inputs of the output layer.
            hidden_gradient: (C, J) gradient of `hidden`, to which the result is added.
        """
        logit_gradient = logit_gradient.to(self.joint.settings.dtype)
        if self.weight is not None and self.weight.dtype == logit_gradient.dtype:
            self.weight[output_rows].addmm_(logit_gradient.t(), hidden)
        elif self.weight is not None:
            self.weight[output_rows] += logit_gradient.t() @ hidden
        if self.bias is not None:
            self.bias[output_rows] += logit_gradient.sum(0, dtype=self.bias.dtype)
        if self.encoder_rows is not None or self.predictor_rows is not None:
            hidden_gradient.addmm_(logit_gradient, self.joint.weight[output_rows])

    def _add_states(self, positions: NodePositions, inputs: Tensor, hidden: Tensor, hidden_gradient: Tensor) -> None:
        """Differentiate activation and dropout, and add the result to the gradients of encoder and predictor states.

        Args:
            positions: rows of encoder and predictor states that the C nodes read.
            inputs: (C, J) sums of encoder and predictor states.
            hidden: (C, J) inputs of the output layer, computed from `inputs` with autograd enabled.
            hidden_gradient: (C, J) gradient of `hidden`.
        """
        if self.encoder_rows is None and self.predictor_rows is None:
            return
        (input_gradient,) = torch.autograd.grad(hidden, inputs, hidden_gradient)
        for gradient, rows in (
            (self.encoder_rows, positions.frame_rows),
            (self.predictor_rows, positions.prefix_rows),
        ):
            if gradient is not None:
                gradient.index_add_(0, rows, input_gradient.to(gradient.dtype))
