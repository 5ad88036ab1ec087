"""Greedy decoding of CTC and transducer scores, whole or part by part, fusion, hypotheses, and token confidence."""

from .automaton import BackoffAutomaton, stack_automata
from .confidence import check_confidence_method, compute_token_confidence
from .frame_scoring import Shortcuts
from .fusion import Fusion, TokenScorer
from .greedy import greedy_decode_ctc, greedy_decode_transducer_reference
from .hypotheses import Hypotheses, Steps, collapse_ctc, insert_forced_blanks
from .label_looping import greedy_decode_transducer
from .options import TransducerOptions
from .resuming import finish_ctc, resume_ctc, resume_greedy_ctc, resume_transducer
from .search_inputs import (
    DEFAULT_BOOSTING_WEIGHT,
    DEFAULT_LM_WEIGHT,
    build_fusion,
    mask_joint,
    mask_logits,
    prepare_allowed_tokens,
)
from .state import (
    CTCState,
    TransducerState,
    stack_ctc_states,
    stack_transducer_states,
    start_ctc_state,
    start_transducer_state,
)

__all__ = [
    "DEFAULT_BOOSTING_WEIGHT",
    "DEFAULT_LM_WEIGHT",
    "BackoffAutomaton",
    "CTCState",
    "Fusion",
    "Hypotheses",
    "Shortcuts",
    "Steps",
    "TokenScorer",
    "TransducerOptions",
    "TransducerState",
    "build_fusion",
    "check_confidence_method",
    "collapse_ctc",
    "compute_token_confidence",
    "finish_ctc",
    "greedy_decode_ctc",
    "greedy_decode_transducer",
    "greedy_decode_transducer_reference",
    "insert_forced_blanks",
    "mask_joint",
    "mask_logits",
    "prepare_allowed_tokens",
    "resume_ctc",
    "resume_greedy_ctc",
    "resume_transducer",
    "stack_automata",
    "stack_ctc_states",
    "stack_transducer_states",
    "start_ctc_state",
    "start_transducer_state",
]
