"""Reads speech that is packed in tar files with a `manifest.jsonl`, clip by clip, without unpacking it.

A manifest line has `tar`, `offset` and `nbytes`, which say where the encoded clip lies, `text`, `duration` and `split`.
"""

import json
from pathlib import Path
from typing import Any


class PackedSpeech:
    """A map-style dataset of one split: rows of `audio` (encoded bytes), `text`, `duration` (seconds) and `speaker`."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        self.entries = [entry for entry in map(json.loads, lines) if entry["split"] == split]
        if not self.entries:
            raise ValueError(f"{folder} has no clips of the split {split!r}: its manifest names others")

    @property
    def durations(self) -> list[float]:
        """Seconds of every clip."""
        return [entry["duration"] for entry in self.entries]

    @property
    def texts(self) -> list[str]:
        """Transcripts."""
        return [entry["text"] for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        with open(self.folder / entry["tar"], "rb") as file:
            file.seek(entry["offset"])
            audio = {"bytes": file.read(entry["nbytes"]), "path": entry["audio"]}
        return {"audio": audio, **{key: entry[key] for key in ("id", "text", "duration", "speaker")}}


class Joined:
    """Several such datasets, one after the other."""

    def __init__(self, parts: list[PackedSpeech]) -> None:
        self.parts = parts
        self.rows = [(part, index) for part in parts for index in range(len(part))]

    @property
    def durations(self) -> list[float]:
        """Seconds of every clip."""
        return [seconds for part in self.parts for seconds in part.durations]

    @property
    def texts(self) -> list[str]:
        """Transcripts."""
        return [text for part in self.parts for text in part.texts]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, position = self.rows[index]
        return part[position]
