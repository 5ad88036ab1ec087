"""Datasets for `ParakeetTrainer` that read single clips from tar files, without unpacking the tar files.

A folder of packed speech has a `manifest.jsonl` with one JSON object per clip: `tar`, `offset` and `nbytes` (file name,
start and size of the encoded clip), `id`, `audio` (file name), `text`, `duration` in seconds, `speaker` and `split`.
"""

import json
from pathlib import Path
from typing import Any


class PackedSpeech:
    """A map-style dataset of one split of a folder of packed speech.

    Args:
        folder: folder with `manifest.jsonl` and the tar files named in the manifest.
        split: name of the split, such as `"train"`.

    Raises:
        ValueError: the manifest has no clip of this split.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        self.entries = [entry for entry in map(json.loads, lines) if entry["split"] == split]
        if not self.entries:
            raise ValueError(f"{folder / 'manifest.jsonl'} must have clips of the split {split!r}, got none")

    @property
    def durations(self) -> list[float]:
        """Duration of every clip in seconds."""
        return [entry["duration"] for entry in self.entries]

    @property
    def texts(self) -> list[str]:
        """Transcript of every clip."""
        return [entry["text"] for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `audio` (encoded bytes and file name), `id`, `text`, `duration` in seconds and `speaker`."""
        entry = self.entries[index]
        with open(self.folder / entry["tar"], "rb") as file:
            file.seek(entry["offset"])
            audio = {"bytes": file.read(entry["nbytes"]), "path": entry["audio"]}
        return {"audio": audio, **{name: entry[name] for name in ("id", "text", "duration", "speaker")}}


class ConcatenatedSpeech:
    """Concatenates several datasets.

    Args:
        datasets: the datasets to concatenate, in order.
    """

    def __init__(self, datasets: list[PackedSpeech]) -> None:
        self.datasets = datasets
        self.locations = [(dataset, index) for dataset in datasets for index in range(len(dataset))]

    @property
    def durations(self) -> list[float]:
        """Duration of every clip in seconds."""
        return [duration for dataset in self.datasets for duration in dataset.durations]

    @property
    def texts(self) -> list[str]:
        """Transcript of every clip."""
        return [text for dataset in self.datasets for text in dataset.texts]

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the row with an index into the concatenated datasets."""
        dataset, local_index = self.locations[index]
        return dataset[local_index]
