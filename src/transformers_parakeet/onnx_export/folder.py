"""Writes a folder that the package onnx-asr loads: ONNX files, vocabulary and configuration.

`graphs.py` builds the graphs, `comparison.py` compares the written files with the model.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ..configuration_parakeet import get_blank_id
from ..generation_arguments import check_decoder, list_decoders
from ..optional_packages import import_optional
from .comparison import check_graph_file, run_graph_file
from .graphs import Graph, build_ctc_graph, build_encoder_graph, build_step_graph, write_graph
from .quiet import quiet_libraries
from .requirements import check_onnx_asr_runs, get_onnx_asr_type

# name of the blank in the vocabulary, by which onnx-asr recognises it
ONNX_ASR_BLANK = "<blk>"

# operators whose weights are quantised; the int8 convolutions of onnxruntime are slower than those in float32
QUANTIZED_OPERATORS = ["MatMul", "LSTM"]


def export_onnx(
    model: Any,
    processor: Any,
    folder: str | Path,
    *,
    decoder: str | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write a folder that the package onnx-asr loads.

    Each ONNX file is compared with the model for random inputs of three sizes. The files get their names only after
    all of them are complete. The model is not changed, but no other thread may use it during the export.

    Args:
        model: a model with a head, in float32 on the CPU, in eval mode.
        processor: processor of the model.
        folder: folder to write. It must be empty or must not exist, unless `overwrite` is true.
        decoder: `"transducer"` or `"ctc"` for a hybrid; `None` for the default decoder of the model.
        quantize: `"int8"` for int8 weights of the linear layers and of the LSTM; `None` for float32.
        overwrite: whether to replace files of the same names in an existing folder. Other files are kept.

    Returns:
        Paths of the written files.

    Raises:
        ValueError: onnx-asr cannot run the model, an argument is invalid, or a file does not compute the same as the
            model.
        FileExistsError: the folder is not empty.
        ImportError: a package of the extra `onnx` is not installed.
    """
    folder = Path(folder)
    check_decoder(model.config, decoder)
    decoder = decoder or list_decoders(model.config)[0]
    if quantize not in (None, "int8"):
        raise ValueError(f"`quantize` must be None or 'int8', got {quantize!r}: correct it")
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists: give an empty or a new folder, or set `overwrite` (--overwrite)")
    check_onnx_asr_runs(model, processor, decoder)
    for package in ("onnx", "onnxruntime", "onnxscript"):
        import_optional(package, "the export", "onnx")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new_folder = Path(temporary)
        (new_folder / "vocab.txt").write_text(build_vocabulary(model, processor), encoding="utf-8")
        (new_folder / "config.json").write_text(json.dumps(build_config(model, decoder), indent=2), encoding="utf-8")
        for name, graph in build_graphs(model, decoder).items():
            write_network(graph, new_folder, name, quantize)
        folder.mkdir(exist_ok=True)
        return [path.replace(folder / path.name) for path in sorted(new_folder.iterdir())]


def build_graphs(model: Any, decoder: str) -> dict[str, Graph]:
    """Build the graphs of a model.

    Args:
        model: a model with a head.
        decoder: `"transducer"` or `"ctc"`.

    Returns:
        Name of the file in onnx-asr, without suffix -> graph.
    """
    if decoder == "ctc":
        return {"model": build_ctc_graph(model)}
    return {"encoder-model": build_encoder_graph(model), "decoder_joint-model": build_step_graph(model)}


def write_network(graph: Graph, folder: Path, name: str, quantize: str | None) -> None:
    """Write the ONNX file of a graph, and compare it with the model.

    Args:
        graph: the graph.
        folder: folder of the file.
        name: name of the file without suffix.
        quantize: `"int8"` or `None`, as in `export_onnx`.

    Raises:
        ValueError: the file does not compute the same as the model.
    """
    path = folder / f"{name}.onnx"
    write_graph(graph, path)
    check_graph_file(graph, path)
    if quantize is None:
        return
    quantized_path = folder / f"{name}.{quantize}.onnx"
    with quiet_libraries():
        # one scale per output channel, as fast as one scale per weight: with random weights of the 110M shape, the
        # relative error of the encoder is 2.8 instead of 3.7 %
        import_optional("onnxruntime.quantization", "the export", "onnx").quantize_dynamic(
            path, quantized_path, op_types_to_quantize=QUANTIZED_OPERATORS, per_channel=True
        )
    run_graph_file(quantized_path, graph.inputs)
    for float_path in folder.glob(f"{name}.onnx*"):
        float_path.unlink()


def build_vocabulary(model: Any, processor: Any) -> str:
    """Build the content of `vocab.txt`: a line `piece id` for each token.

    Args:
        model: a model with a head.
        processor: processor of the model.

    Returns:
        The lines, ordered by id. The blank has the name `<blk>`.

    Raises:
        ValueError: an id has no piece, or a piece contains white space, which the format cannot represent.
    """
    pieces = processor.tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))
    pieces[get_blank_id(model.config)] = ONNX_ASR_BLANK
    invalid = [token_id for token_id, piece in enumerate(pieces) if not piece or any(mark in piece for mark in " \n\r")]
    if invalid:
        raise ValueError(
            "every token must have a piece without spaces and line breaks for onnx-asr, which is not the case for the "
            f"ids {invalid[:5]}: correct the tokenizer"
        )
    return "".join(f"{piece} {token_id}\n" for token_id, piece in enumerate(pieces))


def build_config(model: Any, decoder: str) -> dict[str, Any]:
    """Build the content of `config.json` of onnx-asr.

    Args:
        model: a model with a head.
        decoder: `"transducer"` or `"ctc"`.
    """
    encoder_config = model.config.encoder_config
    config = {
        "model_type": get_onnx_asr_type(model, decoder),
        "features_size": encoder_config.num_mel_bins,
        "subsampling_factor": encoder_config.subsampling_factor,
    }
    return config if decoder == "ctc" else {**config, "max_tokens_per_step": model.config.max_symbols_per_step}


__all__ = ["export_onnx"]
