"""Greedy decoding of CTC and transducer scores, whole or part by part, hypotheses, and token confidence."""

from .confidence import check_confidence_method, compute_token_confidence
from .frame_scoring import Shortcuts
from .greedy import greedy_decode_ctc, greedy_decode_transducer_reference
from .hypotheses import Hypotheses, Steps, collapse_ctc, insert_forced_blanks
from .label_looping import greedy_decode_transducer
from .options import TransducerOptions
from .resuming import finish_ctc, resume_ctc, resume_transducer
from .state import (
    CTCState,
    TransducerState,
    stack_ctc_states,
    stack_transducer_states,
    start_ctc_state,
    start_transducer_state,
)

__all__ = [
    "CTCState",
    "Hypotheses",
    "Shortcuts",
    "Steps",
    "TransducerOptions",
    "TransducerState",
    "check_confidence_method",
    "collapse_ctc",
    "compute_token_confidence",
    "finish_ctc",
    "greedy_decode_ctc",
    "greedy_decode_transducer",
    "greedy_decode_transducer_reference",
    "insert_forced_blanks",
    "resume_ctc",
    "resume_transducer",
    "stack_ctc_states",
    "stack_transducer_states",
    "start_ctc_state",
    "start_transducer_state",
]
