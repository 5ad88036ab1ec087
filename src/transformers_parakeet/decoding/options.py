"""Settings of a transducer search, and the types of the two networks that the search calls.

The search itself is in `greedy.py` (reference implementation) and `label_looping.py` (fast implementation).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Prediction network: (last labels (R,), LSTM state) -> predictor states (R, J), new LSTM state. R is the number of
# clips in the call. The LSTM state is a tuple of tensors (num_layers, R, LSTM width), or `None` before the first step.
Predict = Callable[[Tensor, Any], tuple[Tensor, Any]]
# Joint network: (encoder states (R, K, J), predictor states (R, 1, J)) -> scores (R, K, V + D) of K frames of R clips
Joint = Callable[[Tensor, Tensor], Tensor]

# default weights of the scores of a language model and of phrase boosting; with a boosting weight of 1, clips without
# the phrases got 1.5 to 3.5 % more word errors in docs/search.md, with 0.5 at most 0.6 %
DEFAULT_LM_WEIGHT, DEFAULT_BOOSTING_WEIGHT = 0.3, 0.5
# values of `BeamOptions.pruning_mode` and `BeamOptions.blank_score_mode`; the names are those of NeMo
PRUNING_MODES = ("late", "early")
BLANK_SCORE_MODES = ("lm_weighted_full", "no_score")


@dataclass(frozen=True)
class TransducerOptions:
    """Settings of greedy transducer decoding.

    Args:
        blank_id: id of the blank.
        vocab_size: number of tokens V with the blank. The outputs of the joint network after the first V are durations.
        durations: number of frames for each duration output; `None` for RNN-T, where a label has duration 0 and a blank
            has duration 1.
        max_symbols: number of labels on one frame after which the search advances by one frame.
        max_steps: number of steps, blanks included, after which the search of a clip ends; `None` for no limit.
        lookahead: number of frames of each clip that one call of the joint network scores; 0 to choose it from the
            number of clips. It changes the speed and not the result.
        confidence: method of `compute_token_confidence`; `None` for no confidence.
        keep_logits: whether to return the scores of every step.
    """

    blank_id: int
    vocab_size: int
    durations: tuple[int, ...] | None = None
    max_symbols: int = 10
    max_steps: int | None = None
    lookahead: int = 0
    confidence: str | None = None
    keep_logits: bool = False


@dataclass(frozen=True)
class BeamOptions:
    """Settings of a beam search, of a transducer or of a CTC head.

    Args:
        num_beams: number of hypotheses of each clip that every step keeps.
        num_return_sequences: number of hypotheses of each clip in the result, at most `num_beams`.
        length_penalty: hypotheses are ordered by score / (number of labels + 1)^length_penalty. 1 is NeMo's
            `score_norm`, 0 orders by the score.
        label_bonus: score that a CTC search adds for each label, NeMo's `beam_beta`. A positive bonus favours longer
            results.
        score_threshold: a CTC search drops a hypothesis if its score is this much below the best score of its clip,
            NeMo's `beam_threshold`. Infinity drops none.
        sum_alignments: `True`: the score of a CTC hypothesis is the log of the summed probability of its alignments
            (Graves). `False`: it is the score of its best alignment, as in NeMo.
        pruning_mode: when the scores of the fusion are added in a transducer search. `"late"`: to all tokens, before
            the best tokens are selected. `"early"`: only to the best tokens of the model.
        blank_score_mode: how the fusion changes the scores of the model in a transducer search.
            `"lm_weighted_full"`: it scales the log-probability of the blank and of "no blank" by 1 + the sum of the
            weights, so the fusion does not favour blanks. `"no_score"`: it changes only the scores of labels.
        merge_finished: whether finished hypotheses of a TDT model with the same labels become one hypothesis if their
            last durations end at different frames. NeMo does not merge them, so its result can contain the same
            labels twice.

    Raises:
        ValueError: a number is out of range, or a mode does not exist.
    """

    num_beams: int = 4
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    label_bonus: float = 0.0
    score_threshold: float = math.inf
    sum_alignments: bool = True
    pruning_mode: str = "late"
    blank_score_mode: str = "lm_weighted_full"
    merge_finished: bool = True

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ValueError(
                "`num_return_sequences` must be at least 1 and at most `num_beams`, got "
                f"{self.num_return_sequences} with num_beams={self.num_beams}: raise `num_beams`"
            )
        for name in ("length_penalty", "label_bonus"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` must be a finite number, got {getattr(self, name)}: leave it out")
        if not self.score_threshold > 0:
            raise ValueError(
                f"`score_threshold` must be greater than 0, got {self.score_threshold}: "
                "pass infinity to drop no hypothesis"
            )
        for name, modes in (("pruning_mode", PRUNING_MODES), ("blank_score_mode", BLANK_SCORE_MODES)):
            if getattr(self, name) not in modes:
                raise ValueError(f"`{name}` must be one of {', '.join(modes)}, got {getattr(self, name)!r}")
