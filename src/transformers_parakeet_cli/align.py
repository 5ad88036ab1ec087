"""`parakeet align`: the times of the words of a known text."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .messages import print_error_and_exit, print_note, print_text
from .models import load_pipeline, print_model_note
from .outputs import write_atomically
from .transcribe import DEFAULT_MODEL, Decoder, Device, DtypeOption, Model, get_value

# confidence below which the command warns that the text may not belong to the recording
LOW_CONFIDENCE = 0.01


class AlignmentFormat(str, Enum):
    """Values of `--format`."""

    textgrid = "textgrid"
    json = "json"
    srt = "srt"
    vtt = "vtt"
    tsv = "tsv"


def align(
    audio: Annotated[str, typer.Argument(help="Audio or video file, or URL.")],
    text: Annotated[str, typer.Argument(help="Text file with what is said, or - for stdin.")],
    model: Model = DEFAULT_MODEL,
    output: Annotated[Path | None, typer.Option(help="File to write. Default: print to stdout.")] = None,
    output_format: Annotated[AlignmentFormat | None, typer.Option("--format", help="Default: textgrid.")] = None,
    decoder: Annotated[Decoder | None, typer.Option(help="Head of a hybrid model. Default: transducer.")] = None,
    device: Device = None,
    dtype: DtypeOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the result and errors.")] = False,
) -> None:
    """Find the times of the words of a known text in a recording."""
    with print_error_and_exit():
        transcript = sys.stdin.read() if text == "-" else Path(text).read_text(encoding="utf-8")
        pipeline = load_pipeline(model, device=device, dtype=get_value(dtype))
        from transformers_parakeet import subtitles
        from transformers_parakeet.alignment import align as align_text

        if not quiet:
            print_model_note(pipeline, is_default_dtype=dtype is None)
        result = align_text(audio, transcript, pipeline, decoder=get_value(decoder))
        if result.confidence is not None and result.confidence < LOW_CONFIDENCE and not quiet:
            print_note("the confidence is low: check that the text is what is said in the recording")
        content = subtitles.FORMATS[get_value(output_format) or "textgrid"](result)
        if output is None:
            print_text(content, end="")
        else:
            write_atomically(output, content)
            if not quiet:
                print_note(f"wrote {output}")


__all__ = ["align"]
