"""The command `parakeet`: transcribe, convert, fine-tune, evaluate, and show the bundled demo.

Only arguments and output live here; the work is done by the pipeline, `conversion.py` and `finetuning.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Annotated, Any

import jiwer
import typer
from rich.console import Console
from rich.table import Column, Table
from transformers.utils import logging

from .. import ParakeetASRPipeline, demo_model_path, load_nemo
from ..nemo import convert_checkpoint

logger = logging.get_logger(__name__)

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Speech recognition with NVIDIA Parakeet models.")
# columns of a table that is not printed to a terminal
PIPE_WIDTH = 200

console = Console()
errors = Console(stderr=True)


class Format(str, Enum):
    """How transcripts are written."""

    txt = "txt"
    json = "json"


def complain(text: str) -> None:
    """Print an error, without wrapping: it may be read by a program."""
    errors.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def message_of(error: Exception, name: str = "") -> str:
    """Return the text of an error in one line, with the name of its file before it where the text lacks the name."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if name in text else f"{name}: {text}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error that the user can mend into one line and status 1; verbosity "debug" shows where it came from."""
    try:
        yield
    except (OSError, ValueError, ImportError, MemoryError) as error:
        logger.debug("the command failed", exc_info=True)
        complain(message_of(error))
        raise typer.Exit(1) from error


def load_pipeline(model: str | None) -> Any:
    """Return the pipeline of a Hub id, a folder, a `.nemo` file, or the demo model."""
    logging.disable_progress_bar()
    loaded, processor = load_nemo(model or demo_model_path())
    return ParakeetASRPipeline(loaded, processor=processor, task="automatic-speech-recognition")


@app.command()
def transcribe(
    files: Annotated[list[str], typer.Argument(help="Audio files or URLs: WAV, FLAC, MP3, OGG, Opus, M4A, WebM, …")],
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or .nemo file; default: the bundled demo model (spoken digits).")
    ] = None,
    output: Annotated[Format, typer.Option("--format", help="txt: the text; json: with word times.")] = Format.txt,
) -> None:
    """Write down what is said in audio files; one that fails is named on stderr, and the others are still done."""
    with one_line_errors():
        pipe = load_pipeline(model)
    failures: list[str] = []
    results = recognised(pipe, files, failures)
    if output is Format.json:
        print_list(results)
    else:
        for result in results:
            print_text(f"{result['file']}: {result['text']}" if len(files) > 1 else result["text"])
    raise typer.Exit(int(bool(failures)))


def recognised(pipe: Any, files: list[str], failures: list[str]) -> Iterator[dict[str, Any]]:
    """Recognise files one by one; print the error of each that fails and add its name to `failures`."""
    for file in files:
        try:
            result = pipe(file, return_timestamps="word")
        except Exception as error:  # whatever goes wrong with one file, the next may be good
            logger.debug("%s failed", file, exc_info=True)
            complain(message_of(error, file))
            failures.append(file)
            continue
        yield {"file": file, "text": result["text"], "words": [word(chunk) for chunk in result["chunks"]]}


def print_list(results: Iterator[dict[str, Any]]) -> None:
    """Print a JSON list, every entry as soon as it is known; close the list also when the command is interrupted."""
    separator = "[\n"
    try:
        for result in results:
            text = separator + json.dumps(result, ensure_ascii=False, indent=2)
            separator = ",\n"
            print_text(text, end="")
    finally:
        print_text("[]" if separator == "[\n" else "\n]")


@app.command()
def demo() -> None:
    """Transcribe the bundled clips with both heads of the bundled model and compare with what was said."""
    folder = demo_model_path()
    with one_line_errors():
        pipe = load_pipeline(None)
    clips = json.loads((folder / "clips" / "manifest.json").read_text(encoding="utf-8"))
    files = [str(folder / "clips" / clip["file"]) for clip in clips]
    heard = pipe(files, return_timestamps="word", return_confidence=True)
    second = pipe(files, generate_kwargs={"decoder": "ctc"})
    words = Column("TDT: seconds, confidence", no_wrap=True)
    table = Table("clip", "said", words, "CTC", title="Parakeet demo model: spoken English digits")
    for clip, tdt, ctc in zip(clips, heard, second, strict=True):
        table.add_row(
            clip["file"], clip["text"], "\n".join(map(timed_word, tdt["chunks"])), ctc["text"], end_section=True
        )
    # a pipe has no width of its own: the table gets what it needs
    wide = console if console.file.isatty() else Console(file=console.file, width=PIPE_WIDTH)
    wide.print(table)
    said = [clip["text"] for clip in clips]
    for head, results in (("TDT", heard), ("CTC", second)):
        rate = jiwer.wer(said, [result["text"] for result in results])
        console.print(f"word error rate, {head}: {rate:.1%} on {len(clips)} clips", highlight=False)


def timed_word(chunk: dict[str, Any]) -> str:
    """Write a word with its times in seconds and its confidence."""
    start, end = chunk["timestamp"]
    return f"{chunk['text'].strip():5} {start:.2f}-{end:.2f}  {chunk['confidence']:.2f}"


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A .nemo file, a folder, or the Hub id of either.")],
    target: Annotated[str, typer.Argument(help="A folder to write, or a .nemo file; with --push-to-hub the Hub id.")],
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: as it is.")] = None,
    push_to_hub: Annotated[bool, typer.Option(help="Upload the folder to the Hub as well.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")] = None,
) -> None:
    """Convert a .nemo file to a folder of transformers, or a folder to a .nemo file, and check the result on noise."""
    logging.disable_progress_bar()
    with one_line_errors():
        written = convert_checkpoint(source, target, dtype=dtype, push_to_hub=push_to_hub, revision=revision)
    print_text(f"{written}: written, and equal to {source} on noise")


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def finetune(context: typer.Context) -> None:
    """Train a model further on audio with transcripts; `parakeet finetune --help` lists the options."""
    with one_line_errors():
        from ..training import main as train

        train(context.args)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .nemo file.")],
    data: Annotated[str, typer.Argument(help="NeMo manifest, folder, or name of a Hub dataset.")],
    split: Annotated[str | None, typer.Option(help="Split of data that has splits; default: test.")] = None,
    name: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    batch_size: Annotated[int, typer.Option(help="Clips recognised together.")] = 8,
    decoder: Annotated[str | None, typer.Option(help="ctc: the CTC head of a hybrid.")] = None,
    output: Annotated[
        str | None, typer.Option(help="File for references and hypotheses, one JSON object a line.")
    ] = None,
) -> None:
    """Measure the word error rate of a model on audio with transcripts."""
    with one_line_errors():
        from ..training import evaluate as score
        from ..training import load_speech

        clips = load_speech(data, split, name, default_split="test")
        result = score(load_pipeline(model), clips, batch_size, decoder)
    if output is not None:
        with open(output, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(clip, ensure_ascii=False) + "\n" for clip in result["clips"])
    print_text(
        f"{len(result['clips'])} clips, word error rate {result['wer']:.2%}, character error rate {result['cer']:.2%}"
    )


def word(chunk: dict[str, Any]) -> dict[str, Any]:
    """Return a word with its times in seconds."""
    start, end = chunk["timestamp"]
    return {"text": chunk["text"], "start": start, "end": end}


def print_text(text: str, end: str = "\n") -> None:
    """Print without markup, colours or wrapping, for other programs to read, and at once."""
    typer.echo(text + end, nl=False)


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
