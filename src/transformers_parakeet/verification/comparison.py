"""Compares this package with stock transformers on one clip: the same program runs with the classes of both.

`recognition.py` is the program, and `checkpoint.py` verifies a whole checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .recognition import recognize

# the program
PROGRAM = Path(__file__).with_name("recognition.py")

# start of the line that the program prints
RESULT_PREFIX = "result: "

# longest text of stock transformers in a difference, in characters
MAX_TEXT_LENGTH = 200


@dataclass(frozen=True)
class Comparison:
    """The results of this package and of stock transformers for one clip.

    Args:
        text: text that this package recognises.
        num_tokens: number of recognised labels, without blanks.
        seconds: time of this package for features and recognition, on the CPU in float32.
        stock_text: text that stock transformers recognises; None if it failed.
        stock_seconds: time of stock transformers; None if it failed.
        differences: what differs, one description per kind; empty if text, tokens and times are equal.
    """

    text: str
    num_tokens: int
    seconds: float
    stock_text: str | None
    stock_seconds: float | None
    differences: tuple[str, ...]


def compare_with_stock(folder: Path, clip: Path) -> Comparison:
    """Recognise a clip with this package and with stock transformers, on the CPU in float32, and compare the results.

    Args:
        folder: folder of a checkpoint in the format of transformers.
        clip: audio file with one channel at the sampling rate of the model.

    Returns:
        The comparison. If stock transformers fails, the error is one of the differences.
    """
    stock_result, stock_error = run_stock(folder, clip)
    result = recognize(str(folder), str(clip))
    differences = list_differences(result, stock_result) if stock_result is not None else (stock_error,)
    return Comparison(
        text=result["text"],
        num_tokens=len(result["tokens"]),
        seconds=result["seconds"],
        stock_text=stock_result["text"] if stock_result is not None else None,
        stock_seconds=stock_result["seconds"] if stock_result is not None else None,
        differences=differences,
    )


def run_stock(folder: Path, clip: Path) -> tuple[dict[str, Any] | None, str]:
    """Run the program in a process that does not import this package.

    Args:
        folder: folder of a checkpoint in the format of transformers.
        clip: audio file.

    Returns:
        The result of `recognize`, and an empty text. If the program fails: None, and a description of the error.
    """
    source = PROGRAM.read_text(encoding="utf-8")
    # the program is passed as text, because Python would add the folder of a program file to its search path
    command = [sys.executable, "-c", source, str(folder.resolve()), str(clip.resolve())]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as empty_folder:
        done = subprocess.run(command, cwd=empty_folder, env=environment, capture_output=True, text=True, check=False)
    results = [line for line in done.stdout.splitlines() if line.startswith(RESULT_PREFIX)]
    if done.returncode or not results:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return None, f"stock transformers cannot run the checkpoint: {lines[-1]}"
    result = json.loads(results[-1].removeprefix(RESULT_PREFIX))
    if not result["model_module"].startswith("transformers."):
        return None, f"the other process used {result['model_module']}, not stock transformers: remove its import"
    return result, ""


def list_differences(result: dict[str, Any], stock_result: dict[str, Any]) -> tuple[str, ...]:
    """List what differs between two results of `recognize`.

    Args:
        result: result of this package.
        stock_result: result of stock transformers.
    """
    tokens, stock_tokens = result["tokens"], stock_result["tokens"]
    ids, stock_ids = ([token["id"] for token in entries] for entries in (tokens, stock_tokens))
    differences = []
    if ids != stock_ids:
        pairs = zip(ids, stock_ids, strict=False)
        num_equal = next(
            (index for index, (one, other) in enumerate(pairs) if one != other), min(map(len, (ids, stock_ids)))
        )
        differences.append(f"tokens: {len(ids)} against {len(stock_ids)} of stock, equal up to number {num_equal}")
    else:
        shifts = [
            abs(token[key] - stock[key])
            for token, stock in zip(tokens, stock_tokens, strict=True)
            for key in ("start", "end")
        ]
        if max(shifts, default=0.0) > 0:
            differences.append(f"times: up to {max(shifts):.2f} s")
    if result["text"] != stock_result["text"]:
        stock_text = textwrap.shorten(stock_result["text"], MAX_TEXT_LENGTH)
        differences.append(f"text: stock has {stock_text!r}")
    return tuple(differences)


__all__ = ["Comparison", "compare_with_stock"]
