"""Exact RNN-T and TDT losses in Triton: from logits, or fused with the joint network."""

from . import layers
from .loss import transducer_loss, transducer_loss_from_logits

__all__ = ["layers", "transducer_loss", "transducer_loss_from_logits"]
