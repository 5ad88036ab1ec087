"""Greedy decoding of CTC scores, and the reference implementation of greedy transducer decoding.

The fast transducer search is in `label_looping.py`. The functions take tensors and callables and do not depend on the
model classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .confidence import compute_token_confidence
from .hypotheses import ClipSteps, Hypotheses, collect_hypotheses
from .options import Joint, Predict, TransducerOptions


def greedy_decode_ctc(logits: Tensor, frame_lengths: Tensor | None, blank_id: int) -> Tensor:
    """Select the best token of every frame, without merging repeats or removing blanks.

    Args:
        logits: (B, N, V) scores.
        frame_lengths: (B,) number of valid frames; `None` if all frames are valid.
        blank_id: id of the blank, which is returned for padding frames.

    Returns:
        (B, N) token ids; `collapse_ctc` merges the repeats and removes the blanks.
    """
    best_tokens = logits.argmax(-1)
    if frame_lengths is None:
        return best_tokens
    is_valid = torch.arange(best_tokens.shape[1], device=best_tokens.device) < frame_lengths[:, None]
    return torch.where(is_valid, best_tokens, blank_id)


def greedy_decode_transducer_reference(
    encoder_states: Tensor,
    frame_lengths: Tensor,
    predict: Predict,
    joint: Joint,
    options: TransducerOptions,
    pad_id: int = 0,
) -> Hypotheses:
    """Decode a batch of RNN-T or TDT clips greedily, one clip and one frame at a time.

    `greedy_decode_transducer` returns the same result faster and is tested against this function.

    Args:
        encoder_states: (B, N, J) encoder frames after the projection to the width of the joint network.
        frame_lengths: (B,) number of valid frames.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        joint: joint network: (encoder states, predictor states) -> scores of tokens and durations.
        options: settings of the search; `lookahead` has no effect.
        pad_id: token id that pads short hypotheses.

    Returns:
        The hypotheses of all clips.
    """
    start_tokens = torch.full((len(encoder_states),), options.blank_id, device=encoder_states.device)
    predictor_states, lstm_state = predict(start_tokens, None)
    all_steps = []
    for clip_index, frame_length in enumerate(frame_lengths.tolist()):
        # slices of length 1 keep the batch dimension; in the LSTM state it is the second dimension
        clip = slice(clip_index, clip_index + 1)
        clip_lstm_state = tuple(tensor[:, clip] for tensor in lstm_state)
        clip_states = encoder_states[clip, :frame_length]
        all_steps.append(decode_clip(clip_states, predictor_states[clip], clip_lstm_state, predict, joint, options))
    has_confidence = options.confidence is not None
    return collect_hypotheses(
        all_steps, options.blank_id, pad_id, encoder_states.device, has_confidence, options.keep_logits
    )


def decode_clip(
    encoder_states: Tensor,
    predictor_state: Tensor,
    lstm_state: Any,
    predict: Predict,
    joint: Joint,
    options: TransducerOptions,
) -> ClipSteps:
    """Decode one clip with a transducer greedily, one frame at a time.

    Args:
        encoder_states: (1, N, J) valid encoder frames after the projection to the width of the joint network.
        predictor_state: (1, J) output of the prediction network for the start token.
        lstm_state: LSTM state of the prediction network after the start token.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        joint: joint network: (encoder states, predictor states) -> scores of tokens and durations.
        options: settings of the search.

    Returns:
        All decoding steps, blanks included.
    """
    steps, frame, labels_on_frame = ClipSteps(), 0, 0
    while frame < encoder_states.shape[1] and len(steps.tokens) != options.max_steps:
        logits = joint(encoder_states[:, frame : frame + 1], predictor_state[:, None])[0, 0]
        token, duration, confidence = select_best_outputs(logits, options)
        if token == options.blank_id:
            # a blank always advances, even if its predicted duration is 0
            duration = max(duration, 1)
        else:
            predictor_state, lstm_state = predict(torch.tensor([token], device=encoder_states.device), lstm_state)
        labels_on_frame = 0 if duration > 0 else labels_on_frame + 1
        is_forced_advance = labels_on_frame == options.max_symbols
        steps.append(token, frame, duration, is_forced_advance, confidence)
        steps.logits.append(logits)
        frame += duration
        if is_forced_advance:
            frame, labels_on_frame = frame + 1, 0
    return steps


def select_best_outputs(logits: Tensor, options: TransducerOptions) -> tuple[int, int, float]:
    """Select the best token and the best duration from the scores of one frame.

    Args:
        logits: (V + D,) scores of the joint network: V tokens, then D durations; (V,) for RNN-T.
        options: settings of the search.

    Returns:
        The token id, the duration in frames, and the confidence of the token. The confidence is 0 for a blank, and for
        every token if no confidence is requested.
    """
    token_logits, duration_logits = logits[: options.vocab_size], logits[options.vocab_size :]
    token = int(token_logits.argmax())
    is_blank = token == options.blank_id
    # RNN-T predicts no durations: a label has duration 0 and a blank has duration 1
    duration = int(is_blank) if options.durations is None else options.durations[int(duration_logits.argmax())]
    if options.confidence is None or is_blank:
        return token, duration, 0.0
    return token, duration, float(compute_token_confidence(token_logits, options.confidence))
