"""Parse NeMo manifests, and the metadata files of folders of audio.

Audio is decoded in `clips.py`; other kinds of datasets are opened in `data.py`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def parse_seconds(value: Any, field_name: str) -> float | None:
    """Convert the value of a time field to a number of seconds.

    Args:
        value: a number, a string (from a CSV file) or None.
        field_name: name of the field, used in the error message.

    Returns:
        The number of seconds; None if the value is None or an empty string.

    Raises:
        ValueError: the value is not a finite, non-negative number.
    """
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"`{field_name}` must be a non-negative number of seconds, got {value!r}: correct it")
    return seconds


@dataclass(frozen=True)
class SplitRequest:
    """Name of the dataset split to open, and whether the user chose it.

    Args:
        name: name of the split, such as `"train"`.
        is_explicit: whether the user named the split. If False, `name` is a default value, and data without splits is
            opened whatever the name.
    """

    name: str
    is_explicit: bool = True

    def check_single_split(self, source: Any, split_name: str = "train") -> None:
        """Check that the requested split is the only split of the data.

        Args:
            source: path or description of the data, used in the error message.
            split_name: name of the only split of the data. `"train"` is always accepted as well.

        Raises:
            ValueError: the user requested a split with a different name.
        """
        if self.is_explicit and self.name not in (split_name, "train"):
            raise ValueError(
                f"{source} has no split {self.name!r}, because it is a single set of clips: omit the split, or choose "
                "other data"
            )


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Read a NeMo manifest: one JSON object per line with `audio_filepath`, `text` and usually `duration`.

    Args:
        path: path of the manifest. Relative audio paths are resolved against the folder of the manifest.

    Returns:
        One dict per line, with `audio` (a path), `text`, `duration` (seconds or None) and `offset` (seconds or None).

    Raises:
        ValueError: the file is empty, a line is not a JSON object, a field is missing, or a time is invalid. The
            message contains the line number.
    """
    rows = []
    for location, entry in read_json_lines(path):
        missing_fields = [f"`{name}`" for name in ("audio_filepath", "text") if entry.get(name) is None]
        if missing_fields:
            raise ValueError(
                f"{location}: a manifest line must have `audio_filepath` and `text`: add {' and '.join(missing_fields)}"
            )
        audio_path = path.parent / str(entry["audio_filepath"])
        rows.append({"audio": str(audio_path), "text": str(entry["text"]), **parse_times(entry, location)})
    if not rows:
        raise ValueError(f"{path} must have at least one line, got an empty file: add clips, or choose another file")
    return rows


def read_audio_folder(folder: Path, split: SplitRequest) -> list[dict[str, Any]]:
    """Read the metadata of a folder of audio in the AudioFolder layout of the Hub.

    Each line of `metadata.csv` or `metadata.jsonl` gives the audio file of a clip (`file_name`) and its transcript. The
    subfolder with the name of the split is searched first, then the folder itself.

    Args:
        folder: path of the AudioFolder directory.
        split: the requested split.

    Returns:
        One dict per line of the metadata file; `audio` (a path) replaces `file_name`.

    Raises:
        ValueError: there is no metadata file, the data has no such split, or a line is invalid.
    """
    for metadata_folder in (folder / split.name, folder):
        for path in (metadata_folder / "metadata.csv", metadata_folder / "metadata.jsonl"):
            if not path.exists():
                continue
            if metadata_folder == folder:
                # the folder itself is not divided into splits
                split.check_single_split(folder)
            rows = [convert_metadata(entry, location, path.parent) for location, entry in read_metadata(path)]
            if not rows:
                raise ValueError(f"{path} must have at least one line, got none: add the clips to it")
            return rows
    raise ValueError(
        f"{folder} must contain a metadata.csv or metadata.jsonl (or its subfolder {split.name!r} must), and has none: "
        "create one with `file_name` and a transcript for each clip"
    )


def convert_metadata(entry: Mapping[str, Any], location: str, folder: Path) -> dict[str, Any]:
    """Convert one line of an AudioFolder metadata file to a dataset row.

    Args:
        entry: the fields of the line, by name.
        location: file and line number, used in error messages.
        folder: folder against which `file_name` is resolved.

    Returns:
        The fields of the line, with `audio` (a path) in place of `file_name`. `duration` and `offset` are converted to
        numbers of seconds if the line has them.

    Raises:
        ValueError: `file_name` is missing, or a time is invalid.
    """
    if not entry.get("file_name"):
        raise ValueError(
            f"{location}: every line must have a `file_name`: add it, relative to the folder of the metadata file"
        )
    other_fields = {name: value for name, value in entry.items() if name != "file_name"}
    times = {name: seconds for name, seconds in parse_times(entry, location).items() if name in entry}
    return {**other_fields, **times, "audio": str(folder / entry["file_name"])}


def read_metadata(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the lines of an AudioFolder metadata file.

    Args:
        path: path of the file; CSV if the suffix is `.csv`, JSON lines otherwise.

    Yields:
        For each line, the location (file and line number, used in error messages) and the fields by name.

    Raises:
        ValueError: a line is not a JSON object, or has more values than the CSV header.
    """
    if path.suffix != ".csv":
        yield from read_json_lines(path)
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for entry in reader:
            location = f"{path}, line {reader.line_num}"
            # `csv.DictReader` stores surplus values under the key None
            if None in entry:
                raise ValueError(
                    f"{location}: the line has more values than the header: put texts that contain commas in quotes"
                )
            yield location, entry


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a file with one JSON object per line; skip blank lines.

    Args:
        path: path of the file.

    Yields:
        For each line, the location (file and line number, used in error messages) and the parsed object.

    Raises:
        ValueError: a line is not a JSON object.
    """
    # `splitlines` would also split at characters that JSON allows inside a string, such as U+2028 and U+0085
    for line_number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        location = f"{path}, line {line_number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{location}: the line must be a JSON object ({error}): correct it") from error
        if not isinstance(entry, dict):
            type_name = type(entry).__name__
            # the content of the file is invalid, not the type of an argument, so this is not a TypeError
            raise ValueError(  # noqa: TRY004
                f"{location}: the line must be a JSON object, got {type_name}: correct it"
            )
        yield location, entry


def parse_times(entry: Mapping[str, Any], location: str) -> dict[str, float | None]:
    """Convert the fields `duration` and `offset` of a line to seconds.

    Args:
        entry: the fields of the line, by name.
        location: file and line number, used in the error message.

    Returns:
        `duration` and `offset` in seconds; None for a field that is missing or empty.

    Raises:
        ValueError: a field is not a non-negative number of seconds.
    """
    try:
        return {name: parse_seconds(entry.get(name), name) for name in ("duration", "offset")}
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error


__all__ = ["SplitRequest", "read_audio_folder", "read_manifest"]
