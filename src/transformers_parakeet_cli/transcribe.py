"""`parakeet transcribe`: speech recognition of files, folders, URLs and standard input.

This file defines the options. `inputs.py` finds the recordings, `job.py` transcribes them, and `outputs.py` writes the
results.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .job import Job
from .messages import print_error_and_exit
from .outputs import FORMAT_NAMES, OutputOptions

DEFAULT_MODEL = "nvidia/parakeet-tdt-0.6b-v3"


class Format(str, Enum):
    """Values of `--format`."""

    txt = "txt"
    json = "json"
    srt = "srt"
    vtt = "vtt"
    tsv = "tsv"
    textgrid = "textgrid"
    all = "all"


class Level(str, Enum):
    """Values of `--timestamps`."""

    word = "word"
    segment = "segment"
    char = "char"


class Decoder(str, Enum):
    """Values of `--decoder`."""

    transducer = "transducer"
    ctc = "ctc"


class Attention(str, Enum):
    """Values of `--attention`."""

    local = "local"
    full = "full"


class Dtype(str, Enum):
    """Values of `--dtype`."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantization(str, Enum):
    """Values of `--quantize`."""

    int8 = "int8"


def option(help_text: str, *names: str, envvar: str | None = None) -> Any:
    """Create an option of the command.

    Args:
        help_text: what the option does.
        *names: names of the option; without names, the name of the parameter.
        envvar: environment variable with the default; `None` for no variable.
    """
    return typer.Option(*names, help=help_text, envvar=envvar)


Inputs = Annotated[
    list[str], typer.Argument(help="Audio or video files, folders, patterns such as 'a*.mp3', URLs, or - for stdin.")
]
Model = Annotated[
    str, option("Hub id, folder or .nemo file; demo: the bundled model of spoken digits.", envvar="PARAKEET_MODEL")
]
Formats = Annotated[list[Format] | None, option("Format of the output; repeatable. Default: txt.", "--format")]
OutputDir = Annotated[Path | None, option("Folder of the output files. Default: print one format to stdout.")]
Timestamps = Annotated[
    Level | None, option("Level of the lines with times in txt, and of the rows in tsv; word: also word times in vtt.")
]
DecoderOption = Annotated[Decoder | None, option("Head of a hybrid model. Default: transducer.")]
BatchSize = Annotated[int | None, option("Number of windows per batch. Default: chosen by memory.")]
ChunkLength = Annotated[
    float | None, option("Length of windows in seconds; 0: whole files. Default: windows if a file needs them.")
]
AttentionOption = Annotated[
    Attention | None, option("local: time grows linearly with the length. Default: that of the model.")
]
Device = Annotated[str | None, option("cpu, cuda or cuda:1. Default: cuda if there is a GPU.")]
DtypeOption = Annotated[Dtype | None, option("Default: bfloat16 if the device computes it natively, else float32.")]
Beams = Annotated[
    int | None, option("Number of hypotheses of a beam search; 1: greedy. Default: that of the model, else 1.")
]
Boost = Annotated[
    Path | None, option("Text file with phrases to recognise more often, one per line; a score may follow a tab.")
]
LanguageModel = Annotated[Path | None, option("n-gram model of tokens or words: ARPA file, also .gz.", "--lm")]
LanguageModelWeight = Annotated[float, option("Weight of the n-gram model.", "--lm-weight")]
Scripts = Annotated[
    list[str] | None, option("Script that letters may have, such as Latin; repeatable. Default: all.", "--script")
]
QuantizeOption = Annotated[
    Quantization | None, option("int8: faster and smaller, on a CPU with VNNI or AMX instructions.")
]
Threads = Annotated[
    int | None, typer.Option(help="Number of threads on a CPU. Default: at most the number of free cores.", min=1)
]
Overwrite = Annotated[bool, option("Replace existing output files; otherwise they are kept.", "--overwrite")]
JsonLines = Annotated[bool, option("Print each result to stdout as a JSON object on one line.", "--jsonl")]
Quiet = Annotated[bool, option("Print only results and errors.", "--quiet")]


def transcribe(
    inputs: Inputs,
    model: Model = DEFAULT_MODEL,
    formats: Formats = None,
    output_dir: OutputDir = None,
    timestamps: Timestamps = None,
    decoder: DecoderOption = None,
    batch_size: BatchSize = None,
    chunk_length: ChunkLength = None,
    attention: AttentionOption = None,
    beams: Beams = None,
    boost: Boost = None,
    language_model: LanguageModel = None,
    lm_weight: LanguageModelWeight = 0.3,
    scripts: Scripts = None,
    device: Device = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    jsonl: JsonLines = False,
    quiet: Quiet = False,
) -> None:
    """Transcribe audio and video files.

    Existing output files are kept. If a file fails, the others are transcribed, and the exit status is 1.
    """
    with print_error_and_exit():
        outputs = OutputOptions(
            formats=choose_formats(formats, has_output=output_dir is not None or not jsonl),
            folder=output_dir,
            timestamps=get_value(timestamps),
            overwrite=overwrite,
            prints_lines=jsonl,
        )
        choices = {"dtype": dtype, "attention": attention, "quantize": quantize}
        model_options = {"device": device, **{name: get_value(choice) for name, choice in choices.items()}}
        options = {
            "decoder": get_value(decoder),
            "batch_size": batch_size,
            "chunk_length_s": chunk_length,
            "num_beams": beams,
            "language_model": language_model,
            "lm_weight": lm_weight,
            "scripts": tuple(scripts or ()),
        }
        job = Job(inputs, outputs, quiet)
        job.run(model, model_options, options, boost, threads)
    raise typer.Exit(int(bool(job.errors)))


def choose_formats(formats: list[Format] | None, has_output: bool) -> tuple[str, ...]:
    """Choose the formats of the outputs.

    Args:
        formats: values of `--format`; `None` for the default.
        has_output: whether there is an output other than that of `--jsonl`.

    Returns:
        Names of formats in the order of `FORMAT_NAMES`, each once.
    """
    names = {value.value for value in formats or ([Format.txt] if has_output else [])}
    return tuple(name for name in FORMAT_NAMES if name in names or "all" in names)


def get_value(choice: Enum | None) -> str | None:
    """Return the text of a value of an option.

    Args:
        choice: the value; `None` if the option was not given.
    """
    return None if choice is None else str(choice.value)


__all__ = ["Decoder", "Threads", "get_value", "transcribe"]
