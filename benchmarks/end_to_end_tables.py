"""Makes the tables of docs/performance.md from the CSV files of benchmarks/end_to_end.py.

python benchmarks/end_to_end_tables.py RESULTS.csv [...]

Times are medians over all runs of a case, with the fastest run in brackets.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

Row = dict[str, str]

STAGES = ("features", "encoder", "decoding", "text", "whole")
# pairs of sides whose times are divided: the first side, and the side that it is compared with
RATIOS = (
    *((f"ours {dtype}", f"stock {dtype}") for dtype in ("float32", "bfloat16")),
    *((f"ours {dtype}", f"baseline {dtype}") for dtype in ("float32", "bfloat16", "int8")),
    ("ours int8", "stock bfloat16"),
    ("ours int8", "baseline bfloat16"),
    ("ours float32", "onnx-asr float32"),
    ("ours int8", "onnx-asr int8"),
    ("ours float32", "nemo float32"),
)


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """Read the rows of CSV files."""
    rows = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    return rows


def list_values(rows: list[Row], column: str) -> list[str]:
    """List the different values of a column in the order of their first row."""
    return list(dict.fromkeys(row[column] for row in rows))


def get_side(row: Row) -> str:
    """Return engine and dtype of a row."""
    return f"{row['engine']} {row['dtype']}"


def select(rows: list[Row], side: str, case: str) -> list[Row]:
    """Return the rows of one side and one case."""
    return [row for row in rows if get_side(row) == side and row["case"] == case]


def compute_median(rows: list[Row], column: str) -> float:
    """Compute the median of a column."""
    return statistics.median(float(row[column]) for row in rows)


def format_table(head: list[str], body: Iterable[list[str]]) -> str:
    """Format a table in Markdown.

    Args:
        head: names of the columns.
        body: the rows.
    """
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_summary(rows: list[Row], sides: list[str], cases: list[str]) -> str:
    """Render the time of each case, the time of loading and the peak memory of each side.

    Args:
        rows: rows of one shape.
        sides: engine and dtype of the rows of the table.
        cases: cases of the columns.
    """
    body = []
    for side in sides:
        own = [row for row in rows if get_side(row) == side]
        cells = []
        for case in cases:
            times = [float(row["whole_s"]) for row in select(rows, side, case)]
            cells.append(f"{statistics.median(times):.3f} ({min(times):.3f})" if times else "")
        loading = statistics.median(float(row["loading_s"]) for row in own)
        peak = max(max(float(row["peak_mib"]), float(row["loading_peak_mib"])) for row in own)
        body.append([side, *cells, f"{loading:.1f}", f"{peak:.0f}"])
    return format_table(["engine", *(f"{case}, s" for case in cases), "loading, s", "peak MiB"], body)


def render_stages(rows: list[Row], sides: list[str], cases: list[str]) -> str:
    """Render the seconds of each stage, the labels, and the share of tokens that differ from stock float32.

    Args:
        rows: rows of one shape.
        sides: engine and dtype of the rows of the table.
        cases: cases of the rows of the table.
    """
    body = []
    for case in cases:
        for side in sides:
            own = select(rows, side, case)
            if own:
                times = [f"{compute_median(own, f'{stage}_s'):.3f}" for stage in STAGES]
                errors = f"{float(own[0]['token_error_rate']):.1%}"
                body.append([case, side, *times, own[0]["labels"], errors])
    return format_table(["case", "engine", *STAGES, "labels", "other tokens"], body)


def render_ratios(rows: list[Row], sides: list[str], cases: list[str]) -> str:
    """Render how many times as fast one side is as another one; empty if no pair of `RATIOS` was measured.

    Args:
        rows: rows of one shape.
        sides: the measured sides.
        cases: cases of the columns.
    """
    body = []
    for side, other in RATIOS:
        if side in sides and other in sides:
            cells = []
            for case in cases:
                own, others = select(rows, side, case), select(rows, other, case)
                both = own and others
                ratio = compute_median(others, "whole_s") / compute_median(own, "whole_s") if both else None
                cells.append("" if ratio is None else f"{ratio:.2f}")
            body.append([f"{side} against {other}", *cells])
    return format_table(["times as fast", *cases], body) if body else ""


def render(*paths: Path) -> str:
    """Render the machine, the versions and all tables.

    Args:
        *paths: the CSV files.
    """
    rows = read_rows(paths)
    parts = [
        f"{list_values(rows, 'date')[0][:10]}, {machine} ({instructions}), {cores} cores, {threads} threads"
        for machine, instructions, cores, threads in dict.fromkeys(
            (row["machine"], row["instructions"], row["cores"], row["threads"]) for row in rows
        )
    ]
    versions = dict.fromkeys(f"{row['engine']} {row['engine_version']} (torch {row['torch']})" for row in rows)
    parts.append(f"Python {', '.join(list_values(rows, 'python'))}; {', '.join(versions)}")
    for shape in list_values(rows, "shape"):
        own = [row for row in rows if row["shape"] == shape]
        sides, cases = list(dict.fromkeys(map(get_side, own))), list_values(own, "case")
        parts.append(f"{shape}: median (fastest) seconds from samples to text")
        parts += [function(own, sides, cases) for function in (render_summary, render_ratios, render_stages)]
    return "\n\n".join(filter(None, parts))


if __name__ == "__main__":
    print(render(*map(Path, sys.argv[1:])))
