"""The transducer losses: RNN-T and TDT, from logits or fused with the joint network.

The lattice is in `lattice.py`, the sums over its paths are in `path_sums.py`, and the joint network is in
`chunked_joint.py`.

Letters: B clips, T frames, U labels, J width of the joint network, V tokens with the blank, D durations. `num_nodes` is
the number of valid nodes in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .chunked_joint import (
    ChunkedJoint,
    JointSettings,
    choose_dtype,
    compute_joint_gradients,
    compute_node_log_probs,
)
from .lattice import (
    ArcPosteriors,
    Lattice,
    NodeLogProbs,
    TransducerOptions,
    build_lattice,
    compute_duration_gradient,
    get_accumulation_dtype,
    refuse_second_derivative,
    replace_by_token_gradient_,
    scale_posteriors,
)
from .path_sums import compute_losses_and_posteriors
from .reduction import reduce_loss

# maximum number of logits that `tdt_loss` and `rnnt_loss` read at a time: 16 MiB in float32, which fits into the caches
# of a CPU
MAX_BLOCK_LOGITS = 2**22

# Default memory of `transducer_loss` for hidden values and logits: 160 MiB. With 256 MiB and V = 8193 the loss takes 5
# to 10 % less time and 80 % more memory.
WORKSPACE_BYTES = 160 * 2**20


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
    """Compute the RNN-T or TDT loss together with the joint network, without storing the (B, T, U+1, V) logits.

    Args:
        encoder_states: (B, T, J) projected encoder states.
        predictor_states: (B, U+1, J) projected predictor states; state u is the state after u labels.
        head_weight: (V, J), or (V + D, J) with durations: weight of the joint network's output layer.
        head_bias: (V,) or (V + D,) bias of the output layer, or None.
        labels: (B, U) token ids; values beyond `label_lengths` are ignored.
        frame_lengths, label_lengths: (B,) number of valid frames and (B,) number of valid labels.
        blank_id, sigma, fastemit_lambda: see `TransducerOptions`.
        durations: number of frames of each duration output of TDT; None for RNN-T.
        omega: probability of computing the RNN-T loss of the batch instead of the TDT loss, as in NeMo.
        activation, dropout, workspace_bytes: see `JointSettings`.
        reduction: see `reduce_loss`.
        zero_infinity: whether a clip without any path has loss 0 instead of infinity; its gradient is always 0.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float64 for float64 inputs, otherwise float32.

    Raises:
        ValueError: the shape of the labels, a length or a label is invalid.
    """
    vocab_size = head_weight.shape[0] - len(durations or ())
    options = TransducerOptions(blank_id, _draw_durations(durations, omega), sigma, fastemit_lambda)
    grid_shape = *encoder_states.shape[:2], predictor_states.shape[1]
    labels = labels.to(encoder_states.device)
    lattice = build_lattice(grid_shape, vocab_size, labels, frame_lengths, label_lengths, options)
    dtype = choose_dtype(encoder_states, head_weight)
    settings = JointSettings(vocab_size, activation, dropout, _draw_seed(dropout), workspace_bytes, dtype)
    losses = _FusedLoss.apply(encoder_states, predictor_states, head_weight, head_bias, lattice, settings)
    return _reduce(losses, lattice, reduction, zero_infinity)


class TransducerLoss(nn.Module):
    """Layer without parameters that computes `transducer_loss`.

    `select_loss` returns this layer, or the layer of a kernel whose `forward` has the same arguments.
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
    """Compute the token-and-duration transducer (TDT) loss (arXiv 2304.06795) from logits.

    A blank must have a duration above 0; a label may have duration 0. The last arc of a path is a blank that ends
    exactly at the end of the last frame.

    Args:
        token_logits: (B, T, U+1, V) unnormalised token scores.
        duration_logits: (B, T, U+1, D) unnormalised duration scores.
        targets: (B, U) token ids; values beyond `target_lengths` are ignored.
        logit_lengths: (B,) number of valid frames.
        target_lengths: (B,) number of valid labels.
        blank_token_id, sigma, fastemit_lambda: see `TransducerOptions`.
        durations: number of frames of each duration output.
        reduction: see `reduce_loss`.
        zero_infinity: see `transducer_loss`.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float64 for float64 inputs, otherwise float32.

    Raises:
        ValueError: the shape of the labels, a length or a label is invalid.
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
    """Compute the RNN-T loss (Graves, arXiv 1211.3711) from logits.

    Args:
        logits: (B, T, U+1, V) unnormalised scores.
        targets: (B, U) token ids; values beyond `target_lengths` are ignored.
        logit_lengths: (B,) number of valid frames.
        target_lengths: (B,) number of valid labels.
        blank_token_id, fastemit_lambda: see `TransducerOptions`.
        reduction: see `reduce_loss`.
        zero_infinity: see `transducer_loss`.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float64 for float64 inputs, otherwise float32.

    Raises:
        ValueError: the shape of the labels, a length or a label is invalid.
    """
    options = TransducerOptions(blank_token_id, None, 0.0, fastemit_lambda)
    lattice = _build_logits_lattice(logits, targets, logit_lengths, target_lengths, options)
    losses = _LogitsLoss.apply(logits, None, lattice)
    return _reduce(losses, lattice, reduction, zero_infinity)


def _draw_durations(durations: Sequence[int] | None, omega: float) -> tuple[int, ...] | None:
    """Choose the loss of a batch: RNN-T with probability omega, otherwise TDT.

    Args:
        durations: number of frames of each duration output of TDT; None for RNN-T.
        omega: probability of the RNN-T loss; with 0, torch's random generator is not used.

    Returns:
        The durations for TDT, None for RNN-T.
    """
    if durations is None or (omega > 0 and float(torch.rand(())) < omega):
        return None
    return tuple(durations)


def _draw_seed(dropout: float) -> int:
    """Draw a seed for the dropout masks from torch's generator; without dropout, return 0 and draw nothing."""
    return int(torch.randint(2**62, ())) if dropout > 0 else 0


