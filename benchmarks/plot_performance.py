"""Draws docs/images/speedup.svg from the tables with stock transformers in docs/performance.md.

python benchmarks/plot_performance.py

The tables come from the other scripts of this folder. A test compares the picture with the tables.
"""

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
PICTURE = DOCS / "images" / "speedup.svg"
# pixels
WIDTH, LABEL_WIDTH, ROW_HEIGHT, BAR_HEIGHT, TOP = 820, 360, 24, 16, 34
# pixels at the right side of the longest bar, for its number
NUMBER_WIDTH = 60
COLOUR = "#0969da"
# in the tables of the loss, the section names what was measured
LONG_NAMES = {"fused": "loss with joint network", "logits": "loss"}


@dataclass(frozen=True)
class Case:
    """One row of a table: what was measured, and how many times as fast it was as stock transformers."""

    name: str
    speedup: float


def read_cases(text: str) -> list[Case]:
    """Read the rows of all tables with the columns case, stock s, ours s and speedup.

    Args:
        text: the page in Markdown.
    """
    rows = re.findall(r"^\| ([^|]+) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \| \d+ \| \d+ \|$", text, re.MULTILINE)
    cases = []
    for name, speedup in rows:
        kind, comma, shape = name.partition(",")
        cases.append(Case(LONG_NAMES.get(kind, kind) + comma + shape, float(speedup)))
    return cases


def draw(cases: list[Case]) -> str:
    """Return a bar chart as SVG, with one bar per case and a line where both are equally fast.

    Args:
        cases: the measured cases, from top to bottom.
    """
    scale = (WIDTH - LABEL_WIDTH - NUMBER_WIDTH) / max(case.speedup for case in cases)
    height = TOP + ROW_HEIGHT * len(cases) + 8
    title = "Speed relative to stock transformers, on a CPU"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#1b1f24">',
        f"  <title>{title}</title>",
        f'  <rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'  <text x="{LABEL_WIDTH}" y="20" font-weight="bold">{title}</text>',
    ]
    for index, case in enumerate(cases):
        top = TOP + ROW_HEIGHT * index
        width = round(case.speedup * scale)
        baseline = top + BAR_HEIGHT - 3
        lines += [
            f'  <text x="{LABEL_WIDTH - 8}" y="{baseline}" text-anchor="end">{case.name}</text>',
            f'  <rect x="{LABEL_WIDTH}" y="{top}" width="{width}" height="{BAR_HEIGHT}" fill="{COLOUR}"/>',
            f'  <text x="{LABEL_WIDTH + width + 6}" y="{baseline}">{case.speedup:.2f}</text>',
        ]
    equal = LABEL_WIDTH + round(scale)
    lines.append(f'  <path d="M{equal} {TOP - 6}V{height - 8}" stroke="#1b1f24" stroke-dasharray="4 3"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(draw(read_cases((DOCS / "performance.md").read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
