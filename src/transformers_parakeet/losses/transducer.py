"""Transducer losses: RNN-T and TDT, of logits or together with the joint network.

The sums over paths are in `lattice.py`, the joint network in chunks is in `fused.py`. Letters: B clips, T frames, U
labels, J joint width, V tokens with the blank, D durations, C nodes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fused import FusedLoss, JointSettings, choose_dtype
from .lattice import (
    ArcPosteriors,
    Lattice,
    NodeLogProbs,
    TransducerOptions,
    accumulation_dtype,
    build_lattice,
    compute_duration_gradient,
    compute_token_gradient_,
    refuse_second_derivative,
    scale_posteriors,
    sum_paths,
)
from .reduction import reduce_loss

# number of logits that the losses of given logits read at a time: 16 MiB in float32, which fits into a CPU's caches
BLOCK_LOGITS = 2**22

# default memory for hidden values and logits of `transducer_loss`: 256 MiB
WORKSPACE_BYTES = 256 * 2**20


def transducer_loss(
    encoder_states: Tensor,
    predictor_states: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    frame_lengths: Tensor,
    label_lengths: Tensor,
    blank_id: int,
    durations: Sequence[int] | None = None,
    sigma: float = 0.0,
    omega: float = 0.0,
    fastemit_lambda: float = 0.0,
    activation: str = "relu",
    reduction: str = "mean_volume",
    zero_infinity: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
    dropout: float = 0.0,
) -> Tensor:
    """Compute the RNN-T or TDT loss together with the joint network, without ever storing the (B, T, U+1, V) logits.

    Args:
        encoder_states: (B, T, J) projected encoder states.
        predictor_states: (B, U+1, J) projected predictor states, the first one after the blank.
        head_weight: (V, J), or (V + D, J) with durations: weight of the joint network's output layer.
        head_bias: (V,) or (V + D,) bias of the output layer, or None.
        labels: (B, U) token ids; values beyond `label_lengths` are ignored.
        frame_lengths, label_lengths: (B,) number of valid frames and labels.
        blank_id, sigma, fastemit_lambda: see `TransducerOptions`.
        durations: number of frames of each duration output of TDT; None for RNN-T.
        omega: probability that the batch gets the RNN-T loss of its tokens instead, drawn from torch's generator.
        activation, dropout, workspace_bytes: see `JointSettings`.
        reduction: see `reduce_loss`.
        zero_infinity: replace the infinite loss of a clip without any path by 0. Its gradient is 0 in both cases.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float64 for float64 inputs, otherwise float32.

    Raises:
        ValueError: shapes, lengths or labels do not fit together.
    """
    vocab_size = head_weight.shape[0] - len(durations or ())
    options = TransducerOptions(blank_id, _draw_durations(durations, omega), sigma, fastemit_lambda)
    grid_shape = *encoder_states.shape[:2], predictor_states.shape[1]
    labels = labels.to(encoder_states.device)
    lattice = build_lattice(grid_shape, vocab_size, labels, frame_lengths, label_lengths, options)
    dtype = choose_dtype(encoder_states, head_weight)
    settings = JointSettings(vocab_size, activation, dropout, _draw_seed(dropout), workspace_bytes, dtype)
    losses = FusedLoss.apply(encoder_states, predictor_states, head_weight, head_bias, lattice, settings)
    return _reduce(losses, lattice, reduction, zero_infinity)


class TransducerLoss(nn.Module):
    """Stateless layer that computes `transducer_loss`.

    `select_loss` returns this layer, or the layer of a kernel whose `forward` has the same parameters.
    """

    forward = staticmethod(transducer_loss)


def tdt_loss(
    token_logits: Tensor,
    duration_logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank_token_id: int,
    durations: Sequence[int],
    sigma: float = 0.0,
    reduction: str = "mean",
    fastemit_lambda: float = 0.0,
    zero_infinity: bool = False,
) -> Tensor:
    """Compute the token-and-duration transducer loss (arXiv 2304.06795) of logits.

    A blank needs a duration above 0, a label may have duration 0; the last blank must end exactly at the last frame.

    Args:
        token_logits: (B, T, U+1, V) unnormalised token scores.
        duration_logits: (B, T, U+1, D) unnormalised duration scores.
        targets: (B, U) token ids; values beyond `target_lengths` are ignored.
        logit_lengths, target_lengths: (B,) number of valid frames and labels.
        blank_token_id, sigma, fastemit_lambda: see `TransducerOptions`.
        durations: number of frames of each duration output.
        reduction: see `reduce_loss`.
        zero_infinity: see `transducer_loss`.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float64 for float64 inputs, otherwise float32.

    Raises:
        ValueError: shapes, lengths or labels do not fit together.
    """
    options = TransducerOptions(blank_token_id, tuple(durations), sigma, fastemit_lambda)
    lattice = _build_logits_lattice(token_logits, targets, logit_lengths, target_lengths, options)
    losses = _LogitsLoss.apply(token_logits, duration_logits, lattice)
    return _reduce(losses, lattice, reduction, zero_infinity)


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank_token_id: int,
    reduction: str = "mean_volume",
    fastemit_lambda: float = 0.0,
    zero_infinity: bool = False,
) -> Tensor:
    """Compute the RNN-T loss (Graves, arXiv 1211.3711) of logits.

    Args:
        logits: (B, T, U+1, V) unnormalised scores.
        targets: (B, U) token ids; values beyond `target_lengths` are ignored.
        logit_lengths, target_lengths: (B,) number of valid frames and labels.
        blank_token_id, fastemit_lambda: see `TransducerOptions`.
        reduction: see `reduce_loss`.
        zero_infinity: see `transducer_loss`.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float64 for float64 inputs, otherwise float32.

    Raises:
        ValueError: shapes, lengths or labels do not fit together.
    """
    options = TransducerOptions(blank_token_id, None, 0.0, fastemit_lambda)
    lattice = _build_logits_lattice(logits, targets, logit_lengths, target_lengths, options)
    losses = _LogitsLoss.apply(logits, None, lattice)
    return _reduce(losses, lattice, reduction, zero_infinity)


def transducer_loss_reference(
    logits: Tensor,
    labels: Sequence[int],
    blank_id: int,
    durations: Sequence[int] | None = None,
    sigma: float = 0.0,
    fastemit_lambda: float = 0.0,
) -> Tensor:
    """Compute the loss of one clip node by node with the recursion of log_alpha in `lattice.py`: slow, for tests.

    Args:
        logits: (T, U+1, V), or (T, U+1, V + D) with durations: unnormalised scores of a clip with T > 0 frames.
        labels: the U token ids.
        blank_id, durations, sigma, fastemit_lambda: see `TransducerOptions`.

    Returns:
        Differentiable scalar, infinite without any path.
    """
    num_frames, num_labels = len(logits), len(labels)
    vocab_size = logits.shape[-1] - len(durations or ())
    token_log_probs = logits[..., :vocab_size].log_softmax(-1)
    duration_log_probs = logits[..., vocab_size:].log_softmax(-1) - sigma
    if durations is None:
        duration_log_probs = logits.new_zeros(num_frames, num_labels + 1, 2)
    # nodes that no path reaches have no entry
    log_alpha = {(0, 0): logits.new_zeros(())}
    for t, u in itertools.product(range(num_frames + 1), range(num_labels + 1)):
        terms = []
        for index, duration in enumerate((0, 1) if durations is None else durations):
            source = t - duration, u
            if duration > 0 and source in log_alpha:
                token_log_prob = token_log_probs[source][blank_id]
                terms.append(log_alpha[source] + token_log_prob + duration_log_probs[source][index])
            source = t - duration, u - 1
            if t < num_frames and (durations is not None or duration == 0) and source in log_alpha:
                token_log_prob = token_log_probs[source][labels[u - 1]]
                # FastEmit scales the gradient and leaves the value unchanged
                token_log_prob = token_log_prob + fastemit_lambda * (token_log_prob - token_log_prob.detach())
                terms.append(log_alpha[source] + token_log_prob + duration_log_probs[source][index])
        if terms:
            log_alpha[t, u] = torch.stack(terms).logsumexp(0)
    return -log_alpha.get((num_frames, num_labels), logits.new_tensor(-math.inf))


def _draw_durations(durations: Sequence[int] | None, omega: float) -> tuple[int, ...] | None:
    """Return the durations of TDT, or None (RNN-T) with probability omega."""
    if durations is None or (omega > 0 and float(torch.rand(())) < omega):
        return None
    return tuple(durations)


def _draw_seed(dropout: float) -> int:
    """Draw a seed for dropout masks from torch's generator; without dropout, return 0 and draw nothing."""
    return int(torch.randint(2**62, ())) if dropout > 0 else 0


