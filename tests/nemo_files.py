"""Helpers for the tests of `.nemo` files: they read, change and write archives, and read results of `generate`."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

Members = dict[str, bytes]


def emissions(output: Any, row: int, blank_id: int, pad_id: int) -> tuple[list[int], list[int], list[int]]:
    """Return the labels of one generated row, their frames and their durations.

    The frame of a step is the sum of the durations before it.
    """
    token_ids, durations = output.sequences[row], output.durations[row]
    is_label = (token_ids != blank_id) & (token_ids != pad_id)
    frames = durations.cumsum(0) - durations
    return token_ids[is_label].tolist(), frames[is_label].tolist(), durations[is_label].tolist()


def members(path: Path) -> Members:
    """Return the content of the files of an archive by name."""
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar.getmembers() if info.isfile()}


def write_members(path: Path, content: Members, compress: bool = False) -> Path:
    """Write an archive, plain or with gzip, and return its path."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, value in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
    path.write_bytes(gzip.compress(buffer.getvalue(), 1) if compress else buffer.getvalue())
    return path


def edited_archive(
    source: Path, folder: Path, *, settings: Callable | None = None, weights: Callable | None = None
) -> Path:
    """Write a changed copy of an archive and return its path.

    `settings` and `weights` are functions that change the settings or the state dict in place.
    """
    content = members(source)
    if settings is not None:
        tree = yaml.safe_load(content["./model_config.yaml"])
        settings(tree)
        content["./model_config.yaml"] = yaml.safe_dump(tree, allow_unicode=True).encode()
    if weights is not None:
        state_dict = torch.load(io.BytesIO(content["./model_weights.ckpt"]), weights_only=True)
        weights(state_dict)
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        content["./model_weights.ckpt"] = buffer.getvalue()
    return write_members(folder / "edited.nemo", content)


def set_setting(path: str, value: Any) -> Callable[[dict], None]:
    """Return a function that sets one setting, given by its dotted path, in place."""
    *sections, key = path.split(".")

    def change(settings: dict) -> None:
        for section in sections:
            settings = settings.setdefault(section, {})
        settings[key] = value

    return change
