"""Converts checkpoints between `.nemo` files and folders in the format of transformers, and compares the result.

Files are read by `reader.py` and written by `writer.py`.
"""

import gc
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from torch import Tensor

from .archive import Archive, NemoError
from .fields import SAMPLING_RATE
from .hub import find_checkpoint
from .reader import load_archive, load_folder
from .writer import export_nemo

# largest size of one safetensors file
SHARD_SIZE = "5GB"

# seconds of noise that both models transcribe in the comparison
NOISE_S = 1.5

# largest accepted difference of logits, in units of the largest logit times the machine epsilon: weights at another
# address may be summed in another order; measured with 627 M parameters: 0.5
MAX_ROUNDING = 64

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert_checkpoint(
    source: str | Path, target: str | Path, *, dtype: str | None = None, push_to_hub: bool = False, **hub: Any
) -> Path:
    """Convert a `.nemo` file to a folder, or a folder to a `.nemo` file if the target ends in `.nemo`.

    The result is loaded and compared with the source before it gets its final name: the weights must be equal bit for
    bit, and both models must compute the same from noise.

    Args:
        source: a `.nemo` file, a folder in the format of transformers, or a Hub id of either.
        target: a `.nemo` file, or a folder that does not exist or is empty. With `push_to_hub` it may be a Hub id
            `org/name`; the folder is then `name` in the working directory.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`; None for the type of the source.
        push_to_hub: also upload the folder.
        **hub: `revision`, `token`, `cache_dir` and `local_files_only`, as in `load_nemo`.

    Returns:
        The file or folder that was written.

    Raises:
        NemoError: the source cannot be converted, the target exists, or the comparison failed.
    """
    if dtype is not None and dtype not in DTYPES:
        raise NemoError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    torch_dtype = DTYPES[dtype] if dtype is not None else None
    hub_options = {"revision": None, "token": None, "cache_dir": None, "local_files_only": False, **hub}
    if str(target).endswith(".nemo"):
        if push_to_hub:
            raise NemoError("only folders are pushed to the Hub: upload a .nemo file with `hf upload`")
        write_nemo_file(source, Path(target), torch_dtype, hub_options)
        return Path(target)
    is_hub_id = push_to_hub and not Path(target).parent.is_dir()
    folder = Path(Path(target).name) if is_hub_id else Path(target)
    write_folder(source, folder, torch_dtype, hub_options)
    if push_to_hub:
        api = HfApi(token=hub_options["token"])
        api.create_repo(str(target), exist_ok=True)
        api.upload_folder(repo_id=str(target), folder_path=folder)
    return folder


def write_folder(source: str | Path, folder: Path, dtype: torch.dtype | None, hub_options: dict[str, Any]) -> None:
    """Convert a `.nemo` file to a folder in the format of transformers.

    Args:
        source: the file, or the folder or Hub id that contains it.
        folder: the folder to write; it must not exist or be empty.
        dtype: type of the weights; None for the type of the source.
        hub_options: arguments of `find_checkpoint`.

    Raises:
        NemoError: the source cannot be converted, the folder exists, or the comparison failed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NemoError(f"{folder} exists: give a folder that does not exist or is empty")
    checkpoint = find_checkpoint(source, **hub_options)
    if not checkpoint.is_file():
        raise NemoError(f"{source} is already in the format of transformers: give a .nemo file as the target")
    model, processor = load_archive(Archive(checkpoint), dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new_folder = Path(temporary) / folder.name
        model.save_pretrained(new_folder, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(new_folder)
        (new_folder / "README.md").write_text(model_card(str(source), model), encoding="utf-8")
        check_equal((model, processor), load_folder(new_folder), safetensors_digests(new_folder), source)
        shutil.copytree(new_folder, folder, dirs_exist_ok=True, copy_function=shutil.move)


def write_nemo_file(source: str | Path, path: Path, dtype: torch.dtype | None, hub_options: dict[str, Any]) -> None:
    """Convert a folder in the format of transformers to a `.nemo` file.

    Args:
        source: the folder or its Hub id.
        path: the file to write.
        dtype: type of the weights; None for the type of the source.
        hub_options: arguments of `find_checkpoint`.

    Raises:
        NemoError: the source cannot be converted, or the comparison failed.
    """
    checkpoint = find_checkpoint(source, **hub_options)
    if checkpoint.is_file():
        raise NemoError(f"{source} is a .nemo file already: give a folder to convert it to")
    model, processor = load_folder(checkpoint, dtype=dtype, **hub_options)
    temporary = path.with_name(f".part-{path.name}")
    try:
        export_nemo(model, processor, temporary)
        weights = model.state_dict()
        digests = {key: tensor_digest(weight) for key, weight in weights.items()}
        # free the weights: `check_equal` replaces them by those of the file
        model.load_state_dict({key: weight.to("meta") for key, weight in weights.items()}, assign=True)
        del weights
        # `torch.save` leaves reference cycles that hold the storages
        gc.collect()
        check_equal(load_archive(Archive(temporary)), (model, processor), digests, source)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def tensor_digest(tensor: Tensor) -> bytes:
    """Return the SHA-256 digest of a tensor's type, shape and bytes."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + bytes(1) + content.data).digest()


