"""Defines the command `parakeet` with the subcommands transcribe, demo, convert, finetune and evaluate.

This file handles arguments and output. The computation is in the pipeline, `nemo` and `training`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from transformers.utils import logging

from ..nemo import convert_checkpoint, demo_model_path, load_nemo
from ..pipeline_parakeet import ParakeetASRPipeline

logger = logging.get_logger(__name__)

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Speech recognition with NVIDIA Parakeet models.")
# width in characters of a table that is not printed to a terminal
DEFAULT_TABLE_WIDTH = 200

console = Console()
error_console = Console(stderr=True)


class Format(str, Enum):
    """Output format of `parakeet transcribe`."""

    txt = "txt"
    json = "json"


def print_error(message: str) -> None:
    """Print an error message in red to stderr, without line wrapping, because another program may read the output.

    Args:
        message: the text, without a line break at the end.
    """
    error_console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def format_error(error: Exception, file: str = "") -> str:
    """Format an error as one line.

    Args:
        error: exception. If it has no message, the name of the exception class is used.
        file: name of the file that caused the error. It is prepended unless the message already contains it.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    return message if file in message else f"{file}: {message}"


@contextmanager
def print_error_and_exit() -> Iterator[None]:
    """Catch errors that the user can correct in the `with` block, print them in one line, and exit with status 1.

    All other errors are raised with their traceback. If the verbosity of transformers is "debug", the traceback of a
    caught error is logged.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, MemoryError) as error:
        logger.debug("the command failed", exc_info=True)
        print_error(format_error(error))
        raise typer.Exit(1) from error


def load_pipeline(model: str | None) -> Any:
    """Load a model and create a speech recognition pipeline.

    Args:
        model: Hub id, path of a folder, or path of a `.nemo` file; None for the bundled demo model.
    """
    logging.disable_progress_bar()
    loaded_model, processor = load_nemo(model or demo_model_path())
    return ParakeetASRPipeline(loaded_model, processor=processor, task="automatic-speech-recognition")


@app.command()
def transcribe(
    files: Annotated[list[str], typer.Argument(help="Audio files or URLs: WAV, FLAC, MP3, OGG, Opus, M4A, WebM, …")],
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or .nemo file; default: the bundled demo model (spoken digits).")
    ] = None,
    output_format: Annotated[
        Format, typer.Option("--format", help="txt: text only; json: text and word times in seconds.")
    ] = Format.txt,
) -> None:
    """Transcribe audio files.

    If a file fails, the error is printed to stderr and the remaining files are transcribed. The exit status is then 1.
    """
    with print_error_and_exit():
        pipeline = load_pipeline(model)
    # `transcribe_files` is a generator, which appends to this list while its results are printed
    failed_files: list[str] = []
    results = transcribe_files(pipeline, files, failed_files)
    if output_format is Format.json:
        print_json_list(results)
    else:
        for result in results:
            # name the file if there are several
            print_text(f"{result['file']}: {result['text']}" if len(files) > 1 else result["text"])
    raise typer.Exit(int(bool(failed_files)))


def transcribe_files(pipeline: Any, files: list[str], failed_files: list[str]) -> Iterator[dict[str, Any]]:
    """Transcribe files one by one. If a file fails, print the error and continue with the next file.

    Args:
        pipeline: speech recognition pipeline.
        files: names or URLs of audio files.
        failed_files: output list, to which the name of each failed file is appended.

    Yields:
        One dict `{"file", "text", "words"}` per transcribed file. Each word is a dict `{"text", "start", "end"}` with
        times in seconds.
    """
    for file in files:
        try:
            result = pipeline(file, return_timestamps="word")
        except Exception as error:  # no error in one file may prevent the transcription of the other files
            logger.debug("%s failed", file, exc_info=True)
            print_error(format_error(error, file))
            failed_files.append(file)
            continue
        yield {"file": file, "text": result["text"], "words": [to_word_entry(chunk) for chunk in result["chunks"]]}


def to_word_entry(chunk: dict[str, Any]) -> dict[str, Any]:
    """Convert a word of the pipeline output to a dict `{"text", "start", "end"}` with times in seconds.

    Args:
        chunk: a dict `{"text", "timestamp"}`, with start and end in seconds.
    """
    start, end = chunk["timestamp"]
    return {"text": chunk["text"], "start": start, "end": end}


def print_json_list(results: Iterator[dict[str, Any]]) -> None:
    """Print results as a JSON list, each result as soon as it is available.

    The closing bracket is printed even if the program is interrupted, so the output is always valid JSON.

    Args:
        results: dicts to print, one per file.
    """
    separator = "[\n"
    try:
        for result in results:
            entry = json.dumps(result, ensure_ascii=False, indent=2)
            print_text(separator + entry, end="")
            separator = ",\n"
    finally:
        # no result was printed if the separator is still the opening bracket
        print_text("[]" if separator == "[\n" else "\n]")


@app.command()
def demo() -> None:
    """Transcribe the bundled clips with both heads of the demo model, TDT and CTC, and print the word error rates."""
    folder = demo_model_path()
    with print_error_and_exit():
        pipeline = load_pipeline(None)
    clips = json.loads((folder / "clips" / "manifest.json").read_text(encoding="utf-8"))
    files = [str(folder / "clips" / clip["file"]) for clip in clips]
    tdt_results = pipeline(files, return_timestamps="word", return_confidence=True)
    ctc_results = pipeline(files, generate_kwargs={"decoder": "ctc"})
    print_demo_table(clips, tdt_results, ctc_results)
    references = [clip["text"] for clip in clips]
    for head, results in (("TDT", tdt_results), ("CTC", ctc_results)):
        rate = compute_word_error_rate(references, [result["text"] for result in results])
        rate_text = "not computed, because it needs jiwer (in the extra `cli`)" if rate is None else f"{rate:.1%}"
        console.print(f"word error rate, {head}: {rate_text} on {len(clips)} clips", highlight=False)


def print_demo_table(
    clips: list[dict[str, Any]], tdt_results: list[dict[str, Any]], ctc_results: list[dict[str, Any]]
) -> None:
    """Print a table with one row per clip: file, reference, TDT words with times and confidence, and CTC text.

    Args:
        clips: one dict `{"file", "text"}` per clip; `text` is the reference.
        tdt_results: pipeline output of the TDT head, one dict per clip; `chunks` contains the words with times and
            confidence.
        ctc_results: pipeline output of the CTC head, one dict `{"text"}` per clip.
    """
    words_column = Column("TDT: seconds, confidence", no_wrap=True)
    table = Table("clip", "reference", words_column, "CTC", title="Parakeet demo model: spoken English digits")
    for clip, tdt_result, ctc_result in zip(clips, tdt_results, ctc_results, strict=True):
        words = "\n".join(map(format_word, tdt_result["chunks"]))
        table.add_row(clip["file"], clip["text"], words, ctc_result["text"], end_section=True)
    # without a terminal, rich assumes a width of 80 characters and truncates the table
    is_terminal = console.file.isatty()
    table_console = console if is_terminal else Console(file=console.file, width=DEFAULT_TABLE_WIDTH)
    table_console.print(table)


def format_word(chunk: dict[str, Any]) -> str:
    """Format a word of the pipeline output with start and end in seconds and the confidence.

    Args:
        chunk: a dict `{"text", "timestamp", "confidence"}`, with start and end in seconds.
    """
    start, end = chunk["timestamp"]
    return f"{chunk['text'].strip():5} {start:.2f}-{end:.2f}  {chunk['confidence']:.2f}"


def compute_word_error_rate(references: list[str], hypotheses: list[str]) -> float | None:
    """Compute the word error rate over all clips; return None if jiwer is not installed.

    Args:
        references: the correct text of each clip.
        hypotheses: the recognised text of each clip.
    """
    try:
        import jiwer
    except ImportError:
        return None
    return float(jiwer.wer(references, hypotheses))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A .nemo file, a folder, or a Hub id.")],
    target: Annotated[str, typer.Argument(help="Folder or .nemo file to write; with --push-to-hub a Hub id.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: the dtype of the source.")
    ] = None,
    push_to_hub: Annotated[bool, typer.Option(help="Also upload the folder to the Hub.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")] = None,
) -> None:
    """Convert a .nemo file to a transformers folder, or a folder to a .nemo file.

    The result is loaded and compared with the source: the weights, and the output for random noise.
    """
    logging.disable_progress_bar()
    with print_error_and_exit():
        written_path = convert_checkpoint(source, target, dtype=dtype, push_to_hub=push_to_hub, revision=revision)
    print_text(f"wrote {written_path}; weights and output for random noise equal those of {source}")


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def finetune(context: typer.Context) -> None:
    """Fine-tune a model on audio with transcripts; `parakeet finetune --help` lists the options."""
    # imported here because training needs packages that the other commands do not need
    with print_error_and_exit():
        from ..training import finetune_main

        finetune_main(context.args)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .nemo file.")],
    data: Annotated[str, typer.Argument(help="NeMo manifest, folder, or name of a Hub dataset.")],
    split: Annotated[str | None, typer.Option(help="Split of the dataset; default: test.")] = None,
    name: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    batch_size: Annotated[int, typer.Option(help="Number of clips per batch.")] = 8,
    decoder: Annotated[str | None, typer.Option(help="ctc: use the CTC head of a hybrid.")] = None,
    output_path: Annotated[
        str | None, typer.Option("--output", help="File for references and hypotheses, one JSON object per line.")
    ] = None,
) -> None:
    """Measure the word error rate of a model on audio with transcripts."""
    with print_error_and_exit():
        from ..training import evaluate_pipeline, load_speech

        dataset = load_speech(data, split, name, default_split="test")
        result = evaluate_pipeline(load_pipeline(model), dataset, batch_size, decoder)
    if output_path is not None:
        with open(output_path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(clip, ensure_ascii=False) + "\n" for clip in result["clips"])
    print_text(
        f"{len(result['clips'])} clips, word error rate {result['wer']:.2%}, character error rate {result['cer']:.2%}"
    )


def print_text(text: str, end: str = "\n") -> None:
    """Print text without buffering, colours or line wrapping, because another program may read the output.

    Args:
        text: the text.
        end: text that is printed after `text`.
    """
    typer.echo(text + end, nl=False)


def main() -> None:
    """Run the command `parakeet`."""
    app()


if __name__ == "__main__":
    main()
