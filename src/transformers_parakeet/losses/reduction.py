"""Compacts labels, and reduces the losses of the clips to the loss of a batch.

The losses are computed in `ctc.py` and `transducer.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("none", "sum", "mean", "mean_batch", "mean_volume")


def reduce_loss(losses: Tensor, label_lengths: Tensor, reduction: str) -> Tensor:
    """Reduce the losses of the clips to the loss of the batch, as NeMo's `rnnt_reduction` and `ctc_reduction` do.

    In `mean`, the loss of a clip without labels is divided by 1 instead of 0, as in torch's CTC loss.

    Args:
        losses: (B,) negative log-likelihood of each clip.
        label_lengths: (B,) number of labels of each clip.
        reduction: `none`, `sum`, `mean` (divide each loss by its number of labels, then average over clips),
            `mean_batch` (average over clips) or `mean_volume` (sum over clips divided by the total number of labels).

    Returns:
        (B,) for `none`, otherwise a scalar.

    Raises:
        ValueError: `reduction` has an unknown name.
    """
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return (losses / label_lengths.to(losses.dtype).clamp(min=1)).mean()
    if reduction == "mean_batch":
        return losses.mean()
    if reduction == "mean_volume":
        return losses.sum() / label_lengths.sum().clamp(min=1).to(losses.dtype)
    raise ValueError(f"`reduction` must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def compact_labels(labels: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor]:
    """Move the labels of each clip to the start of its row and fill the rest of the row with zeros.

    The order of the labels does not change. For example, a row [-100, 7, -100, 3] becomes [7, 3, 0, 0].

    Args:
        labels: (B, U) token ids, with padding at any position.
        is_label: (B, U) boolean mask, True at labels and False at padding.

    Returns:
        (B, U) compacted labels, and the (B,) number of labels of each clip.
    """
    label_lengths = is_label.sum(-1)
    # sort labels (0) before padding (1); a stable sort does not change the order of the labels
    order = (~is_label).to(torch.uint8).argsort(dim=-1, stable=True)
    is_padding = torch.arange(labels.shape[-1], device=labels.device) >= label_lengths[:, None]
    return labels.gather(-1, order).masked_fill(is_padding, 0), label_lengths
