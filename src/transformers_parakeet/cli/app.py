"""The command `parakeet` with its subcommands transcribe, demo, convert, finetune and evaluate.

This file handles arguments and output; the pipeline, `nemo` and `training` do the work.
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

from .. import ParakeetASRPipeline, demo_model_path, load_nemo
from ..nemo import convert_checkpoint

logger = logging.get_logger(__name__)

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Speech recognition with NVIDIA Parakeet models.")
# characters; width of a table that is not printed to a terminal
DEFAULT_TABLE_WIDTH = 200

console = Console()
error_console = Console(stderr=True)


class Format(str, Enum):
    """Output format of `parakeet transcribe`."""

    txt = "txt"
    json = "json"


def print_error(message: str) -> None:
    """Print an error message in red to stderr, without wrapping, because another program may read it."""
    error_console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def error_message(error: Exception, file: str = "") -> str:
    """Return the message of an error in one line.

    Args:
        error: the error; if it has no message, the name of its class is used.
        file: name of the file that caused it; put before the message unless the message contains it.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    return message if file in message else f"{file}: {message}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error that the user can correct in one line and exit with status 1.

    Other errors keep their traceback. With transformers' verbosity "debug" the traceback is logged for all errors.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, MemoryError) as error:
        logger.debug("the command failed", exc_info=True)
        print_error(error_message(error))
        raise typer.Exit(1) from error


def load_pipeline(model: str | None) -> Any:
    """Create a speech recognition pipeline.

    Args:
        model: Hub id, folder or `.nemo` file; None means the bundled demo model.
    """
    logging.disable_progress_bar()
    loaded, processor = load_nemo(model or demo_model_path())
    return ParakeetASRPipeline(loaded, processor=processor, task="automatic-speech-recognition")


@app.command()
def transcribe(
    files: Annotated[list[str], typer.Argument(help="Audio files or URLs: WAV, FLAC, MP3, OGG, Opus, M4A, WebM, …")],
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or .nemo file; default: the bundled demo model (spoken digits).")
    ] = None,
    output: Annotated[
        Format, typer.Option("--format", help="txt: text only; json: text and word times in seconds.")
    ] = Format.txt,
) -> None:
    """Transcribe audio files.

    An error in one file is printed to stderr, and the other files are still transcribed; the exit status is then 1.
    """
    with one_line_errors():
        pipe = load_pipeline(model)
    failed_files: list[str] = []
    results = transcribe_files(pipe, files, failed_files)
    if output is Format.json:
        print_json_list(results)
    else:
        for result in results:
            print_text(f"{result['file']}: {result['text']}" if len(files) > 1 else result["text"])
    raise typer.Exit(int(bool(failed_files)))


def transcribe_files(pipe: Any, files: list[str], failed_files: list[str]) -> Iterator[dict[str, Any]]:
    """Transcribe files one by one; print the error of a file that fails and continue with the next one.

    Args:
        pipe: the speech recognition pipeline.
        files: names or URLs of the files.
        failed_files: receives the names of the files that fail.

    Yields:
        `{"file", "text", "words"}` for each file that does not fail; see `word_entry` for the words.
    """
    for file in files:
        try:
            result = pipe(file, return_timestamps="word")
        except Exception as error:  # an error of any kind in one file must not stop the other files
            logger.debug("%s failed", file, exc_info=True)
            print_error(error_message(error, file))
            failed_files.append(file)
            continue
        yield {"file": file, "text": result["text"], "words": [word_entry(chunk) for chunk in result["chunks"]]}


def word_entry(chunk: dict[str, Any]) -> dict[str, Any]:
    """Convert a word from the pipeline to `{"text", "start", "end"}` with times in seconds."""
    start, end = chunk["timestamp"]
    return {"text": chunk["text"], "start": start, "end": end}


def print_json_list(results: Iterator[dict[str, Any]]) -> None:
    """Print results as a JSON list, each one as soon as it is available.

    The list is closed even if the program is interrupted, so that the output is always valid JSON.
    """
    separator = "[\n"
    try:
        for result in results:
            entry = json.dumps(result, ensure_ascii=False, indent=2)
            print_text(separator + entry, end="")
            separator = ",\n"
    finally:
        print_text("[]" if separator == "[\n" else "\n]")


