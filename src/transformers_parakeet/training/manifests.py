"""Parse NeMo manifests, and the metadata files of folders of audio.

Audio is not read here; other kinds of data are opened in `data.py`.
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
    """Convert the value of a time field to seconds.

    Args:
        value: a number, text (CSV files hold numbers as text) or None.
        field_name: name of the field, for the error message.

    Returns:
        The seconds, or None if the value is None or empty text.

    Raises:
        ValueError: the value is not a finite number, or is negative.
    """
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"`{field_name}` must be a number of seconds, at least 0, got {value!r}: correct it")
    return seconds


@dataclass(frozen=True)
class SplitRequest:
    """The split of a dataset to open.

    Args:
        name: name of the split, such as `"train"`.
        is_explicit: whether the caller named the split. If not, `name` is a default, and data that is not divided into
            splits is opened as it is.
    """

    name: str
    is_explicit: bool = True

    def check_undivided(self, source: Any, split_name: str = "train") -> None:
        """Refuse data that is a single split if the caller asked for a different split.

        Args:
            source: the data, for the error message.
            split_name: name of its only split; `"train"` is accepted for every source.

        Raises:
            ValueError: the caller named another split.
        """
        if self.is_explicit and self.name not in (split_name, "train"):
            raise ValueError(
                f"{source} has no split {self.name!r}: it is a single set of clips; omit the split, or name other data"
            )


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Read a NeMo manifest: one JSON object per line with `audio_filepath`, `text` and usually `duration`.

    Args:
        path: the manifest; relative audio paths are relative to its folder.

    Returns:
        Rows with `audio` (a path), `text`, `duration` (seconds or None) and `offset` (seconds or None).

    Raises:
        ValueError: the file is empty, a line is not a JSON object, or a field is missing; the message has the line
            number.
    """
    rows = []
    for location, entry in read_json_lines(path):
        missing = [f"`{name}`" for name in ("audio_filepath", "text") if entry.get(name) is None]
        if missing:
            raise ValueError(
                f"{location}: a manifest line must have `audio_filepath` and `text`: add {' and '.join(missing)}"
            )
        audio_path = path.parent / str(entry["audio_filepath"])
        rows.append({"audio": str(audio_path), "text": str(entry["text"]), **parse_times(entry, location)})
    if not rows:
        raise ValueError(f"{path} must have at least one line, got an empty file: add clips, or name another file")
    return rows


def read_folder(folder: Path, split: SplitRequest) -> list[dict[str, Any]]:
    """Read a folder of audio in the layout of the Hub's AudioFolder.

    The metadata file `metadata.csv` or `metadata.jsonl` names a clip (`file_name`) and its transcript per line. It is
    in a subfolder with the name of the split, or in the folder itself.

    Args:
        folder: the folder.
        split: the split to read.

    Returns:
        One row per line of the metadata file, with the path of the clip as `audio` in place of `file_name`.

    Raises:
        ValueError: there is no metadata file or no such split, or a line is invalid.
    """
    for metadata_folder in (folder / split.name, folder):
        for path in (metadata_folder / "metadata.csv", metadata_folder / "metadata.jsonl"):
            if not path.exists():
                continue
            if metadata_folder == folder:
                split.check_undivided(folder)
            rows = [convert_metadata(entry, location, path.parent) for location, entry in read_metadata(path)]
            if not rows:
                raise ValueError(f"{path} must have at least one clip, got none: add lines to it")
            return rows
    raise ValueError(
        f"a folder of audio must have a metadata.csv or metadata.jsonl with `file_name` and a transcript per clip, in "
        f"the folder or in its subfolder {split.name!r}, and {folder} has neither: write one"
    )


def convert_metadata(entry: Mapping[str, Any], location: str, folder: Path) -> dict[str, Any]:
    """Convert one line of a metadata file to a row.

    Args:
        entry: the fields of the line.
        location: file and line number, for error messages.
        folder: folder to which `file_name` is relative.

    Returns:
        The fields, with the path of the clip as `audio` in place of `file_name`, and times as numbers.

    Raises:
        ValueError: `file_name` is missing, or a time is invalid.
    """
    if not entry.get("file_name"):
        raise ValueError(f"{location}: every line must have a `file_name`: add it, relative to the folder of the file")
    other_fields = {name: value for name, value in entry.items() if name != "file_name"}
    times = {name: seconds for name, seconds in parse_times(entry, location).items() if name in entry}
    return {**other_fields, **times, "audio": str(folder / entry["file_name"])}


def read_metadata(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the lines of a metadata file in CSV or JSON-lines format.

    Args:
        path: the file; its suffix `.csv` means CSV.

    Yields:
        The location (file and line number, for error messages) and the fields of each line.

    Raises:
        ValueError: a line is invalid.
    """
    if path.suffix != ".csv":
        yield from read_json_lines(path)
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for entry in reader:
            location = f"{path}, line {reader.line_num}"
            # `csv` stores surplus values under the key None
            if None in entry:
                raise ValueError(f"{location}: the line has more values than the header: quote texts with commas")
            yield location, entry


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the JSON objects of a file with one object per line; blank lines are skipped.

    Args:
        path: the file.

    Yields:
        The location (file and line number, for error messages) and the object of each line.

    Raises:
        ValueError: a line is not a JSON object.
    """
    # `splitlines` would also split at U+2028, U+0085 and others, which JSON allows inside a string
    for line_number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        location = f"{path}, line {line_number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{location}: the line must be a JSON object, correct it ({error})") from error
        if not isinstance(entry, dict):
            type_name = type(entry).__name__
            # invalid data is a ValueError, also if its type is wrong
            raise ValueError(  # noqa: TRY004
                f"{location}: the line must be a JSON object, got {type_name}: correct it"
            )
        yield location, entry


def parse_times(entry: Mapping[str, Any], location: str) -> dict[str, float | None]:
    """Return `duration` and `offset` of a line in seconds, None where they are missing or empty.

    Args:
        entry: the fields of the line.
        location: file and line number, for error messages.

    Raises:
        ValueError: a time is not a number of seconds; the message begins with the location.
    """
    try:
        return {name: parse_seconds(entry.get(name), name) for name in ("duration", "offset")}
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error


__all__ = ["SplitRequest", "read_folder", "read_manifest"]
