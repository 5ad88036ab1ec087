"""Greedy decoding of CTC and transducer scores, transducer beam search, hypotheses, and token confidence."""

from .beam import beam_decode_transducer
from .beam_reference import beam_decode_clip_reference
from .confidence import check_confidence_method, compute_token_confidence
from .greedy import greedy_decode_ctc, greedy_decode_transducer_reference
from .hypotheses import Hypotheses, Steps, collapse_ctc, insert_forced_blanks
from .label_looping import Shortcuts, greedy_decode_transducer
from .options import BeamOptions, TransducerOptions
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
    "BeamOptions",
    "CTCState",
    "Hypotheses",
    "Shortcuts",
    "Steps",
    "TransducerOptions",
    "TransducerState",
    "beam_decode_clip_reference",
    "beam_decode_transducer",
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
