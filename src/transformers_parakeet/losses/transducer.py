"""Training losses of the heads, in plain PyTorch on any device.

What a label is and where the scores come from is for `modeling_parakeet.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fused import Joint, fused_losses
from .lattice import Task, accurate, locate, make_task, of_cells, refuse_second_derivative, solve, to_gradient

# scores that the losses of given logits treat at once: 16 MiB in float32, within a cache
BLOCK = 2**22

# memory for scores of the fused loss, in bytes
WORKSPACE_BYTES = 256 * 2**20

REDUCTIONS = ("none", "sum", "mean", "mean_batch", "mean_volume")


def reduce_loss(losses: Tensor, label_lengths: Tensor, reduction: str) -> Tensor:
    """Reduce one loss per clip as NeMo does.

    Args:
        losses: (B,) negative log-likelihoods.
        label_lengths: (B,) labels of each clip.
        reduction: `none`, `sum`, `mean` (per label, then over clips), `mean_batch` (over clips), or `mean_volume` (sum
            over clips divided by all labels).

    Returns:
        (B,) for `none`, else a scalar.

    Raises:
        ValueError: unknown reduction.
    """
    # a clip without labels counts as one with one label: finite, as in torch.nn.functional.ctc_loss
    counts = label_lengths.to(losses.dtype).clamp(min=1)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return (losses / counts).mean()
    if reduction == "mean_batch":
        return losses.mean()
    if reduction == "mean_volume":
        return losses.sum() / label_lengths.sum().clamp(min=1).to(losses.dtype)
    raise ValueError(f"`reduction` must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def compact_labels(labels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Move the labels to keep to the front of each row.

    Args:
        labels: (B, U) integer labels.
        keep: (B, U) boolean mask.

    Returns:
        (B, U) labels, zeros behind the kept ones, and their (B,) counts.
    """
    lengths = keep.sum(-1)
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
    rows = labels.gather(-1, order)
    inside = torch.arange(labels.shape[-1], device=labels.device) < lengths[:, None]
    return rows.masked_fill(~inside, 0), lengths


def ctc_loss(
    logits: Tensor,
    labels: Tensor,
    logit_lengths: Tensor,
    blank_token_id: int,
    reduction: str = "mean",
    zero_infinity: bool = True,
) -> Tensor:
    """Compute the CTC loss (Graves et al., 2006).

    Args:
        logits: (B, N, V) raw scores.
        labels: (B, U) labels; -100 and the blank pad and are ignored wherever they stand.
        logit_lengths: (B,) valid frames.
        blank_token_id: id of the blank.
        reduction: see `reduce_loss`.
        zero_infinity: count a transcript that does not fit into its frames as zero, with zero gradient.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float32.

    Raises:
        ValueError: a label that is no token.
    """
    # torch calls cuDNN, whose CTC is not deterministic, for int32 labels only
    labels = labels.to(logits.device, torch.long)
    beyond = labels >= logits.shape[-1]
    # torch would read past the end of the scores
    if bool(beyond.any()):
        raise ValueError(
            f"labels must be ids below {logits.shape[-1]}, got {labels[beyond].unique().tolist()}: make them with the "
            "tokenizer of this model"
        )
    targets, lengths = compact_labels(labels, (labels >= 0) & (labels != blank_token_id))
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
    losses = F.ctc_loss(
        log_probs,
        targets,
        logit_lengths.to(logits.device, torch.long),
        lengths,
        blank=blank_token_id,
        reduction="none",
        zero_infinity=zero_infinity,
    )
    return reduce_loss(losses, lengths, reduction)


