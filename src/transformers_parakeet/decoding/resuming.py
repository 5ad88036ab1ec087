"""Greedy decoding of streams, part by part: each part continues with the state after the part before.

The result does not depend on how the frames are split into parts. The states are in `state.py`, the transducer search
in `label_looping.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .frame_scoring import Shortcuts
from .hypotheses import Hypotheses, collect_hypotheses, pad_lists
from .label_looping import ClipSearch, FrameScorer, predict_clips, search_labels
from .options import Joint, Predict, TransducerOptions
from .state import CTCState, Run, TransducerState


def resume_transducer(
    encoder_states: Tensor,
    frame_lengths: Tensor,
    state: TransducerState,
    predict: Predict,
    joint: Joint,
    options: TransducerOptions,
    pad_id: int = 0,
    shortcuts: Shortcuts | None = None,
) -> tuple[Hypotheses, TransducerState]:
    """Decode the next frames of a batch of RNN-T or TDT streams greedily.

    Every part starts on a new frame, so the number of labels on its first frame starts at 0. A TDT duration that
    reaches past the last frame continues in the next part and can jump over a whole part. Source: the streaming script
    of NeMo, speech_to_text_streaming_infer_rnnt.py.

    Args:
        encoder_states: (B, N, J) next encoder frames after the projection to the width of the joint network.
        frame_lengths: (B,) number of valid frames.
        state: state after the frames before.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        joint: joint network: (encoder states, predictor states) -> scores of tokens and durations.
        options: settings of the search; `max_steps` must be `None`.
        pad_id: token id that pads short hypotheses.
        shortcuts: functions that find the best outputs of the joint network faster; `None` for no such functions.

    Returns:
        The new tokens, with frames counted from the start of each stream, and the state after these frames.
    """
    lengths = [min(length, encoder_states.shape[1]) for length in frame_lengths.tolist()]
    searches = [
        ClipSearch(length, options, next_frame=skipped)
        for length, skipped in zip(lengths, state.skipped_frames, strict=True)
    ]
    scorer = FrameScorer(encoder_states, joint, shortcuts or Shortcuts(), options)
    networks_state = search_labels(searches, scorer, predict, state.predictor_states, state.lstm_state)
    predictor_states, lstm_state = predict_last_labels(searches, predict, *networks_state)
    new_state = TransducerState(
        predictor_states,
        tuple(lstm_state),
        tuple(count + length for count, length in zip(state.num_frames, lengths, strict=True)),
        tuple(search.next_frame - length for search, length in zip(searches, lengths, strict=True)),
    )
    steps, device = [search.steps for search in searches], encoder_states.device
    hypotheses = collect_hypotheses(steps, options.blank_id, pad_id, device, options.confidence is not None, False)
    first_frames = torch.tensor(state.num_frames, device=device)[:, None]
    return replace(hypotheses, frames=hypotheses.frames + first_frames, steps=None), new_state


def predict_last_labels(
    searches: Sequence[ClipSearch], predict: Predict, predictor_states: Tensor, lstm_state: Any
) -> tuple[Tensor, Any]:
    """Run the prediction network for streams whose last step is a label.

    The search does not do this for a label whose duration reaches the last frame, because a clip ends there.

    Args:
        searches: the finished search of every stream.
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        predictor_states: (B, J) predictor states after the search.
        lstm_state: LSTM state after the search.

    Returns:
        The new (B, J) predictor states and the new LSTM state.
    """
    indices = [
        index
        for index, search in enumerate(searches)
        if search.steps.tokens and search.steps.tokens[-1] != search.options.blank_id
    ]
    if not indices:
        return predictor_states, lstm_state
    return predict_clips(predict, predictor_states, lstm_state, searches, indices)


def resume_ctc(
    best_tokens: Tensor,
    frame_lengths: Tensor,
    state: CTCState,
    blank_id: int,
    frame_confidence: Tensor | None = None,
    pad_id: int = 0,
) -> tuple[Hypotheses, CTCState]:
    """Collapse the best tokens of the next frames of a batch of CTC streams.

    The run at the end of the frames is not returned, because the next frames can continue it; see `finish_ctc`.

    Args:
        best_tokens: (B, N) best token of every frame.
        frame_lengths: (B,) number of valid frames.
        state: state after the frames before.
        blank_id: id of the blank.
        frame_confidence: (B, N) confidence of every frame; `None` for no confidence. The confidence of a token is the
            minimum over its frames.
        pad_id: token id that pads short hypotheses.

    Returns:
        The tokens of the runs that ended, with frames counted from the start of each stream, and the state after these
        frames.
    """
    lengths = [min(length, best_tokens.shape[1]) for length in frame_lengths.tolist()]
    ended_runs, last_runs = [], []
    for row, length in enumerate(lengths):
        tokens = best_tokens[row, :length].tolist()
        confidences = None if frame_confidence is None else frame_confidence[row, :length].tolist()
        *ended, last = extend_runs(state.last_runs[row], tokens, confidences, state.num_frames[row])
        ended_runs.append([run for run in ended if run.token != blank_id])
        last_runs.append(last)
    new_state = CTCState(
        tuple(last_runs), tuple(count + length for count, length in zip(state.num_frames, lengths, strict=True))
    )
    return collect_runs(ended_runs, pad_id, best_tokens.device, frame_confidence is not None), new_state


def finish_ctc(
    state: CTCState, blank_id: int, device: torch.device, has_confidence: bool = False, pad_id: int = 0
) -> Hypotheses:
    """Return the token of the last run of each CTC stream, if it is a label.

    Args:
        state: state after the last frame.
        blank_id: id of the blank.
        device: device of the result.
        has_confidence: whether confidence was requested.
        pad_id: token id that pads short hypotheses.

    Returns:
        At most one token per stream.
    """
    runs = [[run] if run.token != blank_id else [] for run in state.last_runs]
    return collect_runs(runs, pad_id, device, has_confidence)


def extend_runs(
    last_run: Run, tokens: Sequence[int], confidences: Sequence[float] | None, first_frame: int
) -> list[Run]:
    """Append frames to a run, and start a new run at every frame whose token differs from that of the frame before.

    Args:
        last_run: the run before the frames.
        tokens: best token of each frame.
        confidences: confidence of each frame; `None` for no confidence.
        first_frame: index of the first of these frames in the stream.

    Returns:
        `last_run`, continued by the frames with the same token, and the new runs.
    """
    runs = [last_run]
    for offset, token in enumerate(tokens):
        run = runs.pop() if token == runs[-1].token else Run(token, first_frame + offset)
        confidence = run.confidence if confidences is None else min(run.confidence, confidences[offset])
        runs.append(replace(run, num_frames=run.num_frames + 1, confidence=confidence))
    return runs


def collect_runs(runs: Sequence[Sequence[Run]], pad_id: int, device: torch.device, has_confidence: bool) -> Hypotheses:
    """Convert the runs of all streams to padded tensors.

    Args:
        runs: the runs of each stream, without blanks.
        pad_id: token id that pads short hypotheses.
        device: device of the result.
        has_confidence: whether confidence was requested.
    """
    confidence = None
    if has_confidence:
        confidence = pad_lists([[run.confidence for run in stream_runs] for stream_runs in runs], 0.0, device)
    return Hypotheses(
        tokens=pad_lists([[run.token for run in stream_runs] for stream_runs in runs], pad_id, device),
        frames=pad_lists([[run.first_frame for run in stream_runs] for stream_runs in runs], 0, device),
        durations=pad_lists([[run.num_frames for run in stream_runs] for stream_runs in runs], 0, device),
        lengths=torch.tensor([len(stream_runs) for stream_runs in runs], device=device),
        confidence=confidence,
    )
