"""Transcribes a shard and writes its file: what every engine does in its workers.

Reading and decoding the audio can be done before, in another process.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from ..audio import TARGET_RATE, AudioSource, AudioTooLongError, DamagedAudioWarning
from .shards import Shard, Target
from .sources import open_source_files
from .transcriber import Transcriber, build_error_row, format_error

logger = logging.get_logger(__name__)

# Limits of what is decoded outside of the worker with the model, in seconds of audio: a longer recording is decoded by
# the worker, which can keep it in a temporary file; the recordings of a shard together (920 MB as float32 at 16 kHz)
MAX_DECODED_S, MAX_DECODED_SHARD_S = 600.0, 4 * 3600.0


@dataclass(frozen=True)
class ShardReport:
    """What a worker did with a shard.

    Args:
        name: name of the shard.
        num_files: number of recordings.
        num_errors: number of rows with an error.
        duration_s: length of the recordings in seconds.
        failure: error that prevents all work, such as a model that cannot be loaded; `None` if the shard was written.
    """

    name: str
    num_files: int = 0
    num_errors: int = 0
    duration_s: float = 0.0
    failure: str | None = None


@dataclass(frozen=True)
class DecodedFile:
    """A recording that was read without a model.

    Args:
        audio: dict with the samples and their sampling rate; `None` if the worker with the model must read it.
        note: warning about damage; `None` for no damage.
        error: reason why it cannot be read; `None` if it can.
    """

    audio: dict[str, Any] | None = None
    note: str | None = None
    error: str | None = None


class ShardWorker:
    """Transcribes shards with one model and writes them. It can be pickled.

    Args:
        transcriber: the transcriber.
        target: folder of the output.
    """

    def __init__(self, transcriber: Transcriber, target: Target) -> None:
        self.transcriber = transcriber
        self.target = target

    def run(self, shard: Shard, decoded: Sequence[DecodedFile] | None = None) -> ShardReport:
        """Transcribe and write a shard; a shard that exists is only read.

        Args:
            shard: the shard.
            decoded: result of `decode_shard`; `None` to read the recordings.

        Returns:
            The report, with `failure` if the model cannot be loaded or the shard cannot be read or written.
        """
        try:
            if self.target.exists(shard.name):
                return build_report(shard, self.target.read_rows(shard.name, ["error", "duration"]))
            rows = self.transcribe(shard, decoded or [DecodedFile()] * len(shard.files))
            self.target.write(shard.name, rows)
        # errors of single recordings are rows; any other error must reach the user instead of ending the process
        except (OSError, ValueError, ImportError, RuntimeError, MemoryError) as error:
            return ShardReport(shard.name, failure=format_error(error))
        return build_report(shard, rows)

    def transcribe(self, shard: Shard, decoded: Sequence[DecodedFile]) -> list[dict[str, Any]]:
        """Transcribe the recordings of a shard.

        Args:
            shard: the shard.
            decoded: one entry per recording.

        Returns:
            The rows of the output.
        """
        pairs = list(zip(shard.files, decoded, strict=True))
        opened = open_source_files([file for file, entry in pairs if entry.audio is None and entry.error is None])
        sources = [next(opened) if entry.audio is None else entry.audio for _, entry in pairs if entry.error is None]
        results = iter(self.transcriber.transcribe(sources))
        rows = []
        for file, entry in pairs:
            row = next(results) if entry.error is None else build_error_row(entry.error, self.transcriber.model)
            rows.append({"file": file.name, **row, "error": row["error"] or entry.note})
        return rows


def build_report(shard: Shard, rows: Sequence[dict[str, Any]]) -> ShardReport:
    """Build the report of a shard that is written.

    Args:
        shard: the shard.
        rows: its rows, with `error` and `duration`.
    """
    num_errors = sum(row["error"] is not None for row in rows)
    return ShardReport(shard.name, len(rows), num_errors, sum(row["duration"] or 0.0 for row in rows))


def decode_shard(shard: Shard) -> list[DecodedFile]:
    """Read and decode the recordings of a shard without a model.

    Args:
        shard: the shard.

    Returns:
        One entry per recording. Recordings longer than `MAX_DECODED_S`, and those after `MAX_DECODED_SHARD_S`, are left
        to the worker with the model.
    """
    entries = []
    remaining_s = MAX_DECODED_SHARD_S
    for source in open_source_files(shard.files):
        entry, duration_s = _decode(source, min(MAX_DECODED_S, remaining_s))
        remaining_s -= duration_s
        entries.append(entry)
    return entries


def _decode(source: Any, max_duration_s: float) -> tuple[DecodedFile, float]:
    """Decode a recording, and return it with its length in seconds; a longer one is returned empty with length 0."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DamagedAudioWarning)
        try:
            audio = AudioSource(source, max_duration_s=max_duration_s)
        except AudioTooLongError:
            return DecodedFile(), 0.0
        # as in `transcribe_files`, no error in one file may prevent the transcription of the other files
        except Exception as error:
            logger.debug("a recording could not be read", exc_info=True)
            return DecodedFile(error=format_error(error)), 0.0
    notes = [str(entry.message) for entry in caught if issubclass(entry.category, DamagedAudioWarning)]
    samples = {"array": audio.load(), "sampling_rate": TARGET_RATE}
    return DecodedFile(samples, notes[0] if notes else None), audio.num_samples / TARGET_RATE


__all__ = ["DecodedFile", "ShardReport", "ShardWorker", "build_report", "decode_shard"]
