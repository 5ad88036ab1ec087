"""Greedy decoding and beam search of CTC and transducer scores, language models, phrase boosting, and confidence."""

from .alignment import LabelAlignment, NodeScores, align_ctc, align_transducer, count_ctc_frames
from .automaton import BackoffAutomaton, stack_automata
from .beam import beam_decode_transducer
from .beam_reference import ReferenceHypothesis, beam_decode_clip_reference
from .biasing import BoostedPhrase, build_boosting_tree
from .confidence import check_confidence_method, compute_token_confidence
from .ctc_beam import beam_decode_ctc
from .frame_scoring import Shortcuts
from .fusion import Fusion, TokenScorer
from .greedy import greedy_decode_ctc, greedy_decode_transducer_reference
from .hypotheses import Hypotheses, Steps, collapse_ctc, insert_forced_blanks, penalise_length
from .label_looping import greedy_decode_transducer
from .ngram import load_language_model
from .options import DEFAULT_BOOSTING_WEIGHT, DEFAULT_LM_WEIGHT, BeamOptions, Joint, Predict, TransducerOptions
from .resuming import finish_ctc, resume_ctc, resume_greedy_ctc, resume_transducer
from .search_inputs import build_fusion, mask_joint, mask_logits, prepare_allowed_tokens
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
    "BeamOptions",
    "BoostedPhrase",
    "CTCState",
    "Fusion",
    "Hypotheses",
    "Joint",
    "LabelAlignment",
    "NodeScores",
    "Predict",
    "ReferenceHypothesis",
    "Shortcuts",
    "Steps",
    "TokenScorer",
    "TransducerOptions",
    "TransducerState",
    "align_ctc",
    "align_transducer",
    "beam_decode_clip_reference",
    "beam_decode_ctc",
    "beam_decode_transducer",
    "build_boosting_tree",
    "build_fusion",
    "check_confidence_method",
    "collapse_ctc",
    "compute_token_confidence",
    "count_ctc_frames",
    "finish_ctc",
    "greedy_decode_ctc",
    "greedy_decode_transducer",
    "greedy_decode_transducer_reference",
    "insert_forced_blanks",
    "load_language_model",
    "mask_joint",
    "mask_logits",
    "penalise_length",
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