def safetensors_digests(folder: Path) -> dict[str, bytes]:
    """Return the digest of every weight in the safetensors files of a folder, with one weight in memory at a time."""
    digests = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
        for key in keys:
            # opened once per weight, because the memory of a mapped file is freed only when it is closed
            with safe_open(path, "pt") as file:
                digests[key] = tensor_digest(file.get_tensor(key))
    return digests


def check_equal(
    from_archive: tuple[Any, Any],
    from_folder: tuple[Any, Any],
    folder_digests: dict[str, bytes],
    source: str | Path,
) -> None:
    """Refuse a conversion if the two checkpoints differ.

    Their weights must be equal bit for bit. From noise, both models must generate the same tokens and compute the same
    logits up to rounding.

    Args:
        from_archive: model and processor of the `.nemo` file.
        from_folder: model and processor of the folder. If the weights are equal, the model gets those of the file, so
            that only one copy is in memory.
        folder_digests: digests of the folder's weights.
        source: the checkpoint that is converted, for the error.

    Raises:
        NemoError: weights, tokens or logits differ.
    """
    archive_weights = from_archive[0].state_dict()
    archive_digests = {key: tensor_digest(weight) for key, weight in archive_weights.items()}
    keys = archive_digests.keys() | folder_digests.keys()
    differences = sorted(key for key in keys if archive_digests.get(key) != folder_digests.get(key))
    if not differences:
        from_folder[0].load_state_dict(archive_weights, assign=True)
        differences = compare_outputs(outputs_on_noise(*from_archive), outputs_on_noise(*from_folder))
    if differences:
        raise NemoError(f"the conversion of {source} changes {', '.join(differences[:5])}: nothing was written")


def compare_outputs(outputs: dict[str, Tensor], other_outputs: dict[str, Tensor]) -> list[str]:
    """Return the names of the outputs that differ between two models: logits by more than rounding, tokens at all.

    Args:
        outputs: result of `outputs_on_noise` for one model.
        other_outputs: result of `outputs_on_noise` for the other model.
    """
    logits, other_logits = outputs["logits"], other_outputs["logits"]
    tolerance = MAX_ROUNDING * torch.finfo(logits.dtype).eps * other_logits.abs().max()
    # NaN is not close, so it counts as a difference
    is_close = bool((logits - other_logits).abs().max() <= tolerance)
    token_names = [name for name in outputs if name != "logits"]
    changed = [name for name in token_names if not torch.equal(outputs[name], other_outputs[name])]
    return [f"{name} of noise" for name in ([] if is_close else ["logits"]) + changed]


@torch.no_grad()
def outputs_on_noise(model: Any, processor: Any) -> dict[str, Tensor]:
    """Return what a model computes from 1.5 s of noise.

    Returns:
        `logits`; `tokens`, the generated sequences; and for a hybrid `CTC tokens`, the sequences of its CTC head.
    """
    noise = 0.1 * np.random.default_rng(0).standard_normal(int(SAMPLING_RATE * NOISE_S)).astype(np.float32)
    inputs = processor(noise, sampling_rate=SAMPLING_RATE)
    outputs = {"logits": model(**inputs).logits, "tokens": generate_sequences(model, inputs)}
    if getattr(model.config, "ctc_head", False):
        outputs["CTC tokens"] = generate_sequences(model, inputs, decoder="ctc")
    return outputs


def generate_sequences(model: Any, inputs: Any, **options: Any) -> Tensor:
    """Return the (B, U) token ids that `model.generate` returns, which are its whole result or a field of it."""
    result = model.generate(**inputs, **options)
    return result if isinstance(result, Tensor) else result.sequences


def model_card(source: str, model: Any) -> str:
    """Return the README of a converted checkpoint.

    Args:
        source: the `.nemo` file or Hub id that it was converted from.
        model: the model.
    """
    config, encoder = model.config, model.config.encoder_config
    head = {"parakeet_ctc": "CTC", "parakeet_rnnt": "RNN-T", "parakeet_tdt": "TDT"}[config.model_type]
    head += " and CTC (hybrid)" if getattr(config, "ctc_head", False) else ""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = {
        "origin": f"`{Path(source).name if Path(source).exists() else source}`",
        "head": head,
        "encoder": f"FastConformer, {encoder.num_hidden_layers} layers of width {encoder.hidden_size}",
        "parameters": f"{num_parameters / 1e6:.1f} million, {str(model.dtype).removeprefix('torch.')}",
        "vocabulary": f"{config.vocab_size - 1} SentencePiece pieces and the blank",
        "features": f"{encoder.num_mel_bins} mel bins, 16 kHz",
    }
    if getattr(config, "durations", None):
        rows["durations"] = ", ".join(map(str, config.durations))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return CARD.format(title=Path(source).stem, table=table)


CARD = """---
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags:
- parakeet
- speech
---

# {title}

Converted from a NeMo checkpoint by transformers-parakeet. The licence and the credits are those of the original.

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
