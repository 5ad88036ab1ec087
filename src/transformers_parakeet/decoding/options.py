"""Settings of a transducer search, and the types of the two networks that it calls.

Both searches, the plain one and the fast one, use them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Prediction network: (last labels (R,), LSTM state) -> predictor states (R, J), new LSTM state.
# The LSTM state is a tuple of tensors (layers, R, P), and `None` before the first step.
Predict = Callable[[Tensor, Any], tuple[Tensor, Any]]
# Joint network: (projected frames (R, K, J), predictor states (R, 1, J)) -> scores (R, K, V + D)
Joint = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TransducerOptions:
    """Settings of greedy transducer decoding.

    Args:
        blank_id: id of the blank.
        vocab_size: number of tokens V with the blank. The outputs of the joint network after them are durations.
        durations: frames of each duration output; `None` for RNN-T, where a label stays on its frame and a blank
            advances one frame.
        max_symbols: number of labels on one frame after which the search moves one frame.
        max_steps: number of steps, blanks included, after which a row stops; `None` for no limit.
        lookahead: number of frames that one call of the joint network scores in a row; 0 chooses it by the number of
            rows. It changes the speed and not the result.
        confidence: method of `token_confidence`; `None` for no confidence.
        keep_logits: return the scores of every step.
    """

    blank_id: int
    vocab_size: int
    durations: tuple[int, ...] | None = None
    max_symbols: int = 10
    max_steps: int | None = None
    lookahead: int = 0
    confidence: str | None = None
    keep_logits: bool = False
