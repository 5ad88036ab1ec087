"""Runs the steps of streams: encoder, decoder and words, for all streams of a batch that have enough samples.

`stream_encoders.py` encodes, `stream_decoder.py` decodes, `stream_words.py` builds words. The interface is in
`streaming.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..configuration_parakeet import get_blank_id
from ..decoding import (
    DEFAULT_BOOSTING_WEIGHT,
    DEFAULT_LM_WEIGHT,
    TokenScorer,
    build_fusion,
    check_confidence_method,
    prepare_allowed_tokens,
)
from .stream_decoder import DecoderState, StreamDecoder
from .stream_encoders import CachedEncoder, ContextEncoder, EncoderInput, EncoderResult
from .stream_input import Part, SampleBuffer
from .stream_settings import choose_decoder, choose_settings
from .stream_words import StreamEvent, StreamUpdate, StreamWord, Token, WordCollector
from .voice_activity import SpeechDetector

# seconds before a chunk that a speech detector also gets in cache-aware streaming, so that it can estimate the noise
DETECTOR_CONTEXT_S = 3.0


@dataclass(frozen=True)
class StreamOptions:
    """Options of `ParakeetStream` and `StreamBatch`.

    Args:
        chunk_s: duration of a chunk in seconds, which is decoded at once; `None` for 2 s.
        left_s: left context of a chunk in seconds; `None` for 10 s.
        right_s: right context of a chunk in seconds; a chunk is decoded when its right context has been received.
            `None` for 2 s. These three must be `None` for a cache-aware model; `model.set_attention_context` sets its
            chunk.
        decoder: `"transducer"`, or `"ctc"` for the CTC head of a hybrid; `None` for the transducer if there is one.
        confidence: confidence method, `"max_prob"` or `"entropy"`; `None` for no confidence, which is faster.
        speech_detector: function from (S,) samples to the ranges (first sample, end exclusive) that contain speech. A
            chunk without speech gives no text: its frames count as blanks. `None` to decode all chunks.
        boosting: boosting tree of phrases; `None` for no boosting.
        boosting_weight: weight of the scores of the boosting tree.
        language_model: language model over the tokens of the model; `None` for no language model.
        lm_weight: weight of the scores of the language model.
        allowed_tokens: (V,) bool, whether a token may be in the text, where V is the number of tokens with the blank;
            the blank is always allowed. `None` to allow all tokens.

    Raises:
        ValueError: `confidence` is not a confidence method.
    """

    chunk_s: float | None = None
    left_s: float | None = None
    right_s: float | None = None
    decoder: str | None = None
    confidence: str | None = "max_prob"
    speech_detector: SpeechDetector | None = None
    boosting: TokenScorer | None = None
    boosting_weight: float = DEFAULT_BOOSTING_WEIGHT
    language_model: TokenScorer | None = None
    lm_weight: float = DEFAULT_LM_WEIGHT
    allowed_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the option that does not depend on the model."""
        if self.confidence is not None:
            check_confidence_method(self.confidence)


@dataclass
class StreamState:
    """Everything that a stream has between two steps.

    Args:
        words: the tokens of the incomplete word.
        decoder_state: state of the decoder.
        cache: cache of the encoder for cache-aware streaming; `None` otherwise.
        samples: the samples that are still needed.
        num_decoded: number of samples that were decoded so far.
        is_finished: whether the stream has ended.
        new_words: committed words that are not yet in an update.
        new_events: events that are not yet in an update.
    """

    words: WordCollector
    decoder_state: DecoderState
    cache: Any = None
    samples: SampleBuffer = field(default_factory=SampleBuffer)
    num_decoded: int = 0
    is_finished: bool = False
    new_words: list[StreamWord] = field(default_factory=list)
    new_events: list[StreamEvent] = field(default_factory=list)

    def add_tokens(self, tokens: Sequence[Token]) -> None:
        """Add decoded tokens, and store the words that they complete and the events.

        Args:
            tokens: the new tokens.
        """
        words, events = self.words.add(tokens, self.decoder_state.num_frames[0])
        self.new_words += words
        self.new_events += events


