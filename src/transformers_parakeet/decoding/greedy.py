"""Greedy decoding of CTC scores, and the reference implementation of greedy transducer decoding.

The fast transducer search is in `label_looping.py`, the scores of language models and phrase boosting in `fusion.py`.
The functions take tensors and callables and do not depend on the model classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .confidence import compute_token_confidence
from .fusion import Fusion
from .hypotheses import ClipSteps, Hypotheses, collect_hypotheses
from .label_choice import LabelChooser
from .options import Joint, Predict, TransducerOptions


def greedy_decode_ctc(
    logits: Tensor, frame_lengths: Tensor | None, blank_id: int, fusion: Fusion | None = None
) -> Tensor:
    """Select the best token of every frame, without merging repeats or removing blanks.

    Args:
        logits: (B, N, V) scores.
        frame_lengths: (B,) number of valid frames; `None` if all frames are valid.
        blank_id: id of the blank, which is returned for padding frames.
        fusion: language model and phrase boosting, which choose the new labels (see `choose_ctc_labels`); on the device
            of the scores. `None` for the labels of the model alone.

    Returns:
        (B, N) token ids; `collapse_ctc` merges the repeats and removes the blanks.

    Raises:
        ValueError: the scorers of `fusion` and the model have different labels.
    """
    best_tokens = logits.argmax(-1)
    if frame_lengths is not None:
        is_valid = torch.arange(best_tokens.shape[1], device=best_tokens.device) < frame_lengths[:, None]
        best_tokens = torch.where(is_valid, best_tokens, blank_id)
    if fusion is None:
        return best_tokens
    fusion.check_vocabulary(blank_id, logits.shape[-1])
    label_chooser = LabelChooser(fusion, fusion.start(len(logits)))
    return choose_ctc_labels(logits, best_tokens, [blank_id] * len(logits), label_chooser)


def choose_ctc_labels(
    logits: Tensor, best_tokens: Tensor, previous_tokens: Sequence[int], label_chooser: LabelChooser
) -> Tensor:
    """Choose the new labels of CTC scores with a fusion.

    A frame has a new label if its best token is neither the blank nor the token of the previous frame. The fusion
    chooses the label of this frame, but never the token of the previous frame. If the previous frame had a new label,
    its token is the one that the fusion chose. Source: greedy CTC decoding with fusion models in NeMo,
    ctc_greedy_decoding.py.

    Args:
        logits: (B, N, V) scores; the blank is the last token.
        best_tokens: (B, N) best token of every frame; the blank at padding frames.
        previous_tokens: the token of the frame before the first frame of each clip; the blank at the start of a clip.
        label_chooser: chooses the labels, changed in place.

    Returns:
        (B, N) token ids.
    """
    blank_id = logits.shape[-1] - 1
    tokens = best_tokens.tolist()
    previous_tokens = list(previous_tokens)
    frames = [find_new_label(row, 0, token, blank_id) for row, token in zip(tokens, previous_tokens, strict=True)]
    while rows := [row for row, frame in enumerate(frames) if frame < len(tokens[row])]:
        row_frames = [frames[row] for row in rows]
        # (R, V - 1) scores of the labels of one frame of each of R clips
        label_logits = logits[rows, row_frames, :-1]
        for index, (row, frame) in enumerate(zip(rows, row_frames, strict=True)):
            previous = tokens[row][frame - 1] if frame else previous_tokens[row]
            if previous != blank_id:
                label_logits[index, previous] = -torch.inf
        labels = label_chooser.choose(rows, label_logits).tolist()
        for row, frame, label in zip(rows, row_frames, labels, strict=True):
            tokens[row][frame] = label
            frames[row] = find_new_label(tokens[row], frame + 1, label, blank_id)
    return torch.tensor(tokens, device=best_tokens.device).reshape(best_tokens.shape)


def find_new_label(tokens: Sequence[int], first_frame: int, previous_token: int, blank_id: int) -> int:
    """Find the next frame whose token is neither the blank nor the token of the previous frame.

    Args:
        tokens: the token of every frame.
        first_frame: the frame at which the search starts.
        previous_token: the token of the frame before `first_frame`.
        blank_id: id of the blank.

    Returns:
        Index of the frame; the number of frames if there is no such frame.
    """
    for frame in range(first_frame, len(tokens)):
        if tokens[frame] not in (blank_id, previous_token):
            return frame
        previous_token = tokens[frame]
    return len(tokens)


def greedy_decode_transducer_reference(
    encoder_states: Tensor,
    frame_lengths: Tensor,
    predict: Predict,
    joint: Joint,
    options: TransducerOptions,
    pad_id: int = 0,
    fusion: Fusion | None = None,
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
        fusion: language model and phrase boosting, on the device of the encoder states. They change which label is
            emitted, but not whether a label is emitted. `None` for the labels of the model alone.

    Returns:
        The hypotheses of all clips.

    Raises:
        ValueError: the scorers of `fusion` and the model have different labels.
    """
    fusion_states = None
    if fusion is not None:
        fusion.check_vocabulary(options.blank_id, options.vocab_size)
        fusion_states = fusion.start(len(encoder_states))
    start_tokens = torch.full((len(encoder_states),), options.blank_id, device=encoder_states.device)
    predictor_states, lstm_state = predict(start_tokens, None)
    all_steps = []
    for clip_index, frame_length in enumerate(frame_lengths.tolist()):
        # slices of length 1 keep the batch dimension; in the LSTM state it is the second dimension
        clip = slice(clip_index, clip_index + 1)
        clip_lstm_state = tuple(tensor[:, clip] for tensor in lstm_state)
        clip_states = encoder_states[clip, :frame_length]
        chooser = None if fusion is None or fusion_states is None else LabelChooser(fusion, fusion_states[clip])
        networks_state = predictor_states[clip], clip_lstm_state
        all_steps.append(decode_clip(clip_states, *networks_state, predict, joint, options, chooser))
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
    label_chooser: LabelChooser | None = None,
) -> ClipSteps:
    """Decode one clip with a transducer greedily, one frame at a time.

    Args:
        encoder_states: (1, N, J) valid encoder frames after the projection to the width of the joint network.
        predictor_state: (1, J) output of the prediction network for the start token.
        lstm_state: LSTM state of the prediction network after the start token.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        joint: joint network: (encoder states, predictor states) -> scores of tokens and durations.
        options: settings of the search.
        label_chooser: chooses the labels with a fusion, changed in place; `None` without a fusion.

    Returns:
        All decoding steps, blanks included.
    """
    steps, frame, labels_on_frame = ClipSteps(), 0, 0
    while frame < encoder_states.shape[1] and len(steps.tokens) != options.max_steps:
        logits = joint(encoder_states[:, frame : frame + 1], predictor_state[:, None])[0, 0]
        token, duration = select_best_outputs(logits, options)
        confidence = 0.0
        if token == options.blank_id:
            # a blank always advances, even if its predicted duration is 0
            duration = max(duration, 1)
        else:
            token, confidence = choose_label(token, logits[: options.vocab_size], options.confidence, label_chooser)
            predictor_state, lstm_state = predict(torch.tensor([token], device=encoder_states.device), lstm_state)
        labels_on_frame = 0 if duration > 0 else labels_on_frame + 1
        is_forced_advance = labels_on_frame == options.max_symbols
        steps.append(token, frame, duration, is_forced_advance, confidence)
        steps.logits.append(logits)
        frame += duration
        if is_forced_advance:
            frame, labels_on_frame = frame + 1, 0
    return steps


