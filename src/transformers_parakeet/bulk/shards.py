"""Groups recordings into shards, and writes and lists the Parquet files of the output.

A shard is the unit of work: a worker transcribes its recordings and writes one file, which is complete if it exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..optional_packages import import_optional
from .sources import SourceFile, open_file_system

# a shard is finished when it has this number of bytes of audio files, so that little work is lost with a worker
MAX_SHARD_BYTES = 256 * 1024**2
# key of the settings in the metadata of a Parquet file
SETTINGS_KEY = b"transformers_parakeet"
SHARD_PREFIX, SHARD_SUFFIX = "part-", ".parquet"


@dataclass(frozen=True)
class Shard:
    """Recordings that one worker transcribes and writes to one file.

    Args:
        files: the recordings.
    """

    files: tuple[SourceFile, ...]

    @property
    def name(self) -> str:
        """Name of the file, which depends only on the names of the recordings."""
        digest = hashlib.sha256("\n".join(file.name for file in self.files).encode("utf-8", "surrogateescape"))
        return f"{SHARD_PREFIX}{digest.hexdigest()[:16]}{SHARD_SUFFIX}"


@dataclass(frozen=True)
class FinishedShards:
    """The content of the output folder.

    Args:
        names: names of the files.
        files: values of the column `file`.
        num_errors: number of rows with an error.
    """

    names: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    num_errors: int = 0


def plan_shards(files: Sequence[SourceFile], finished: FinishedShards, files_per_shard: int) -> list[Shard]:
    """Group the recordings that are not finished into shards.

    All recordings are grouped, and groups without a finished recording become shards. So a second run over the same
    source plans the same shards as the first run. If the source has changed, the new recordings of the other groups
    become shards together.

    Args:
        files: all recordings of the source.
        finished: the content of the output folder.
        files_per_shard: maximum number of recordings in a shard.

    Returns:
        The shards, in the order of the source.
    """
    shards: list[Shard] = []
    others: list[SourceFile] = []
    for group in _group_files(files, files_per_shard):
        missing = [file for file in group if file.name not in finished.files]
        if len(missing) == len(group):
            shards.append(Shard(tuple(group)))
        else:
            others += missing
    return [*shards, *(Shard(tuple(group)) for group in _group_files(others, files_per_shard))]


def _group_files(files: Iterable[SourceFile], files_per_shard: int) -> Iterator[list[SourceFile]]:
    """Yield the recordings in groups of at most `files_per_shard` recordings and about `MAX_SHARD_BYTES`."""
    group: list[SourceFile] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.size
        if len(group) == files_per_shard or size >= MAX_SHARD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def get_schema(settings: str) -> Any:
    """Return the pyarrow schema of the output.

    Args:
        settings: JSON text that is stored in the metadata of every file.
    """
    pyarrow = import_optional("pyarrow", "writing Parquet", "ray")
    word = pyarrow.struct(
        {
            "text": pyarrow.string(),
            "start": pyarrow.float64(),
            "end": pyarrow.float64(),
            "confidence": pyarrow.float64(),
        }
    )
    fields = {
        "file": pyarrow.string(),
        "text": pyarrow.string(),
        "words": pyarrow.list_(word),
        "confidence": pyarrow.float64(),
        "duration": pyarrow.float64(),
        "error": pyarrow.string(),
        "model": pyarrow.string(),
    }
    return pyarrow.schema(fields, metadata={SETTINGS_KEY: settings.encode()})


class Target:
    """A folder of Parquet files, on this machine or in an object store. It can be pickled.

    Args:
        location: path or URL of the folder.
        settings: what determines the results, such as the model and the decoder. Every file contains them, and a folder
            contains results of one set of settings only.
    """

    def __init__(self, location: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        path = os.fspath(location)
        # workers have other working directories
        self.location = path if "://" in path else os.path.abspath(path)
        self.settings = json.dumps(dict(settings), sort_keys=True)

    def create(self) -> None:
        """Create the folder, if it does not exist.

        Raises:
            OSError: the folder cannot be created.
        """
        file_system, folder = open_file_system(self.location)
        file_system.makedirs(folder, exist_ok=True)

    def exists(self, name: str) -> bool:
        """Return whether a file exists.

        Args:
            name: name of the file.
        """
        file_system, folder = open_file_system(self.location)
        return bool(file_system.exists(f"{folder}/{name}"))

    def write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a file that is complete whenever it exists under its name.

        On this machine, the file is written under another name, which starts with a dot and ends with `.partial`, and
        then renamed. An object of an object store appears when it is complete.

        Args:
            name: name of the file.
            rows: the rows, with a value for each column.

        Raises:
            OSError: the file cannot be written.
        """
        pyarrow = import_optional("pyarrow", "writing Parquet", "ray")
        parquet = import_optional("pyarrow.parquet", "writing Parquet", "ray")
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(list(rows), get_schema(self.settings)), sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
        file_system, folder = open_file_system(self.location)
        if "://" in self.location:
            file_system.pipe_file(f"{folder}/{name}", content)
            return
        partial = f"{folder}/.{name}.{uuid.uuid4().hex}.partial"
        try:
            with open(partial, "wb") as file:
                file.write(content)
            os.replace(partial, f"{folder}/{name}")
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)

    def remove(self, name: str) -> None:
        """Delete a file.

        Args:
            name: name of the file.
        """
        file_system, folder = open_file_system(self.location)
        file_system.rm_file(f"{folder}/{name}")

    def read_rows(self, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Read columns of a file, and check that it has the settings of this folder.

        Args:
            name: name of the file.
            columns: names of the columns.

        Returns:
            One dict per row.

        Raises:
            ValueError: the file has other settings, or it was not written by `write`.
        """
        parquet = import_optional("pyarrow.parquet", "reading Parquet", "ray")
        file_system, folder = open_file_system(self.location)
        with file_system.open(f"{folder}/{name}", "rb") as stream:
            file = parquet.ParquetFile(stream)
            settings = (file.schema_arrow.metadata or {}).get(SETTINGS_KEY, b"").decode()
            if settings != self.settings:
                raise ValueError(
                    f"the folder {self.location} must contain results with the settings {self.settings}, but {name} "
                    f"has {settings or 'none'}: choose another folder, or use the same model and options"
                )
            rows: list[dict[str, Any]] = file.read(columns=list(columns)).to_pylist()
        return rows

    def read_finished(self, retry_errors: bool = False) -> FinishedShards:
        """Read which recordings are finished.

        Args:
            retry_errors: whether to delete the files that contain an error, so that their recordings are transcribed
                again.

        Raises:
            ValueError: a file has other settings.
        """
        file_system, folder = open_file_system(self.location)
        paths = file_system.find(folder, maxdepth=1) if file_system.exists(folder) else []
        finished: dict[str, list[dict[str, Any]]] = {}
        for name in sorted(path.rpartition("/")[2] for path in paths):
            if not (name.startswith(SHARD_PREFIX) and name.endswith(SHARD_SUFFIX)):
                continue
            rows = self.read_rows(name, ["file", "error"])
            if retry_errors and any(row["error"] is not None for row in rows):
                self.remove(name)
            else:
                finished[name] = rows
        all_rows = [row for rows in finished.values() for row in rows]
        return FinishedShards(
            frozenset(finished),
            frozenset(row["file"] for row in all_rows),
            sum(row["error"] is not None for row in all_rows),
        )


__all__ = ["FinishedShards", "Shard", "Target", "get_schema", "plan_shards"]
