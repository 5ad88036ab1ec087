"""Decoding of scores: greedy search for CTC and transducers, hypotheses, and token confidence."""

from .confidence import check_confidence_method, token_confidence
from .greedy import greedy_ctc, greedy_transducer_reference
from .hypotheses import Hypotheses, Steps, collapse_ctc, insert_forced_blanks
from .label_looping import Shortcuts, greedy_transducer
from .options import TransducerOptions

__all__ = [
    "Hypotheses",
    "Shortcuts",
    "Steps",
    "TransducerOptions",
    "check_confidence_method",
    "collapse_ctc",
    "greedy_ctc",
    "greedy_transducer",
    "greedy_transducer_reference",
    "insert_forced_blanks",
    "token_confidence",
]
