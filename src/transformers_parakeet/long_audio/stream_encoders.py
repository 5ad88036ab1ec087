"""The two ways to encode streams: with left and right context around each chunk, or with a cache of the past.

`stream_input.py` plans which samples a step reads, `stream_engine.py` runs the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..networks import EncoderCache, stack_caches
from .stream_input import Part, get_first_needed_sample, plan_cached_part, plan_part
from .stream_settings import StreamSettings, prepare_encoder


@dataclass(frozen=True)
class EncoderInput:
    """The input of one step of one stream.

    Args:
        part: the sample numbers of the step.
        samples: (S,) samples of the step.
        cache: cache of the encoder; `None` for encoding with left and right context.
    """

    part: Part
    samples: Tensor
    cache: EncoderCache | None


# (N, H) encoder frames of the chunk of a stream, and its new cache
EncoderResult = tuple[Tensor, EncoderCache | None]


class ContextEncoder:
    """Encodes buffers of left context, chunk and right context, as NeMo streams offline models.

    Args:
        encoder: encoder of the model.
        feature_extractor: feature extractor of the model.
        settings: settings of the stream.
    """

    # whether chunks without speech must be encoded as well
    needs_all_chunks = False

    def __init__(self, encoder: Any, feature_extractor: Any, settings: StreamSettings) -> None:
        self.encoder = prepare_encoder(encoder, settings)
        self.extractor, self.settings = feature_extractor, settings

    def start_cache(self) -> None:
        """Return `None`, because the buffers contain the past."""

    def plan(self, num_decoded: int, num_received: int, is_last: bool) -> Part | None:
        """Plan the next step of a stream, see `plan_part`.

        Args:
            num_decoded: number of samples that were decoded so far.
            num_received: number of samples of the stream so far.
            is_last: whether the stream has ended.
        """
        return plan_part(num_decoded, num_received, self.settings, is_last)

    def get_first_needed_sample(self, num_decoded: int) -> int:
        """Return the first sample that a later step can read.

        Args:
            num_decoded: number of samples that were decoded so far.
        """
        return get_first_needed_sample(num_decoded, self.settings)

    def encode(self, inputs: Sequence[EncoderInput]) -> list[EncoderResult]:
        """Encode the buffers of several streams as one batch.

        Features are normalised over the whole buffer, as in NeMo.

        Args:
            inputs: the input of each stream.

        Returns:
            The encoder frames of each chunk, without caches.
        """
        if not inputs:
            return []
        lengths = torch.tensor([len(item.samples) for item in inputs])
        waveforms = pad_sequence([item.samples for item in inputs], batch_first=True)
        features, mask = self.extractor.extract(waveforms, lengths)
        device = self.encoder.device
        outputs = self.encoder(input_features=features.to(device), attention_mask=mask.to(device))
        encoder_lengths = outputs.attention_mask.sum(-1).tolist()
        results: list[EncoderResult] = []
        for item, hidden, length in zip(inputs, outputs.last_hidden_state, encoder_lengths, strict=True):
            first_frame, end_frame = self._get_chunk_frames(item.part, length)
            results.append((hidden[first_frame:end_frame], None))
        return results

    def count_frames(self, part: Part) -> int:
        """Count the encoder frames of a chunk without encoding it.

        Args:
            part: the sample numbers of the step.
        """
        num_features = torch.tensor((part.stop - part.start) // self.settings.hop_length)
        encoder_length = int(self.encoder._get_subsampling_output_length(num_features))
        first_frame, end_frame = self._get_chunk_frames(part, encoder_length)
        return end_frame - first_frame

    def _get_chunk_frames(self, part: Part, encoder_length: int) -> tuple[int, int]:
        """Return the first and the end frame of a chunk among the encoder frames of its buffer.

        Args:
            part: the sample numbers of the step.
            encoder_length: number of encoder frames of the buffer.
        """
        samples_per_frame = self.settings.samples_per_frame
        first_frame = (part.chunk_start - part.start) // samples_per_frame
        if part.is_last:
            return first_frame, max(first_frame, encoder_length)
        return first_frame, first_frame + (part.chunk_stop - part.chunk_start) // samples_per_frame


class CachedEncoder:
    """Encodes only the new feature frames of streams, with the cache of each stream.

    Args:
        encoder: encoder of the model, with chunked attention and causal convolutions.
        feature_extractor: feature extractor of the model, without normalisation.
        settings: settings of the stream.
        context_s: seconds of samples before a chunk that a step reads in addition, for a speech detector.
    """

    # the cache needs the frames of all chunks
    needs_all_chunks = True

    def __init__(self, encoder: Any, feature_extractor: Any, settings: StreamSettings, context_s: float) -> None:
        self.encoder, self.extractor, self.settings = encoder, feature_extractor, settings
        self.num_context_frames = int(context_s * feature_extractor.sampling_rate / settings.hop_length)

    def start_cache(self) -> EncoderCache:
        """Create the cache of a stream before its first chunk."""
        cache: EncoderCache = self.encoder.start_cache(1)
        return cache

    def plan(self, num_decoded: int, num_received: int, is_last: bool) -> Part | None:
        """Plan the next step of a stream, see `plan_cached_part`.

        Args:
            num_decoded: number of samples that were decoded so far.
            num_received: number of samples of the stream so far.
            is_last: whether the stream has ended.
        """
        return plan_cached_part(num_decoded, num_received, self.settings, is_last, self.num_context_frames)

    def get_first_needed_sample(self, num_decoded: int) -> int:
        """Return the first sample that a later step can read.

        Args:
            num_decoded: number of samples that were decoded so far.
        """
        return get_first_needed_sample(num_decoded, self.settings, self.num_context_frames)

    def encode(self, inputs: Sequence[EncoderInput]) -> list[EncoderResult]:
        """Encode the chunks of several streams.

        Streams with the same number of new feature frames are encoded as one batch, which needs no padding.

        Args:
            inputs: the input of each stream.

        Returns:
            The encoder frames of each chunk and the new cache of each stream.
        """
        features = [self._extract_features(item) for item in inputs]
        results: dict[int, EncoderResult] = {}

        def get_group(index: int) -> tuple[bool, int]:
            """Return what the streams of one batch have in common: first chunk or not, and number of frames."""
            return inputs[index].part.chunk_start == 0, len(features[index])

        for _, group in groupby(sorted(range(len(inputs)), key=get_group), key=get_group):
            indices = list(group)
            # every stream has a cache, see `start_cache`
            caches = [cache for index in indices if (cache := inputs[index].cache) is not None]
            chunks = torch.stack([features[index] for index in indices])
            hidden, new_cache = self.encoder.stream_step(chunks, stack_caches(caches))
            for row, index in enumerate(indices):
                results[index] = hidden[row], new_cache.select(row)
        return [results[index] for index in range(len(inputs))]

    def _extract_features(self, item: EncoderInput) -> Tensor:
        """Compute the (T, F) feature frames of the chunk of a step, on the device of the model."""
        part, hop_length = item.part, self.settings.hop_length
        features, _ = self.extractor.extract(item.samples[None], torch.tensor([len(item.samples)]))
        first_frame = (part.chunk_start - part.start) // hop_length
        num_frames = (part.chunk_stop - part.chunk_start) // hop_length
        chunk: Tensor = features[0, first_frame : first_frame + num_frames].to(self.encoder.device)
        return chunk