def _reduce(losses: Tensor, lattice: Lattice, reduction: str, zero_infinity: bool) -> Tensor:
    """Replace infinite losses by 0 if asked to, and reduce the (B,) losses of the clips."""
    if zero_infinity:
        losses = losses.masked_fill(losses == math.inf, 0.0)
    return reduce_loss(losses, lattice.label_lengths, reduction)


def _build_logits_lattice(
    token_logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    options: TransducerOptions,
) -> Lattice:
    """Build the lattices for (B, T, U+1, V) logits; the arguments are those of `tdt_loss`."""
    *grid_shape, vocab_size = token_logits.shape
    targets = targets.to(token_logits.device)
    return build_lattice(grid_shape, vocab_size, targets, logit_lengths, target_lengths, options)


class _LogitsLoss(torch.autograd.Function):
    """Losses (B,) of (B, T, U+1, V) token logits and (B, T, U+1, D) duration logits, with an analytic gradient."""

    @staticmethod
    def forward(ctx: Any, token_logits: Tensor, duration_logits: Tensor | None, lattice: Lattice) -> Tensor:
        """Compute the log-probabilities of the valid nodes, and sum over the paths of each lattice."""
        losses, posteriors = sum_paths(lattice, _compute_node_log_probs(token_logits, duration_logits, lattice))
        ctx.lattice = lattice
        ctx.save_for_backward(token_logits, duration_logits, posteriors.blank, posteriors.label, posteriors.durations)
        return losses

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of token logits and duration logits from the (B,) gradient of the losses."""
        refuse_second_derivative()
        token_logits, duration_logits, blank, label, durations = ctx.saved_tensors
        lattice: Lattice = ctx.lattice
        posteriors = scale_posteriors(lattice, ArcPosteriors(blank, label, durations), loss_gradient)
        token_gradient = duration_gradient = None
        if ctx.needs_input_grad[0]:
            token_gradient = _backward_token_logits(token_logits, lattice, posteriors)
        if ctx.needs_input_grad[1]:
            duration_gradient = _backward_duration_logits(duration_logits, lattice, posteriors.durations)
        return token_gradient, duration_gradient, None


@dataclass(frozen=True)
class _FrameBlock:
    """Nodes of consecutive frames of one clip.

    Args:
        grid: clip, frames and columns in the (B, T, U+1) grid of nodes.
        nodes: range of the same nodes in `lattice.nodes`.
    """

    grid: tuple[int, slice, slice]
    nodes: slice


def _split_frames(lattice: Lattice, num_logits: int) -> Iterator[_FrameBlock]:
    """Divide the valid nodes of each clip into blocks of consecutive frames with about `BLOCK_LOGITS` logits.

    Args:
        lattice: the lattices of the batch.
        num_logits: number of logits per node.

    Yields:
        Blocks, in the order of `lattice.nodes`.
    """
    start = 0
    lengths = zip(lattice.frame_lengths.tolist(), lattice.label_lengths.tolist(), strict=True)
    for clip, (num_frames, num_labels) in enumerate(lengths):
        num_columns = num_labels + 1
        block_frames = max(1, BLOCK_LOGITS // (num_columns * num_logits))
        for first_frame in range(0, num_frames, block_frames):
            last_frame = min(first_frame + block_frames, num_frames)
            end = start + (last_frame - first_frame) * num_columns
            yield _FrameBlock((clip, slice(first_frame, last_frame), slice(num_columns)), slice(start, end))
            start = end


def _find_next_labels(lattice: Lattice, block: _FrameBlock) -> Tensor:
    """Return the (number of nodes,) next labels of the nodes of a block; every frame has the same labels."""
    clip, frames, columns = block.grid
    return lattice.next_labels[clip, columns].repeat(frames.stop - frames.start)


def _compute_node_log_probs(token_logits: Tensor, duration_logits: Tensor | None, lattice: Lattice) -> NodeLogProbs:
    """Compute the log-probabilities of blank, next label and durations at the valid nodes.

    Args:
        token_logits: (B, T, U+1, V).
        duration_logits: (B, T, U+1, D), or None for RNN-T.
        lattice: the lattices of the batch.

    Returns:
        Log-probabilities of C nodes.
    """
    dtype, device, num_nodes = accumulation_dtype(token_logits.dtype), token_logits.device, len(lattice.nodes)
    blank, label = (torch.empty(num_nodes, dtype=dtype, device=device) for _ in range(2))
    durations = None
    if duration_logits is not None:
        durations = torch.empty(num_nodes, duration_logits.shape[3], dtype=dtype, device=device)
    for block in _split_frames(lattice, token_logits.shape[3]):
        # (nodes of the block, V)
        token_log_probs = token_logits[block.grid].log_softmax(-1, dtype=dtype).flatten(0, 1)
        next_labels = _find_next_labels(lattice, block)
        blank[block.nodes] = token_log_probs[:, lattice.options.blank_id]
        label[block.nodes] = token_log_probs.gather(1, next_labels[:, None])[:, 0]
        if durations is not None and duration_logits is not None:
            durations[block.nodes] = duration_logits[block.grid].log_softmax(-1, dtype=dtype).flatten(0, 1)
    return NodeLogProbs(blank, label, durations)


def _backward_token_logits(token_logits: Tensor, lattice: Lattice, posteriors: ArcPosteriors) -> Tensor:
    """Compute the gradient of the loss with respect to the token logits.

    Args:
        token_logits: (B, T, U+1, V).
        lattice: the lattices of the batch.
        posteriors: of the arcs of the C valid nodes, times the gradient of the clip's loss.

    Returns:
        (B, T, U+1, V) gradient, 0 in the padding.
    """
    # the logits may be a slice of a tensor with more outputs; the gradient is contiguous
    gradient = torch.zeros_like(token_logits, memory_format=torch.contiguous_format)
    for block in _split_frames(lattice, token_logits.shape[3]):
        probs = token_logits[block.grid].softmax(-1, dtype=posteriors.blank.dtype)
        next_labels = _find_next_labels(lattice, block)
        blank, label = posteriors.blank[block.nodes], posteriors.label[block.nodes]
        compute_token_gradient_(probs.view(-1, probs.shape[-1]), lattice.options.blank_id, next_labels, blank, label)
        gradient[block.grid] = probs
    return gradient


def _backward_duration_logits(duration_logits: Tensor, lattice: Lattice, posteriors: Tensor) -> Tensor:
    """Compute the gradient of the loss with respect to the duration logits.

    Args:
        duration_logits: (B, T, U+1, D).
        lattice: the lattices of the batch.
        posteriors: (C, D) of the durations at the valid nodes, times the gradient of the clip's loss.

    Returns:
        (B, T, U+1, D) gradient, 0 in the padding.
    """
    gradient = torch.zeros_like(duration_logits, memory_format=torch.contiguous_format)
    for block in _split_frames(lattice, duration_logits.shape[3]):
        logits = duration_logits[block.grid].to(posteriors.dtype)
        gradient[block.grid] = compute_duration_gradient(logits, posteriors[block.nodes].view_as(logits))
    return gradient
