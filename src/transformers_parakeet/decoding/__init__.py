"""Greedy decoding and beam search of CTC and transducer scores, hypotheses, and token confidence."""

from .automaton import BackoffAutomaton
from .biasing import BoostedPhrase, build_boosting_tree
from .confidence import check_confidence_method, compute_token_confidence
from .ctc_beam import beam_decode_ctc
from .fusion import TokenScorer
from .greedy import greedy_decode_ctc, greedy_decode_transducer_reference
from .hypotheses import Hypotheses, Steps, collapse_ctc, insert_forced_blanks
from .label_looping import Shortcuts, greedy_decode_transducer
from .ngram import load_language_model
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
    "BackoffAutomaton",
    "BeamOptions",
    "BoostedPhrase",
    "CTCState",
    "Hypotheses",
    "Shortcuts",
    "Steps",
    "TokenScorer",
    "TransducerOptions",
    "TransducerState",
    "beam_decode_ctc",
    "build_boosting_tree",
    "check_confidence_method",
    "collapse_ctc",
    "compute_token_confidence",
    "finish_ctc",
    "greedy_decode_ctc",
    "greedy_decode_transducer",
    "greedy_decode_transducer_reference",
    "insert_forced_blanks",
    "load_language_model",
    "resume_ctc",
    "resume_transducer",
    "stack_ctc_states",
    "stack_transducer_states",
    "start_ctc_state",
    "start_transducer_state",
]