def _reduce(losses: Tensor, lattice: Lattice, reduction: str, zero_infinity: bool) -> Tensor:
    """Reduce the (B,) losses of the clips as described in `reduce_loss`.

    Args:
        losses: (B,) negative log-likelihood of each clip.
        lattice: the lattices of the batch.
        reduction: see `reduce_loss`.
        zero_infinity: whether to replace infinite losses by 0 first.

    Returns:
        (B,) for `none`, otherwise a scalar.
    """
    if zero_infinity:
        losses = losses.masked_fill(losses == math.inf, 0.0)
    return reduce_loss(losses, lattice.label_lengths, reduction)


class _FusedLoss(torch.autograd.Function):
    """Loss of each clip from the inputs of the joint network, with an analytic gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        encoder_states: Tensor,
        predictor_states: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        lattice: Lattice,
        joint_settings: JointSettings,
    ) -> Tensor:
        """Compute the negative log-likelihood of each clip, evaluating the joint network chunk by chunk.

        The posteriors, and as many chunks of token log-probabilities as fit into the workspace, are kept for the
        backward pass.

        Args:
            ctx: torch's context, which stores values for `backward`.
            encoder_states: (B, T, J) projected encoder states.
            predictor_states: (B, U+1, J) projected predictor states.
            head_weight: (V, J), or (V + D, J) for TDT: weight of the output layer.
            head_bias: bias of the output layer, or None.
            lattice: the lattices of the batch.
            joint_settings: settings of the joint network.

        Returns:
            (B,) losses; float64 for float64 inputs, otherwise float32.
        """
        # the settings contain the dtype of the matrix products
        with torch.autocast(head_weight.device.type, enabled=False):
            joint = ChunkedJoint(encoder_states, predictor_states, head_weight, head_bias, lattice, joint_settings)
            num_cached_chunks = joint.plan.num_cached if any(ctx.needs_input_grad) else 0
            log_probs, ctx.cached_log_probs = compute_node_log_probs(joint, num_cached_chunks)
            losses, posteriors = compute_losses_and_posteriors(lattice, log_probs)
        ctx.lattice, ctx.joint_settings = lattice, joint_settings
        tensors = encoder_states, predictor_states, head_weight, head_bias
        ctx.save_for_backward(*tensors, posteriors.blank, posteriors.label, posteriors.durations)
        return losses

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the inputs of `forward` chunk by chunk.

        Args:
            ctx: torch's context, with the values that `forward` stored.
            loss_grad: (B,) gradient with respect to the loss of each clip.

        Returns:
            Gradients of the first four inputs, None for a tensor that needs no gradient; then None for `lattice` and
            `joint_settings`.
        """
        refuse_second_derivative()
        encoder_states, predictor_states, head_weight, head_bias, *arc_posteriors = ctx.saved_tensors
        # This pass overwrites the cached chunks. A second backward pass (after `retain_graph=True`) recomputes them.
        cached_log_probs, ctx.cached_log_probs = ctx.cached_log_probs, []
        posteriors = ArcPosteriors(*arc_posteriors)
        with torch.autocast(loss_grad.device.type, enabled=False):
            joint = ChunkedJoint(
                encoder_states, predictor_states, head_weight, head_bias, ctx.lattice, ctx.joint_settings
            )
            gradients = compute_joint_gradients(joint, posteriors, loss_grad, cached_log_probs, ctx.needs_input_grad)
        return (*gradients, None, None)


