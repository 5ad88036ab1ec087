"""Open speech datasets: NeMo manifests, folders of audio, `datasets` datasets, and datasets of the Hub.

Lines of manifests are parsed in `manifests.py`. Audio stays encoded until `clips.py` reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .extras import import_optional
from .manifests import SplitRequest, read_folder, read_manifest

MANIFEST_SUFFIXES = (".json", ".jsonl")
AUDIO_COLUMNS = ("audio", "audio_filepath", "file", "path")
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
    """Open a dataset of clips with transcripts.

    Args:
        source: a `datasets` dataset; a NeMo manifest (`.json` or `.jsonl`); a folder that `save_to_disk` wrote; a
            folder of audio with a `metadata.csv` or `metadata.jsonl`; or the name of a dataset on the Hub.
        split: the split to open; None for `default_split`. Data without splits, such as a manifest, counts as
            `"train"`.
        name: configuration of a Hub dataset; None for its default.
        streaming: whether to read the data during training instead of downloading it first.
        audio_column: column of the audio; None for the first of `AUDIO_COLUMNS` that the data has.
        text_column: column of the transcripts; None for the first of `TEXT_COLUMNS` that the data has.
        default_split: the split to open if `split` is None and the data has splits.

    Returns:
        A `datasets` dataset, or `ClipRows` for a manifest if the package `datasets` is not installed. Its columns are
        `audio` (encoded), `text`, and all others of the source.

    Raises:
        FileNotFoundError: `source` is a path, and there is no such file or folder.
        ValueError: there is no such column or split, or a line of the manifest is invalid.
        ImportError: `datasets` is needed and not installed.
    """
    request = SplitRequest(split or default_split, is_explicit=split is not None)
    if isinstance(source, (str, Path)):
        check_source(source)
        if Path(source).suffix in MANIFEST_SUFFIXES and not streaming and find_spec("datasets") is None:
            request.check_undivided(source)
            return ClipRows(read_manifest(Path(source)))
        dataset = open_path(source, request, name, streaming)
    else:
        dataset = select_split(source, f"the {type(source).__name__}", request)
    return rename_columns(dataset, audio_column, text_column)


def open_path(source: str | Path, split: SplitRequest, name: str | None, streaming: bool) -> Any:
    """Open a manifest, a folder or a Hub dataset as a `datasets` dataset.

    Args:
        source: the path or Hub name.
        split: the split to open.
        name: configuration of a Hub dataset; None for its default.
        streaming: whether to return an `IterableDataset`; ignored for folders that `save_to_disk` wrote.

    Raises:
        ValueError: there is no such split, or a line is invalid.
    """
    datasets = import_optional("datasets", "this data")
    path = Path(source)
    if path.suffix in MANIFEST_SUFFIXES:
        split.check_undivided(path)
        rows = read_manifest(path)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return select_split(datasets.load_from_disk(str(path)), path, split)
    elif path.is_dir():
        rows = read_folder(path, split)
    else:
        return datasets.load_dataset(str(source), name, split=split.name, streaming=streaming)
    dataset = datasets.Dataset.from_list(rows)
    return dataset.to_iterable_dataset() if streaming else dataset


def select_split(dataset: Any, source: Any, split: SplitRequest) -> Any:
    """Return the requested split of a `DatasetDict`, or a single dataset after checking its split.

    Args:
        dataset: a `datasets` dataset or a dict of them.
        source: where the dataset comes from, for error messages.
        split: the split to return.

    Raises:
        ValueError: there is no such split.
    """
    if isinstance(dataset, dict):
        if split.name not in dataset:
            raise ValueError(f"the split must be one of {', '.join(dataset)}, got {split.name!r}: choose one of these")
        return dataset[split.name]
    split.check_undivided(source, str(getattr(dataset, "split", None) or "train"))
    return dataset


def check_source(source: str | Path) -> None:
    """Refuse a path that does not exist, because it would otherwise be looked up as a dataset of the Hub.

    Args:
        source: a path or the name of a Hub dataset.

    Raises:
        FileNotFoundError: nothing exists there, and the text is not a valid Hub name, has a file suffix, or starts with
            the name of a local folder.
    """
    path, text = Path(source), str(source)
    if path.exists():
        return
    may_be_hub_name = isinstance(source, str) and text.count("/") <= 1 and not path.suffix[1:].isalpha()
    if may_be_hub_name:
        with contextlib.suppress(HFValidationError):
            validate_repo_id(text)
            if "/" not in text or not path.parent.is_dir():
                return
    raise FileNotFoundError(
        f"there is no file or folder {text}: correct the path, or name a dataset of the Hub as `org/name`"
    )


class ClipRows(Sequence[dict[str, Any]]):
    """The rows of a manifest, with the part of the `datasets.Dataset` interface that training and evaluation use.

    Args:
        rows: the rows that `read_manifest` returned.
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
        """Return the row with an index, or the column with a name as a list."""
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def map(self, function: Callable[[dict[str, Any]], dict[str, Any]], **_: Any) -> ClipRows:
        """Return rows to which the fields that `function` returns for each row have been added."""
        return ClipRows([{**row, **function(row)} for row in self.rows])


def rename_columns(dataset: Any, audio_column: str | None, text_column: str | None) -> Any:
    """Rename the columns of audio and transcripts to `audio` and `text`, without decoding the audio.

    Args:
        dataset: a `datasets` dataset, streamed or not.
        audio_column: column of the audio; None to detect it.
        text_column: column of the transcripts; None to detect it.

    Returns:
        The dataset with renamed columns. A column that already has the new name is dropped.

    Raises:
        ValueError: there is no such column.
    """
    datasets = import_optional("datasets", "this data")
    # a stream with unknown features reveals its columns only in its first row
    columns = dataset.column_names or list(next(iter(dataset)))
    audio = find_column("audio", audio_column, AUDIO_COLUMNS, columns)
    text = find_column("text", text_column, TEXT_COLUMNS, columns)
    if isinstance((dataset.features or {}).get(audio), datasets.Audio):
        # an `Audio` column of a stream may need torchcodec even with `decode=False`; its storage type does not
        encoded_type = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        dataset = dataset.cast_column(audio, encoded_type)
    for old_name, new_name in ((audio, "audio"), (text, "text")):
        if old_name == new_name:
            continue
        if new_name in columns:
            dataset = dataset.remove_columns(new_name)
        dataset = dataset.rename_column(old_name, new_name)
    return dataset


def find_column(kind: str, requested: str | None, usual_names: Sequence[str], columns: Sequence[str]) -> str:
    """Return the requested column, or the first of the usual names, if the dataset has it.

    Args:
        kind: `"audio"` or `"text"`, for the error message.
        requested: name that the caller gave; None to try the usual names.
        usual_names: names to try, in order.
        columns: columns of the dataset.

    Raises:
        ValueError: the dataset has none of the names.
    """
    for name in [requested] if requested else usual_names:
        if name in columns:
            return name
    raise ValueError(
        f"the data must have a column of {kind}, and has {', '.join(columns)}: name the column with `{kind}_column`"
    )


__all__ = ["load_speech"]
