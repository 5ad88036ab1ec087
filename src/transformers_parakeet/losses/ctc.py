"""The CTC loss (Graves et al., 2006), computed by torch.

Reductions over clips and the compaction of labels are in `reduction.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .reduction import compact_labels, reduce_loss


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
        logits: (B, N, V) unnormalised scores.
        labels: (B, U) token ids; -100 and the blank are padding and are ignored at any position.
        logit_lengths: (B,) number of valid frames.
        blank_token_id: id of the blank.
        reduction: see `reduce_loss`.
        zero_infinity: replace the infinite loss of a transcript that is too long for its frames by 0, with gradient 0.

    Returns:
        float32 scalar, or (B,) with `reduction="none"`.

    Raises:
        ValueError: a label is not below V.
    """
    # torch calls cuDNN's CTC, which is not deterministic, only for int32 labels
    labels = labels.to(logits.device, torch.long)
    _check_labels(labels, vocab_size=logits.shape[-1])
    targets, label_lengths = compact_labels(labels, (labels >= 0) & (labels != blank_token_id))
    losses = F.ctc_loss(
        F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1),
        targets,
        logit_lengths.to(logits.device, torch.long),
        label_lengths,
        blank=blank_token_id,
        reduction="none",
        zero_infinity=zero_infinity,
    )
    return reduce_loss(losses, label_lengths, reduction)


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    """Raise ValueError if a label has no logit: torch would read memory outside of the logits."""
    too_large = labels >= vocab_size
    if bool(too_large.any()):
        raise ValueError(
            f"labels must be ids below {vocab_size}, got {labels[too_large].unique().tolist()}: make them with the "
            "tokenizer of this model"
        )
