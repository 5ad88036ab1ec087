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
from .fusion import Fusion
from .greedy import choose_ctc_labels, greedy_decode_ctc
from .hypotheses import Hypotheses, collect_hypotheses, pad_lists
from .label_choice import LabelChooser
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
    fusion: Fusion | None = None,
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
        fusion: the language model and phrase boosting with which the state was started; `None` without them.

    Returns:
        The new tokens, with frames counted from the start of each stream, and the state after these frames.

    Raises:
        ValueError: the state was started with a fusion and `fusion` is `None`, or the reverse; or the scorers of
            `fusion` and the model have different labels.
    """
    label_chooser = resume_fusion(fusion, state, options.blank_id, options.vocab_size)
    lengths = [min(length, encoder_states.shape[1]) for length in frame_lengths.tolist()]
    searches = [
        ClipSearch(length, options, next_frame=skipped)
        for length, skipped in zip(lengths, state.skipped_frames, strict=True)
    ]
    scorer = FrameScorer(encoder_states, joint, shortcuts or Shortcuts(), options, has_fusion=fusion is not None)
    networks_state = search_labels(
        searches, scorer, predict, state.predictor_states, state.lstm_state, label_chooser=label_chooser
    )
    new_state = advance_state(state, searches, predict_last_labels(searches, predict, *networks_state), label_chooser)
    steps, device = [search.steps for search in searches], encoder_states.device
    hypotheses = collect_hypotheses(steps, options.blank_id, pad_id, device, options.confidence is not None, False)
    first_frames = torch.tensor(state.num_frames, device=device)[:, None]
    return replace(hypotheses, frames=hypotheses.frames + first_frames, steps=None), new_state


def advance_state(
    state: TransducerState,
    searches: Sequence[ClipSearch],
    networks_state: tuple[Tensor, Any],
    label_chooser: LabelChooser | None,
) -> TransducerState:
    """Build the state of streams after the search in their next frames.

    Args:
        state: state before the search.
        searches: the finished search of every stream.
        networks_state: (B, J) predictor states and LSTM state after the last label of each stream.
        label_chooser: has chosen the labels with a fusion; `None` without a fusion.
    """
    predictor_states, lstm_state = networks_state
    return TransducerState(
        predictor_states,
        tuple(lstm_state),
        tuple(count + search.frame_length for count, search in zip(state.num_frames, searches, strict=True)),
        tuple(search.next_frame - search.frame_length for search in searches),
        None if label_chooser is None else label_chooser.states,
    )


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


def resume_fusion(
    fusion: Fusion | None, state: TransducerState | CTCState, blank_id: int, vocab_size: int
) -> LabelChooser | None:
    """Create the object that chooses labels with a fusion, from the state of a batch of streams.

    Args:
        fusion: language model and phrase boosting; `None` without them.
        state: state of the streams.
        blank_id: id of the blank.
        vocab_size: number of tokens V with the blank.

    Returns:
        The object; `None` without a fusion.

    Raises:
        ValueError: the state was started with a fusion and `fusion` is `None`, or the reverse; or the scorers of
            `fusion` and the model have different labels.
    """
    if (fusion is None) != (state.fusion_states is None):
        raise ValueError(
            "a stream must be decoded with the language model and phrase boosting of its start state, got "
            f"{'none' if fusion is None else 'some'} for a state that was started "
            f"{'without' if state.fusion_states is None else 'with'} them: pass the same `fusion` to both functions"
        )
    if fusion is None or state.fusion_states is None:
        return None
    fusion.check_vocabulary(blank_id, vocab_size)
    return LabelChooser(fusion, state.fusion_states)


def resume_greedy_ctc(
    logits: Tensor, frame_lengths: Tensor, state: CTCState, blank_id: int, fusion: Fusion | None = None
) -> tuple[Tensor, CTCState]:
    """Select the best token of the next frames of a batch of CTC streams.

    `resume_ctc` collapses these tokens.

    Args:
        logits: (B, N, V) scores of the next frames.
        frame_lengths: (B,) number of valid frames.
        state: state after the frames before.
        blank_id: id of the blank, which is returned for padding frames.
        fusion: the language model and phrase boosting with which the state was started; `None` without them.

    Returns:
        (B, N) token ids, and the state in which only the fusion states have changed.

    Raises:
        ValueError: the state was started with a fusion and `fusion` is `None`, or the reverse; or the scorers of
            `fusion` and the model have different labels.
    """
    label_chooser = resume_fusion(fusion, state, blank_id, logits.shape[-1])
    best_tokens = greedy_decode_ctc(logits, frame_lengths, blank_id)
    if label_chooser is None:
        return best_tokens, state
    previous_tokens = [run.token for run in state.last_runs]
    tokens = choose_ctc_labels(logits, best_tokens, previous_tokens, label_chooser)
    return tokens, replace(state, fusion_states=label_chooser.states)


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
        best_tokens: (B, N) best token of every frame, for example from `resume_greedy_ctc`.
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
        tuple(last_runs),
        tuple(count + length for count, length in zip(state.num_frames, lengths, strict=True)),
        state.fusion_states,
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
