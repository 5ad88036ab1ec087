"""Training losses of the heads, in plain PyTorch on any device.

What a label is and where the scores come from is for `modeling_parakeet.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

# log-probability of what cannot happen: finite, so that gradients through it are zero and not NaN
NEVER = -1e30

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
    """
    labels = labels.to(logits.device)
    targets, lengths = compact_labels(labels, (labels >= 0) & (labels != blank_token_id))
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
    # cuDNN's CTC takes int32 targets on the CPU only and is not deterministic
    with torch.backends.cudnn.flags(enabled=False):
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
        fastemit_lambda: FastEmit weight (arXiv 2010.11148): gradients of labels are scaled by 1 + lambda.
        activation: of the joint network, a name that transformers knows.
        reduction: see `reduce_loss`.
        zero_infinity: count a transcript that no path can emit as zero.
        workspace_bytes: memory for scores.
        dropout: probability of zeroing an input of the output layer.

    Returns:
        Scalar, or (B,) with `reduction="none"`.
    """
    hidden = ACT2FN[activation](encoder_states[:, :, None] + predictor_states[:, None])
    logits = F.linear(F.dropout(hidden, dropout), head_weight, head_bias)
    if durations is None:
        return rnnt_loss(logits, labels, frame_lengths, label_lengths, blank_id, reduction)
    tokens = logits.shape[-1] - len(durations)
    return tdt_loss(
        logits[..., :tokens], logits[..., tokens:], labels, frame_lengths, label_lengths, blank_id, durations, sigma,
        reduction,
    )  # fmt: skip


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
) -> Tensor:
    """Compute the token-and-duration transducer loss (arXiv 2304.06795).

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

    Returns:
        Scalar, or (B,) with `reduction="none"`; float32. Infinite where no path fits.
    """
    blank, label = _arc_scores(token_logits, targets, blank_token_id)
    spans = F.log_softmax(duration_logits, dim=-1, dtype=torch.float32)
    arcs = {
        duration: (blank - sigma + spans[..., index], label - sigma + spans[..., :-1, index])
        for index, duration in enumerate(durations)
    }
    blanks = {duration: pair[0] for duration, pair in arcs.items() if duration > 0}
    labels = {duration: pair[1] for duration, pair in arcs.items()}
    losses = _lattice(blanks, labels, logit_lengths, target_lengths)
    return reduce_loss(losses, target_lengths.to(losses.device), reduction)


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank_token_id: int,
    reduction: str = "mean_volume",
) -> Tensor:
    """Compute the RNN-T loss (arXiv 1211.3711): the lattice of TDT in which a label stays and a blank moves one frame.

    Args:
        logits: (B, N, U+1, V) raw scores.
        targets: (B, U) labels.
        logit_lengths: (B,) valid frames.
        target_lengths: (B,) valid labels.
        blank_token_id: id of the blank.
        reduction: see `reduce_loss`.

    Returns:
        Scalar, or (B,) with `reduction="none"`; float32.
    """
    blank, label = _arc_scores(logits, targets, blank_token_id)
    losses = _lattice({1: blank}, {0: label}, logit_lengths, target_lengths)
    return reduce_loss(losses, target_lengths.to(losses.device), reduction)


def _arc_scores(logits: Tensor, targets: Tensor, blank_token_id: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, N, U+1) of the blank and (B, N, U) of the next label."""
    scores = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    index = targets.to(logits.device, torch.long)[:, None, :, None].expand(-1, logits.shape[1], -1, 1)
    return scores[..., blank_token_id], scores[:, :, :-1].gather(-1, index)[..., 0]


def _lattice(
    blanks: dict[int, Tensor], labels: dict[int, Tensor], logit_lengths: Tensor, target_lengths: Tensor
) -> Tensor:
    """Sum over all paths of a transducer lattice, frame by frame; double precision, the lattice is small.

    Args:
        blanks: per duration above 0, (B, N, U+1) scores of the blank arcs.
        labels: per duration, (B, N, U) scores of the label arcs.
        logit_lengths: (B,) frames.
        target_lengths: (B,) labels.

    Returns:
        (B,) negative log-likelihoods, float32.
    """
    some = next(iter(blanks.values()))
    batch, frames, width = some.shape
    logit_lengths, target_lengths = logit_lengths.to(some.device), target_lengths.to(some.device)
    blanks = {d: arc.double() for d, arc in blanks.items()}
    labels = {d: arc.double() for d, arc in labels.items()}
    nothing = torch.full((batch, width), NEVER, dtype=torch.double, device=some.device)
    first = nothing.clone()
    first[:, 0] = 0.0
    alphas: list[Tensor] = []
    for frame in range(frames + 1):
        arriving = [first] if frame == 0 else []
        for duration in {*blanks, *labels} - {0}:
            start = frame - duration
            if start < 0:
                continue
            if duration in blanks:
                arriving.append(alphas[start] + blanks[duration][:, start])
            if duration in labels and frame < frames:
                moved = alphas[start][:, :-1] + labels[duration][:, start]
                arriving.append(F.pad(moved, (1, 0), value=NEVER))
        alpha = torch.stack(arriving).logsumexp(0) if arriving else nothing
        if 0 in labels and frame < frames and width > 1:
            alpha = _stay(alpha, labels[0][:, frame])
        alphas.append(alpha)
    rows = torch.arange(batch, device=some.device)
    # a path ends with a blank that lands on the end: what blanks alone bring there
    return -_ends(alphas, blanks, logit_lengths)[rows, target_lengths.long()].float()


def _stay(alpha: Tensor, arcs: Tensor) -> Tensor:
    """Add the paths that emit labels without moving: a first-order recurrence along U, as a scan in the log semiring.

    Args:
        alpha: (B, U+1) scores of arriving at a frame.
        arcs: (B, U) scores of its labels of duration 0.
    """
    total = F.pad(arcs.cumsum(-1), (1, 0))
    return total + torch.logcumsumexp(alpha - total, dim=-1)


def _ends(alphas: list[Tensor], blanks: dict[int, Tensor], lengths: Tensor) -> Tensor:
    """(B, U+1) scores of landing on each row's end with a blank."""
    table = torch.stack(alphas, dim=1)
    rows = torch.arange(len(lengths), device=lengths.device)
    landing = []
    for duration, arcs in blanks.items():
        start = lengths.long() - duration
        at = start.clamp(min=0)
        score = table[rows, at] + arcs[rows, at.clamp(max=arcs.shape[1] - 1)]
        landing.append(score.masked_fill((start < 0)[:, None], NEVER))
    return torch.stack(landing).logsumexp(0)
