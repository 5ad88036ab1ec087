"""Decoding of scores: greedy search for CTC and transducers, and confidence."""

from .greedy import Hypotheses, Shortcuts, TransducerOptions, confidence, greedy_ctc, greedy_transducer

__all__ = [
    "Hypotheses",
    "Shortcuts",
    "TransducerOptions",
    "confidence",
    "greedy_ctc",
    "greedy_transducer",
]
