"""Measures one engine in one process for benchmarks/end_to_end.py: loading, and the stages from samples to text.

    python benchmarks/end_to_end_worker.py JSON

`end_to_end.py` starts this script, with the interpreter and the `PYTHONPATH` of the engine, and describes the fields of
JSON in `Side.describe_job`. Only the engine `ours` imports transformers_parakeet.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import rival

SAMPLING_RATE = 16000
# name -> number of clips and seconds of each clip
CASES = {"10 s": (1, 10), "60 s": (1, 60), "8 x 15 s": (8, 15)}

# a function that transcribes clips, and adds the seconds of its stages to a dict
Recogniser = Callable[[list[Any], dict[str, float]], list[str]]


def add_time(function: Callable[..., Any], seconds: dict[str, float], stage: str) -> Callable[..., Any]:
    """Wrap a function so that each call adds its duration to a stage.

    Args:
        function: the function.
        seconds: stage -> seconds; changed by every call.
        stage: name of the stage.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        """Call the function and add its duration."""
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
        return result

    return run


def load_transformers(job: dict[str, Any]) -> Recogniser:
    """Load a model with stock transformers, or with this package if its side is not `stock`.

    Args:
        job: see `Side.describe_job`.
    """
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    if job["engine"] == "ours":
        import transformers_parakeet as tp
    if job["dtype"] == "int8":
        model, processor = tp.load_nemo(job["folder"])
    else:
        dtype = getattr(torch, job["dtype"])
        model = transformers.AutoModelForTDT.from_pretrained(job["folder"], dtype=dtype)
        processor = transformers.AutoProcessor.from_pretrained(job["folder"])
    encode = model.get_audio_features

    def recognise(clips: list[Any], seconds: dict[str, float]) -> list[str]:
        """Transcribe the clips."""
        model.get_audio_features = add_time(encode, seconds, "encoder")
        make_features = add_time(processor, seconds, "features")
        inputs = make_features(clips, sampling_rate=SAMPLING_RATE, return_tensors="pt").to(dtype=model.dtype)
        output = add_time(model.generate, seconds, "decoding")(**inputs)
        seconds["decoding"] -= seconds["encoder"]
        return list(add_time(processor.batch_decode, seconds, "text")(output.sequences, skip_special_tokens=True))

    return recognise


def load_onnx_asr(job: dict[str, Any]) -> Recogniser:
    """Load a folder with onnx-asr. Its time of decoding includes the conversion to text.

    Args:
        job: see `Side.describe_job`.
    """
    onnx_asr = importlib.import_module("onnx_asr")
    options = importlib.import_module("onnxruntime").SessionOptions()
    options.intra_op_num_threads = job["threads"]
    quantization = None if job["dtype"] == "float32" else job["dtype"]
    recogniser = onnx_asr.load_model(
        "nemo-conformer-tdt",
        job["folder"],
        quantization=quantization,
        sess_options=options,
        providers=["CPUExecutionProvider"],
    )
    stages = {"features": recogniser.asr._preprocessor, "encoder": recogniser.asr._encode}

    def recognise(clips: list[Any], seconds: dict[str, float]) -> list[str]:
        """Transcribe the clips."""
        recogniser.asr._preprocessor = add_time(stages["features"], seconds, "features")
        recogniser.asr._encode = add_time(stages["encoder"], seconds, "encoder")
        texts = add_time(recogniser.recognize, seconds, "decoding")(clips)
        seconds["decoding"] -= seconds["features"] + seconds["encoder"]
        return list(texts)

    return recognise


def load_nemo_toolkit(job: dict[str, Any]) -> Recogniser:
    """Load a `.nemo` file with NVIDIA NeMo. Its time of decoding includes the conversion to text.

    Args:
        job: see `Side.describe_job`.
    """
    import torch

    torch.set_num_threads(job["threads"])
    models = importlib.import_module("nemo.collections.asr.models")
    model = models.ASRModel.restore_from(str(Path(job["folder"]) / "model.nemo"), map_location="cpu").eval()

    @torch.inference_mode()
    def recognise(clips: list[Any], seconds: dict[str, float]) -> list[str]:
        """Transcribe the clips by the steps of `model.transcribe`, which also starts a data loader and writes files."""
        samples = torch.tensor(np.stack(clips))
        lengths = torch.full((len(clips),), samples.shape[1])
        make_features = add_time(model.preprocessor, seconds, "features")
        features, feature_lengths = make_features(input_signal=samples, length=lengths)
        encode = add_time(model.encoder, seconds, "encoder")
        encoded, encoded_lengths = encode(audio_signal=features, length=feature_lengths)
        decode = add_time(model.decoding.rnnt_decoder_predictions_tensor, seconds, "decoding")
        return [hypothesis.text for hypothesis in decode(encoded, encoded_lengths)]

    return recognise


# engine -> function that loads a model, and the package whose version is reported
ENGINES = {
    "stock": (load_transformers, "transformers"),
    "ours": (load_transformers, "transformers-parakeet"),
    "onnx-asr": (load_onnx_asr, "onnx-asr"),
    "nemo": (load_nemo_toolkit, "nemo-toolkit"),
}


def get_version(package: str) -> str:
    """Return the version of a package; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def measure_case(recognise: Recogniser, clips: list[Any], repeats: int, expected: list[str] | None) -> dict[str, Any]:
    """Transcribe the clips once without timing, check the texts, and transcribe them `repeats` times with timing.

    Args:
        recognise: the loaded engine.
        clips: (S,) float32 samples of each clip.
        repeats: number of timed runs; 0 to transcribe the clips only once, one by one.
        expected: texts that the engine must return; `None` if rounding may change them.

    Returns:
        `texts` of the first run, `runs` with the seconds of the stages and of the `whole` run, and `peak_mib`.

    Raises:
        SystemExit: the texts are not the expected ones.
    """
    if not repeats:
        return {"texts": [recognise([clip], {})[0] for clip in clips]}
    # the peak is that of this case
    Path("/proc/self/clear_refs").write_text("5")
    texts = recognise(clips, {})
    if expected is not None and texts != expected:
        raise SystemExit("in float32 the texts must equal those of stock transformers, and they do not")
    runs = []
    for _ in range(repeats):
        seconds: dict[str, float] = {}
        start = time.perf_counter()
        recognise(clips, seconds)
        runs.append({**seconds, "whole": time.perf_counter() - start})
    return {"texts": texts, "runs": runs, "peak_mib": rival.peak_memory() / 1024}


def main() -> None:
    """Load the engine, measure all cases, and print one JSON object."""
    job = json.loads(sys.argv[1])
    load, package = ENGINES[job["engine"]]
    start = time.perf_counter()
    recognise = load(job)
    result: dict[str, Any] = {"loading_s": time.perf_counter() - start, "loading_peak_mib": rival.peak_memory() / 1024}
    samples = np.load(job["audio"])
    result["cases"] = {}
    for name in job["cases"]:
        num_clips, num_seconds = CASES[name]
        clips = list(samples[: num_clips * num_seconds * SAMPLING_RATE].reshape(num_clips, -1))
        result["cases"][name] = measure_case(recognise, clips, job["repeats"], job["expected_texts"].get(name))
    result["engine_version"] = get_version(package)
    result.update({name: get_version(name) for name in ("torch", "transformers")}, python=platform.python_version())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
