"""Where clips for training and evaluation come from: datasets, Hub names, folders, NeMo manifests.

Rows go to `SpeechCollator` in `training.py` as they are; decoding is for `audio.py`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..audio import AudioError, load_audio

MANIFESTS = (".json", ".jsonl")
AUDIO_COLUMNS = ("audio", "audio_filepath", "file", "path")
# files in which libsndfile finds a sample without decoding what lies before; `load_audio` reads them with it, too
SEEKABLE = {".wav", ".flac", ".aiff", ".au"}
# seconds that a stated duration may lack because it was rounded
ROUNDING_S = 0.01
TEXT_COLUMNS = ("text", "transcription", "sentence", "transcript", "normalized_text")


def load_speech(
    source: Any,
    split: str | None = None,
    name: str | None = None,
    streaming: bool = False,
    audio_column: str | None = None,
    text_column: str | None = None,
    default_split: str = "train",
) -> Any:
    """Open a set of clips with transcripts.

    Args:
        source: a `datasets` dataset; a NeMo manifest (`.json` or `.jsonl`); a folder that `save_to_disk` wrote; a
            folder of audio with a `metadata.csv` or `metadata.jsonl`; or the name of a dataset on the Hub.
        split: which part of it. A source without splits, such as a manifest, counts as its own split `"train"`.
        name: the configuration of a Hub dataset.
        streaming: read while training instead of downloading first.
        audio_column: column of the audio; default the first of `AUDIO_COLUMNS` that the source has.
        text_column: column of the transcripts; default the first of `TEXT_COLUMNS`.
        default_split: the split of a source with splits when `split` is None.

    Returns:
        A `datasets` dataset, or `ClipRows` of a manifest where that package is missing, with the columns `audio` (not
        decoded) and `text`, and all others of the source.

    Raises:
        FileNotFoundError: a text that can only be a path names no file or folder.
        ValueError: no such column or split, or a manifest line that cannot be used.
    """
    if isinstance(source, (str, Path)):
        check_source(source)
        if Path(source).suffix in MANIFESTS and not streaming and find_spec("datasets") is None:
            if split is not None:
                _check_only_split(source, split)
            return ClipRows(read_manifest(Path(source)))
    dataset = _open(source, split or default_split, split is not None, name, streaming)
    return _with_standard_columns(dataset, _datasets(), audio_column, text_column)


def _open(source: Any, split: str, named: bool, name: str | None, streaming: bool) -> Any:
    """Open a split of a source; a source without splits is opened whole if the split was not named by the caller."""
    datasets = _datasets()
    if not isinstance(source, (str, Path)):
        return _choose_split(source, f"the {type(source).__name__}", split, named)
    path = Path(source)
    if path.suffix in MANIFESTS:
        if named:
            _check_only_split(path, split)
        rows = read_manifest(path)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _choose_split(datasets.load_from_disk(str(path)), path, split, named)
    elif path.is_dir():
        rows = read_folder(path, split, named)
    else:
        return datasets.load_dataset(str(source), name, split=split, streaming=streaming)
    whole = datasets.Dataset.from_list(rows)
    return whole.to_iterable_dataset() if streaming else whole


def _choose_split(dataset: Any, source: Any, split: str, named: bool) -> Any:
    """Return the split of a dict of datasets; check the split of a single dataset."""
    if isinstance(dataset, dict):
        if split not in dataset:
            raise ValueError(f"the split must be one of {', '.join(dataset)}, got {split!r}: choose another")
        return dataset[split]
    if named:
        _check_only_split(source, split, str(getattr(dataset, "split", None) or "train"))
    return dataset


def _check_only_split(source: Any, split: str, own: str = "train") -> None:
    """Refuse to return a source that has one split when another split was asked for."""
    if split not in (own, "train"):
        raise ValueError(
            f"{source} has no split {split!r}: it is a single set of clips; leave the split out, or name other data"
        )


def check_source(source: str | Path) -> None:
    """Refuse a mistyped path, which would otherwise be looked for among the datasets of the Hub.

    Raises:
        FileNotFoundError: the text is no name of a Hub dataset, has the ending of a file, or lies in a local folder.
    """
    path, text = Path(source), str(source)
    if path.exists():
        return
    is_name = isinstance(source, str) and text.count("/") <= 1 and not path.suffix[1:].isalpha()
    if is_name:
        with contextlib.suppress(HFValidationError):
            validate_repo_id(text)
            if "/" not in text or not path.parent.is_dir():
                return
    raise FileNotFoundError(
        f"there is no file or folder {text}: correct the path, or name a dataset of the Hub as `org/name`"
    )


class ClipRows(Sequence[dict[str, Any]]):
    """The rows of a manifest, with as much of the interface of `datasets` as training and evaluation use.

    Args:
        rows: see `read_manifest`.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    @property
    def column_names(self) -> list[str]:
        """Names of the fields of a row."""
        return list(self.rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        """Return a row by its number, or a column by its name."""
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def map(self, function: Callable[[dict[str, Any]], dict[str, Any]], **_: Any) -> ClipRows:
        """Return the rows with what a function of each adds to it."""
        return ClipRows([{**row, **function(row)} for row in self.rows])


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "this training data is read by the package datasets, which is not installed: pip install datasets"
        ) from error
    return datasets