class TransducerLoss(nn.Module):
    """Stateless layer around `transducer_loss`: the place where a kernel with the same `forward` can stand."""

    def forward(
        self,
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
        """Compute the loss; arguments and result are those of `transducer_loss`."""
        return transducer_loss(
            encoder_states, predictor_states, head_weight, head_bias, labels, frame_lengths, label_lengths, blank_id,
            durations, sigma, omega, fastemit_lambda, activation, reduction, zero_infinity, workspace_bytes, dropout,
        )  # fmt: skip


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
    """Compute the RNN-T (arXiv 1211.3711) or TDT (arXiv 2304.06795) loss together with the joint network.

    The (B, T, U+1, V) scores are never held: they are computed a few cells at a time, and again in backward.

    Args:
        encoder_states: (B, T, J) projected frames.
        predictor_states: (B, U+1, J) predictor states, the first one that of the blank.
        head_weight: (V, J), or (V + D, J) with durations: the joint's output layer.
        head_bias: (V,) or (V + D,).
        labels: (B, U) labels; what lies behind `label_lengths` is never read.
        frame_lengths: (B,) valid frames.
        label_lengths: (B,) valid labels.
        blank_id: id of the blank.
        durations: frames of each duration output; `None` for RNN-T.
        sigma: subtracted from every token log-probability, with durations.
        omega: probability that the minibatch gets the RNN-T loss of its tokens instead, drawn from torch's generator.
        fastemit_lambda: FastEmit weight (arXiv 2010.11148): scales the token gradients of labels by 1 + lambda, as in
            NeMo's numba kernels; the value stays the negative log-likelihood.
        activation: of the joint network, a name that transformers knows.
        reduction: see `reduce_loss`.
        zero_infinity: count a transcript that no path can emit as zero. Its gradient is zero either way.
        workspace_bytes: memory for scores; what fits is kept for backward.
        dropout: probability of zeroing an input of the output layer.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float32, float64 for float64 input.

    Raises:
        ValueError: shapes, lengths or labels that do not fit together.
    """
    tokens = head_weight.shape[0] - len(durations or ())
    if durations is not None and omega > 0 and float(torch.rand(())) < omega:
        durations = None
    shape = (*encoder_states.shape[:2], predictor_states.shape[1])
    task = make_task(shape, encoder_states.device, tokens, labels, frame_lengths, label_lengths, blank_id, durations,
                     sigma, fastemit_lambda)  # fmt: skip
    seed = int(torch.randint(2**62, ())) if dropout > 0 else 0
    joint = Joint(tokens, activation, dropout, seed, workspace_bytes)
    losses = fused_losses(encoder_states, predictor_states, head_weight, head_bias, task, joint)
    return _finish(losses, task, reduction, zero_infinity)


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
    """Compute the token-and-duration transducer loss (arXiv 2304.06795) from scores that exist already.

    A blank needs a duration above 0, a label may stay; the last blank lands exactly on the end.

    Args:
        token_logits: (B, N, U+1, V) raw token scores.
        duration_logits: (B, N, U+1, D) raw duration scores.
        targets: (B, U) labels.
        logit_lengths: (B,) valid frames.
        target_lengths: (B,) valid labels.
        blank_token_id: id of the blank.
        durations: frames of each duration output.
        sigma: subtracted from every token log-probability.
        reduction: see `reduce_loss`.
        fastemit_lambda: as in `transducer_loss`.
        zero_infinity: as in `transducer_loss`.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float32, float64 for float64 input. Infinite where no path fits.

    Raises:
        ValueError: shapes, lengths or labels that do not fit together.
    """
    task = make_task(
        token_logits.shape[:3], token_logits.device, token_logits.shape[3], targets, logit_lengths, target_lengths,
        blank_token_id, durations, sigma, fastemit_lambda,
    )  # fmt: skip
    return _finish(_LogitsLoss.apply(token_logits, duration_logits, task), task, reduction, zero_infinity)


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
    """Compute the RNN-T loss (arXiv 1211.3711) from scores that exist already.

    Args:
        logits: (B, N, U+1, V) raw scores.
        targets: (B, U) labels.
        logit_lengths: (B,) valid frames.
        target_lengths: (B,) valid labels.
        blank_token_id: id of the blank.
        reduction: see `reduce_loss`.
        fastemit_lambda: as in `transducer_loss`.
        zero_infinity: as in `transducer_loss`.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float32, float64 for float64 input.

    Raises:
        ValueError: shapes, lengths or labels that do not fit together.
    """
    task = make_task(
        logits.shape[:3], logits.device, logits.shape[3], targets, logit_lengths, target_lengths, blank_token_id, None,
        0.0, fastemit_lambda,
    )  # fmt: skip
    return _finish(_LogitsLoss.apply(logits, None, task), task, reduction, zero_infinity)


def _finish(losses: Tensor, task: Task, reduction: str, zero_infinity: bool) -> Tensor:
    """Reduce the losses of the clips."""
    if zero_infinity:
        losses = losses.masked_fill(losses == math.inf, 0.0)
    return reduce_loss(losses, task.labels, reduction)


class _LogitsLoss(torch.autograd.Function):
    """Losses (B,) from (B, T, W, V) token scores and (B, T, W, D) duration scores, with an analytic gradient."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, spans: Tensor | None, task: Task) -> Tensor:
        """Look the arcs up, a few frames at a time, and sum the paths."""
        dtype = accurate(tokens.dtype)
        blank, label = (torch.empty(len(task.cells), dtype=dtype, device=tokens.device) for _ in range(2))
        timed = torch.empty(len(task.cells), len(task.durations), dtype=dtype, device=tokens.device)
        for place, some in _places(task, tokens.shape[3]):
            scores = tokens[place].log_softmax(-1, dtype=dtype).flatten(0, 1)
            blank[some] = scores[:, task.blank]
            label[some] = scores.gather(1, locate(task, task.cells[some]).next_label[:, None])[:, 0]
            if spans is not None:
                timed[some] = spans[place].log_softmax(-1, dtype=dtype).flatten(0, 1)
        losses, flow = solve(task, blank, label, None if spans is None else timed)
        ctx.task = task
        ctx.save_for_backward(tokens, spans, flow.blank, flow.label, flow.spans)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Write the gradient of a few frames at a time."""
        refuse_second_derivative()
        tokens, spans, *flow = ctx.saved_tensors
        task: Task = ctx.task
        blank, label, timed = (part * of_cells(task, gradient, part.ndim) for part in flow)
        out = [torch.zeros_like(scores, memory_format=torch.contiguous_format) if need else None
               for scores, need in zip((tokens, spans), ctx.needs_input_grad, strict=False)]  # fmt: skip
        for place, some in _places(task, tokens.shape[3]):
            if out[0] is not None:
                scores = tokens[place].softmax(-1, dtype=blank.dtype)
                next_label = locate(task, task.cells[some]).next_label
                to_gradient(scores.view(-1, scores.shape[-1]), task.blank, next_label, blank[some], label[some])
                out[0][place] = scores
            if out[1] is not None:
                scores = spans[place].softmax(-1, dtype=blank.dtype)
                part = timed[some].view_as(scores)
                out[1][place] = scores * part.sum(-1, keepdim=True) - part
        return (*out, None)


def _places(task: Task, outputs: int) -> Iterator[tuple[tuple[int, slice, slice], slice]]:
    """Cut the valid cells into blocks of frames of one clip: index into the grid, and range of the valid cells."""
    start = 0
    for clip, (frames, labels) in enumerate(zip(task.frames.tolist(), task.labels.tolist(), strict=True)):
        step = max(1, BLOCK // ((labels + 1) * outputs))
        for first in range(0, frames, step):
            last = min(first + step, frames)
            count = (last - first) * (labels + 1)
            yield (clip, slice(first, last), slice(labels + 1)), slice(start, start + count)
            start += count
