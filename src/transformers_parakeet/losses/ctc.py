"""The CTC loss (Graves et al., 2006), computed by torch.

`reduction.py` compacts labels and reduces the losses of the clips.
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
        labels: (B, U) token ids; negative ids and the blank are padding and are ignored at any position.
        logit_lengths: (B,) number of valid frames.
        blank_token_id: id of the blank.
        reduction: see `reduce_loss`.
        zero_infinity: whether the loss and the gradient of a transcript that is too long for its frames are 0 instead
            of infinite.

    Returns:
        float32 scalar, or (B,) with `reduction="none"`.

    Raises:
        ValueError: a label is V or larger.
    """
    # for int32 labels, torch calls the CTC loss of cuDNN, which is not deterministic
    labels = labels.to(logits.device, torch.long)
    _check_labels(labels, vocab_size=logits.shape[-1])
    is_label = (labels >= 0) & (labels != blank_token_id)
    compacted_labels, label_lengths = compact_labels(labels, is_label)
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    losses = F.ctc_loss(
        # (N, B, V)
        log_probs.transpose(0, 1),
        compacted_labels,
        logit_lengths.to(logits.device, torch.long),
        label_lengths,
        blank=blank_token_id,
        reduction="none",
        zero_infinity=zero_infinity,
    )
    return reduce_loss(losses, label_lengths, reduction)


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    """Raise ValueError if a label is `vocab_size` or larger, because torch would read memory outside of the logits."""
    is_too_large = labels >= vocab_size
    if bool(is_too_large.any()):
        raise ValueError(
            f"labels must be ids below {vocab_size}, got {labels[is_too_large].unique().tolist()}: encode the "
            "transcripts with the tokenizer of this model"
        )
