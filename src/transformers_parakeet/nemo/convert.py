"""Converts checkpoints both ways between `.nemo` files and folders of transformers, and checks what it wrote.

What either side means is for `nemo.py` and `nemo_export.py`.
"""

import gc
import hashlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from torch import Tensor

from .archive import Archive, NemoError
from .hub import find_checkpoint, load_folder
from .reader import load_archive
from .writer import export_nemo

# above this the weights are cut into several files
SHARD_SIZE = "5GB"

# seconds of noise that both models hear in the check
NOISE_S = 1.5

# seconds after which the memory of weights is given back
RELEASE_S = 0.05

# largest difference of scores in units of rounding: sums may be taken in another order; measured for 627 M
# parameters with weights at another address: 0.5
ROUNDING = 64

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert_checkpoint(
    source: str | Path, target: str | Path, *, dtype: str | None = None, push_to_hub: bool = False, **hub: Any
) -> Path:
    """Convert a `.nemo` file to a folder, or with a target that ends in `.nemo` a folder to such a file.

    What was written is loaded again before it gets its name: its weights must be the same bit for bit, and it must
    recognise the same in noise.

    Args:
        source: a `.nemo` file, a folder, or a Hub id of either.
        target: a folder that does not exist or is empty, or a `.nemo` file; with `push_to_hub` also the Hub id
            `org/name` of a folder, of which the part after the slash names the local one.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`; default as in the source.
        push_to_hub: also upload the folder.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`, as in `load_nemo`.

    Returns:
        The file or folder.

    Raises:
        NemoError: the source cannot be converted, the target is taken, or the result computes something else.
    """
    if dtype is not None and dtype not in DTYPES:
        raise NemoError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place = {"revision": None, "token": None, "cache_dir": None, "local_files_only": False, **hub}
    if str(target).endswith(".nemo"):
        if push_to_hub:
            raise NemoError("only folders are pushed to the Hub, upload a .nemo file with `hf upload`")
        return to_nemo(source, Path(target), DTYPES.get(dtype or ""), place)
    folder = Path(Path(target).name) if push_to_hub and not Path(target).parent.is_dir() else Path(target)
    to_folder(source, folder, DTYPES.get(dtype or ""), place)
    if push_to_hub:
        api = HfApi(token=place["token"])
        api.create_repo(str(target), exist_ok=True)
        api.upload_folder(repo_id=str(target), folder_path=folder)
    return folder


def to_folder(source: str | Path, folder: Path, dtype: torch.dtype | None, hub: dict[str, Any]) -> None:
    """Write the folder of a `.nemo` file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NemoError(f"{folder} exists: name a folder that does not, or an empty one")
    found = find_checkpoint(source, **hub)
    if not found.is_file():
        raise NemoError(f"{source} is already in the format of transformers: name a .nemo file to convert it to")
    archive = Archive(found)
    model, processor = load_archive(archive, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as workplace:
        part = Path(workplace) / folder.name
        with released(archive, model):
            model.save_pretrained(part, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(part)
        (part / "README.md").write_text(model_card(str(source), model), encoding="utf-8")
        check((model, processor), load_folder(part), archive, file_digests(part), source)
        shutil.copytree(part, folder, dirs_exist_ok=True, copy_function=shutil.move)


def to_nemo(source: str | Path, path: Path, dtype: torch.dtype | None, hub: dict[str, Any]) -> Path:
    """Write the `.nemo` file of a folder."""
    found = find_checkpoint(source, **hub)
    if found.is_file():
        raise NemoError(f"{source} is a .nemo file already: name a folder to convert it to")
    model, processor = load_folder(found, dtype=dtype, **hub)
    part = path.with_name(f".part-{path.name}")
    try:
        export_nemo(model, processor, part)
        weights = model.state_dict()
        digests = {key: digest(weight) for key, weight in weights.items()}
        # the check gives it those of the archive: one copy in memory is enough
        model.load_state_dict({key: weight.to("meta") for key, weight in weights.items()}, assign=True)
        del weights
        # torch.save leaves cycles that hold the storages
        gc.collect()
        archive = Archive(part)
        check(load_archive(archive), (model, processor), archive, digests, source)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def digest(weight: Tensor) -> bytes:
    """Return the SHA-256 of a tensor's type, shape and bytes."""
    content = weight.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode() + bytes(1) + content.data).digest()


