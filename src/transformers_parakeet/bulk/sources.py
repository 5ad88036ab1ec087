"""Finds the recordings of a folder, a manifest, a Parquet file or a URL, and opens them.

`shards.py` groups the recordings, and `transcriber.py` transcribes them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..optional_packages import import_optional

# endings of the files that are taken from a folder: audio, and video with an audio track
MEDIA_SUFFIXES = (
    *(".aac", ".aif", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".m4b", ".mka", ".mp2", ".mp3", ".oga", ".ogg"),
    *(".opus", ".wav", ".weba", ".wma"),
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv"),
)
MANIFEST_SUFFIXES = (".json", ".jsonl")
PARQUET_SUFFIX = ".parquet"
# columns of Parquet files with audio, and with paths, in the order in which they are looked for
AUDIO_COLUMNS = ("audio", "bytes")
PATH_COLUMNS = ("path", "file", "audio_filepath", "audio")
# bytes per second that are assumed for a recording of which only the duration is known (16-bit samples at 16 kHz)
BYTES_PER_SECOND = 32_000
# rows of a Parquet file that are read at a time
ROWS_PER_READ = 64


@dataclass(frozen=True)
class SourceFile:
    """A recording to transcribe.

    Args:
        name: value of the column `file` of the output; unique within a source.
        location: path or URL of the recording, or of the Parquet file that contains its bytes.
        size: number of bytes; 0 if it is not known.
        row: row of the Parquet file; `None` for a recording that is a file of its own.
        column: column of the bytes in the Parquet file.
    """

    name: str
    location: str
    size: int = 0
    row: int | None = None
    column: str | None = None


class RemoteFile:
    """A file of an object store that is opened when it is first read, so that an error belongs to this file.

    Args:
        url: URL that fsspec can open, such as `s3://bucket/talk.flac`.
    """

    def __init__(self, url: str) -> None:
        self.name = url
        self._file: Any = None

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes; all bytes if it is negative.

        Args:
            size: number of bytes.

        Returns:
            The bytes; empty at the end of the file.
        """
        if self._file is None:
            file_system, path = open_file_system(self.name)
            self._file = file_system.open(path, "rb")
        content: bytes = self._file.read(size)
        return content


def is_remote(location: str) -> bool:
    """Return whether a location is a URL that only fsspec can open; `load_audio` opens http and https itself.

    Args:
        location: path or URL.
    """
    return "://" in location and not location.lower().startswith(("http://", "https://"))