def _with_standard_columns(found: Any, datasets: Any, audio_column: str | None, text_column: str | None) -> Any:
    """Call the columns `audio` and `text`, and leave audio encoded."""
    # an iterable dataset of unknown features tells its columns by its first row
    columns = found.column_names or list(next(iter(found)))
    audio = _choose("audio", audio_column, AUDIO_COLUMNS, columns)
    text = _choose("text", text_column, TEXT_COLUMNS, columns)
    if isinstance((found.features or {}).get(audio), datasets.Audio):
        # even with `decode=False` an audio column of a stream may ask for torchcodec; what it holds does not
        found = found.cast_column(audio, {"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    for old, new in ((audio, "audio"), (text, "text")):
        if old != new:
            found = (found.remove_columns(new) if new in columns else found).rename_column(old, new)
    return found


def _choose(kind: str, asked: str | None, usual: Sequence[str], columns: Sequence[str]) -> str:
    for name in [asked] if asked else usual:
        if name in columns:
            return name
    raise ValueError(f"the data needs a column of {kind}, and has {', '.join(columns)}: name it with `{kind}_column`")


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Read a NeMo manifest: one JSON object per line with `audio_filepath`, `text` and usually `duration`.

    Args:
        path: the file; relative audio paths start from its folder.

    Returns:
        Rows with `audio`, `text`, `duration` (seconds or None) and `offset` (seconds or None).

    Raises:
        ValueError: a line is no JSON object, or lacks a field; the message has its number.
    """
    rows = []
    for place, entry in _json_lines(path):
        missing = " and ".join(repr(name) for name in ("audio_filepath", "text") if entry.get(name) is None)
        if missing:
            raise ValueError(f"{place}: a manifest line must have `audio_filepath` and `text`, add {missing}")
        seconds = _seconds_of(entry, place)
        rows.append({"audio": str(path.parent / str(entry["audio_filepath"])), "text": str(entry["text"]), **seconds})
    if not rows:
        raise ValueError(f"{path} must have at least one line, and is empty")
    return rows


def read_folder(folder: Path, split: str, named: bool = False) -> list[dict[str, Any]]:
    """Read a folder of audio in the layout of the Hub: a metadata file with `file_name` and a transcript per clip.

    Args:
        folder: holds `metadata.csv` or `metadata.jsonl`, or has a subfolder `split` that does.
        split: name of the subfolder.
        named: refuse metadata in the folder itself when the caller asked for another split than `"train"`.

    Returns:
        The lines of the metadata, with the path of the clip as `audio`.

    Raises:
        ValueError: the folder has no metadata file or no such split, or a line has no `file_name`.
    """
    for parent in (folder / split, folder):
        for path in (parent / "metadata.csv", parent / "metadata.jsonl"):
            if not path.exists():
                continue
            if named and parent == folder:
                _check_only_split(folder, split)
            rows = [_metadata_row(row, place, parent) for place, row in _metadata_lines(path)]
            if not rows:
                raise ValueError(f"{path} must have at least one clip, and has none")
            return rows
    raise ValueError(
        f"a folder of audio must have a metadata.csv or metadata.jsonl with `file_name` and a transcript, in it or in "
        f"its subfolder {split!r}: {folder} has none; write one"
    )


def _metadata_row(row: Mapping[str, Any], place: str, parent: Path) -> dict[str, Any]:
    """Turn a line of metadata into a row of training data."""
    if not row.get("file_name"):
        raise ValueError(f"{place}: every line must have a `file_name`: add it, relative to the file's folder")
    others = {name: value for name, value in row.items() if name != "file_name"}
    seconds = {name: value for name, value in _seconds_of(row, place).items() if name in row}
    return {**others, **seconds, "audio": str(parent / row["file_name"])}


def _metadata_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the lines of a CSV or JSON file, each with its place for messages."""
    if path.suffix != ".csv":
        yield from _json_lines(path)
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:
                raise ValueError(f"{place}: the line has more values than the header has names: quote commas in texts")
            yield place, row


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the JSON objects of a file, one per line, each with its place for messages; skip blank lines."""
    # not `splitlines`, which also splits at U+2028, U+0085 and others that JSON allows inside a string
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: the line must be a JSON object, correct it ({error})") from error
        if not isinstance(entry, dict):
            given = type(entry).__name__
            # the value of a line is data, and wrong data is a ValueError
            raise ValueError(f"{place}: the line must be a JSON object, got {given}: correct it")  # noqa: TRY004
        yield place, entry


def _seconds_of(row: Mapping[str, Any], place: str) -> dict[str, float | None]:
    """Return `duration` and `offset` of a row as numbers, None where they are missing or empty."""
    try:
        return {name: as_seconds(row.get(name), name) for name in ("duration", "offset")}
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def as_seconds(value: Any, name: str) -> float | None:
    """Read a number of seconds, which a CSV file has as text.

    Args:
        value: a number, text, or nothing.
        name: of the field, for the message.

    Returns:
        The seconds; None for None and for empty text.

    Raises:
        ValueError: the value is no finite number, or is negative.
    """
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"`{name}` must be a number of seconds, at least 0, got {value!r}: correct it")
    return seconds


def read_clip(row: Mapping[str, Any], sampling_rate: int) -> npt.NDArray[np.float32]:
    """Decode the audio of a row.

    As in NeMo, a row with a `duration` is cut to so many seconds, with or without an `offset`; 0 means unknown.
    Unlike NeMo, a part that ends within `ROUNDING_S` of the clip's end goes up to the end.

    Args:
        row: `audio`, and for a part of it `offset` and `duration` in seconds.
        sampling_rate: Hz of the result.

    Returns:
        (S,) float32 samples.

    Raises:
        AudioError: the audio cannot be read, or ends before the offset, or offset and duration are no seconds.
    """
    try:
        offset, duration = as_seconds(row.get("offset"), "offset"), as_seconds(row.get("duration"), "duration")
    except ValueError as error:
        raise AudioError(str(error)) from error
    rate = row.get("sampling_rate")
    if not offset and not duration:
        return load_audio(row["audio"], rate, target_rate=sampling_rate)
    part = _read_part(row["audio"], rate, offset or 0.0, duration or math.inf, sampling_rate)
    if offset and not len(part):
        raise AudioError(f"the clip must reach beyond its offset of {offset:g} s, and does not: correct the manifest")
    return part


def _read_part(
    audio: Any, rate: int | None, offset: float, duration: float, sampling_rate: int
) -> npt.NDArray[np.float32]:
    """Decode some seconds of a clip; of a long file only these, where libsndfile can seek in it."""
    import soundfile

    if isinstance(audio, str) and Path(audio).suffix.lower() in SEEKABLE:
        with contextlib.suppress(soundfile.LibsndfileError), soundfile.SoundFile(audio) as file:
            start, stop = _part_bounds(offset, duration, file.samplerate, file.frames)
            # a header that states no length is for `load_audio`, as is a file that is read whole
            if file.frames and stop - start < file.frames:
                file.seek(start)
                channels = file.read(stop - start, dtype="float32", always_2d=True)
                samples = channels.mean(axis=1, dtype=np.float32)
                return load_audio(samples, file.samplerate, target_rate=sampling_rate)
    # decoded as a whole, which also says what is wrong with a broken file
    samples = load_audio(audio, rate, target_rate=sampling_rate)
    start, stop = _part_bounds(offset, duration, sampling_rate, len(samples))
    return samples[start:stop]


def _part_bounds(offset: float, duration: float, rate: int, samples: int) -> tuple[int, int]:
    """Return first and last (exclusive) sample of a part of a clip."""
    start = min(round(offset * rate), samples)
    end = (offset + duration) * rate
    return start, samples if end > samples - ROUNDING_S * rate else max(start, round(end))


def clip_name(row: Mapping[str, Any], position: int) -> str:
    """Name a row in messages: its file or id, else its place in the batch."""
    audio = row.get("audio")
    if isinstance(audio, Mapping):
        audio = audio.get("path")
    named = audio if isinstance(audio, (str, Path)) else row.get("id")
    return str(named) if named else f"clip {position} of the batch"


def clip_durations(dataset: Any) -> list[float]:
    """Return the seconds of every clip, from a column or attribute `duration`.

    Raises:
        ValueError: the dataset is streamed, or has no durations.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError("batches by duration need a dataset with a length, this one is streamed: set a batch size")
    if "duration" in (getattr(dataset, "column_names", None) or ()):
        found = list(dataset["duration"])
    else:
        found = list(getattr(dataset, "durations", ()))
    if len(found) != len(dataset) or None in found:
        raise ValueError(
            "batches by duration need a column `duration` in seconds without gaps: add it with `add_durations`"
        )
    return found


def add_durations(dataset: Any, sampling_rate: int = 16000) -> Any:
    """Give a `datasets` dataset a column `duration` where it has none, by decoding every clip once.

    A clip that cannot be read counts as 0 s: what becomes of it is for the collator to say.
    """

    def measure(row: dict[str, Any]) -> dict[str, float]:
        try:
            stated = as_seconds(row.get("duration"), "duration")
            return {"duration": stated if stated is not None else len(read_clip(row, sampling_rate)) / sampling_rate}
        except (OSError, ValueError):
            return {"duration": 0.0}

    if "duration" in dataset.column_names and None not in dataset["duration"]:
        return dataset
    return dataset.map(measure, desc="durations")


__all__ = ["add_durations", "clip_durations", "load_speech", "read_folder", "read_manifest"]
