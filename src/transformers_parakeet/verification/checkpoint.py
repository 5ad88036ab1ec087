"""Verifies a checkpoint: comparison with stock transformers on a bundled clip, and error rates on test data.

`comparison.py` runs stock transformers, and `training/evaluate.py` computes the error rates.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from ..nemo import (
    HUB_TIMEOUT_S,
    REQUEST_ERRORS,
    download_checkpoint,
    load_nemo,
    summarize_error,
)
from ..pipeline_parakeet import ParakeetASRPipeline
from ..training import Evaluation, create_english_normalizer, load_speech, run_evaluation
from .comparison import Comparison, compare_with_stock

# a clip of LibriSpeech dev-clean, 10.5 s; its origin and licence are in the file LICENSE beside it
CLIP = Path(__file__).parent / "clip" / "2412-153948-0001.flac"

# the test data of the published error rates: Hub dataset, its configuration and its split
LIBRISPEECH, LIBRISPEECH_CONFIGURATION, LIBRISPEECH_SPLIT = "openslr/librispeech_asr", "clean", "test"

# packages whose versions are reported
PACKAGES = ("transformers-parakeet", "transformers", "torch", "tokenizers", "huggingface_hub", "numpy", "soundfile")


@dataclass(frozen=True)
class VerifyOptions:
    """Options of `verify_checkpoint`.

    Args:
        num_clips: number of clips of the test data that are scored; 0 for none.
        data: test data in the forms of `load_speech`; None for LibriSpeech test-clean from the Hub.
        batch_size: number of clips per batch.
        device: device for the test data, such as `"cuda"`; None for a GPU if there is one. The comparison with stock
            transformers runs on the CPU.
        revision: branch, tag or commit of a Hub model; None for the default branch.
    """

    num_clips: int = 100
    data: str | None = None
    batch_size: int = 8
    device: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Verification:
    """The result of `verify_checkpoint`.

    Args:
        model: path or Hub id of the checkpoint.
        commit: commit of a Hub model; None for a local checkpoint.
        comparison: comparison with stock transformers on the bundled clip.
        data: name of the test data.
        evaluation: error rates and speed on the test data; None if no clip was scored.
        versions: name of a package or of Python -> version.
        machine: property of the machine -> description.
    """

    model: str
    commit: str | None
    comparison: Comparison
    data: str
    evaluation: Evaluation | None
    versions: dict[str, str]
    machine: dict[str, str]


def verify_checkpoint(model: str, options: VerifyOptions, report: Callable[[str], None]) -> Verification:
    """Compare a checkpoint with stock transformers, and compute its error rates on test data.

    Stock transformers cannot load a `.nemo` file, so it is first converted to a temporary folder.

    Args:
        model: Hub id, path of a folder or path of a `.nemo` file.
        options: the options.
        report: function that is called with the name of each step before it starts.

    Returns:
        The comparison, the error rates, and the versions and the machine.

    Raises:
        FileNotFoundError: the checkpoint or the test data does not exist.
        OSError: the Hub cannot be reached, and the cache does not contain the checkpoint or the test data.
        NemoError: the checkpoint is not supported.
    """
    report(f"looking for {model}")
    checkpoint = download_checkpoint(model, revision=options.revision)
    clips = read_test_clips(options, report) if options.num_clips else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint
        if checkpoint.is_file():
            report("converting the .nemo file to a temporary folder")
            folder = Path(temporary)
            loaded_model, processor = load_nemo(checkpoint)
            loaded_model.save_pretrained(folder)
            processor.save_pretrained(folder)
        report("recognising the bundled clip with stock transformers and with this package")
        comparison = compare_with_stock(folder, CLIP)
    evaluation = score_test_clips(checkpoint, clips, options, report) if clips else None
    return Verification(
        model=model,
        commit=find_commit(checkpoint),
        comparison=comparison,
        data=options.data or f"{LIBRISPEECH} {LIBRISPEECH_CONFIGURATION} {LIBRISPEECH_SPLIT}",
        evaluation=evaluation,
        versions={"Python": platform.python_version(), **{name: get_version(name) for name in PACKAGES}},
        machine=describe_machine(choose_device(options.device)),
    )


def read_test_clips(options: VerifyOptions, report: Callable[[str], None]) -> list[Any]:
    """Read the first clips of the test data, and download no more than these.

    Args:
        options: the options.
        report: function that is called with the name of the step.

    Returns:
        One row with the columns `audio` (encoded) and `text` per clip.

    Raises:
        OSError: the data does not exist, or the Hub cannot be reached.
    """
    if options.data is not None:
        return list(itertools.islice(load_speech(options.data, default_split="test"), options.num_clips))
    report(f"downloading {options.num_clips} clips of LibriSpeech test-clean")
    try:
        # this request fails at once without a network; `datasets` would repeat its requests for half a minute
        HfApi().dataset_info(LIBRISPEECH, timeout=HUB_TIMEOUT_S)
        dataset = load_speech(LIBRISPEECH, LIBRISPEECH_SPLIT, LIBRISPEECH_CONFIGURATION, streaming=True)
        return list(itertools.islice(dataset, options.num_clips))
    except REQUEST_ERRORS as error:
        raise OSError(
            "LibriSpeech test-clean must be downloaded from the Hub, but it cannot be reached "
            f"({summarize_error(error)}): check the connection, name other test data with `--data`, or score no clips "
            "with `--clips 0`"
        ) from error


def score_test_clips(
    checkpoint: Path, clips: list[Any], options: VerifyOptions, report: Callable[[str], None]
) -> Evaluation:
    """Recognise clips in float32 and compute the error rates after Whisper's English normalisation.

    Args:
        checkpoint: path of a `.nemo` file or folder.
        clips: one row with the columns `audio` and `text` per clip.
        options: the options.
        report: function that is called with the name of the step.
    """
    report(f"recognising {len(clips)} clips of the test data")
    model, processor = load_nemo(checkpoint, dtype=torch.float32)
    device = choose_device(options.device)
    pipe = ParakeetASRPipeline(model, processor=processor, task="automatic-speech-recognition", device=device)
    return run_evaluation(pipe, clips, options.batch_size, normalize=create_english_normalizer())


def find_commit(checkpoint: Path) -> str | None:
    """Find the commit of a checkpoint from its path in the Hub cache, or return None for another path.

    Args:
        checkpoint: path of a `.nemo` file or folder.
    """
    match = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", checkpoint.as_posix())
    return match[1] if match is not None else None


def get_version(package: str) -> str:
    """Return the version of an installed package, or "not installed" if it is used without an installation.

    Args:
        package: name of the package.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def choose_device(device: str | None) -> torch.device:
    """Return the device with a name, or by default a GPU if there is one.

    Args:
        device: name of the device; None for the default.
    """
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def describe_machine(device: torch.device) -> dict[str, str]:
    """Describe the machine: system, CPU, number of threads, and GPU if it is used.

    Args:
        device: device for the test data.
    """
    cpu_file = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.+)$", cpu_file.read_text(), re.MULTILINE) if cpu_file.is_file() else None
    cpu = match[1] if match is not None else platform.processor() or platform.machine()
    machine = {
        "system": platform.platform(),
        "CPU": f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
    if device.type == "cuda":
        machine["GPU"] = torch.cuda.get_device_name(device)
    return machine


__all__ = ["Verification", "VerifyOptions", "verify_checkpoint"]
