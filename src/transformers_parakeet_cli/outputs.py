"""Writes the results of `parakeet transcribe` to files or to stdout.

`transformers_parakeet.subtitles` converts a result to text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .messages import print_text

# ending of a file that is not complete; a process that is killed leaves at most one such file per output
PARTIAL_SUFFIX = ".partial"
FORMAT_NAMES = ("txt", "json", "srt", "vtt", "tsv", "textgrid")
# formats of which several results can be printed one after another
PRINTED_FORMATS = ("txt", "json")


@dataclass(frozen=True)
class OutputOptions:
    """Which outputs are written, and where.

    Args:
        formats: names of the formats, in the order of `FORMAT_NAMES`.
        folder: folder of the files; `None` to print one format to stdout.
        timestamps: `"word"`, `"segment"` or `"char"`: level of the lines with times in txt, and of the rows in tsv;
            `"word"` adds the times of words to vtt. `None` for text without times in txt, and for segments in tsv.
        overwrite: whether existing files are replaced.
        prints_lines: whether every result is printed to stdout as a JSON object on one line.

    Raises:
        ValueError: several formats or several kinds of output would be printed to stdout.
    """

    formats: tuple[str, ...]
    folder: Path | None = None
    timestamps: str | None = None
    overwrite: bool = False
    prints_lines: bool = False

    def __post_init__(self) -> None:
        """Check that at most one format is printed to stdout."""
        if self.folder is None and self.prints_lines and self.formats:
            raise ValueError(
                f"`--jsonl` prints to stdout, got also {', '.join(self.formats)}: add `--output-dir FOLDER`, or leave "
                "out `--format`"
            )
        if self.folder is None and len(self.formats) > 1:
            raise ValueError(
                f"stdout holds one format, got {', '.join(self.formats)}: add `--output-dir FOLDER`, or leave out "
                "all but one `--format`"
            )

    def check_number(self, num_recordings: int) -> None:
        """Check that the results of several recordings can be printed one after another.

        Args:
            num_recordings: number of recordings.

        Raises:
            ValueError: the format allows only one recording on stdout.
        """
        if self.folder is None and num_recordings > 1 and not set(self.formats) <= set(PRINTED_FORMATS):
            raise ValueError(
                f"stdout holds one file in the format {self.formats[0]}, got {num_recordings} recordings: add "
                "`--output-dir FOLDER`"
            )

    def create_folder(self) -> None:
        """Create the output folder if it does not exist.

        Raises:
            ValueError: the folder cannot be created or written.
        """
        if self.folder is None:
            return
        reason = "no permission to write"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            is_writable = os.access(self.folder, os.W_OK)
        except OSError as error:
            is_writable, reason = False, error.strerror or type(error).__name__
        if not is_writable:
            raise ValueError(f"`--output-dir` must be a folder that can be written, got {self.folder} ({reason})")

    @property
    def needs_confidence(self) -> bool:
        """Whether an output contains confidences."""
        return "json" in self.formats or self.prints_lines

    def get_missing_formats(self, name: str) -> tuple[str, ...]:
        """Return the formats whose files must be written: all, or those that do not exist.

        Args:
            name: path of the outputs of a recording without ending, relative to the output folder.
        """
        if self.folder is None or self.overwrite:
            return self.formats
        return tuple(format_name for format_name in self.formats if not self.get_path(name, format_name).exists())

    def get_path(self, name: str, format_name: str) -> Path:
        """Return the path of an output file.

        Args:
            name: path of the outputs of a recording without ending, relative to the output folder.
            format_name: name of the format.
        """
        return (self.folder or Path()) / f"{name}.{format_name}"

    def write(self, result: Any, name: str, formats: tuple[str, ...]) -> None:
        """Write the files of a result.

        Args:
            result: a `TranscriptionResult`.
            name: path of the outputs without ending, relative to the output folder.
            formats: names of the formats to write.

        Raises:
            OSError: a file cannot be written.
        """
        for format_name in formats:
            write_atomically(self.get_path(name, format_name), format_result(result, format_name, self.timestamps))


def format_result(result: Any, format_name: str, timestamps: str | None) -> str:
    """Convert a result to the text of an output file.

    Args:
        result: a `TranscriptionResult`.
        format_name: name of the format.
        timestamps: see `OutputOptions`.

    Returns:
        The content of the file, with a line break at its end.
    """
    from transformers_parakeet import subtitles

    levels = {"word": result.words, "segment": result.segments, "char": result.tokens}
    if format_name == "txt" and timestamps is not None:
        return "".join(f"{format_line(timed_text)}\n" for timed_text in levels[timestamps])
    if format_name == "tsv" and timestamps is not None:
        return subtitles.to_tsv(replace(result, segments=levels[timestamps]))
    if format_name == "vtt":
        return subtitles.to_vtt(result, word_times=timestamps == "word")
    return subtitles.FORMATS[format_name](result)


def format_line(timed_text: Any) -> str:
    """Format a token, word or segment as one line: start and end in seconds in brackets, and the text.

    Args:
        timed_text: a `TimedText`.
    """
    return f"[{timed_text.start:.2f} - {timed_text.end:.2f}] {' '.join(timed_text.text.split())}"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is complete whenever it exists under its name.

    The text is written to a file whose name starts with a dot and ends with the process id and `.partial`. Then the
    file gets its name in one step.

    Args:
        path: the file. Its folder is created.
        text: the content.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        # the file still exists if writing failed or was interrupted
        with suppress(FileNotFoundError):
            partial.unlink()


def print_json_list(results: Iterator[Any]) -> None:
    """Print results to stdout as a JSON list, each result as soon as it is available.

    The closing bracket is printed even if the program is interrupted, so the output is always valid JSON.

    Args:
        results: a `TranscriptionResult` per entry.
    """
    separator = "[\n"
    try:
        for result in results:
            print_text(separator + format_result(result, "json", None), end="")
            separator = ",\n"
    finally:
        # no result was printed if the separator is still the opening bracket
        print_text("[]" if separator == "[\n" else "]")


def print_json_line(result: Any) -> None:
    """Print a result to stdout as a JSON object on one line.

    Args:
        result: a `TranscriptionResult`.
    """
    from transformers_parakeet import subtitles

    print_text(subtitles.to_json(result, indent=None), end="")


__all__ = [
    "FORMAT_NAMES",
    "PARTIAL_SUFFIX",
    "PRINTED_FORMATS",
    "OutputOptions",
    "format_result",
    "print_json_line",
    "print_json_list",
]
