"""Helpers for the tests of `.nemo` files: reading, changing and writing them, and reading what `generate` returned."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

Members = dict[str, bytes]


def emissions(out: Any, row: int, blank: int, pad: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, frames and durations of one generated row; a frame is the sum of the durations before it."""
    ids, durations = out.sequences[row], out.durations[row]
    label = (ids != blank) & (ids != pad)
    frames = durations.cumsum(0) - durations
    return ids[label].tolist(), frames[label].tolist(), durations[label].tolist()


def members(path: Path) -> Members:
    """Return the files of an archive by name."""
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar.getmembers() if info.isfile()}


def write(path: Path, content: Members, compress: bool = False) -> Path:
    """Write an archive, plain or gzip."""
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
    """Write an archive anew with its settings or its weights changed in place."""
    content = members(source)
    if settings is not None:
        tree = yaml.safe_load(content["./model_config.yaml"])
        settings(tree)
        content["./model_config.yaml"] = yaml.safe_dump(tree, allow_unicode=True).encode()
    if weights is not None:
        state = torch.load(io.BytesIO(content["./model_weights.ckpt"]), weights_only=True)
        weights(state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content["./model_weights.ckpt"] = buffer.getvalue()
    return write(folder / "edited.nemo", content)


def setter(path: str, value: Any) -> Callable[[dict], None]:
    """Return a change of one setting, given by its dotted path."""
    *sections, key = path.split(".")

    def put(tree: dict) -> None:
        for section in sections:
            tree = tree.setdefault(section, {})
        tree[key] = value

    return put
