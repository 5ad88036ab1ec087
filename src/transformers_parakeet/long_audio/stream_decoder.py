"""Decodes the encoder frames of streams, step by step, with a CTC or transducer head.

The searches are in the sub-package `decoding`; this module connects them to a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..configuration_parakeet import get_blank_id
from ..decoding import (
    CTCState,
    Fusion,
    Hypotheses,
    Shortcuts,
    TransducerOptions,
    TransducerState,
    compute_token_confidence,
    finish_ctc,
    mask_joint,
    mask_logits,
    resume_ctc,
    resume_greedy_ctc,
    resume_transducer,
    stack_ctc_states,
    stack_transducer_states,
    start_ctc_state,
    start_transducer_state,
)
from .stream_words import Token

DecoderState = TransducerState | CTCState


class StreamDecoder:
    """Decodes streams with one head of a model. The state of each stream is in its `DecoderState`.

    Args:
        model: the model.
        head_type: the head that decodes, `"ctc"`, `"rnnt"` or `"tdt"`.
        confidence: confidence method of `compute_token_confidence`; `None` for no confidence.
        fusion: language model and phrase boosting, on the device of the model; `None` without them.
        allowed_tokens: (V,) bool, whether a token is allowed, on the device of the model; `None` to allow all tokens.
    """

    def __init__(
        self,
        model: Any,
        head_type: str,
        confidence: str | None,
        fusion: Fusion | None = None,
        allowed_tokens: Tensor | None = None,
    ) -> None:
        self.model, self.head_type, self.confidence = model, head_type, confidence
        self.fusion, self.allowed_tokens = fusion, allowed_tokens
        self.blank_id, self.pad_id = get_blank_id(model.config), model.config.pad_token_id

    def start(self) -> DecoderState:
        """Create the state of a stream before its first frame."""
        if self.head_type == "ctc":
            return start_ctc_state(1, self.blank_id, self.fusion)
        return start_transducer_state(self.model.decoder.step, 1, self.blank_id, self.model.device, self.fusion)

    def decode(
        self, frames: Sequence[Tensor | int], states: Sequence[DecoderState]
    ) -> tuple[list[list[Token]], list[DecoderState]]:
        """Decode the next frames of several streams as one batch.

        Args:
            frames: (N, H) encoder frames of each stream, or a number of frames that count as blanks.
            states: state of each stream.

        Returns:
            The new tokens and the new state of each stream.
        """
        tokens: list[list[Token]] = [[] for _ in frames]
        new_states = list(states)
        for index, chunk in enumerate(frames):
            if isinstance(chunk, int):
                tokens[index], new_states[index] = self._decode_blanks(chunk, states[index])
        scored = [(index, chunk) for index, chunk in enumerate(frames) if isinstance(chunk, Tensor)]
        if scored:
            hidden = pad_sequence([chunk for _, chunk in scored], batch_first=True)
            lengths = torch.tensor([len(chunk) for _, chunk in scored], device=hidden.device)
            decode = self._decode_ctc if self.head_type == "ctc" else self._decode_transducer
            hypotheses, new_state = decode(hidden, lengths, [states[index] for index, _ in scored])
            for row, (index, _) in enumerate(scored):
                tokens[index], new_states[index] = to_tokens(hypotheses, row), new_state.select(row)
        return tokens, new_states

    def _decode_blanks(self, num_frames: int, state: DecoderState) -> tuple[list[Token], DecoderState]:
        """Advance a stream by frames that count as blanks.

        Args:
            num_frames: number of frames.
            state: state of the stream.
        """
        if isinstance(state, TransducerState):
            return [], state.skip_blank_frames(num_frames)
        blanks, confidence = torch.full((1, num_frames), self.blank_id), torch.ones(1, num_frames)
        hypotheses, new_state = resume_ctc(
            blanks, torch.tensor([num_frames]), state, self.blank_id, confidence if self.confidence else None
        )
        return to_tokens(hypotheses, 0), new_state

    def _decode_ctc(self, hidden: Tensor, lengths: Tensor, states: Sequence[Any]) -> tuple[Hypotheses, CTCState]:
        """Decode (B, N, H) encoder frames of B streams with the CTC head.

        Args:
            hidden: (B, N, H) encoder frames.
            lengths: (B,) number of valid frames.
            states: `CTCState` of each stream.
        """
        logits = self.model.ctc_logits(hidden)
        if self.allowed_tokens is not None:
            logits = mask_logits(logits, self.allowed_tokens, self.blank_id)
        state = stack_ctc_states(states)
        tokens, state = resume_greedy_ctc(logits, lengths, state, self.blank_id, self.fusion)
        confidence = None
        if self.confidence is not None:
            confidence = compute_token_confidence(logits, self.confidence, None if self.fusion is None else tokens)
        return resume_ctc(tokens, lengths, state, self.blank_id, confidence, self.pad_id)

    def _decode_transducer(
        self, hidden: Tensor, lengths: Tensor, states: Sequence[Any]
    ) -> tuple[Hypotheses, TransducerState]:
        """Decode (B, N, H) encoder frames of B streams with the transducer.

        Args:
            hidden: (B, N, H) encoder frames.
            lengths: (B,) number of valid frames.
            states: `TransducerState` of each stream.
        """
        model, config = self.model, self.model.config
        options = TransducerOptions(
            blank_id=self.blank_id,
            vocab_size=config.vocab_size,
            durations=tuple(config.durations) if self.head_type == "tdt" else None,
            max_symbols=config.max_symbols_per_step,
            confidence=self.confidence,
        )
        joint, shortcuts = model.joint.score, Shortcuts(*model.joint.build_argmax_functions(config.vocab_size))
        if self.allowed_tokens is not None:
            # the shortcut for tokens does not call the joint network, so it would ignore the mask
            joint = mask_joint(joint, self.allowed_tokens, self.blank_id, config.vocab_size)
            shortcuts = Shortcuts(find_best_durations=shortcuts.find_best_durations)
        return resume_transducer(
            model.encoder_projector(hidden),
            lengths,
            stack_transducer_states(states),
            model.decoder.step,
            joint,
            options,
            self.pad_id,
            shortcuts,
            self.fusion,
        )

    def get_last_tokens(self, state: DecoderState) -> list[Token]:
        """Return the tokens that `decode` has not yet returned: the label of the last CTC run, if there is one.

        The next frames can continue this run. A transducer has no such token.

        Args:
            state: state of the stream.
        """
        if isinstance(state, TransducerState):
            return []
        device = torch.device("cpu")
        return to_tokens(finish_ctc(state, self.blank_id, device, self.confidence is not None, self.pad_id), 0)


def to_tokens(hypotheses: Hypotheses, row: int) -> list[Token]:
    """Convert the hypothesis of one stream to a list of tokens.

    Args:
        hypotheses: the hypotheses of a batch.
        row: index of the stream in the batch.
    """
    lists = hypotheses.to_lists(row)
    confidences = lists["confidence"] or [None] * len(lists["tokens"])
    rows = zip(lists["tokens"], lists["frames"], lists["durations"], confidences, strict=True)
    return [Token(*values) for values in rows]
