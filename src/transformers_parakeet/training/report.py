"""Writes an evaluation as one HTML file: error rates, error rate against length, confused words, worst clips.

`evaluate.py` computes the evaluation. The file needs no network, no scripts and no other files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from .evaluate import Evaluation
from .metrics import BOOTSTRAP_DRAWS, AlignedWord, ClipScore, Rate, compute_rates

# maximum number of rows of a table of words and of worst clips
MAX_WORD_ROWS = 20
MAX_CLIPS = 20
# number of groups of clips in the diagram
MAX_GROUPS = 10

# dash that stands for no word in an alignment
NO_WORD = "\u2013"

# size of the diagram and its margins in pixels
DIAGRAM_WIDTH, DIAGRAM_HEIGHT = 640, 260
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 56, 16, 16, 44

RATE_NAMES = {
    "wer": "word error rate",
    "substitutions": "substituted words",
    "deletions": "deleted words",
    "insertions": "inserted words",
    "cer": "character error rate",
}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0 0 1rem; }
th, td { text-align: left; padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td.number, th.number { text-align: right; }
.tables { display: flex; flex-wrap: wrap; gap: 2rem; }
.alignment { overflow-x: auto; }
.alignment td, .alignment th { border: 0; padding: 0 0.5rem 0 0; white-space: nowrap; }
.alignment .error { background: #fbdcd9; }
svg text { font: 12px system-ui, sans-serif; fill: #444; }
"""


@dataclass(frozen=True)
class LengthGroup:
    """Clips of similar length with their common word error rate.

    Args:
        duration: mean length of the clips in seconds.
        rate: word error rate of the clips with its 95 % interval.
        num_clips: number of clips.
    """

    duration: float
    rate: Rate
    num_clips: int


def write_report(
    evaluation: Evaluation, path: str | Path, title: str = "Evaluation", settings: Mapping[str, Any] | None = None
) -> None:
    """Write an evaluation as one HTML file.

    Args:
        evaluation: the errors and the speed.
        path: the file to write; an existing file is replaced.
        title: heading of the page.
        settings: names and values to list in the page, such as model, data and normalisation.

    Raises:
        OSError: the file cannot be written.
    """
    Path(path).write_text(format_report(evaluation, title, settings), encoding="utf-8")


