"""Open speech datasets: NeMo manifests, folders of audio, `datasets` datasets, and datasets on the Hub.

Manifests are parsed in `manifests.py`. Audio stays encoded; `clips.py` decodes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..optional_packages import import_optional
from .manifests import SplitRequest, read_audio_folder, read_manifest

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
        source: a `datasets` dataset; a NeMo manifest (`.json` or `.jsonl`); a folder written by `save_to_disk`; a
            folder of audio with a `metadata.csv` or `metadata.jsonl`; or the name of a dataset on the Hub.
        split: name of the split to open; None for `default_split`. Data without splits, such as a manifest, is treated
            as the split `"train"`.
        config_name: configuration name of a Hub dataset; None for the default configuration.
        streaming: whether to read the data during training instead of downloading it first.
        audio_column: column of the audio; None for the first of `AUDIO_COLUMNS` that the data has.
        text_column: column of the transcripts; None for the first of `TEXT_COLUMNS` that the data has.
        default_split: name of the split to open if `split` is None and the data has splits.

    Returns:
        A `datasets` dataset; for a manifest `ClipRows` if the package `datasets` is not installed. The dataset has the
        columns `audio` (encoded) and `text`, and the remaining columns of the source.

    Raises:
        FileNotFoundError: `source` is a path that does not exist.
        ValueError: the data has no such column or split, or a line of the manifest is invalid.
        ImportError: the data needs the package `datasets`, which is not installed.
    """
    request = SplitRequest(split or default_split, is_explicit=split is not None)
    if isinstance(source, (str, Path)):
        check_source(source)
        if Path(source).suffix in MANIFEST_SUFFIXES and not streaming and find_spec("datasets") is None:
            request.check_single_split(source)
            return ClipRows(read_manifest(Path(source)))
        dataset = open_dataset(source, request, name, streaming)
    else:
        dataset = select_split(source, f"the {type(source).__name__}", request)
    return rename_columns(dataset, audio_column, text_column)


def open_dataset(source: str | Path, split: SplitRequest, config_name: str | None, streaming: bool) -> Any:
    """Open a manifest, a folder or a Hub dataset as a `datasets` dataset.

    Args:
        source: path of a manifest or folder, or name of a dataset on the Hub.
        split: the requested split.
        config_name: configuration name of a Hub dataset; None for the default configuration.
        streaming: whether to return an `IterableDataset`; ignored for folders written by `save_to_disk`.

    Raises:
        OSError: the Hub dataset does not exist, or it cannot be downloaded.
        ValueError: the data has no such split, or a line of the manifest or metadata file is invalid.
    """
    datasets = import_optional("datasets", "this data", "train")
    path = Path(source)
    if path.suffix in MANIFEST_SUFFIXES:
        # a manifest has no splits
        split.check_single_split(path)
        rows = read_manifest(path)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return select_split(datasets.load_from_disk(str(path)), path, split)
    elif path.is_dir():
        rows = read_audio_folder(path, split)
    else:
        return load_hub_dataset(str(source), config_name, split=split.name, streaming=streaming)
    dataset = datasets.Dataset.from_list(rows)
    return dataset.to_iterable_dataset() if streaming else dataset


def load_hub_dataset(name: str, config_name: str | None, **options: Any) -> Any:
    """Load a dataset from the Hub or from its cache.

    Args:
        name: name of the dataset, `org/name`.
        config_name: configuration name; None for the default configuration.
        **options: `split` and `streaming`, as in `datasets.load_dataset`.

    Raises:
        OSError: the dataset does not exist, or it cannot be downloaded.
    """
    datasets = import_optional("datasets", "this data", "train")
    try:
        return datasets.load_dataset(name, config_name, **options)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"there is no file or folder {name} on this machine, and no dataset of this name was loaded from the Hub "
            f"({reason}): correct the path, or check the name of the dataset and the connection"
        ) from error


