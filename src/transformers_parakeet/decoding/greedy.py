"""Greedy decoding of CTC scores, and of transducer scores in a plain form that is the reference for the fast one.

The fast transducer search is in `label_looping.py`. Both work on tensors and callables and know no models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .confidence import token_confidence
from .hypotheses import Hypotheses, RowSteps, collect_hypotheses
from .options import Joint, Predict, TransducerOptions


def greedy_ctc(logits: Tensor, frame_lengths: Tensor | None, blank_id: int) -> Tensor:
    """Return the best token of every frame. Repeats and blanks stay; `collapse_ctc` removes them.

    Args:
        logits: (B, N, V) scores.
        frame_lengths: (B,) number of valid frames; `None` if all frames are valid.
        blank_id: token of the frames past the end of a clip.

    Returns:
        (B, N) token ids.
    """
    best_tokens = logits.argmax(-1)
    if frame_lengths is None:
        return best_tokens
    is_valid = torch.arange(best_tokens.shape[1], device=best_tokens.device) < frame_lengths[:, None]
    return torch.where(is_valid, best_tokens, blank_id)


def greedy_transducer_reference(
    encoded: Tensor, frame_lengths: Tensor, predict: Predict, joint: Joint, options: TransducerOptions, pad_id: int = 0
) -> Hypotheses:
    """Decode RNN-T or TDT scores greedily, one row and one frame at a time: the plain form of `greedy_transducer`.

    Args:
        encoded: (B, N, J) encoder frames, projected to the width of the joint network.
        frame_lengths: (B,) number of valid frames.
        predict: the prediction network, see `Predict`.
        joint: the joint network, see `Joint`.
        options: the settings of the search; `lookahead` has no effect.
        pad_id: token id past the end of a row.

    Returns:
        The hypotheses of all rows.
    """
    start_tokens = torch.full((len(encoded),), options.blank_id, device=encoded.device)
    predictor_states, lstm_state = predict(start_tokens, None)
    rows = []
    for row, frame_length in enumerate(frame_lengths.tolist()):
        valid_frames = encoded[row : row + 1, :frame_length]
        row_lstm_state = tuple(part[:, row : row + 1] for part in lstm_state)
        rows.append(decode_row(valid_frames, predictor_states[row : row + 1], row_lstm_state, predict, joint, options))
    has_confidence = options.confidence is not None
    return collect_hypotheses(rows, options.blank_id, pad_id, encoded.device, has_confidence, options.keep_logits)


def decode_row(
    frames: Tensor, predictor_state: Tensor, lstm_state: Any, predict: Predict, joint: Joint, options: TransducerOptions
) -> RowSteps:
    """Decode one row of a transducer, one frame at a time.

    Args:
        frames: (1, N, J) valid encoder frames.
        predictor_state: (1, J) output of the prediction network for the start token.
        lstm_state: LSTM state of the prediction network after the start token.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        joint: joint network: (frames, predictor states) -> scores of tokens and durations.
        options: the settings of the search.

    Returns:
        All steps, blanks included.
    """
    steps, frame, labels_on_frame = RowSteps(), 0, 0
    while frame < frames.shape[1] and len(steps.tokens) != options.max_steps:
        logits = joint(frames[:, frame : frame + 1], predictor_state[:, None])[0, 0]
        token, duration, confidence = best_step(logits, options)
        if token == options.blank_id:
            duration = max(duration, 1)
        else:
            predictor_state, lstm_state = predict(torch.tensor([token], device=frames.device), lstm_state)
        labels_on_frame = 0 if duration > 0 else labels_on_frame + 1
        is_forced = labels_on_frame == options.max_symbols
        steps.append(token, frame, duration, is_forced, confidence)
        steps.logits.append(logits)
        frame += duration
        if is_forced:
            frame, labels_on_frame = frame + 1, 0
    return steps


def best_step(logits: Tensor, options: TransducerOptions) -> tuple[int, int, float]:
    """Return the best token of one frame, its duration in frames, and its confidence (0 for a blank).

    Args:
        logits: (V + D,) scores of the joint network.
        options: the settings of the search.
    """
    token_logits, duration_logits = logits[: options.vocab_size], logits[options.vocab_size :]
    token = int(token_logits.argmax())
    is_blank = token == options.blank_id
    duration = int(is_blank) if options.durations is None else options.durations[int(duration_logits.argmax())]
    if options.confidence is None or is_blank:
        return token, duration, 0.0
    return token, duration, float(token_confidence(token_logits, options.confidence))
