"""Greedy decoding of CTC and transducer scores, hypotheses, and token confidence."""

from .confidence import check_confidence_method, compute_token_confidence
from .greedy import greedy_decode_ctc, greedy_decode_transducer_reference
from .hypotheses import Hypotheses, Steps, collapse_ctc, insert_forced_blanks
from .label_looping import Shortcuts, greedy_decode_transducer
from .options import TransducerOptions

__all__ = [
    "Hypotheses",
    "Shortcuts",
    "Steps",
    "TransducerOptions",
    "check_confidence_method",
    "collapse_ctc",
    "compute_token_confidence",
    "greedy_decode_ctc",
    "greedy_decode_transducer",
    "greedy_decode_transducer_reference",
    "insert_forced_blanks",
]
