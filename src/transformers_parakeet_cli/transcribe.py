"""`parakeet transcribe`: speech recognition of files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any

import typer

from .messages import format_error, print_error, print_error_and_exit, print_text, print_traceback
from .models import load_pipeline


class Format(str, Enum):
    """Output format of `parakeet transcribe`."""

    txt = "txt"
    json = "json"


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
        # no error in one file may prevent the transcription of the other files
        except Exception as error:  # noqa: BLE001
            print_traceback()
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


__all__ = ["transcribe"]