def file_digests(folder: Path) -> dict[str, bytes]:
    """Return the digests of a folder's weights, of which only one is in memory at a time."""
    digests = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as names:
            keys = list(names.keys())
        for key in keys:
            # a mapping is given back as a whole, hence one for each weight
            with safe_open(file, "pt") as weights:
                digests[key] = digest(weights.get_tensor(key))
    return digests


@contextmanager
def released(archive: Archive, model: torch.nn.Module) -> Iterator[None]:
    """Keep giving back the memory of an archive's weights while something goes through all of them."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(RELEASE_S):
            for weight in weights:
                archive.release(weight)

    weights = list(model.parameters())
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def check(
    from_archive: tuple[Any, Any],
    from_folder: tuple[Any, Any],
    archive: Archive,
    digests: dict[str, bytes],
    source: str | Path,
) -> None:
    """Refuse a pair of models that are not the same: bit for bit in their weights, and in what they compute from noise.

    Args:
        from_archive: model and processor of a `.nemo` file.
        from_folder: model and processor of a folder; once its weights are found equal, it gets those of the archive, so
            that one copy is in memory.
        archive: the `.nemo` file; the memory of its weights is given back as soon as they are used.
        digests: of the folder's weights.
        source: named in the error.
    """
    weights = from_archive[0].state_dict()
    with released(archive, from_archive[0]):
        found = {key: digest(weight) for key, weight in weights.items()}
    wrong = sorted(key for key in found.keys() | digests.keys() if found.get(key) != digests.get(key))
    if not wrong:
        from_folder[0].load_state_dict(weights, assign=True)
        with released(archive, from_archive[0]):
            heard, other = computed(*from_archive), computed(*from_folder)
        scores, scale = heard.pop("scores"), other["scores"].abs().max()
        if not bool((scores - other.pop("scores")).abs().max() <= ROUNDING * torch.finfo(scores.dtype).eps * scale):
            wrong.append("scores of noise")
        wrong += [f"{name} of noise" for name, value in heard.items() if not torch.equal(value, other[name])]
    if wrong:
        raise NemoError(f"the conversion of {source} changes {', '.join(wrong[:5])}: nothing was written")


@torch.no_grad()
def computed(model: Any, processor: Any) -> dict[str, Tensor]:
    """Return what a model computes from noise: the scores of its head, and what `generate` returns for every head."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(int(16000 * NOISE_S)).astype(np.float32)
    inputs = processor(noise, sampling_rate=16000)
    results = {"sequences": generated(model, inputs)}
    if getattr(model.config, "ctc_head", False):
        results["CTC sequences"] = generated(model, inputs, decoder="ctc")
    return {**results, "scores": model(**inputs).logits}


def generated(model: Any, inputs: Any, **options: Any) -> Tensor:
    """Return the ids that a model generates."""
    out = model.generate(**inputs, **options)
    return out if isinstance(out, Tensor) else out.sequences


def model_card(source: str, model: Any) -> str:
    """Return the README of a converted checkpoint: where it comes from, and what it is."""
    config, encoder = model.config, model.config.encoder_config
    head = {"parakeet_ctc": "CTC", "parakeet_rnnt": "RNN-T", "parakeet_tdt": "TDT"}[config.model_type]
    head += " and CTC (hybrid)" if getattr(config, "ctc_head", False) else ""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    rows = {
        "origin": f"`{Path(source).name if Path(source).exists() else source}`",
        "head": head,
        "encoder": f"FastConformer, {encoder.num_hidden_layers} layers of width {encoder.hidden_size}",
        "parameters": f"{millions:.1f} million, {str(model.dtype).removeprefix('torch.')}",
        "vocabulary": f"{config.vocab_size - 1} SentencePiece pieces and the blank",
        "features": f"{encoder.num_mel_bins} mel bins, 16 kHz",
    }
    if getattr(config, "durations", None):
        rows["durations"] = ", ".join(map(str, config.durations))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags:
- parakeet
- speech
---

# {Path(source).stem}

Converted from a NeMo checkpoint by transformers-parakeet; the licence and the credit are those of the original.

| | |
| --- | --- |
{table}

```python
import transformers_parakeet
from transformers import pipeline

recognise = pipeline("automatic-speech-recognition", model="this folder")
print(recognise("audio.wav")["text"])
```
"""


__all__ = ["convert_checkpoint"]
