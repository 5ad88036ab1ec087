"""Converts checkpoints between `.nemo` files and transformers checkpoint folders, and verifies the result.

`reader.py` reads and `writer.py` writes the `.nemo` files.
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
from .reader import describe_head, load_archive, load_folder
from .writer import export_nemo

# maximum size of one safetensors file
MAX_SHARD_SIZE = "5GB"

# duration in seconds of the noise that both models transcribe for the comparison
NOISE_DURATION_S = 1.5

# largest accepted difference between logits, in units of the largest absolute logit times the machine epsilon. The
# order of summation can depend on the memory address of the weights: a model with 627 M parameters differed by 0.5.
MAX_LOGIT_ERROR_EPS = 64

DTYPES_BY_NAME = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert_checkpoint(
    source: str | Path, target: str | Path, *, dtype: str | None = None, push_to_hub: bool = False, **hub: Any
) -> Path:
    """Convert a `.nemo` file to a transformers checkpoint folder, or a folder to a `.nemo` file.

    Before the result gets its final name, it is loaded and compared with the source: the weights must be bit-identical,
    and both models must produce the same tokens and logits for random noise.

    Args:
        source: path of a `.nemo` file, path of a transformers checkpoint folder, or Hub id `org/name`.
        target: path to write. If it ends in `.nemo`, a `.nemo` file is written, otherwise a folder, which must be empty
            or must not exist. With `push_to_hub` it may be a Hub id `org/name`; the folder `name` is then written to
            the working directory.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`; None to keep the dtype of the source.
        push_to_hub: whether to upload the folder to the Hub.
        **hub: `revision`, `token`, `cache_dir` and `local_files_only`, as in `load_nemo`.

    Returns:
        Path of the written file or folder.

    Raises:
        NemoError: the source cannot be converted, the target folder is not empty, or the comparison failed.
    """
    if dtype is not None and dtype not in DTYPES_BY_NAME:
        raise NemoError(f"`dtype` must be one of {', '.join(DTYPES_BY_NAME)}, got {dtype!r}")
    torch_dtype = DTYPES_BY_NAME[dtype] if dtype is not None else None
    hub_options = {"revision": None, "token": None, "cache_dir": None, "local_files_only": False, **hub}
    if str(target).endswith(".nemo"):
        if push_to_hub:
            raise NemoError("`push_to_hub` requires a folder as target: upload a .nemo file with `hf upload`")
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
    """Convert a `.nemo` file to a transformers checkpoint folder, and verify the result.

    Args:
        source: path of the `.nemo` file, or a folder or Hub id that contains a `.nemo` file.
        folder: path of the folder to write. The folder must be empty or must not exist.
        dtype: dtype of the weights; None to keep the dtype of the source.
        hub_options: keyword arguments of `find_checkpoint`.

    Raises:
        NemoError: the source cannot be converted, the target folder is not empty, or the comparison failed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NemoError(f"{folder} exists: give an empty folder or a folder that does not exist")
    checkpoint = find_checkpoint(source, **hub_options)
    if not checkpoint.is_file():
        raise NemoError(f"{source} is already a transformers checkpoint: give a .nemo file as the target")
    model, processor = load_archive(Archive(checkpoint), dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new_folder = Path(temporary) / folder.name
        model.save_pretrained(new_folder, max_shard_size=MAX_SHARD_SIZE)
        processor.save_pretrained(new_folder)
        (new_folder / "README.md").write_text(build_model_card(str(source), model), encoding="utf-8")
        check_equal((model, processor), load_folder(new_folder), compute_safetensors_digests(new_folder), source)
        shutil.copytree(new_folder, folder, dirs_exist_ok=True, copy_function=shutil.move)


def write_nemo_file(source: str | Path, path: Path, dtype: torch.dtype | None, hub_options: dict[str, Any]) -> None:
    """Convert a transformers checkpoint folder to a `.nemo` file, and verify the result.

    Args:
        source: path of the folder, or Hub id `org/name`.
        path: path of the `.nemo` file to write.
        dtype: dtype of the weights; None to keep the dtype of the source.
        hub_options: keyword arguments of `find_checkpoint`.

    Raises:
        NemoError: the source cannot be converted, or the written checkpoint does not match the source.
    """
    checkpoint = find_checkpoint(source, **hub_options)
    if checkpoint.is_file():
        raise NemoError(f"{source} is already a .nemo file: give a folder as the target")
    model, processor = load_folder(checkpoint, dtype=dtype, **hub_options)
    temporary_file = path.with_name(f".part-{path.name}")
    try:
        export_nemo(model, processor, temporary_file)
        weights = model.state_dict()
        digests = {key: compute_digest(weight) for key, weight in weights.items()}
        # free the memory of the weights before the file is loaded; `check_equal` later loads the weights of the file
        # into `model`, to compare the outputs
        model.load_state_dict({key: weight.to("meta") for key, weight in weights.items()}, assign=True)
        del weights
        # `torch.save` leaves reference cycles that keep the weights in memory
        gc.collect()
        check_equal(load_archive(Archive(temporary_file)), (model, processor), digests, source)
        temporary_file.replace(path)
    finally:
        temporary_file.unlink(missing_ok=True)


def compute_digest(tensor: Tensor) -> bytes:
    """Compute the SHA-256 digest of the dtype, shape and values of a tensor.

    Args:
        tensor: CPU tensor of any shape.
    """
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + bytes(1) + content.data).digest()


def compute_safetensors_digests(folder: Path) -> dict[str, bytes]:
    """Compute the digest of each weight in the safetensors files of a folder.

    Only one weight is in memory at a time.

    Args:
        folder: folder with safetensors files.

    Returns:
        Name of the weight -> digest.
    """
    digests = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
        for key in keys:
            # open the file again for each weight, because the memory of the mapped file is freed only on closing
            with safe_open(path, "pt") as file:
                digests[key] = compute_digest(file.get_tensor(key))
    return digests


def check_equal(
    from_archive: tuple[Any, Any],
    from_folder: tuple[Any, Any],
    folder_digests: dict[str, bytes],
    source: str | Path,
) -> None:
    """Check that a `.nemo` file and a folder contain the same checkpoint.

    The weights must be bit-identical. For random noise, both models must generate the same tokens and compute the same
    logits up to rounding.

    Args:
        from_archive: model and processor loaded from the `.nemo` file.
        from_folder: model and processor loaded from the folder. If the weights are identical, this model is changed to
            use the weights of the first model, so only one copy stays in memory.
        folder_digests: name of each weight in the folder -> digest of the weight.
        source: path or Hub id of the converted checkpoint, for the error message.

    Raises:
        NemoError: weights, tokens or logits differ.
    """
    archive_weights = from_archive[0].state_dict()
    archive_digests = {key: compute_digest(weight) for key, weight in archive_weights.items()}
    keys = archive_digests.keys() | folder_digests.keys()
    # a weight that only one checkpoint contains is also a difference
    differences = sorted(key for key in keys if archive_digests.get(key) != folder_digests.get(key))
    if not differences:
        from_folder[0].load_state_dict(archive_weights, assign=True)
        differences = compare_outputs(compute_outputs_on_noise(*from_archive), compute_outputs_on_noise(*from_folder))
    if differences:
        raise NemoError(f"the conversion of {source} changes {', '.join(differences[:5])}: nothing was written")


def compare_outputs(archive_outputs: dict[str, Tensor], folder_outputs: dict[str, Tensor]) -> list[str]:
    """Compare the outputs of two models; logits may differ by rounding errors, tokens must be identical.

    Args:
        archive_outputs: result of `compute_outputs_on_noise` for the model from the `.nemo` file.
        folder_outputs: result of `compute_outputs_on_noise` for the model from the folder.

    Returns:
        Descriptions of the outputs that differ, such as "logits of noise"; empty if the outputs are equal.
    """
    archive_logits, folder_logits = archive_outputs["logits"], folder_outputs["logits"]
    tolerance = MAX_LOGIT_ERROR_EPS * torch.finfo(archive_logits.dtype).eps * folder_logits.abs().max()
    # a comparison with NaN is False, so NaN counts as a difference
    logits_are_close = bool((archive_logits - folder_logits).abs().max() <= tolerance)
    token_names = [name for name in archive_outputs if name != "logits"]
    changed_tokens = [name for name in token_names if not torch.equal(archive_outputs[name], folder_outputs[name])]
    changed_outputs = changed_tokens if logits_are_close else ["logits", *changed_tokens]
    return [f"{name} of noise" for name in changed_outputs]


@torch.no_grad()
def compute_outputs_on_noise(model: Any, processor: Any) -> dict[str, Tensor]:
    """Run a model on 1.5 s of white noise with a fixed seed.

    Args:
        model: Parakeet model with a head.
        processor: processor of the model.

    Returns:
        A dict with `logits`, the generated token ids as `tokens`, and for a hybrid the token ids generated by the CTC
        head as `CTC tokens`.
    """
    noise = 0.1 * np.random.default_rng(0).standard_normal(int(SAMPLING_RATE * NOISE_DURATION_S)).astype(np.float32)
    inputs = processor(noise, sampling_rate=SAMPLING_RATE)
    outputs = {"logits": model(**inputs).logits, "tokens": generate_labels(model, inputs)}
    if getattr(model.config, "ctc_head", False):
        outputs["CTC tokens"] = generate_labels(model, inputs, decoder="ctc")
    return outputs


def generate_labels(model: Any, inputs: Any, **options: Any) -> Tensor:
    """Generate (B, U) labels, U labels with padding for each of B clips; `options` are passed to `generate`.

    The layout of `sequences` is not compared: a `.nemo` file adds a blank where a folder adds none, after the maximum
    number of labels on a frame.

    Args:
        model: a model with a head.
        inputs: features and mask, as the processor returns them.
        **options: arguments of `generate`.
    """
    labels: Tensor = model.generate(**inputs, return_dict_in_generate=True, **options).hypotheses.tokens
    return labels


def build_model_card(source: str, model: Any) -> str:
    """Build the README of a converted checkpoint: origin, head, sizes and an example program.

    Args:
        source: path of the `.nemo` file or Hub id of the original checkpoint. Only the file name of a local path is
            published.
        model: converted model.
    """
    config, encoder_config = model.config, model.config.encoder_config
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = {
        "origin": f"`{Path(source).name if Path(source).exists() else source}`",
        "head": describe_head(config),
        "encoder": (f"FastConformer, {encoder_config.num_hidden_layers} layers of width {encoder_config.hidden_size}"),
        "parameters": f"{num_parameters / 1e6:.1f} million, {str(model.dtype).removeprefix('torch.')}",
        "vocabulary": f"{config.vocab_size - 1} SentencePiece pieces and the blank",
        "features": f"{encoder_config.num_mel_bins} mel bins, 16 kHz",
    }
    if getattr(config, "durations", None):
        rows["durations"] = ", ".join(map(str, config.durations))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return MODEL_CARD_TEMPLATE.format(title=Path(source).stem, table=table)


MODEL_CARD_TEMPLATE = """---
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags:
- parakeet
- speech
---

# {title}

Converted from a NeMo checkpoint by transformers-parakeet. See the original checkpoint for its licence and authors.

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
