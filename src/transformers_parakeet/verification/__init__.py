"""Verification of a checkpoint: comparison with stock transformers, and error rates on test data."""

from .checkpoint import Verification, VerifyOptions, verify_checkpoint
from .comparison import Comparison, compare_with_stock

__all__ = [
    "Comparison",
    "Verification",
    "VerifyOptions",
    "compare_with_stock",
    "verify_checkpoint",
]
