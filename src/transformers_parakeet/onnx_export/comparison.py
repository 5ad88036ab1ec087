"""Compares exported ONNX files with the model: outputs in onnxruntime, and tokens in the package onnx-asr."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..generation_arguments import list_decoders
from ..optional_packages import import_optional
from .graphs import Graph
from .requirements import get_onnx_asr_type

# largest accepted difference of an output, relative to its largest absolute value
MAX_RELATIVE_ERROR = 1e-4

# number of feature frames of the inputs that are compared: one encoder frame, and 10 s
COMPARED_FRAMES = (8, 1000)


def check_graph_file(graph: Graph, path: Path) -> None:
    """Check that an ONNX file computes the same as the module that it was exported from.

    Args:
        graph: module and example inputs. They are also compared as a batch of one, with the lengths `COMPARED_FRAMES`.
        path: the ONNX file.

    Raises:
        ValueError: an output differs by more than rounding errors.
    """
    all_inputs = [graph.inputs, *(resize_inputs(graph, num_frames) for num_frames in COMPARED_FRAMES)]
    session = open_session(path)
    for inputs in all_inputs:
        with torch.no_grad():
            expected = graph.module(**inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for name, output, tensor in zip(graph.outputs, run_session(session, inputs), expected, strict=True):
            error = compute_relative_error(output, tensor.numpy())
            # a comparison with NaN is False
            if not error <= MAX_RELATIVE_ERROR:
                raise ValueError(
                    f"the output {name} of {path.name} must equal that of the model up to a relative error of "
                    f"{MAX_RELATIVE_ERROR}, got {error:.2g}: report this as an issue of transformers-parakeet"
                )


def resize_inputs(graph: Graph, num_frames: int) -> dict[str, Tensor]:
    """Take the first clip of the example inputs, and repeat or cut its frames.

    Args:
        graph: graph with example inputs.
        num_frames: number of feature frames of the result; unused if the inputs have no feature frames.

    Returns:
        Inputs for a batch of one.
    """
    inputs = {}
    for name, tensor in graph.inputs.items():
        for dimension, size_name in graph.variable_sizes[name].items():
            if size_name == "batch":
                tensor = tensor.narrow(dimension, 0, 1)
            else:
                indices = torch.arange(num_frames) % tensor.shape[dimension]
                tensor = tensor.index_select(dimension, indices)
        inputs[name] = torch.tensor([num_frames]) if name == "length" else tensor
    return inputs


def compute_relative_error(output: np.ndarray, expected: np.ndarray) -> float:
    """Compute the largest difference of two arrays, divided by the largest absolute value of the second one.

    Args:
        output: array of any shape.
        expected: array of the same shape.

    Returns:
        The relative error; infinity if the shapes differ, NaN if an array contains NaN.
    """
    if output.shape != expected.shape:
        return float("inf")
    largest = max(np.abs(expected).max(initial=0.0), np.finfo(np.float32).tiny)
    return float(np.abs(output - expected).max(initial=0.0) / largest)


def open_session(path: Path) -> Any:
    """Load an ONNX file with onnxruntime on the CPU.

    Args:
        path: the file.
    """
    runtime = import_optional("onnxruntime", "the export", "onnx")
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run_session(session: Any, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    """Compute all outputs of a loaded ONNX file.

    Args:
        session: session of onnxruntime.
        inputs: name of each input -> value.
    """
    outputs: list[np.ndarray] = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return outputs


def run_graph_file(path: Path, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    """Load an ONNX file and compute all its outputs.

    Args:
        path: the file.
        inputs: name of each input -> value.
    """
    return run_session(open_session(path), inputs)


def count_different_clips(
    model: Any,
    processor: Any,
    folder: str | Path,
    clips: Sequence[np.ndarray],
    *,
    decoder: str | None = None,
    quantize: str | None = None,
) -> int:
    """Transcribe clips with the model and with the package onnx-asr, and count the clips whose tokens differ.

    Args:
        model: the exported model.
        processor: processor of the model.
        folder: the written folder.
        clips: (S,) float32 samples of each clip at 16 kHz.
        decoder: as in `export_onnx`.
        quantize: as in `export_onnx`.

    Returns:
        Number of clips with different tokens.

    Raises:
        ImportError: onnx-asr is not installed.
    """
    decoder = decoder or list_decoders(model.config)[0]
    pieces = list_pieces(model, processor, clips, decoder)
    onnx_asr = import_optional("onnx_asr", "the export", "onnx")
    recogniser = onnx_asr.load_model(get_onnx_asr_type(model, decoder), folder, quantization=quantize)
    results = recogniser.with_timestamps().recognize(list(clips))
    return sum(result.tokens != expected for result, expected in zip(results, pieces, strict=True))


def list_pieces(model: Any, processor: Any, clips: Sequence[np.ndarray], decoder: str) -> list[list[str]]:
    """Transcribe clips with the model, and list the pieces of each clip with spaces as in onnx-asr.

    Args:
        model: a model with a head.
        processor: processor of the model.
        clips: (S,) float32 samples of each clip at 16 kHz.
        decoder: `"transducer"` or `"ctc"`.
    """
    inputs = processor(list(clips), sampling_rate=processor.feature_extractor.sampling_rate)
    hypotheses = model.generate(**inputs, decoder=decoder, return_dict_in_generate=True).hypotheses
    rows = zip(hypotheses.tokens.tolist(), hypotheses.lengths.tolist(), strict=True)
    clip_pieces = [processor.tokenizer.convert_ids_to_tokens(tokens[:length]) for tokens, length in rows]
    return [[piece.replace("\u2581", " ") for piece in pieces] for pieces in clip_pieces]


__all__ = ["check_graph_file", "count_different_clips", "run_graph_file"]