@app.command()
def demo() -> None:
    """Transcribe the bundled clips with the TDT and the CTC head of the demo model, and compare with the references."""
    folder = demo_model_path()
    with one_line_errors():
        pipe = load_pipeline(None)
    clips = json.loads((folder / "clips" / "manifest.json").read_text(encoding="utf-8"))
    files = [str(folder / "clips" / clip["file"]) for clip in clips]
    tdt_results = pipe(files, return_timestamps="word", return_confidence=True)
    ctc_results = pipe(files, generate_kwargs={"decoder": "ctc"})
    print_demo_table(clips, tdt_results, ctc_results)
    references = [clip["text"] for clip in clips]
    for head, results in (("TDT", tdt_results), ("CTC", ctc_results)):
        rate = word_error_rate(references, [result["text"] for result in results])
        text = "not computed, it needs jiwer (in the extra `cli`)" if rate is None else f"{rate:.1%}"
        console.print(f"word error rate, {head}: {text} on {len(clips)} clips", highlight=False)


def print_demo_table(
    clips: list[dict[str, Any]], tdt_results: list[dict[str, Any]], ctc_results: list[dict[str, Any]]
) -> None:
    """Print a table with one row per clip: file, reference, words with times and confidence, and CTC text.

    Args:
        clips: `{"file", "text"}` for each clip; the text is the reference.
        tdt_results: result of the pipeline with word times and confidence, for each clip.
        ctc_results: result of the pipeline with the CTC head, for each clip.
    """
    words_column = Column("TDT: seconds, confidence", no_wrap=True)
    table = Table("clip", "reference", words_column, "CTC", title="Parakeet demo model: spoken English digits")
    for clip, tdt, ctc in zip(clips, tdt_results, ctc_results, strict=True):
        words = "\n".join(map(format_word, tdt["chunks"]))
        table.add_row(clip["file"], clip["text"], words, ctc["text"], end_section=True)
    # a file or pipe has no width, so rich would assume 80 characters and truncate the table
    is_terminal = console.file.isatty()
    table_console = console if is_terminal else Console(file=console.file, width=DEFAULT_TABLE_WIDTH)
    table_console.print(table)


def format_word(chunk: dict[str, Any]) -> str:
    """Format a word from the pipeline with its start and end in seconds and its confidence."""
    start, end = chunk["timestamp"]
    return f"{chunk['text'].strip():5} {start:.2f}-{end:.2f}  {chunk['confidence']:.2f}"


def word_error_rate(references: list[str], hypotheses: list[str]) -> float | None:
    """Compute the word error rate over all clips together; return None if jiwer is not installed."""
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
        str | None, typer.Option(help="float32, float16 or bfloat16; default: that of the source.")
    ] = None,
    push_to_hub: Annotated[bool, typer.Option(help="Also upload the folder to the Hub.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")] = None,
) -> None:
    """Convert a .nemo file to a transformers folder, or a folder to a .nemo file.

    The result is loaded and compared with the source on random noise.
    """
    logging.disable_progress_bar()
    with one_line_errors():
        written = convert_checkpoint(source, target, dtype=dtype, push_to_hub=push_to_hub, revision=revision)
    print_text(f"wrote {written}; on random noise its output equals that of {source}")


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def finetune(context: typer.Context) -> None:
    """Fine-tune a model on audio with transcripts; `parakeet finetune --help` lists the options."""
    with one_line_errors():
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
    output: Annotated[
        str | None, typer.Option(help="File for references and hypotheses, one JSON object per line.")
    ] = None,
) -> None:
    """Measure the word error rate of a model on audio with transcripts."""
    with one_line_errors():
        from ..training import evaluate_pipeline, load_speech

        clips = load_speech(data, split, name, default_split="test")
        result = evaluate_pipeline(load_pipeline(model), clips, batch_size, decoder)
    if output is not None:
        with open(output, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(clip, ensure_ascii=False) + "\n" for clip in result["clips"])
    print_text(
        f"{len(result['clips'])} clips, word error rate {result['wer']:.2%}, character error rate {result['cer']:.2%}"
    )


def print_text(text: str, end: str = "\n") -> None:
    """Print text at once and without colours or wrapping, because another program may read it."""
    typer.echo(text + end, nl=False)


def main() -> None:
    """Run the command `parakeet`."""
    app()


if __name__ == "__main__":
    main()
