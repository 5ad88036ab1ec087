"""Prints results to stdout and messages to stderr, in one style for all subcommands."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

console = Console()
error_console = Console(stderr=True)


def print_text(text: str, end: str = "\n") -> None:
    """Print text to stdout without colours or line wrapping, because another program may read the output.

    Args:
        text: the text.
        end: text that is printed after `text`.
    """
    typer.echo(text + end, nl=False)


def print_error(message: str) -> None:
    """Print an error message in red to stderr, without line wrapping, because another program may read the output.

    Args:
        message: the text, without a line break at the end.
    """
    error_console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def print_note(message: str) -> None:
    """Print a message that is not an error to stderr, without line wrapping.

    Args:
        message: the text, without a line break at the end.
    """
    error_console.print(message, markup=False, highlight=False, soft_wrap=True)


def format_error(error: Exception, file: str = "") -> str:
    """Format an error as one line.

    Args:
        error: exception. If it has no message, the name of the exception class is used.
        file: name of the file that caused the error. It is prepended unless the message already contains it.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    return message if file in message else f"{file}: {message}"


def print_traceback(error: Exception) -> None:
    """Print the traceback of an exception to stderr, if the environment variable `TRANSFORMERS_VERBOSITY` is `debug`.

    Args:
        error: the exception.
    """
    if os.environ.get("TRANSFORMERS_VERBOSITY") == "debug":
        print_note("".join(traceback.format_exception(error)))


@contextmanager
def print_error_and_exit() -> Iterator[None]:
    """Catch errors that the user can correct in the `with` block, print them in one line, and exit with status 1.

    All other errors are raised with their traceback.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, MemoryError) as error:
        print_traceback(error)
        print_error(format_error(error))
        raise typer.Exit(1) from error


__all__ = [
    "console",
    "error_console",
    "format_error",
    "print_error",
    "print_error_and_exit",
    "print_note",
    "print_text",
    "print_traceback",
]
