"""Transcribes batches of columns, as Ray Data, `datasets.map` and Spark pass them.

`transcription.py` does the work; this module converts columns to recordings and results to columns.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..audio import DamagedAudioWarning
from .sources import RemoteFile, is_remote

# columns of the audio, in the order in which a row looks for a value
INPUT_COLUMNS = ("audio", "bytes", "path")
OUTPUT_COLUMNS = ("text", "words", "confidence", "duration", "error", "model")


class Transcriber:
    """A function on batches of recordings that loads its model when it is first called.

    It fits `ray.data.Dataset.map_batches`, `datasets.Dataset.map(batched=True)` and Spark's `mapInPandas`. It can be
    pickled; a copy in another process loads a model of its own. A recording that cannot be transcribed is a row with
    its error.

    Args:
        model: Hub id, folder, `.nemo` file, or `"demo"` for the bundled model of spoken digits.
        device, dtype, attention, quantize: see `transformers_parakeet.transcription.load_pipeline`.
        num_threads: number of threads of torch in the process; `None` to leave it.
        prefix: text before the names of the output columns, for batches that have a column `text` already.
        **options: fields of `transformers_parakeet.transcription.TranscriptionOptions`.

    Raises:
        ValueError: an option is invalid.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        attention: str | None = None,
        quantize: str | None = None,
        num_threads: int | None = None,
        prefix: str = "",
        **options: Any,
    ) -> None:
        # imported here, like the model: a process that only plans needs neither
        from ..transcription import TranscriptionOptions

        self.model = str(model)
        self.loading_options = {"device": device, "dtype": dtype, "attention": attention, "quantize": quantize}
        self.num_threads = num_threads
        self.prefix = prefix
        self.options = TranscriptionOptions(**options)
        self._pipeline: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the options without the loaded model."""
        return {**self.__dict__, "_pipeline": None}

    def load(self) -> Any:
        """Load the model, if it is not loaded, and return its pipeline.

        Raises:
            OSError: the model cannot be loaded.
            ValueError: an option does not fit the model.
        """
        if self._pipeline is None:
            import torch

            from ..transcription import load_pipeline, prepare_run

            if self.num_threads is not None:
                torch.set_num_threads(self.num_threads)
            pipeline = load_pipeline(self.model, **self.loading_options)
            # an option that the model does not support is an error of the model, not of every recording
            prepare_run(pipeline, self.options)
            self._pipeline = pipeline
        return self._pipeline

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Transcribe a batch.

        Args:
            batch: columns of equal length. The audio of a row is its first value that is not missing in the columns
                `audio` (anything that `load_audio` accepts), `bytes` (the content of an audio file) and `path` (a path
                or URL).

        Returns:
            The columns of the batch except audio and bytes, and `text`, `words` (dicts with `text`, `start` and `end`
            in seconds, and `confidence`), `confidence`, `duration` in seconds, `error` and `model`. In a row of a
            recording that cannot be read, `error` is the reason, `words` is empty and the other values are `None`. In a
            row of a damaged recording, `error` says which part was read.

        Raises:
            ValueError: the batch has no column with audio, or an output column exists already.
            OSError: the model cannot be loaded.
        """
        num_rows = _count_rows(batch)
        kept = {name: list(values) for name, values in batch.items() if not _is_audio_column(name, values)}
        clashes = sorted(set(kept) & {self.prefix + name for name in OUTPUT_COLUMNS})
        if clashes:
            raise ValueError(
                f"the batch must not have the columns of the result, but it has {', '.join(clashes)}: remove or rename "
                "them, or pass `prefix` to `Transcriber`"
            )
        rows = self.transcribe([_get_audio(batch, row) for row in range(num_rows)])
        return {**kept, **{self.prefix + name: [row[name] for row in rows] for name in OUTPUT_COLUMNS}}

    def transcribe(self, sources: Sequence[Any]) -> list[dict[str, Any]]:
        """Transcribe recordings; those of similar size are decoded together.

        Args:
            sources: anything that `load_audio` accepts, and URLs that fsspec opens.

        Returns:
            One dict per recording, in their order, with the keys `OUTPUT_COLUMNS`.
        """
        from ..transcription import FailedFile, transcribe_files

        pipeline = self.load()
        order = sorted(range(len(sources)), key=lambda row: estimate_size(sources[row]))
        notes: dict[int, str] = {}
        rows: list[dict[str, Any]] = [{}] * len(sources)
        entries = transcribe_files(pipeline, _note_damage(sources, order, notes), self.options)
        with warnings.catch_warnings():
            # `_note_damage` collects these warnings, which Python otherwise shows only once
            warnings.simplefilter("always", DamagedAudioWarning)
            for row, entry in zip(order, entries, strict=True):
                if isinstance(entry, FailedFile):
                    rows[row] = build_error_row(format_error(entry.error), self.model)
                else:
                    rows[row] = _build_row(entry, self.model)
        for row, note in notes.items():
            rows[row]["error"] = rows[row]["error"] or note
        return rows


