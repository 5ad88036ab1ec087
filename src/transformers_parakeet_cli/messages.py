"""Prints results to stdout and messages to stderr, in one style for all subcommands."""

from __future__ import annotations

import os
import shlex
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.table import Table

console = Console()
error_console = Console(stderr=True)

# width in characters of a table that is not printed to a terminal
DEFAULT_TABLE_WIDTH = 200


def print_text(text: str, end: str = "\n") -> None:
    """Print text to stdout without colours or line wrapping, because another program may read the output.

    Args:
        text: the text.
        end: text that is printed after `text`.
    """
    typer.echo(text + end, nl=False)


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values to stdout in two aligned columns, without line wrapping.

    Args:
        rows: pairs of name and value. A row with an empty name continues the value of the row before.
    """
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print_text(f"{name:{width}}  {value}")


def print_table(table: Table) -> None:
    """Print a table to stdout: as wide as the terminal, or without a terminal 200 characters wide.

    Args:
        table: the table.
    """
    # without a terminal, rich assumes a width of 80 characters and truncates the table
    is_terminal = console.file.isatty()
    table_console = console if is_terminal else Console(file=console.file, width=DEFAULT_TABLE_WIDTH)
    table_console.print(table)


def print_next_command(*arguments: str) -> None:
    """Print to stderr the command that uses the result of the present command.

    Args:
        *arguments: the command and its arguments, which are quoted for a shell. A word in capital letters stands for a
            name that the user knows.
    """
    print_note(f"next: {shlex.join(arguments)}")


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
    if isinstance(error, OSError) and error.strerror and error.filename:
        # the text of Python, without the number of the error
        message = f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, FileNotFoundError) and error.errno is not None:
        message = f"{message}: correct the path"
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
    "print_next_command",
    "print_note",
    "print_rows",
    "print_table",
    "print_text",
    "print_traceback",
]
