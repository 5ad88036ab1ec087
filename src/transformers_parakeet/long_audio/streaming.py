"""Transcription of audio while it is spoken: one stream, or many streams in one batch.

`stream_engine.py` runs the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .stream_engine import StreamEngine, StreamOptions
from .stream_input import convert_samples
from .stream_words import StreamUpdate


class StreamBatch:
    """Transcribes several streams of one model. Streams that have enough samples are computed as one batch.

    The result of a stream does not depend on the other streams. The model is not changed.

    Args:
        model: a CTC, RNN-T, TDT or hybrid model in evaluation mode.
        processor: processor of the model.
        num_streams: number of streams.
        **options: fields of `StreamOptions`, such as `chunk_s`, `decoder`, `boosting` and `language_model`.

    Raises:
        ValueError: the model is in training mode, or an argument is not valid for the model.
    """

    def __init__(self, model: Any, processor: Any, num_streams: int, **options: Any) -> None:
        if num_streams < 1:
            raise ValueError(f"`num_streams` must be at least 1, got {num_streams}: pass the number of streams")
        self._engine = StreamEngine(model, processor, StreamOptions(**options))
        self._streams = [self._engine.start() for _ in range(num_streams)]

    def feed(self, samples: Sequence[Any]) -> list[StreamUpdate]:
        """Add samples to the streams.

        Samples that are refused with an error of this list are not added to any stream.

        Args:
            samples: one entry per stream: (S,) floating-point samples from -1 to 1 at the sampling rate of the model,
                any number of them, or `None` for a stream without new samples.

        Returns:
            The update of each stream.

        Raises:
            ValueError: the number of entries is not the number of streams, samples are not valid, or a stream that has
                ended gets samples.
            RuntimeError: the attention context of the model was changed.
        """
        if len(samples) != len(self._streams):
            raise ValueError(
                f"`samples` must have one entry per stream, got {len(samples)} entries for {len(self._streams)} "
                "streams: pass `None` for a stream without new samples"
            )
        self._engine.check_attention_context()
        blocks = [None if block is None else convert_samples(block) for block in samples]
        for index, (stream, block) in enumerate(zip(self._streams, blocks, strict=True)):
            if block is not None and stream.is_finished:
                raise ValueError(
                    f"samples must be fed to a stream before its end, but stream {index} has ended: call "
                    f"`restart({index})` to start a new stream in its place"
                )
        for stream, block in zip(self._streams, blocks, strict=True):
            if block is not None:
                stream.samples.append(block)
        return self._engine.advance(self._streams)

    def finish(self, stream_indices: Sequence[int] | None = None) -> list[StreamUpdate]:
        """End streams: decode their remaining samples and commit all words.

        Args:
            stream_indices: indices of the streams, each one once; `None` for all streams.

        Returns:
            The last update of each of these streams; empty for a stream that had already ended.

        Raises:
            ValueError: an index is repeated, or is not the index of a stream.
            RuntimeError: the attention context of the model was changed.
        """
        indices = range(len(self._streams)) if stream_indices is None else stream_indices
        self._check_indices(indices)
        return self._engine.advance([self._streams[index] for index in indices], is_last=True)

    def restart(self, stream_index: int) -> None:
        """Replace a stream by a new one, for example when a speaker leaves and another one joins.

        Args:
            stream_index: index of the stream.

        Raises:
            ValueError: it is not the index of a stream.
        """
        self._check_indices([stream_index])
        self._streams[stream_index] = self._engine.start()

    def _check_indices(self, stream_indices: Sequence[int]) -> None:
        """Raise a ValueError if an index is repeated, or is not the index of a stream."""
        num_streams = len(self._streams)
        if len(set(stream_indices)) < len(stream_indices) or not set(stream_indices) <= set(range(num_streams)):
            raise ValueError(
                f"indices of streams must be different numbers from 0 to {num_streams - 1}, got "
                f"{list(stream_indices)}: pass each stream once"
            )


class ParakeetStream:
    """Transcribes one stream of audio while it is received.

    Args:
        model: a CTC, RNN-T, TDT or hybrid model in evaluation mode.
        processor: processor of the model.
        **options: fields of `StreamOptions`, such as `chunk_s`, `decoder`, `boosting` and `language_model`.

    Raises:
        ValueError: the model is in training mode, or an argument is not valid for the model.
    """

    def __init__(self, model: Any, processor: Any, **options: Any) -> None:
        self._batch = StreamBatch(model, processor, num_streams=1, **options)

    def feed(self, samples: Any) -> StreamUpdate:
        """Add samples to the stream.

        Args:
            samples: (S,) floating-point samples from -1 to 1 at the sampling rate of the model, any number of them.

        Returns:
            The new committed words, the tentative words, and the new events.

        Raises:
            ValueError: the samples are not valid, or the stream has ended.
            RuntimeError: the attention context of the model was changed.
        """
        return self._batch.feed([samples])[0]

    def finish(self) -> StreamUpdate:
        """End the stream: decode the remaining samples and commit all words.

        Returns:
            The last committed words and events; empty if the stream had already ended.

        Raises:
            RuntimeError: the attention context of the model was changed.
        """
        return self._batch.finish()[0]

    def updates(self, blocks: Iterable[Any]) -> Iterator[StreamUpdate]:
        """Transcribe blocks of samples, for example from a file or a microphone, and end the stream after the last one.

        Args:
            blocks: blocks of samples, see `feed`.

        Yields:
            The update after each block, and the update of `finish`.
        """
        for block in blocks:
            yield self.feed(block)
        yield self.finish()
