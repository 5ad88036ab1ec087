"""Runs the steps of streams: features, encoder and decoder, for all streams of a batch that have enough samples.

`stream_input.py` plans the steps, `stream_words.py` builds words; the interface is in `streaming.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..decoding import check_confidence_method
from ..networks import stack_caches
from .stream_decoder import DecoderState, StreamDecoder
from .stream_input import Part, SampleBuffer, get_first_needed_sample, plan_cached_part, plan_part
from .stream_settings import choose_decoder, choose_settings, prepare_encoder
from .stream_words import StreamUpdate, Token, WordCollector

# maps (S,) samples to the ranges (first sample, end exclusive) that contain speech
SpeechDetector = Callable[[Tensor], list[tuple[int, int]]]

# seconds before a chunk that a speech detector also gets in cache-aware streaming, so that it can estimate the noise
DETECTOR_CONTEXT_S = 3.0


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
    """

    words: WordCollector
    decoder_state: DecoderState
    cache: Any = None
    samples: SampleBuffer = field(default_factory=SampleBuffer)
    num_decoded: int = 0
    is_finished: bool = False


class StreamEngine:
    """Encodes and decodes streams of one model. The state of each stream is in its `StreamState`.

    Args:
        model: a CTC, RNN-T, TDT or hybrid model in evaluation mode.
        processor: processor of the model.
        chunk_s: duration of a chunk in seconds; see `choose_settings`.
        left_s: left context in seconds.
        right_s: right context in seconds.
        decoder: `"transducer"`, or `"ctc"` for the CTC head of a hybrid; `None` for the transducer if there is one.
        confidence: confidence method of `compute_token_confidence`; `None` for no confidence.
        speech_detector: finds speech in samples; frames of chunks without speech count as blanks. `None` to decode all.

    Raises:
        ValueError: the model is in training mode, or an argument is not valid for the model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        chunk_s: float | None,
        left_s: float | None,
        right_s: float | None,
        decoder: str | None,
        confidence: str | None,
        speech_detector: SpeechDetector | None,
    ) -> None:
        if model.training:
            raise ValueError(
                "a streamed model must be in evaluation mode, got a model in training mode: call `.eval()`"
            )
        if confidence is not None:
            check_confidence_method(confidence)
        self.model, self.processor, self.speech_detector = model, processor, speech_detector
        self.extractor = processor.feature_extractor
        self.decoder = StreamDecoder(model, choose_decoder(model.config, decoder), confidence)
        self.settings = choose_settings(model.encoder, self.extractor, chunk_s, left_s, right_s)
        self.encoder = prepare_encoder(model.encoder, self.settings)
        self.attention_context = list(self.encoder.config.attention_context_size)
        self.frame_s = self.settings.samples_per_frame / self.extractor.sampling_rate
        frames_per_second = self.extractor.sampling_rate / self.settings.hop_length
        # feature frames before the chunk that are read for the speech detector
        self.num_context_frames = int(DETECTOR_CONTEXT_S * frames_per_second) if speech_detector else 0

    @torch.no_grad()
    def start(self) -> StreamState:
        """Create the state of a new stream."""
        cache = self.encoder.start_cache(1) if self.settings.is_cache_aware else None
        words = WordCollector(self.processor, self.decoder.head_type, self.frame_s)
        return StreamState(words, self.decoder.start(), cache)

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
        self._check_attention_context()
        updates = [StreamUpdate() for _ in streams]
        while True:
            parts = [None if stream.is_finished else self._plan(stream, is_last) for stream in streams]
            ready = [(index, part) for index, part in enumerate(parts) if part is not None]
            if not ready:
                break
            new_tokens = self._run_step([streams[index] for index, _ in ready], [part for _, part in ready])
            for (index, _), tokens in zip(ready, new_tokens, strict=True):
                add_tokens(streams[index], updates[index], tokens)
        for stream, update in zip(streams, updates, strict=True):
            if is_last and not stream.is_finished:
                add_tokens(stream, update, self.decoder.get_last_tokens(stream.decoder_state))
                update.committed.extend(stream.words.complete_word())
                stream.is_finished = True
            if not stream.is_finished:
                update.tentative.extend(stream.words.build_words(self.decoder.get_last_tokens(stream.decoder_state)))
        return updates

    def _check_attention_context(self) -> None:
        """Raise a RuntimeError if the attention context was changed after the streams started."""
        context = list(self.encoder.config.attention_context_size)
        if context != self.attention_context:
            raise RuntimeError(
                f"the attention context must not change while a stream runs, it was {self.attention_context} and now "
                f"is {context}: finish the stream, change the context, and start a new stream"
            )

    def _plan(self, stream: StreamState, is_last: bool) -> Part | None:
        """Plan the next step of a stream; `None` if it needs more samples."""
        num_received = stream.samples.stop
        if self.settings.is_cache_aware:
            return plan_cached_part(stream.num_decoded, num_received, self.settings, is_last, self.num_context_frames)
        return plan_part(stream.num_decoded, num_received, self.settings, is_last)

    def _run_step(self, streams: Sequence[StreamState], parts: Sequence[Part]) -> list[list[Token]]:
        """Run one step of several streams.

        Args:
            streams: the streams, changed in place.
            parts: the samples of the step of each stream.

        Returns:
            The new tokens of each stream.
        """
        buffers = [stream.samples.get(part.start, part.stop) for stream, part in zip(streams, parts, strict=True)]
        has_speech = [self._has_speech(buffer, part) for buffer, part in zip(buffers, parts, strict=True)]
        # the cache of the encoder needs all frames, also those without speech
        encoded = [index for index in range(len(parts)) if has_speech[index] or self.settings.is_cache_aware]
        encode = self._encode_with_cache if self.settings.is_cache_aware else self._encode_buffers
        chunks = encode(
            [streams[index] for index in encoded],
            [parts[index] for index in encoded],
            [buffers[index] for index in encoded],
        )
        frames_by_index = dict(zip(encoded, chunks, strict=True))
        # a number of frames, instead of frames, means blanks
        frames = [
            frames_by_index[index] if has_speech[index] else self._count_frames(part, frames_by_index.get(index))
            for index, part in enumerate(parts)
        ]
        states = [stream.decoder_state for stream in streams]
        tokens, states = self.decoder.decode(frames, states)
        for stream, part, state in zip(streams, parts, states, strict=True):
            stream.decoder_state, stream.num_decoded = state, part.chunk_stop
            stream.samples.drop_before(
                get_first_needed_sample(stream.num_decoded, self.settings, self.num_context_frames)
            )
        return tokens

    def _count_frames(self, part: Part, frames: Tensor | None) -> int:
        """Count the encoder frames of the chunk of a part.

        Args:
            part: the sample numbers of the part.
            frames: (N, H) encoder frames of the chunk; `None` if they were not computed.
        """
        if frames is not None:
            return len(frames)
        num_features = torch.tensor(part.num_samples // self.settings.hop_length)
        first_frame, end_frame = self._get_chunk_frames(
            part, int(self.model._get_subsampling_output_length(num_features))
        )
        return end_frame - first_frame

    def _has_speech(self, buffer: Tensor, part: Part) -> bool:
        """Return whether the chunk of a part contains speech; true without a speech detector."""
        if self.speech_detector is None:
            return True
        chunk_start, chunk_stop = part.chunk_start - part.start, part.chunk_stop - part.start
        return any(start < chunk_stop and stop > chunk_start for start, stop in self.speech_detector(buffer))

    def _encode_buffers(
        self, streams: Sequence[StreamState], parts: Sequence[Part], buffers: Sequence[Tensor]
    ) -> list[Tensor]:
        """Encode buffers of left context, chunk and right context.

        Args:
            streams: the streams, not used.
            parts: the sample numbers of the buffers.
            buffers: (S,) samples of each buffer.

        Returns:
            (N, H) encoder frames of each chunk.
        """
        if not buffers:
            return []
        lengths = torch.tensor([len(buffer) for buffer in buffers])
        features, mask = self.extractor.extract(pad_sequence(list(buffers), batch_first=True), lengths)
        device = self.model.device
        outputs = self.encoder(input_features=features.to(device), attention_mask=mask.to(device))
        encoder_lengths = outputs.attention_mask.sum(-1).tolist()
        frames = []
        for part, hidden, length in zip(parts, outputs.last_hidden_state, encoder_lengths, strict=True):
            first_frame, end_frame = self._get_chunk_frames(part, length)
            frames.append(hidden[first_frame:end_frame])
        return frames

    def _get_chunk_frames(self, part: Part, encoder_length: int) -> tuple[int, int]:
        """Return the first and the end frame of a chunk among the encoder frames of its buffer.

        Args:
            part: the sample numbers of the buffer.
            encoder_length: number of encoder frames of the buffer.
        """
        samples_per_frame = self.settings.samples_per_frame
        first_frame = (part.chunk_start - part.start) // samples_per_frame
        if part.is_last:
            return first_frame, max(first_frame, encoder_length)
        return first_frame, first_frame + (part.chunk_stop - part.chunk_start) // samples_per_frame

    def _encode_with_cache(
        self, streams: Sequence[StreamState], parts: Sequence[Part], buffers: Sequence[Tensor]
    ) -> list[Tensor]:
        """Encode the new feature frames of streams with their caches.

        Streams with the same number of new frames are encoded as one batch without padding.

        Args:
            streams: the streams, whose caches are replaced.
            parts: the sample numbers of the buffers.
            buffers: (S,) samples of each buffer.

        Returns:
            (N, H) encoder frames of each chunk.
        """
        features = [self._extract_chunk(part, buffer) for part, buffer in zip(parts, buffers, strict=True)]
        frames: dict[int, Tensor] = {}

        def get_group(index: int) -> tuple[bool, int]:
            """Return what the streams of one batch must have in common: first chunk or not, and number of frames."""
            return parts[index].chunk_start == 0, len(features[index])

        for _, group in groupby(sorted(range(len(streams)), key=get_group), key=get_group):
            indices = list(group)
            cache = stack_caches([streams[index].cache for index in indices])
            hidden, cache = self.encoder.stream_step(torch.stack([features[index] for index in indices]), cache)
            for row, index in enumerate(indices):
                frames[index], streams[index].cache = hidden[row], cache.select(row)
        return [frames[index] for index in range(len(streams))]

    def _extract_chunk(self, part: Part, buffer: Tensor) -> Tensor:
        """Compute the (T, F) feature frames of the chunk of a part, on the device of the model.

        Args:
            part: the sample numbers of the buffer.
            buffer: (S,) samples of the buffer.
        """
        hop = self.settings.hop_length
        features, _ = self.extractor.extract(buffer[None], torch.tensor([len(buffer)]))
        return features[0, (part.chunk_start - part.start) // hop : (part.chunk_stop - part.start) // hop].to(
            self.model.device
        )


def add_tokens(stream: StreamState, update: StreamUpdate, tokens: Sequence[Token]) -> None:
    """Add new tokens to a stream, and its new words and events to an update.

    Args:
        stream: the stream, changed in place.
        update: the update, changed in place.
        tokens: the new tokens.
    """
    words, events = stream.words.add(tokens)
    update.committed.extend(words)
    update.events.extend(events)