def open_file_system(location: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the path in it.

    Args:
        location: path, or URL such as `s3://bucket/folder`.

    Raises:
        ImportError: fsspec, or the package for this kind of URL, is not installed.
        ValueError: fsspec does not know this kind of URL.
    """
    fsspec_core = import_optional("fsspec.core", "reading folders and URLs", "ray")
    file_system, path = fsspec_core.url_to_fs(location)
    return file_system, path


def list_source_files(source: str | os.PathLike[str]) -> list[SourceFile]:
    """List the recordings of a source, sorted or in the order of the manifest or Parquet file, each name once.

    Args:
        source: a folder or URL of a folder with audio files or Parquet files; a NeMo manifest (`.json` or `.jsonl`); or
            a Parquet file with a column of bytes or paths.

    Returns:
        The recordings. A file of a folder has its path relative to the folder as name, a line of a manifest and a row
        with a path have this path, and a row with bytes has its path if all rows have different ones, otherwise the
        name of the Parquet file and the number of the row.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: the source contains no recording, or it cannot be read.
    """
    location = os.fspath(source)
    file_system, path = open_file_system(location)
    if not file_system.exists(path):
        raise FileNotFoundError(f"there is no file or folder {location}: correct the path")
    if file_system.isdir(path):
        files = list(_list_folder(location, file_system, path))
    elif path.endswith(MANIFEST_SUFFIXES):
        files = list(_read_manifest(location, file_system, path))
    elif path.endswith(PARQUET_SUFFIX):
        files = list(_list_parquet_rows(location, file_system, path))
    else:
        raise ValueError(
            f"the source must be a folder, a manifest (.json, .jsonl) or a Parquet file, got {location}: for single "
            "files use `parakeet transcribe`"
        )
    if not files:
        raise ValueError(f"the source must contain a recording, but {location} has none: correct the path")
    by_name: dict[str, SourceFile] = {}
    for file in _make_names_unique(files):
        by_name.setdefault(file.name, file)
    return list(by_name.values())


def _list_folder(location: str, file_system: Any, folder: str) -> Iterator[SourceFile]:
    """Yield the audio and video files of a folder and its sub-folders; without any, the rows of its Parquet files."""
    infos: dict[str, dict[str, Any]] = file_system.find(folder, detail=True)
    media = [path for path in sorted(infos) if path.lower().endswith(MEDIA_SUFFIXES)]
    tables = [path for path in sorted(infos) if path.endswith(PARQUET_SUFFIX)]
    if media and tables:
        raise ValueError(
            f"a folder must contain audio files or Parquet files, but {location} contains {len(media)} audio files and "
            f"{len(tables)} Parquet files: move one kind to another folder"
        )
    for path in media:
        name = os.path.relpath(path, folder).replace(os.sep, "/")
        yield SourceFile(name, _get_location(file_system, path), int(infos[path].get("size") or 0))
    for path in tables:
        yield from _list_parquet_rows(_get_location(file_system, path), file_system, path)


def _get_location(file_system: Any, path: str) -> str:
    """Return the absolute path of a local file, or the URL of another file."""
    is_local = "file" in ([file_system.protocol] if isinstance(file_system.protocol, str) else file_system.protocol)
    return os.path.abspath(path) if is_local else str(file_system.unstrip_protocol(path))


def _join(file_system: Any, path: str, name: str) -> str:
    """Return the location of a recording whose name is relative to the folder of a manifest or Parquet file."""
    if "://" in name or os.path.isabs(name):
        return name
    return f"{_get_location(file_system, path).rpartition('/')[0]}/{name}"


def _read_manifest(location: str, file_system: Any, path: str) -> Iterator[SourceFile]:
    """Yield the recordings of a NeMo manifest: one JSON object per line with `audio_filepath`."""
    with file_system.open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{location}, line {number} must be a JSON object ({error}): correct the line"
                ) from error
            name = entry.get("audio_filepath") if isinstance(entry, dict) else None
            if not isinstance(name, str) or not name:
                raise ValueError(f"{location}, line {number} must have a text `audio_filepath`: add it to the line")
            if entry.get("offset"):
                raise ValueError(
                    f"whole files are transcribed, but {location}, line {number} has the offset {entry['offset']} s: "
                    "write the part to a file of its own"
                )
            size = round(float(entry.get("duration") or 0.0) * BYTES_PER_SECOND)
            yield SourceFile(name, _join(file_system, path, name), size)


def _list_parquet_rows(location: str, file_system: Any, path: str) -> Iterator[SourceFile]:
    """Yield the recordings of a Parquet file; the bytes are not read."""
    parquet = import_optional("pyarrow.parquet", "reading Parquet", "ray")
    with file_system.open(path, "rb") as stream:
        file = parquet.ParquetFile(stream)
        audio_column, name_column = _choose_columns(location, file.schema_arrow)
        names: list[Any] = [None] * file.metadata.num_rows
        if name_column is not None:
            table = file.read(columns=[name_column])
            column = table.column(0)
            if "." in name_column:
                column = table.flatten().column(0)
            names = column.to_pylist()
        size = _mean_size(file.metadata, audio_column)
    for row, name in enumerate(names):
        if audio_column is not None:
            row_name = f"{os.path.basename(path)}#{row}"
            yield SourceFile(name or row_name, _get_location(file_system, path), size, row, audio_column)
        elif not name:
            raise ValueError(f"{location}, row {row} must have a path in the column {name_column}: remove the row")
        else:
            yield SourceFile(name, _join(file_system, path, name))


def _choose_columns(location: str, schema: Any) -> tuple[str | None, str | None]:
    """Return the names of the columns with bytes and with paths or names; `None` for a column that does not exist."""
    types = import_optional("pyarrow", "reading Parquet", "ray").types
    is_text = {field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)}
    path_column = next((name for name in PATH_COLUMNS if name in is_text), None)
    for name in AUDIO_COLUMNS:
        field_type = schema.field(name).type if name in schema.names else None
        if field_type is not None and (types.is_binary(field_type) or types.is_large_binary(field_type)):
            return name, path_column
        # the feature `Audio` of the package datasets
        if field_type is not None and types.is_struct(field_type):
            parts = {field.name for field in field_type}
            if "bytes" in parts:
                return name, f"{name}.path" if "path" in parts else path_column
    if path_column is None:
        raise ValueError(
            f"a Parquet file must have a column of bytes ({', '.join(AUDIO_COLUMNS)}) or of paths "
            f"({', '.join(PATH_COLUMNS)}), but {location} has {', '.join(schema.names)}: rename a column"
        )
    return None, path_column


def _mean_size(metadata: Any, column: str | None) -> int:
    """Return the mean number of bytes of a value of a column, from the metadata of a Parquet file."""
    num_bytes = 0
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            if column is not None and chunk.path_in_schema.split(".")[0] == column:
                num_bytes += chunk.total_uncompressed_size
    return num_bytes // max(1, metadata.num_rows)


def _make_names_unique(files: list[SourceFile]) -> Iterator[SourceFile]:
    """Yield the files; a row of bytes whose name occurs more than once is named by its Parquet file and row."""
    counts = Counter(file.name for file in files)
    for file in files:
        if file.row is not None and counts[file.name] > 1:
            name = f"{os.path.basename(file.location)}#{file.row}"
            yield SourceFile(name, file.location, file.size, file.row, file.column)
        else:
            yield file


def open_source_files(files: Iterable[SourceFile]) -> Iterator[Any]:
    """Yield for each recording what `Transcriber` reads: a path, an http URL, a `RemoteFile`, or a dict with bytes.

    Args:
        files: the recordings. The rows of one Parquet file that follow each other are read together.

    Raises:
        OSError: a Parquet file cannot be read.
    """
    pending = list(files)
    contents: dict[tuple[str, int], Any] = {}
    for file in pending:
        if file.row is None:
            yield RemoteFile(file.location) if is_remote(file.location) else file.location
            continue
        if (file.location, file.row) not in contents:
            contents = read_parquet_rows(file, {other.row for other in pending if other.location == file.location})
        yield contents.pop((file.location, file.row))


def read_parquet_rows(file: SourceFile, rows: set[int | None]) -> dict[tuple[str, int], Any]:
    """Read the bytes of several rows of a Parquet file.

    Args:
        file: a recording in the Parquet file.
        rows: the rows.

    Returns:
        For each location and row, a dict with `bytes` and `path`.
    """
    parquet = import_optional("pyarrow.parquet", "reading Parquet", "ray")
    file_system, path = open_file_system(file.location)
    contents: dict[tuple[str, int], Any] = {}
    with file_system.open(path, "rb") as stream:
        table = parquet.ParquetFile(stream)
        start = 0
        for group in range(table.metadata.num_row_groups):
            stop = start + table.metadata.row_group(group).num_rows
            if any(row is not None and start <= row < stop for row in rows):
                row = start
                for batch in table.iter_batches(ROWS_PER_READ, row_groups=[group], columns=[file.column]):
                    for index in range(batch.num_rows):
                        if row + index in rows:
                            value = batch.column(0)[index].as_py()
                            contents[file.location, row + index] = _to_audio(value, file, row + index)
                    row += batch.num_rows
            start = stop
    return contents


def _to_audio(value: Any, file: SourceFile, row: int) -> dict[str, Any]:
    """Convert a value of a Parquet column, bytes or a dict, to a dict with `bytes` and `path`."""
    content = value.get("bytes") if isinstance(value, Mapping) else value
    # a row without bytes is an error of this row: its content is empty
    return {"bytes": b"" if content is None else content, "path": f"{os.path.basename(file.location)}#{row}"}


__all__ = ["MEDIA_SUFFIXES", "RemoteFile", "SourceFile", "is_remote", "list_source_files", "open_source_files"]