class StreamEngine:
    """Encodes and decodes streams of one model. The state of each stream is in its `StreamState`.

    Args:
        model: a CTC, RNN-T, TDT or hybrid model in evaluation mode.
        processor: processor of the model.
        options: options of the stream.

    Raises:
        ValueError: the model is in training mode, or an option is not valid for the model.
    """

    def __init__(self, model: Any, processor: Any, options: StreamOptions) -> None:
        if model.training:
            raise ValueError(
                "a streamed model must be in evaluation mode, got a model in training mode: call `.eval()`"
            )
        self.processor, self.speech_detector = processor, options.speech_detector
        extractor = processor.feature_extractor
        settings = choose_settings(model.encoder, extractor, options.chunk_s, options.left_s, options.right_s)
        self.encoder: CachedEncoder | ContextEncoder
        if settings.is_cache_aware:
            context_s = DETECTOR_CONTEXT_S if options.speech_detector else 0.0
            self.encoder = CachedEncoder(model.encoder, extractor, settings, context_s)
        else:
            self.encoder = ContextEncoder(model.encoder, extractor, settings)
        self.decoder = build_stream_decoder(model, options)
        self.attention_context = list(self.encoder.encoder.config.attention_context_size)
        self.frame_s = settings.samples_per_frame / extractor.sampling_rate

    @torch.no_grad()
    def start(self) -> StreamState:
        """Create the state of a new stream."""
        words = WordCollector(self.processor, self.decoder.head_type, self.frame_s)
        return StreamState(words, self.decoder.start(), self.encoder.start_cache())

    @torch.no_grad()
    def advance(self, streams: Sequence[StreamState], is_last: bool = False) -> list[StreamUpdate]:
        """Run all steps for which the streams have enough samples, one step of all such streams at a time.

        Args:
            streams: the streams, changed in place.
            is_last: whether the streams have ended, so that their remaining samples are decoded.

        Returns:
            The update of each stream.

        Raises:
            RuntimeError: the attention context of the model was changed after the streams started.
        """
        self.check_attention_context()
        while True:
            steps = [
                (stream, part)
                for stream in streams
                if not stream.is_finished
                and (part := self.encoder.plan(stream.num_decoded, stream.samples.stop, is_last)) is not None
            ]
            if not steps:
                break
            self._run_step([stream for stream, _ in steps], [part for _, part in steps])
        return [self._build_update(stream, is_last) for stream in streams]

    def check_attention_context(self) -> None:
        """Check that the attention context of the encoder is the one with which the streams started.

        Raises:
            RuntimeError: the attention context of the model was changed.
        """
        context = list(self.encoder.encoder.config.attention_context_size)
        if context != self.attention_context:
            raise RuntimeError(
                f"the attention context must not change while a stream runs, it was {self.attention_context} and now "
                f"is {context}: finish the stream, change the context, and start a new stream"
            )

    def _run_step(self, streams: Sequence[StreamState], parts: Sequence[Part]) -> None:
        """Run one step of several streams.

        Args:
            streams: the streams, changed in place.
            parts: the samples of the step of each stream.
        """
        inputs = [
            EncoderInput(part, stream.samples.get(part.start, part.stop), stream.cache)
            for stream, part in zip(streams, parts, strict=True)
        ]
        has_speech = [self._has_speech(item) for item in inputs]
        results = self._encode(inputs, has_speech)
        # a number of frames, instead of frames, means blanks
        frames: list[Tensor | int] = []
        for item, result, is_speech in zip(inputs, results, has_speech, strict=True):
            if result is None:
                # only `ContextEncoder` leaves out chunks
                assert isinstance(self.encoder, ContextEncoder)
                frames.append(self.encoder.count_frames(item.part))
            else:
                frames.append(result[0] if is_speech else len(result[0]))
        tokens, states = self.decoder.decode(frames, [stream.decoder_state for stream in streams])
        for index, (stream, part, result) in enumerate(zip(streams, parts, results, strict=True)):
            stream.num_decoded, stream.decoder_state = part.chunk_stop, states[index]
            stream.cache = None if result is None else result[1]
            stream.samples.drop_before(self.encoder.get_first_needed_sample(stream.num_decoded))
            stream.add_tokens(tokens[index])

    def _encode(self, inputs: Sequence[EncoderInput], has_speech: Sequence[bool]) -> list[EncoderResult | None]:
        """Encode the chunks that contain speech, or all chunks if the encoder needs all.

        Args:
            inputs: the input of each stream.
            has_speech: whether the chunk of each stream contains speech.

        Returns:
            The encoder frames and the new cache of each stream; `None` for a chunk that was not encoded.
        """
        encoded = [index for index in range(len(inputs)) if has_speech[index] or self.encoder.needs_all_chunks]
        results: list[EncoderResult | None] = [None] * len(inputs)
        for index, result in zip(encoded, self.encoder.encode([inputs[index] for index in encoded]), strict=True):
            results[index] = result
        return results

    def _has_speech(self, item: EncoderInput) -> bool:
        """Return whether the chunk of a step contains speech; true without a speech detector."""
        if self.speech_detector is None:
            return True
        chunk_start, chunk_stop = item.part.chunk_start - item.part.start, item.part.chunk_stop - item.part.start
        return any(start < chunk_stop and stop > chunk_start for start, stop in self.speech_detector(item.samples))

    def _build_update(self, stream: StreamState, is_last: bool) -> StreamUpdate:
        """Build the update of a stream after its steps, and end the stream if `is_last`.

        Args:
            stream: the stream, changed in place.
            is_last: whether the stream has ended.
        """
        tentative: list[StreamWord] = []
        if is_last and not stream.is_finished:
            stream.add_tokens(self.decoder.get_last_tokens(stream.decoder_state))
            stream.new_words += stream.words.complete_word()
            stream.is_finished = True
        elif not is_last:
            tentative = stream.words.build_words(self.decoder.get_last_tokens(stream.decoder_state))
        update = StreamUpdate(stream.new_words, tentative, stream.new_events)
        stream.new_words, stream.new_events = [], []
        return update


def build_stream_decoder(model: Any, options: StreamOptions) -> StreamDecoder:
    """Build the decoder of streams from the options.

    Args:
        model: a CTC, RNN-T, TDT or hybrid model.
        options: options of the stream.

    Raises:
        ValueError: the head does not exist, or the language model, the boosting tree or the mask of allowed tokens does
            not fit the model.
        TypeError: `allowed_tokens` is not a bool tensor.
    """
    blank_id, vocab_size = get_blank_id(model.config), model.config.vocab_size
    fusion = build_fusion(
        options.language_model, options.lm_weight, options.boosting, options.boosting_weight, blank_id, vocab_size
    )
    allowed_tokens = options.allowed_tokens
    if allowed_tokens is not None:
        allowed_tokens = prepare_allowed_tokens(allowed_tokens, blank_id, vocab_size).to(model.device)
    return StreamDecoder(
        model,
        choose_decoder(model.config, options.decoder),
        options.confidence,
        None if fusion is None else fusion.to(model.device),
        allowed_tokens,
    )
