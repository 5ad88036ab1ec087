"""The transducer loss, fused with the joint network or from logits.

The README has the formulas. RNN-T (arXiv 1211.3711) is TDT (arXiv 2304.06795) in which a label does not advance and a
blank advances one frame, so both have the same lattice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_device, check_dtypes, check_joint, check_lengths, check_logits, check_options, check_values
from .joint import JointSettings, differentiate_joint, prepare_inputs, score_all_nodes
from .lattice import (
    LatticeSettings,
    allocate_scores,
    number_nodes,
    run_path_sums,
    run_posteriors,
    write_logit_gradients,
    write_scores,
)

# default memory for the hidden units and logits of one chunk of the fused loss, in bytes
WORKSPACE_BYTES = 256 * 2**20
# The backward pass of the fused loss skips nodes with small posteriors. This is the largest allowed sum of the skipped
# posteriors of an utterance: the rounding error of float32.
NEGLIGIBLE = 2.0**-24


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
    """Compute the RNN-T or TDT loss together with the joint network activation(encoder + predictor) @ weight.T + bias.

    Args:
        encoder_states: (B, T, J) projected encoder frames.
        predictor_states: (B, U+1, J) projected predictor states; state u is the state after u labels.
        head_weight: (V, J), or (V + D, J) with durations: weight of the output layer.
        head_bias: (V,) or (V + D,) bias of the output layer, or None.
        labels: (B, U) label ids; values beyond `label_lengths` are ignored.
        frame_lengths: (B,) number of valid frames.
        label_lengths: (B,) number of valid labels.
        blank_id: id of the blank.
        durations: number of frames of each duration output; None for RNN-T.
        sigma: logit under-normalisation of TDT, subtracted from every token log-probability; ignored for RNN-T.
        omega: probability of computing the RNN-T loss of the batch instead of the TDT loss.
        fastemit_lambda: FastEmit weight (arXiv 2010.11148). Token gradients of labels are multiplied by 1 + lambda; the
            value of the loss stays the negative log-likelihood.
        activation: `relu`, `tanh` or `sigmoid`.
        reduction: `none`, `sum`, `mean` (per label, then over utterances), `mean_batch` (over utterances) or
            `mean_volume` (sum divided by the number of labels).
        zero_infinity: whether to replace the infinite loss of a transcript without a path by 0. The gradient of such a
            transcript is 0 in any case.
        workspace_bytes: memory for the hidden units and logits of one chunk, in bytes.
        dropout: dropout probability of a hidden unit. The seed is drawn from torch's generator.

    Returns:
        Float32 scalar, or (B,) with `reduction="none"`.

    Raises:
        TypeError: the kernel does not support a dtype.
        ValueError: a shape, length, label or option is invalid.
    """
    tensors = {
        "encoder_states": encoder_states, "predictor_states": predictor_states, "head_weight": head_weight,
        "head_bias": head_bias,
    }  # fmt: skip
    device = check_device(tensors)
    check_dtypes(tensors)
    check_joint(encoder_states, predictor_states, head_weight, head_bias, activation, dropout)
    vocab_size = len(head_weight) - (0 if durations is None else len(durations))
    arc_durations = check_options(blank_id, vocab_size, durations, fastemit_lambda, omega, reduction)
    if arc_durations is not None and _draw_rnnt(omega):
        arc_durations = None
        head_weight, head_bias = head_weight[:vocab_size], None if head_bias is None else head_bias[:vocab_size]
    settings = LatticeSettings(blank_id, arc_durations, 0.0 if arc_durations is None else sigma, fastemit_lambda)
    seed = int(torch.randint(2**31 - 1, ()).item()) if dropout > 0 else 0
    check_lengths(labels, frame_lengths, label_lengths, *encoder_states.shape[:2], predictor_states.shape[1])
    labels, frame_lengths, label_lengths = (tensor.to(device) for tensor in (labels, frame_lengths, label_lengths))
    losses = _FusedLoss.apply(
        *_to_common_dtype(device, encoder_states, predictor_states, head_weight, head_bias),
        labels, frame_lengths, label_lengths, settings, JointSettings(activation, dropout, seed, workspace_bytes),
        vocab_size,
    )  # fmt: skip
    return _reduce(losses, label_lengths, reduction, zero_infinity)


def transducer_loss_from_logits(
    token_logits: Tensor,
    duration_logits: Tensor | None,
    labels: Tensor,
    frame_lengths: Tensor,
    label_lengths: Tensor,
    blank_id: int,
    durations: Sequence[int] | None = None,
    sigma: float = 0.0,
    omega: float = 0.0,
    fastemit_lambda: float = 0.0,
    reduction: str = "mean_volume",
    zero_infinity: bool = False,
    overwrite_logits: bool = False,
) -> Tensor:
    """Compute the RNN-T or TDT loss from logits.

    Args:
        token_logits: (B, T, U+1, V) unnormalised token scores.
        duration_logits: (B, T, U+1, D) unnormalised duration scores; None for RNN-T. Token logits and duration logits
            may be slices of one tensor.
        labels: (B, U) label ids; values beyond `label_lengths` are ignored.
        frame_lengths: (B,) number of valid frames.
        label_lengths: (B,) number of valid labels.
        blank_id: id of the blank.
        durations: number of frames of each duration output; None for RNN-T.
        sigma: see `transducer_loss`.
        omega: see `transducer_loss`.
        fastemit_lambda: see `transducer_loss`.
        reduction: see `transducer_loss`.
        zero_infinity: see `transducer_loss`.
        overwrite_logits: whether the backward pass writes the gradient over the logits, which saves the memory of a
            second tensor of this size. Other code must then not use the logits, and backward can run only once.

    Returns:
        Float32 scalar, or (B,) with `reduction="none"`.

    Raises:
        RuntimeError: backward runs a second time after the logits were overwritten.
        TypeError: the kernel does not support a dtype.
        ValueError: a shape, length, label or option is invalid.
    """
    tensors = {"token_logits": token_logits, "duration_logits": duration_logits}
    device = check_device(tensors)
    check_dtypes(tensors)
    arc_durations = check_options(blank_id, token_logits.shape[-1], durations, fastemit_lambda, omega, reduction)
    check_logits(token_logits, duration_logits, arc_durations)
    check_lengths(labels, frame_lengths, label_lengths, *token_logits.shape[:3])
    labels, frame_lengths, label_lengths = (tensor.to(device) for tensor in (labels, frame_lengths, label_lengths))
    if arc_durations is not None and _draw_rnnt(omega):
        arc_durations, duration_logits = None, None
    settings = LatticeSettings(blank_id, arc_durations, 0.0 if arc_durations is None else sigma, fastemit_lambda)
    losses = _LogitsLoss.apply(
        token_logits, duration_logits, labels, frame_lengths, label_lengths, settings, overwrite_logits
    )
    return _reduce(losses, label_lengths, reduction, zero_infinity)


def _draw_rnnt(omega: float) -> bool:
    """Return True with probability omega (compute the RNN-T loss); with omega 0, torch's generator is not used."""
    return omega > 0 and bool(torch.rand(()) < omega)