def _count_rows(batch: Mapping[str, Sequence[Any]]) -> int:
    """Return the number of rows of a batch, and check that it has a column with audio."""
    columns = [name for name in INPUT_COLUMNS if name in batch]
    if not columns:
        raise ValueError(
            f"a batch must have one of the columns {', '.join(INPUT_COLUMNS)}, got {', '.join(batch) or 'none'}: "
            "rename the column with the audio"
        )
    return len(batch[columns[0]])


def _is_audio_column(name: str, values: Sequence[Any]) -> bool:
    """Return whether a column contains audio, which the result does not repeat; paths are repeated."""
    return name == "bytes" or (name == "audio" and not all(isinstance(value, str) for value in values))


def _get_audio(batch: Mapping[str, Sequence[Any]], row: int) -> Any:
    """Return the audio of a row; a dict without audio if all its values are missing, which is an error of the row."""
    for name in INPUT_COLUMNS:
        value = batch[name][row] if name in batch else None
        # pandas has NaN for a missing text
        if value is not None and not (isinstance(value, float) and value != value):
            return _open_remote(value)
    return {}


def _open_remote(value: Any) -> Any:
    """Return a value of a batch; for a URL of an object store, a `RemoteFile`."""
    path = value
    if isinstance(value, Mapping) and all(value.get(key) is None for key in ("array", "raw", "bytes")):
        path = value.get("path")
    return RemoteFile(path) if isinstance(path, str) and is_remote(path) else value


def estimate_size(source: Any) -> int:
    """Estimate the size of a recording, so that recordings of similar length can be decoded together.

    Args:
        source: anything that `load_audio` accepts.

    Returns:
        The number of bytes of a file or of 16-bit samples; 0 if it is not known.
    """
    if isinstance(source, Mapping):
        values = (source.get(key) for key in ("array", "raw", "bytes", "path"))
        source = next((value for value in values if value is not None), None)
        if isinstance(source, Mapping):
            return 0
    if isinstance(source, (str, os.PathLike)):
        return os.path.getsize(source) if os.path.isfile(source) else 0
    if isinstance(source, (bytes, bytearray, memoryview)):
        return len(source)
    return 2 * len(source) if hasattr(source, "__len__") else 0


def _note_damage(sources: Sequence[Any], order: Sequence[int], notes: dict[int, str]) -> Iterator[Any]:
    """Yield the sources in an order, and collect the warnings that reading them gives.

    Args:
        sources: the recordings.
        order: their positions.
        notes: output dict, from the position of a damaged recording to the warning.
    """
    previous = warnings.showwarning
    current = -1

    def note(message: Any, category: type[Warning], *arguments: Any, **options: Any) -> None:
        """Collect the warning of a damaged recording, and show all others."""
        if issubclass(category, DamagedAudioWarning):
            notes[current] = str(message)
        else:
            previous(message, category, *arguments, **options)

    warnings.showwarning = note
    try:
        for current in order:
            # a recording is read completely before the next one is requested
            yield sources[current]
    finally:
        warnings.showwarning = previous


def _build_row(result: Any, model: str) -> dict[str, Any]:
    """Convert a `TranscriptionResult` to a row."""
    words = [
        {"text": word.text, "start": word.start, "end": word.end, "confidence": word.confidence}
        for word in result.words
    ]
    return {
        "text": result.text,
        "words": words,
        "confidence": result.confidence,
        "duration": result.duration,
        "error": None,
        "model": model,
    }


def build_error_row(error: str, model: str) -> dict[str, Any]:
    """Build the row of a recording that cannot be transcribed.

    Args:
        error: the reason.
        model: name of the model.
    """
    return {"text": None, "words": [], "confidence": None, "duration": None, "error": error, "model": model}


def format_error(error: BaseException) -> str:
    """Format an error as one line; the name of its class if it has no text.

    Args:
        error: the exception.
    """
    return " ".join(str(error).split()) or type(error).__name__


__all__ = ["OUTPUT_COLUMNS", "Transcriber", "build_error_row", "format_error"]