def _build_logits_lattice(
    token_logits: Tensor,
    labels: Tensor,
    frame_lengths: Tensor,
    label_lengths: Tensor,
    options: TransducerOptions,
) -> Lattice:
    """Build the lattices of a batch from its logits.

    Args:
        token_logits: (B, T, U+1, V) token logits, from which the sizes are read.
        labels: (B, U) token ids.
        frame_lengths: (B,) number of valid frames.
        label_lengths: (B,) number of valid labels.
        options: options of the loss.

    Returns:
        The lattices, on the device of the logits.
    """
    *grid_shape, vocab_size = token_logits.shape
    return build_lattice(grid_shape, vocab_size, labels.to(token_logits.device), frame_lengths, label_lengths, options)


class _LogitsLoss(torch.autograd.Function):
    """Loss of each clip from token logits and duration logits, with an analytic gradient."""

    @staticmethod
    def forward(ctx: Any, token_logits: Tensor, duration_logits: Tensor | None, lattice: Lattice) -> Tensor:
        """Compute the negative log-likelihood of each clip.

        Args:
            ctx: torch's context, which stores values for `backward`.
            token_logits: (B, T, U+1, V) unnormalised token scores.
            duration_logits: (B, T, U+1, D) unnormalised duration scores; None for RNN-T.
            lattice: the lattices of the batch.

        Returns:
            (B,) losses; float64 for float64 inputs, otherwise float32.
        """
        log_probs = _normalize_logits(token_logits, duration_logits, lattice)
        losses, posteriors = compute_losses_and_posteriors(lattice, log_probs)
        ctx.lattice = lattice
        ctx.save_for_backward(token_logits, duration_logits, posteriors.blank, posteriors.label, posteriors.durations)
        return losses

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of token logits and duration logits.

        Args:
            ctx: torch's context, with the values that `forward` stored.
            loss_grad: (B,) gradient with respect to the loss of each clip.

        Returns:
            Gradients of `token_logits` and `duration_logits`, None for a tensor that needs no gradient; then None for
            `lattice`.
        """
        refuse_second_derivative()
        token_logits, duration_logits, *arc_posteriors = ctx.saved_tensors
        lattice: Lattice = ctx.lattice
        posteriors = scale_posteriors(lattice, ArcPosteriors(*arc_posteriors), loss_grad)
        token_grad = duration_grad = None
        if ctx.needs_input_grad[0]:
            token_grad = _compute_token_logits_gradient(token_logits, lattice, posteriors)
        if ctx.needs_input_grad[1]:
            duration_grad = _compute_duration_logits_gradient(duration_logits, lattice, posteriors.durations)
        return token_grad, duration_grad, None


@dataclass(frozen=True)
class _FrameBlock:
    """The valid nodes of consecutive frames of one clip.

    Args:
        grid_index: clip, frames and label positions of the nodes: an index into tensors of shape (B, T, U+1, ...).
        node_range: indices of the same nodes in `lattice.nodes`.
    """

    grid_index: tuple[int, slice, slice]
    node_range: slice


def _split_into_blocks(lattice: Lattice, logits_per_node: int) -> Iterator[_FrameBlock]:
    """Split the valid nodes of each clip into blocks of consecutive frames, to limit the memory for their logits.

    A block has at most `MAX_BLOCK_LOGITS` logits, or one frame if a frame has more logits.

    Args:
        lattice: the lattices of the batch.
        logits_per_node: V for token logits, D for duration logits.

    Yields:
        Blocks in the order of `lattice.nodes`.
    """
    first_node = 0
    lengths = zip(lattice.frame_lengths.tolist(), lattice.label_lengths.tolist(), strict=True)
    for clip_index, (num_frames, num_labels) in enumerate(lengths):
        num_positions = num_labels + 1
        frames_per_block = max(1, MAX_BLOCK_LOGITS // (num_positions * logits_per_node))
        for first_frame in range(0, num_frames, frames_per_block):
            end_frame = min(first_frame + frames_per_block, num_frames)
            end_node = first_node + (end_frame - first_frame) * num_positions
            grid_index = clip_index, slice(first_frame, end_frame), slice(num_positions)
            yield _FrameBlock(grid_index, slice(first_node, end_node))
            first_node = end_node


def _get_next_labels(lattice: Lattice, block: _FrameBlock) -> Tensor:
    """Return the next label of each node of a block, shape (nodes of the block,)."""
    clip_index, frames, label_positions = block.grid_index
    # every frame of a clip has the same next labels
    return lattice.next_labels[clip_index, label_positions].repeat(frames.stop - frames.start)


def _normalize_logits(token_logits: Tensor, duration_logits: Tensor | None, lattice: Lattice) -> NodeLogProbs:
    """Compute the log-probabilities of blank, next label and durations at the valid nodes from logits.

    Args:
        token_logits: (B, T, U+1, V) unnormalised token scores.
        duration_logits: (B, T, U+1, D) unnormalised duration scores; None for RNN-T.
        lattice: the lattices of the batch.

    Returns:
        Log-probabilities at the valid nodes.
    """
    dtype, device = get_accumulation_dtype(token_logits.dtype), token_logits.device
    num_nodes = len(lattice.nodes)
    blank, label = (torch.empty(num_nodes, dtype=dtype, device=device) for _ in range(2))
    durations = None
    if duration_logits is not None:
        durations = torch.empty(num_nodes, duration_logits.shape[3], dtype=dtype, device=device)
    for block in _split_into_blocks(lattice, logits_per_node=token_logits.shape[3]):
        # (nodes of the block, V)
        token_log_probs = token_logits[block.grid_index].log_softmax(-1, dtype=dtype).flatten(0, 1)
        next_labels = _get_next_labels(lattice, block)
        blank[block.node_range] = token_log_probs[:, lattice.options.blank_id]
        label[block.node_range] = token_log_probs.gather(1, next_labels[:, None])[:, 0]
        if durations is not None and duration_logits is not None:
            duration_log_probs = duration_logits[block.grid_index].log_softmax(-1, dtype=dtype)
            durations[block.node_range] = duration_log_probs.flatten(0, 1)
    return NodeLogProbs(blank, label, durations)


def _compute_token_logits_gradient(token_logits: Tensor, lattice: Lattice, posteriors: ArcPosteriors) -> Tensor:
    """Compute the gradient of the loss with respect to the token logits.

    Args:
        token_logits: (B, T, U+1, V) unnormalised token scores.
        lattice: the lattices of the batch.
        posteriors: posteriors of the arcs that leave each valid node, times the gradient of the clip's loss.

    Returns:
        (B, T, U+1, V) gradient, 0 in the padding.
    """
    # the logits may be a slice of a larger tensor; the gradient is contiguous
    gradient = torch.zeros_like(token_logits, memory_format=torch.contiguous_format)
    for block in _split_into_blocks(lattice, logits_per_node=token_logits.shape[3]):
        probs = token_logits[block.grid_index].softmax(-1, dtype=posteriors.blank.dtype)
        next_labels = _get_next_labels(lattice, block)
        blank, label = posteriors.blank[block.node_range], posteriors.label[block.node_range]
        # (nodes of the block, V) view: `probs` becomes the gradient
        flat_probs = probs.view(-1, probs.shape[-1])
        replace_by_token_gradient_(flat_probs, lattice.options.blank_id, next_labels, blank, label)
        gradient[block.grid_index] = probs
    return gradient


def _compute_duration_logits_gradient(duration_logits: Tensor, lattice: Lattice, duration_posteriors: Tensor) -> Tensor:
    """Compute the gradient of the loss with respect to the duration logits.

    Args:
        duration_logits: (B, T, U+1, D) unnormalised duration scores.
        lattice: the lattices of the batch.
        duration_posteriors: (num_nodes, D) posteriors of the durations, times the gradient of the clip's loss.

    Returns:
        (B, T, U+1, D) gradient, 0 in the padding.
    """
    gradient = torch.zeros_like(duration_logits, memory_format=torch.contiguous_format)
    for block in _split_into_blocks(lattice, logits_per_node=duration_logits.shape[3]):
        block_logits = duration_logits[block.grid_index].to(duration_posteriors.dtype)
        block_posteriors = duration_posteriors[block.node_range].view_as(block_logits)
        gradient[block.grid_index] = compute_duration_gradient(block_logits, block_posteriors)
    return gradient