def select_split(dataset: Any, source: Any, split: SplitRequest) -> Any:
    """Select the requested split of a `DatasetDict`; return a single dataset unchanged if it is the requested split.

    Args:
        dataset: a `datasets` dataset, or a dict from split names to datasets.
        source: path or description of the data, used in error messages.
        split: the requested split.

    Raises:
        ValueError: the data has no such split.
    """
    if isinstance(dataset, dict):
        if split.name not in dataset:
            raise ValueError(f"the split must be one of {', '.join(dataset)}, got {split.name!r}: name another split")
        return dataset[split.name]
    # a dataset without a split name counts as "train"
    split.check_single_split(source, str(getattr(dataset, "split", None) or "train"))
    return dataset


def check_source(source: str | Path) -> None:
    """Check that a data source is an existing path or may be the name of a Hub dataset.

    Without this check, a mistyped path would be looked up on the Hub.

    Args:
        source: a path, or the name of a Hub dataset.

    Raises:
        FileNotFoundError: the path does not exist, and it is not a valid Hub name, has a file suffix, or starts with
            the name of a local folder.
    """
    path, source_text = Path(source), str(source)
    if path.exists():
        return
    may_be_hub_name = isinstance(source, str) and source_text.count("/") <= 1 and not path.suffix[1:].isalpha()
    if may_be_hub_name:
        with contextlib.suppress(HFValidationError):
            validate_repo_id(source_text)
            # if `data` is a local folder, `data/train` is more likely a mistyped path than a Hub dataset
            if "/" not in source_text or not path.parent.is_dir():
                return
    raise FileNotFoundError(
        f"there is no file or folder {source_text}: correct the path, or give the name of a Hub dataset as `org/name`"
    )


class ClipRows(Sequence[dict[str, Any]]):
    """A list of manifest rows with the methods of `datasets.Dataset` that training and evaluation use.

    Args:
        rows: the rows returned by `read_manifest`.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self.rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        """Return one row if `key` is an index, or one column as a list if `key` is a column name."""
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def map(self, function: Callable[[dict[str, Any]], dict[str, Any]], **_: Any) -> ClipRows:
        """Apply `function` to every row, and return new rows with the returned fields added.

        Args:
            function: receives a row and returns the fields to add.
            **_: options of `datasets.Dataset.map`; not used.
        """
        return ClipRows([{**row, **function(row)} for row in self.rows])


def rename_columns(dataset: Any, audio_column: str | None, text_column: str | None) -> Any:
    """Rename the audio column to `audio` and the transcript column to `text`, without decoding the audio.

    Args:
        dataset: a `datasets` dataset, streamed or not.
        audio_column: name of the audio column; None to detect the column by its name.
        text_column: name of the transcript column; None to detect the column by its name.

    Returns:
        The dataset with renamed columns. If another column is already called `audio` or `text`, it is dropped.

    Raises:
        ValueError: the dataset has no such column.
    """
    datasets = import_optional("datasets", "this data", "train")
    # a streamed dataset may not know its columns before the first row is read
    columns = dataset.column_names or list(next(iter(dataset)))
    audio_column = find_column("audio", audio_column, AUDIO_COLUMNS, columns)
    text_column = find_column("text", text_column, TEXT_COLUMNS, columns)
    if isinstance((dataset.features or {}).get(audio_column), datasets.Audio):
        # cast to the storage type of `Audio`: streaming an `Audio` column may need torchcodec, even with `decode=False`
        storage_type = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        dataset = dataset.cast_column(audio_column, storage_type)
    for old_name, new_name in ((audio_column, "audio"), (text_column, "text")):
        if old_name == new_name:
            continue
        if new_name in columns:
            dataset = dataset.remove_columns(new_name)
        dataset = dataset.rename_column(old_name, new_name)
    return dataset


def find_column(
    content: str, requested_name: str | None, common_names: Sequence[str], column_names: Sequence[str]
) -> str:
    """Find the name of the audio or transcript column of a dataset.

    Args:
        content: `"audio"` or `"text"`, used in the error message.
        requested_name: name of the column chosen by the user; None to try the common names.
        common_names: common names of such a column, in order of preference.
        column_names: names of all columns of the dataset.

    Returns:
        The requested name, or the first common name that the dataset has.

    Raises:
        ValueError: the dataset has no such column.
    """
    for name in [requested_name] if requested_name else common_names:
        if name in column_names:
            return name
    raise ValueError(
        f"the data must have a column of {content}, got the columns {', '.join(column_names)}: name the column with "
        f"`{content}_column`"
    )


__all__ = ["load_speech"]