def format_report(evaluation: Evaluation, title: str = "Evaluation", settings: Mapping[str, Any] | None = None) -> str:
    """Format an evaluation as an HTML page.

    Args:
        evaluation: the errors and the speed.
        title: heading of the page.
        settings: names and values to list in the page.

    Returns:
        The HTML page.
    """
    sections = [
        f"<h1>{escape(title)}</h1>",
        format_table([], [(name, str(value)) for name, value in (settings or {}).items()]),
        "<h2>Error rates</h2>",
        format_rates(evaluation),
        "<h2>Word error rate against the length of clips</h2>",
        format_diagram(group_by_length(evaluation.scores)),
        "<h2>Confused words</h2>",
        format_confusions(evaluation.scores),
        "<h2>Clips with the most word errors</h2>",
        *map(format_clip, evaluation.worst_clips(MAX_CLIPS)),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table. Every cell is escaped, and cells after the first one are aligned to the right.

    Args:
        header: the cells of the first row; empty for no header.
        rows: the cells of the other rows.

    Returns:
        The HTML table.
    """

    def format_row(cells: Sequence[str], tag: str) -> str:
        """Format one row with cells of an HTML tag."""
        attributes = ["", *([' class="number"'] * (len(cells) - 1))]
        return "".join(
            f"<{tag}{attribute}>{escape(cell)}</{tag}>" for cell, attribute in zip(cells, attributes, strict=True)
        )

    lines = [format_row(header, "th")] if header else []
    lines += [format_row(cells, "td") for cells in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def format_rates(evaluation: Evaluation) -> str:
    """Format the error rates with intervals and counts, and the speed.

    Args:
        evaluation: the errors and the speed.

    Returns:
        An HTML table and a paragraph.
    """
    words, characters = [score.words for score in evaluation.scores], [score.characters for score in evaluation.scores]
    counts = {
        "wer": sum(word_counts.errors for word_counts in words),
        "substitutions": sum(word_counts.substitutions for word_counts in words),
        "deletions": sum(word_counts.deletions for word_counts in words),
        "insertions": sum(word_counts.insertions for word_counts in words),
        "cer": sum(character_counts.errors for character_counts in characters),
    }
    rows = []
    for name, label in RATE_NAMES.items():
        rate = evaluation.rates[name]
        rows.append((label, f"{rate.value:.2%}", f"{rate.low:.2%} to {rate.high:.2%}", f"{counts[name]:,}"))
    num_words = sum(word_counts.reference_length for word_counts in words)
    summary = (
        f"{len(words):,} clips, {num_words:,} reference words, {evaluation.audio_seconds:,.1f} s of audio, "
        f"{evaluation.processing_seconds:,.1f} s of processing, real-time factor {evaluation.real_time_factor:.4f}. "
        f"Intervals: percentile bootstrap over clips, {BOOTSTRAP_DRAWS:,} draws."
    )
    return format_table(("", "rate", "95 % interval", "number"), rows) + f"<p>{escape(summary)}</p>"


def group_by_length(scores: Sequence[ClipScore]) -> list[LengthGroup]:
    """Divide clips into groups of equally many clips by their length, and compute the word error rate of each group.

    Args:
        scores: the errors of each clip.

    Returns:
        At most ten groups with increasing length. Groups without reference words are left out.
    """
    sorted_scores = sorted(scores, key=lambda score: score.clip.duration)
    num_groups = min(MAX_GROUPS, len(sorted_scores))
    groups = []
    for index in range(num_groups):
        first, stop = (len(sorted_scores) * bound // num_groups for bound in (index, index + 1))
        group_scores = sorted_scores[first:stop]
        if any(score.words.reference_length for score in group_scores):
            duration = sum(score.clip.duration for score in group_scores) / len(group_scores)
            groups.append(LengthGroup(duration, compute_rates(group_scores)["wer"], len(group_scores)))
    return groups


def format_diagram(groups: Sequence[LengthGroup]) -> str:
    """Draw the word error rate of groups of clips against their length, with intervals.

    Args:
        groups: the groups with increasing length, at least one.

    Returns:
        An SVG image and a caption.
    """
    max_duration = max(group.duration for group in groups) or 1.0
    max_rate = max(group.rate.high for group in groups) or 1.0
    width, height = DIAGRAM_WIDTH - MARGIN_LEFT - MARGIN_RIGHT, DIAGRAM_HEIGHT - MARGIN_TOP - MARGIN_BOTTOM
    bottom = MARGIN_TOP + height
    shapes = []
    for fraction in (0.0, 0.5, 1.0):
        x, y = MARGIN_LEFT + fraction * width, bottom - fraction * height
        shapes += [
            f'<line x1="{MARGIN_LEFT}" x2="{MARGIN_LEFT + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{MARGIN_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{fraction * max_rate:.1%}</text>',
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{fraction * max_duration:.1f}</text>',
        ]
    for group in groups:
        x = MARGIN_LEFT + group.duration / max_duration * width
        low, value, high = (
            bottom - rate / max_rate * height for rate in (group.rate.low, group.rate.value, group.rate.high)
        )
        label = f"{group.num_clips} clips, mean length {group.duration:.1f} s, word error rate {group.rate.value:.2%}"
        shapes += [
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="#888"/>',
            f'<circle cx="{x:.1f}" cy="{value:.1f}" r="4" fill="#1f5fa8"><title>{label}</title></circle>',
        ]
    axis = f'<text x="{MARGIN_LEFT + width / 2}" y="{DIAGRAM_HEIGHT - 6}" text-anchor="middle">seconds</text>'
    return (
        f'<svg viewBox="0 0 {DIAGRAM_WIDTH} {DIAGRAM_HEIGHT}" width="{DIAGRAM_WIDTH}" role="img" '
        f'aria-label="word error rate against length">{"".join(shapes)}{axis}</svg>'
        "<p>Each point is a group of equally many clips, at their mean length. Lines are 95 % intervals.</p>"
    )


def count_confusions(scores: Sequence[ClipScore]) -> Counter[AlignedWord]:
    """Count the substituted, deleted and inserted words of all clips.

    Args:
        scores: the errors of each clip.

    Returns:
        The number of each pair of different words; `None` stands for no word.
    """
    return Counter(pair for score in scores for pair in score.alignment if pair.reference != pair.hypothesis)


def format_confusions(scores: Sequence[ClipScore]) -> str:
    """Format the most frequent substitutions, deletions and insertions.

    Args:
        scores: the errors of each clip.

    Returns:
        Three HTML tables.
    """
    counts = sorted(
        count_confusions(scores).items(),
        # equal numbers are in alphabetical order
        key=lambda item: (-item[1], item[0].reference or "", item[0].hypothesis or ""),
    )
    substitutions = [
        (f"{pair.reference} \u2192 {pair.hypothesis}", str(count))
        for pair, count in counts
        if pair.reference is not None and pair.hypothesis is not None
    ]
    deletions = [(pair.reference, str(count)) for pair, count in counts if pair.reference and pair.hypothesis is None]
    insertions = [(pair.hypothesis, str(count)) for pair, count in counts if pair.hypothesis and pair.reference is None]
    tables = [
        format_table(("reference \u2192 hypothesis", "number"), substitutions[:MAX_WORD_ROWS]),
        format_table(("deleted", "number"), deletions[:MAX_WORD_ROWS]),
        format_table(("inserted", "number"), insertions[:MAX_WORD_ROWS]),
    ]
    return f'<div class="tables">{"".join(tables)}</div>'


def format_clip(score: ClipScore) -> str:
    """Format a clip: name, length, number of errors, and the aligned words with errors highlighted.

    Args:
        score: the errors of the clip.

    Returns:
        A heading and a table of two rows, reference and hypothesis, with one column per aligned pair.
    """
    words = score.words
    heading = (
        f"{score.clip.name}: {words.errors} errors in {words.reference_length} words ({words.substitutions} "
        f"substituted, {words.deletions} deleted, {words.insertions} inserted), {score.clip.duration:.1f} s"
    )
    cells: dict[str, list[str]] = {"reference": [], "hypothesis": []}
    for pair in score.alignment:
        attribute = "" if pair.reference == pair.hypothesis else ' class="error"'
        for row, word in (("reference", pair.reference), ("hypothesis", pair.hypothesis)):
            cells[row].append(f"<td{attribute}>{escape(NO_WORD if word is None else word)}</td>")
    rows = "".join(f"<tr><th>{row}</th>{''.join(row_cells)}</tr>" for row, row_cells in cells.items())
    return f'<h3>{escape(heading)}</h3><div class="alignment"><table>{rows}</table></div>'


__all__ = ["format_report", "write_report"]
