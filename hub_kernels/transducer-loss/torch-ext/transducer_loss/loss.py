"""The transducer loss: of logits, and fused with the joint network that makes them.

Formulas are in the README. RNN-T (arXiv 1211.3711) is TDT (arXiv 2304.06795) with a label that stays and a blank that
moves one frame: one lattice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import ACTIVATIONS, check_device, check_dtype, check_lengths, check_options, check_values
from .joint import Joint, differentiate_joint, prepare, score_joint
from .lattice import Arcs, empty_scores, lay_cells, read_logits, run_lattice, weigh, write_gradient

# memory for hidden units and logits of one chunk of the fused loss, in bytes
WORKSPACE_BYTES = 256 * 2**20
# cells that together have less than this share of an utterance's probability get no gradient of their own in the fused
# loss: the rounding error of float32
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
    """Compute the loss together with the joint network act(encoder + predictor) @ weight.T + bias.

    Args:
        encoder_states: (B, T, J) projected frames.
        predictor_states: (B, U+1, J) predictor states, the first one that of the blank.
        head_weight: (V, J), or (V + D, J) with durations.
        head_bias: (V,) or (V + D,), or None.
        labels: (B, U) integer labels; what lies behind `label_lengths` is not looked at.
        frame_lengths: (B,) valid frames.
        label_lengths: (B,) valid labels.
        blank_id: id of the blank.
        durations: frames of each duration output; None for RNN-T.
        sigma: subtracted from every token log-probability, with durations.
        omega: probability that the minibatch gets the RNN-T loss of its tokens instead, drawn from torch's generator.
        fastemit_lambda: FastEmit weight (arXiv 2010.11148): token gradients of labels are scaled by 1 + lambda; the
            value stays the negative log-likelihood.
        activation: `relu`, `tanh` or `sigmoid`.
        reduction: `none`, `sum`, `mean`, `mean_batch` or `mean_volume`.
        zero_infinity: count a transcript that no path can emit as zero. Its gradient is zero either way.
        workspace_bytes: memory for hidden units and logits.
        dropout: probability of dropping a hidden unit, drawn from torch's generator.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float32.

    Raises:
        TypeError: a dtype without a kernel.
        ValueError: shapes, lengths, labels or options do not fit.
    """
    given = {
        "encoder_states": encoder_states, "predictor_states": predictor_states, "head_weight": head_weight,
        "head_bias": head_bias,
    }  # fmt: skip
    device = check_device(given)
    check_dtype(**given)
    _check_joint(encoder_states, predictor_states, head_weight, head_bias, activation, dropout)
    tokens = len(head_weight) - (0 if durations is None else len(durations))
    arcs = Arcs(
        blank_id,
        check_options(blank_id, tokens, durations, fastemit_lambda, omega, reduction),
        0.0 if durations is None else sigma,
        fastemit_lambda,
    )
    if arcs.timed and _draw(omega):
        arcs = Arcs(blank_id, None, 0.0, fastemit_lambda)
        head_weight, head_bias = head_weight[:tokens], None if head_bias is None else head_bias[:tokens]
    seed = int(torch.randint(2**31 - 1, ()).item()) if dropout > 0 else 0
    check_lengths(labels, frame_lengths, label_lengths, *encoder_states.shape[:2], predictor_states.shape[1])
    labels, frame_lengths, label_lengths = (one.to(device) for one in (labels, frame_lengths, label_lengths))
    losses = _FusedLoss.apply(
        *_one_dtype(device, encoder_states, predictor_states, head_weight, head_bias),
        labels, frame_lengths, label_lengths, arcs, Joint(activation, dropout, seed, workspace_bytes), tokens,
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
    """Compute the loss of logits that are already there.

    Args:
        token_logits: (B, T, U+1, V) raw scores.
        duration_logits: (B, T, U+1, D) raw scores; None for RNN-T. It may be a slice of the same tensor as the tokens'.
        labels: see `transducer_loss`, as all arguments not named here.
        frame_lengths: (B,).
        label_lengths: (B,).
        blank_id: id of the blank.
        durations: frames of each duration output; None for RNN-T.
        sigma: see `transducer_loss`.
        omega: see `transducer_loss`.
        fastemit_lambda: see `transducer_loss`.
        reduction: see `transducer_loss`.
        zero_infinity: see `transducer_loss`.
        overwrite_logits: write the gradient over the logits in backward, in place of new memory of their size. Nothing
            else may need them then, and backward runs once.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float32.

    Raises:
        RuntimeError: second backward after the logits were overwritten.
        TypeError: a dtype without a kernel.
        ValueError: shapes, lengths, labels or options do not fit.
    """
    device = check_device({"token_logits": token_logits, "duration_logits": duration_logits})
    check_dtype(token_logits=token_logits, duration_logits=duration_logits)
    spans = check_options(blank_id, token_logits.shape[-1], durations, fastemit_lambda, omega, reduction)
    _check_logits(token_logits, duration_logits, spans)
    check_lengths(labels, frame_lengths, label_lengths, *token_logits.shape[:3])
    labels, frame_lengths, label_lengths = (one.to(device) for one in (labels, frame_lengths, label_lengths))
    if spans is not None and _draw(omega):
        spans = None
    arcs = Arcs(blank_id, spans, 0.0 if spans is None else sigma, fastemit_lambda)
    losses = _LogitsLoss.apply(
        token_logits,
        None if spans is None else duration_logits,
        labels,
        frame_lengths,
        label_lengths,
        arcs,
        overwrite_logits,
    )
    return _reduce(losses, label_lengths, reduction, zero_infinity)


def _check_joint(
    encoder_states: Tensor, predictor_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, activation: str,
    dropout: float,
) -> None:  # fmt: skip
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be at least 0 and below 1, got {dropout}")
    if encoder_states.dim() != 3 or predictor_states.dim() != 3 or head_weight.dim() != 2:
        raise ValueError(
            "`encoder_states` must be (B, T, J), `predictor_states` (B, U+1, J) and `head_weight` (outputs, J), got "
            f"{tuple(encoder_states.shape)}, {tuple(predictor_states.shape)} and {tuple(head_weight.shape)}"
        )
    batch, _, size = encoder_states.shape
    if predictor_states.shape[0] != batch or predictor_states.shape[1] < 1 or predictor_states.shape[2] != size:
        raise ValueError(
            f"`predictor_states` must be ({batch}, U+1, {size}) like `encoder_states`, got "
            f"{tuple(predictor_states.shape)}"
        )
    if head_weight.shape[1] != size:
        raise ValueError(f"`head_weight` must have {size} columns, got {tuple(head_weight.shape)}")
    if head_bias is not None and tuple(head_bias.shape) != (len(head_weight),):
        raise ValueError(f"`head_bias` must have the shape ({len(head_weight)},), got {tuple(head_bias.shape)}")


def _check_logits(token_logits: Tensor, duration_logits: Tensor | None, spans: tuple[int, ...] | None) -> None:
    if token_logits.dim() != 4:
        raise ValueError(f"`token_logits` must be (B, T, U+1, V), got {tuple(token_logits.shape)}")
    if (duration_logits is None) != (spans is None):
        raise ValueError("`durations` and `duration_logits` must be given together, or both be None for RNN-T")
    if duration_logits is not None and spans is not None:
        shape = (*token_logits.shape[:3], len(spans))
        if tuple(duration_logits.shape) != shape:
            raise ValueError(f"`duration_logits` must have the shape {shape}, got {tuple(duration_logits.shape)}")


def _draw(omega: float) -> bool:
    """Draw whether this minibatch is plain RNN-T; no draw is made for 0."""
    return omega > 0 and bool(torch.rand(()) < omega)


def _one_dtype(device: torch.device, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Give floating tensors the dtype of autocast if it is on, else the widest of theirs."""
    present = [tensor for tensor in tensors if tensor is not None]
    dtype = present[0].dtype
    for tensor in present[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _reduce(losses: Tensor, label_lengths: Tensor, reduction: str, zero_infinity: bool) -> Tensor:
    """Reduce one loss per utterance; one without labels counts as one with one label."""
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
    """Loss per utterance of the joint network's inputs; backward makes each chunk of logits again."""

    @staticmethod
    def forward(
        ctx: Any, encoder_states: Tensor, predictor_states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
        frame_lengths: Tensor, label_lengths: Tensor, arcs: Arcs, joint: Joint, tokens: int,
    ) -> Tensor:  # fmt: skip
        frames = encoder_states.shape[1]
        lengths = check_values(labels, frame_lengths, label_lengths, frames, tokens, arcs.blank_id)
        cells = lay_cells(labels, frame_lengths, label_lengths, lengths, frames, padded_rows=False)
        scores = empty_scores(cells, arcs)
        with torch.autocast(encoder_states.device.type, enabled=False):
            score_joint(prepare(encoder_states, predictor_states, weight, bias), cells, arcs, joint, scores)
        needed = any(ctx.needs_input_grad)
        losses, alpha, beta, spans = run_lattice(cells, arcs, scores, both=needed)
        ctx.save_for_backward(encoder_states, predictor_states, weight, bias)
        if needed:
            ctx.lattice = (cells, scores, alpha, beta, spans)
            ctx.arcs, ctx.joint = arcs, joint
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        cells, scores, alpha, beta, spans = ctx.lattice
        weights = weigh(cells, ctx.arcs, scores, alpha, beta, spans, loss_gradient, NEGLIGIBLE)
        inputs = ctx.saved_tensors
        with torch.autocast(beta.device.type, enabled=False):
            gradients = differentiate_joint(
                prepare(*inputs), cells, ctx.arcs, ctx.joint, scores, weights, ctx.needs_input_grad[:4]
            )
        found = (gradients.encoder, gradients.predictor, gradients.weight, gradients.bias)
        shaped = (
            None if gradient is None else gradient.view(tensor.shape).to(tensor.dtype)
            for gradient, tensor in zip(found, inputs, strict=True)
        )
        return (*shaped, *([None] * 6))


class _LogitsLoss(torch.autograd.Function):
    """Loss per utterance of logits, with an analytic gradient."""

    @staticmethod
    def forward(
        ctx: Any, token_logits: Tensor, duration_logits: Tensor | None, labels: Tensor, frame_lengths: Tensor,
        label_lengths: Tensor, arcs: Arcs, overwrite: bool,
    ) -> Tensor:  # fmt: skip
        frames, _, tokens = token_logits.shape[1:]
        lengths = check_values(labels, frame_lengths, label_lengths, frames, tokens, arcs.blank_id)
        cells = lay_cells(labels, frame_lengths, label_lengths, lengths, frames, padded_rows=True)
        scores = empty_scores(cells, arcs)
        token_rows = _rows(token_logits)
        duration_rows = token_rows if duration_logits is None else _rows(duration_logits)
        read_logits(token_rows, duration_rows, cells.row_cell, cells, arcs, scores)
        needed = any(ctx.needs_input_grad)
        losses, alpha, beta, spans = run_lattice(cells, arcs, scores, both=needed)
        ctx.save_for_backward(token_logits, duration_logits)
        ctx.overwritten = False
        if needed:
            ctx.lattice = (cells, scores, alpha, beta, spans)
            ctx.arcs, ctx.overwrite = arcs, overwrite
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.overwritten:
            raise RuntimeError(
                "backward must run once with `overwrite_logits`: the logits are gone; turn it off to go back twice"
            )
        cells, scores, alpha, beta, spans = ctx.lattice
        token_logits, duration_logits = ctx.saved_tensors
        ctx.overwritten = ctx.overwrite
        # all cells are written, whatever their occupancy
        weights = weigh(cells, ctx.arcs, scores, alpha, beta, spans, loss_gradient, -1.0)
        token_rows = _rows(token_logits)
        token_gradient = token_rows if ctx.overwrite else torch.empty_like(token_rows)
        duration_gradient = token_gradient
        if duration_logits is not None:
            duration_rows = _rows(duration_logits)
            duration_gradient = duration_rows if ctx.overwrite else torch.empty_like(duration_rows)
        write_gradient(token_rows, token_gradient, duration_gradient, cells.row_cell, cells, ctx.arcs, scores, weights)
        return (
            token_gradient.view(token_logits.shape),
            None if duration_logits is None else duration_gradient.view(duration_logits.shape),
            *([None] * 5),
        )  # fmt: skip


def _rows(logits: Tensor) -> Tensor:
    """View (B, T, U+1, V) as rows with a common stride, or copy it if it has none."""
    batch, frames, columns, size = logits.shape
    step = logits.stride(2)
    regular = logits.stride() == (frames * columns * step, columns * step, step, 1)
    if not regular:
        logits = logits.contiguous()
        step = size
    return logits.as_strided((batch * frames * columns, size), (step, 1))
