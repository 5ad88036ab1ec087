"""Where clips for training and evaluation come from: datasets, Hub names, folders, NeMo manifests.

Rows go to `SpeechCollator` in `training.py` as they are; decoding is for `audio.py`.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .audio import AudioError, load_audio

MANIFESTS = (".json", ".jsonl")
AUDIO_COLUMNS = ("audio", "audio_filepath", "file", "path")
# files in which libsndfile finds a sample without decoding what lies before; `load_audio` reads them with it, too
SEEKABLE = {".wav", ".flac", ".aiff", ".au"}
TEXT_COLUMNS = ("text", "transcription", "sentence", "transcript", "normalized_text")


def load_speech(
    source: Any,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    audio_column: str | None = None,
    text_column: str | None = None,
) -> Any:
    """Open a set of clips with transcripts.

    Args:
        source: a `datasets` dataset; a NeMo manifest (`.json` or `.jsonl`); a folder that `save_to_disk` wrote; a
            folder of audio with a `metadata.csv` or `metadata.jsonl`; or the name of a dataset on the Hub.
        split: which part of it.
        name: the configuration of a Hub dataset.
        streaming: read while training instead of downloading first.
        audio_column: column of the audio; default the first of `AUDIO_COLUMNS` that there is.
        text_column: column of the transcripts; default the first of `TEXT_COLUMNS`.

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
            return ClipRows(read_manifest(Path(source)))
    datasets = _datasets()
    if not isinstance(source, (str, Path)):
        found = source
    elif Path(source).suffix in (".json", ".jsonl"):
        found = datasets.Dataset.from_list(read_manifest(Path(source)))
        found = found.to_iterable_dataset() if streaming else found
    elif (Path(source) / "state.json").exists() or (Path(source) / "dataset_dict.json").exists():
        found = datasets.load_from_disk(str(source))
    elif Path(source).is_dir():
        found = datasets.Dataset.from_list(read_folder(Path(source), split))
        found = found.to_iterable_dataset() if streaming else found
    else:
        found = datasets.load_dataset(str(source), name, split=split, streaming=streaming)
    if isinstance(found, dict):
        if split not in found:
            raise ValueError(f"the split must be one of {', '.join(found)}, got {split!r}: choose another")
        found = found[split]
    return _with_standard_columns(found, datasets, audio_column, text_column)


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
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            audio, text = str(path.parent / entry["audio_filepath"]), str(entry["text"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: a manifest line must be a JSON object with `audio_filepath` and `text` "
                f"({type(error).__name__}: {error}); correct it"
            ) from error
        rows.append({"audio": audio, "text": text, "duration": entry.get("duration"), "offset": entry.get("offset")})
    if not rows:
        raise ValueError(f"{path} must have at least one line, and is empty")
    return rows


def read_folder(folder: Path, split: str) -> list[dict[str, Any]]:
    """Read a folder of audio in the layout of the Hub: a metadata file with `file_name` and a transcript per clip.

    Args:
        folder: holds `metadata.csv` or `metadata.jsonl`, or has a subfolder `split` that does.
        split: name of the subfolder.

    Returns:
        The lines of the metadata, with the path of the clip as `audio`.

    Raises:
        ValueError: there is no metadata file, or it has no column `file_name`.
    """
    for parent in (folder / split, folder):
        for path in (parent / "metadata.csv", parent / "metadata.jsonl"):
            if not path.exists():
                continue
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, file))
            if not rows or any("file_name" not in row for row in rows):
                raise ValueError(f"every line of {path} must have a `file_name`: add it, relative to the file's folder")
            return [
                {**{k: v for k, v in row.items() if k != "file_name"}, "audio": str(parent / row["file_name"])}
                for row in rows
            ]
    raise ValueError(
        f"a folder of audio must have a metadata.csv or metadata.jsonl with `file_name` and a transcript, in it or in "
        f"its subfolder {split!r}: {folder} has none; write one"
    )


def read_clip(row: Mapping[str, Any], sampling_rate: int) -> npt.NDArray[np.float32]:
    """Decode the audio of a row.

    Args:
        row: `audio`; with an `offset`, only `duration` seconds from there on.
        sampling_rate: Hz of the result.

    Returns:
        (S,) float32 samples.

    Raises:
        AudioError: it cannot be read, or ends before the offset.
    """
    rate = row.get("sampling_rate")
    offset = row.get("offset")
    if offset is None:
        return load_audio(row["audio"], rate, target_rate=sampling_rate)
    part = _read_part(row["audio"], offset, row.get("duration"), sampling_rate)
    if not len(part):
        raise AudioError(f"the clip must reach beyond its offset of {offset} s, and does not: correct the manifest")
    return part


def _read_part(audio: Any, offset: float, duration: float | None, sampling_rate: int) -> npt.NDArray[np.float32]:
    """Decode some seconds of a file; of a long one only these, where libsndfile can seek in it."""
    import soundfile

    if isinstance(audio, str) and Path(audio).suffix.lower() in SEEKABLE:
        with contextlib.suppress(soundfile.LibsndfileError), soundfile.SoundFile(audio) as file:
            file.seek(min(round(offset * file.samplerate), file.frames))
            frames = -1 if duration is None else round(duration * file.samplerate)
            return load_audio(file.read(frames, dtype="float32"), file.samplerate, target_rate=sampling_rate)
    # decoded as a whole, which also says what is wrong with a broken file
    samples = load_audio(audio, target_rate=sampling_rate)
    end = len(samples) if duration is None else round((offset + duration) * sampling_rate)
    return samples[round(offset * sampling_rate) : end]


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
        if row.get("duration") is not None:
            return {"duration": float(row["duration"])}
        try:
            return {"duration": len(read_clip(row, sampling_rate)) / sampling_rate}
        except (OSError, ValueError):
            return {"duration": 0.0}

    if "duration" in dataset.column_names and None not in dataset["duration"]:
        return dataset
    return dataset.map(measure, desc="durations")


__all__ = ["add_durations", "clip_durations", "load_speech", "read_folder", "read_manifest"]
