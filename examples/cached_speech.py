"""Computes the features of a speech dataset once, and stores them in a file for the following epochs."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transformers_parakeet import load_audio

# range of the factor by which the tempo of a clip is changed in training
TEMPO_RANGE = (0.9, 1.1)


class CachedSpeech:
    """A map-style dataset with the log-mel features of another dataset, read from a file.

    The features are stored as float16, about 16 kB per second of audio with 80 mel bins. The file is written when it
    does not exist, which decodes each clip once.

    Args:
        dataset: dataset with `durations`, `texts`, and rows with `audio`.
        processor: `ParakeetProcessor` of the model.
        folder: folder of the file.
        name: name of the dataset, which is part of the file name.
        changes_tempo: whether to change the tempo of a clip by a random factor whenever it is read.
    """

    def __init__(self, dataset: Any, processor: Any, folder: Path, name: str, changes_tempo: bool = False) -> None:
        self.texts, self.changes_tempo = list(dataset.texts), changes_tempo
        self.durations = [float(duration) for duration in dataset.durations]
        extractor = processor.feature_extractor
        key = json.dumps([extractor.to_dict(), self.texts, self.durations], sort_keys=True, default=str)
        path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        if not path.with_suffix(".json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_features(dataset, extractor, path)
        lengths = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.starts = np.cumsum([0, *lengths])
        shape = (int(self.starts[-1]), extractor.feature_size)
        self.frames = np.memmap(path.with_suffix(".f16"), dtype=np.float16, mode="r", shape=shape)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `input_features` (T, F) and `text`."""
        features = torch.from_numpy(self.frames[self.starts[index] : self.starts[index + 1]].astype(np.float32))
        if self.changes_tempo:
            features = change_tempo(features, float(torch.empty(1).uniform_(*TEMPO_RANGE)))
        return {"input_features": features, "text": self.texts[index]}


def write_features(dataset: Any, extractor: Any, path: Path) -> None:
    """Write the features of all clips to `path` with the ending `.f16`, and their lengths with the ending `.json`.

    Args:
        dataset: dataset with rows with `audio`.
        extractor: feature extractor.
        path: path without ending. The file with the lengths is written last.
    """
    lengths = []
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        for index in range(len(dataset)):
            samples = load_audio(dataset[index]["audio"], target_rate=extractor.sampling_rate)
            batch = extractor([samples], sampling_rate=extractor.sampling_rate)
            features = batch["input_features"][0][batch["attention_mask"][0].bool()]
            lengths.append(len(features))
            file.write(features.numpy().astype(np.float16).tobytes())
    partial.replace(path.with_suffix(".f16"))
    path.with_suffix(".json").write_text(json.dumps(lengths), encoding="utf-8")


def change_tempo(features: torch.Tensor, factor: float) -> torch.Tensor:
    """Change the tempo of a clip by linear interpolation of its features along time.

    Args:
        features: (T, F) features.
        factor: factor of the tempo; 1.1 makes the clip shorter.

    Returns:
        (T / factor, F) features.
    """
    num_frames = max(1, round(len(features) / factor))
    return torch.nn.functional.interpolate(features.T[None], size=num_frames, mode="linear", align_corners=True)[0].T