def choose_label(
    best_label: int, logits: Tensor, confidence_method: str | None, label_chooser: LabelChooser | None
) -> tuple[int, float]:
    """Choose the label of a frame with a fusion, and compute its confidence.

    Args:
        best_label: the label with the largest score.
        logits: (V,) scores of all tokens on the frame; with a fusion the blank is the last token.
        confidence_method: method of `compute_token_confidence`; `None` for no confidence.
        label_chooser: chooses the label with a fusion, changed in place; `None` to keep `best_label`.

    Returns:
        The label, and its confidence; the confidence is 0 if it is not requested.
    """
    label = None if label_chooser is None else label_chooser.choose([0], logits[None, :-1])[0]
    confidence = 0.0 if confidence_method is None else float(compute_token_confidence(logits, confidence_method, label))
    return best_label if label is None else int(label), confidence


def select_best_outputs(logits: Tensor, options: TransducerOptions) -> tuple[int, int]:
    """Select the best token and the best duration from the scores of one frame.

    Args:
        logits: (V + D,) scores of the joint network: V tokens, then D durations; (V,) for RNN-T.
        options: settings of the search.

    Returns:
        The token id, and the duration in frames.
    """
    token_logits, duration_logits = logits[: options.vocab_size], logits[options.vocab_size :]
    token = int(token_logits.argmax())
    if options.durations is None:
        # RNN-T predicts no durations: a label has duration 0 and a blank has duration 1
        return token, int(token == options.blank_id)
    return token, options.durations[int(duration_logits.argmax())]
