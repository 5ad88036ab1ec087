"""`parakeet export`: a folder of ONNX files for other programs."""

from __future__ import annotations

import importlib.util
import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .messages import print_error_and_exit, print_next_command, print_note, print_text
from .models import load_pipeline
from .transcribe import Decoder, get_value


class ExportFormat(str, Enum):
    """Values of `--format`."""

    onnx_asr = "onnx-asr"


def export(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .nemo file; demo: the bundled model.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    export_format: Annotated[
        ExportFormat, typer.Option("--format", help="The program that loads the folder.")
    ] = ExportFormat.onnx_asr,
    int8: Annotated[bool, typer.Option("--int8", help="Write int8 instead of float32 weights.")] = False,
    decoder: Annotated[Decoder | None, typer.Option(help="Head of a hybrid model. Default: transducer.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of the same names in a folder that is not empty.")
    ] = False,
) -> None:
    """Write ONNX files that another program loads: the package onnx-asr.

    Each file is compared with the model for random inputs. If onnx-asr is installed, the tokens of the bundled clips
    are compared, too.
    """
    options = {"decoder": get_value(decoder), "quantize": "int8" if int8 else None}
    with print_error_and_exit():
        from transformers_parakeet.onnx_export import export_onnx, get_onnx_asr_type

        pipeline = load_pipeline(model, device="cpu", dtype="float32")
        print_note(f"exporting {model} to the format of {export_format.value}: minutes for a large model")
        paths = export_onnx(pipeline.model, pipeline.processor, folder, overwrite=overwrite, **options)
        for path in paths:
            print_text(str(path))
        print_note(f"for random inputs the float32 files compute the same as {model}")
        compare_tokens(pipeline, folder, options)
    quantization = ["-q", "int8"] if int8 else []
    head = get_onnx_asr_type(pipeline.model, options["decoder"])
    print_next_command("onnx-asr", head, "FILE.wav", "-p", str(folder), *quantization)


def compare_tokens(pipeline: Any, folder: Path, options: dict[str, str | None]) -> None:
    """Print in how many bundled clips onnx-asr recognises the same tokens as the model, if onnx-asr is installed.

    Args:
        pipeline: pipeline of the exported model.
        folder: the written folder.
        options: `decoder` and `quantize`, as in `export_onnx`.
    """
    if importlib.util.find_spec("onnx_asr") is None:
        print_note("tokens were not compared, because onnx-asr is not installed: pip install 'onnx-asr[cpu]'")
        return
    from transformers_parakeet import demo_model_path, load_audio
    from transformers_parakeet.onnx_export import count_different_clips

    clip_folder = demo_model_path() / "clips"
    names = [clip["file"] for clip in json.loads((clip_folder / "manifest.json").read_text(encoding="utf-8"))]
    clips = [load_audio(str(clip_folder / name)) for name in names]
    num_different = count_different_clips(pipeline.model, pipeline.processor, folder, clips, **options)
    print_note(f"onnx-asr recognises the same tokens in {len(clips) - num_different} of {len(clips)} bundled clips")


__all__ = ["export"]
