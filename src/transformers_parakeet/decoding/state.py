"""The state of a decoder between two parts of a stream: what decoding the next encoder frames needs.

The functions that decode with a state are in `resuming.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fusion import Fusion
from .options import Predict


@dataclass(frozen=True)
class TransducerState:
    """State of greedy RNN-T or TDT decoding of B streams after some of their frames.

    A TDT duration can jump over frames that are not yet available. `skipped_frames` counts them.

    Args:
        predictor_states: (B, J) predictor states after the last label of each stream.
        lstm_state: LSTM state of the prediction network: a tuple of tensors (num_layers, B, LSTM width).
        num_frames: number of encoder frames that were decoded so far in each stream.
        skipped_frames: number of frames at the start of the next part of each stream that a duration jumps over.
        fusion_states: (B, number of scorers) states of the language model and of phrase boosting; `None` without them.
    """

    predictor_states: Tensor
    lstm_state: tuple[Tensor, ...]
    num_frames: tuple[int, ...]
    skipped_frames: tuple[int, ...]
    fusion_states: Tensor | None = None

    def select(self, stream_index: int) -> TransducerState:
        """Return the state of one stream as a batch of size 1.

        Args:
            stream_index: index of the stream in the batch.
        """
        rows = slice(stream_index, stream_index + 1)
        # copies, because views would keep the memory of the whole batch
        return TransducerState(
            self.predictor_states[rows].clone(),
            tuple(tensor[:, rows].clone() for tensor in self.lstm_state),
            self.num_frames[rows],
            self.skipped_frames[rows],
            None if self.fusion_states is None else self.fusion_states[rows].clone(),
        )

    def skip_blank_frames(self, num_frames: int) -> TransducerState:
        """Return the state after frames that count as blanks and that were not scored, in every stream.

        Args:
            num_frames: number of such frames.
        """
        return TransducerState(
            self.predictor_states,
            self.lstm_state,
            tuple(count + num_frames for count in self.num_frames),
            tuple(max(0, skipped - num_frames) for skipped in self.skipped_frames),
            self.fusion_states,
        )


@dataclass(frozen=True)
class Run:
    """Consecutive frames with the same best token of a CTC head.

    Args:
        token: the token, a label or the blank.
        first_frame: first frame of the run, counted from the start of the stream.
        num_frames: number of frames in the run.
        confidence: minimum of the confidences of the frames; infinity if confidence was not requested.
    """

    token: int
    first_frame: int = 0
    num_frames: int = 0
    confidence: float = math.inf


@dataclass(frozen=True)
class CTCState:
    """State of greedy CTC decoding of B streams after some of their frames.

    Args:
        last_runs: the run at the end of each stream, which the next frames can continue.
        num_frames: number of encoder frames that were decoded so far in each stream.
        fusion_states: (B, number of scorers) states of the language model and of phrase boosting; `None` without them.
    """

    last_runs: tuple[Run, ...]
    num_frames: tuple[int, ...]
    fusion_states: Tensor | None = None

    def select(self, stream_index: int) -> CTCState:
        """Return the state of one stream as a batch of size 1.

        Args:
            stream_index: index of the stream in the batch.
        """
        rows = slice(stream_index, stream_index + 1)
        fusion_states = None if self.fusion_states is None else self.fusion_states[rows].clone()
        return CTCState(self.last_runs[rows], self.num_frames[rows], fusion_states)


def start_transducer_state(
    predict: Predict, num_streams: int, blank_id: int, device: torch.device, fusion: Fusion | None = None
) -> TransducerState:
    """Create the state of transducer decoding before the first frame.

    Args:
        predict: prediction network: (last labels, LSTM state) -> predictor states, new LSTM state.
        num_streams: number of streams B.
        blank_id: id of the blank, which is also the start token.
        device: device of the prediction network.
        fusion: language model and phrase boosting on the same device; `None` without them.
    """
    start_tokens = torch.full((num_streams,), blank_id, device=device)
    predictor_states, lstm_state = predict(start_tokens, None)
    zeros = (0,) * num_streams
    fusion_states = None if fusion is None else fusion.start(num_streams)
    return TransducerState(predictor_states, tuple(lstm_state), zeros, zeros, fusion_states)


def start_ctc_state(num_streams: int, blank_id: int, fusion: Fusion | None = None) -> CTCState:
    """Create the state of CTC decoding before the first frame.

    Args:
        num_streams: number of streams B.
        blank_id: id of the blank.
        fusion: language model and phrase boosting, on the device of the CTC head; `None` without them.
    """
    fusion_states = None if fusion is None else fusion.start(num_streams)
    return CTCState((Run(blank_id),) * num_streams, (0,) * num_streams, fusion_states)


def stack_transducer_states(states: Sequence[TransducerState]) -> TransducerState:
    """Combine the states of several batches of streams to the state of one batch.

    Args:
        states: at least one state.
    """
    return TransducerState(
        torch.cat([state.predictor_states for state in states]),
        tuple(torch.cat(tensors, dim=1) for tensors in zip(*(state.lstm_state for state in states), strict=True)),
        tuple(count for state in states for count in state.num_frames),
        tuple(count for state in states for count in state.skipped_frames),
        stack_fusion_states(states),
    )


def stack_ctc_states(states: Sequence[CTCState]) -> CTCState:
    """Combine the states of several batches of streams to the state of one batch.

    Args:
        states: at least one state.
    """
    return CTCState(
        tuple(run for state in states for run in state.last_runs),
        tuple(count for state in states for count in state.num_frames),
        stack_fusion_states(states),
    )


def stack_fusion_states(states: Sequence[TransducerState | CTCState]) -> Tensor | None:
    """Combine the fusion states of several batches of streams.

    Args:
        states: states of decoding; all have fusion states, or none has.

    Returns:
        (B, number of scorers) fusion states; `None` if the states have none.

    Raises:
        ValueError: some states have fusion states, and others have none.
    """
    fusion_states = [state.fusion_states for state in states if state.fusion_states is not None]
    if len(fusion_states) not in (0, len(states)):
        raise ValueError(
            "streams of one batch must all be decoded with the same language model and phrase boosting, got "
            f"{len(fusion_states)} of {len(states)} states with them: start all states with the same `fusion`"
        )
    return torch.cat(fusion_states) if fusion_states else None