def _to_common_dtype(device: torch.device, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Convert tensors to autocast's dtype under autocast, otherwise to their common promoted dtype; None stays None."""
    passed_tensors = [tensor for tensor in tensors if tensor is not None]
    dtype = passed_tensors[0].dtype
    for tensor in passed_tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _reduce(losses: Tensor, label_lengths: Tensor, reduction: str, zero_infinity: bool) -> Tensor:
    """Reduce the (B,) losses of the utterances to the loss of the batch.

    Args:
        losses: (B,) negative log-likelihood of each utterance.
        label_lengths: (B,) number of labels; 0 counts as 1, so no loss is divided by 0.
        reduction: see `transducer_loss`.
        zero_infinity: whether to replace infinite losses by 0 first.

    Returns:
        (B,) for `none`, otherwise a scalar.
    """
    if zero_infinity:
        losses = torch.where(losses.isinf(), 0.0, losses)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return (losses / label_lengths.clamp(min=1)).mean()
    if reduction == "mean_batch":
        return losses.mean()
    return losses.sum() / label_lengths.sum().clamp(min=1)


class _FusedLoss(torch.autograd.Function):
    """Loss of each utterance from the inputs of the joint network; backward recomputes the logits of each chunk."""

    @staticmethod
    def forward(
        ctx: Any, encoder_states: Tensor, predictor_states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
        frame_lengths: Tensor, label_lengths: Tensor, settings: LatticeSettings, joint: JointSettings, vocab_size: int,
    ) -> Tensor:  # fmt: skip
        """Compute the (B,) losses: score all lattice nodes chunk by chunk, then sum over the paths."""
        num_frames = encoder_states.shape[1]
        lengths = check_values(labels, frame_lengths, label_lengths, num_frames, vocab_size, settings.blank_id)
        nodes = number_nodes(labels, frame_lengths, label_lengths, lengths, num_frames, has_rows=False)
        scores = allocate_scores(nodes, settings)
        with torch.autocast(encoder_states.device.type, enabled=False):
            inputs = prepare_inputs(encoder_states, predictor_states, weight, bias)
            score_all_nodes(inputs, nodes, settings, joint, scores)
        needs_gradient = any(ctx.needs_input_grad)
        sums = run_path_sums(nodes, settings, scores, needs_gradient)
        ctx.save_for_backward(encoder_states, predictor_states, weight, bias)
        if needs_gradient:
            ctx.nodes, ctx.scores, ctx.sums = nodes, scores, sums
            ctx.settings, ctx.joint = settings, joint
        return sums.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the states, the weight and the bias from the nodes that are not negligible."""
        posteriors = run_posteriors(ctx.nodes, ctx.settings, ctx.scores, ctx.sums, loss_gradient, NEGLIGIBLE)
        tensors = ctx.saved_tensors
        with torch.autocast(loss_gradient.device.type, enabled=False):
            gradients = differentiate_joint(
                prepare_inputs(*tensors), ctx.nodes, ctx.settings, ctx.joint, ctx.scores, posteriors,
                ctx.needs_input_grad[:4],
            )  # fmt: skip
        flat_gradients = (gradients.encoder, gradients.predictor, gradients.weight, gradients.bias)
        tensor_gradients = (
            None if gradient is None else gradient.view(tensor.shape).to(tensor.dtype)
            for gradient, tensor in zip(flat_gradients, tensors, strict=True)
        )
        return (*tensor_gradients, *([None] * 6))


class _LogitsLoss(torch.autograd.Function):
    """Loss of each utterance from logits, with an analytic gradient."""

    @staticmethod
    def forward(
        ctx: Any, token_logits: Tensor, duration_logits: Tensor | None, labels: Tensor, frame_lengths: Tensor,
        label_lengths: Tensor, settings: LatticeSettings, overwrite_logits: bool,
    ) -> Tensor:  # fmt: skip
        """Compute the (B,) losses: score all lattice nodes from their logits, then sum over the paths."""
        num_frames, _, vocab_size = token_logits.shape[1:]
        lengths = check_values(labels, frame_lengths, label_lengths, num_frames, vocab_size, settings.blank_id)
        nodes = number_nodes(labels, frame_lengths, label_lengths, lengths, num_frames, has_rows=True)
        scores = allocate_scores(nodes, settings)
        token_rows = _view_as_rows(token_logits)
        duration_rows = token_rows if duration_logits is None else _view_as_rows(duration_logits)
        write_scores(token_rows, duration_rows, nodes.row_node, nodes, settings, scores)
        needs_gradient = any(ctx.needs_input_grad)
        sums = run_path_sums(nodes, settings, scores, needs_gradient)
        ctx.save_for_backward(token_logits, duration_logits)
        ctx.overwritten = False
        if needs_gradient:
            ctx.nodes, ctx.scores, ctx.sums = nodes, scores, sums
            ctx.settings, ctx.overwrite_logits = settings, overwrite_logits
        return sums.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of token logits and duration logits."""
        if ctx.overwritten:
            raise RuntimeError(
                "backward must run only once with `overwrite_logits`, because the logits were overwritten: turn it off "
                "to run backward twice"
            )
        token_logits, duration_logits = ctx.saved_tensors
        ctx.overwritten = ctx.overwrite_logits
        # with a negative limit, no node is negligible
        posteriors = run_posteriors(ctx.nodes, ctx.settings, ctx.scores, ctx.sums, loss_gradient, -1.0)
        token_rows = _view_as_rows(token_logits)
        token_gradient = token_rows if ctx.overwrite_logits else torch.empty_like(token_rows)
        # RNN-T has no duration logits and does not use this tensor
        duration_gradient = token_gradient
        if duration_logits is not None:
            duration_rows = _view_as_rows(duration_logits)
            duration_gradient = duration_rows if ctx.overwrite_logits else torch.empty_like(duration_rows)
        write_logit_gradients(
            token_rows, token_gradient, duration_gradient, ctx.nodes.row_node, ctx.nodes, ctx.settings, ctx.scores,
            posteriors,
        )  # fmt: skip
        return (
            token_gradient.view(token_logits.shape),
            None if duration_logits is None else duration_gradient.view(duration_logits.shape),
            *([None] * 5),
        )


def _view_as_rows(logits: Tensor) -> Tensor:
    """View (B, T, U+1, V) logits as (B * T * (U+1), V) rows; copy the logits if the rows are not equally spaced."""
    batch, num_frames, num_positions, size = logits.shape
    row_stride = logits.stride(2)
    strides = (num_frames * num_positions * row_stride, num_positions * row_stride, row_stride, 1)
    if logits.stride() != strides:
        logits = logits.contiguous()
        row_stride = size
    return logits.as_strided((batch * num_frames * num_positions, size), (row_stride, 1))
