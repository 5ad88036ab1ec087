"""From frames to character, word and segment times, exactly as NVIDIA NeMo computes them; pure Python.

Knows token ids, frames and two callables of a tokenizer; seconds and text come from the processor.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "min": min,
    "prod": math.prod,
}

# NeMo's default way from token to word confidence
DEFAULT_AGGREGATION = "min"


@dataclass(frozen=True)
class Emissions:
    """The tokens of one clip, without blanks.

    Args:
        tokens: ids.
        frames: encoder frame at which each token was emitted.
        durations: frames that each token spans (TDT: as predicted; CTC: its run; RNN-T: 0 or 1 step of advance).
        confidence: how sure the model was of each token, when asked for.
    """

    tokens: list[int]
    frames: list[int]
    durations: list[int]
    confidence: list[float] | None = None


@dataclass(frozen=True)
class Span:
    """A piece of text with its start and end in frames, and its confidence."""

    text: str
    start: int
    end: int
    confidence: float | None = None


def ctc_runs(ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """Merge consecutive repeats of frame-wise ids into (token, first frame, frame after the last); blanks stay in."""
    runs, frame = [], 0
    for token, group in groupby(ids):
        length = len(list(group))
        runs.append((token, frame, frame + length))
        frame += length
    return runs


def ctc_emissions(ids: Sequence[int], blank_id: int, confidence: Sequence[float] | None = None) -> Emissions:
    """Merge the frame-wise ids of a CTC head: repeats collapse, blanks go.

    Args:
        ids: best id of every frame.
        blank_id: the blank.
        confidence: confidence of every frame; a token takes the smallest of its frames.
    """
    runs = [run for run in ctc_runs(ids) if run[0] != blank_id]
    sure = None if confidence is None else [min(confidence[start:end]) for _, start, end in runs]
    return Emissions([t for t, _, _ in runs], [f for _, f, _ in runs], [end - f for _, f, end in runs], sure)


def transducer_emissions(
    ids: Sequence[int], durations: Sequence[int], skip: Collection[int], confidence: Sequence[float] | None = None
) -> Emissions:
    """Take the tokens out of generated steps; the frame of a step is the sum of the durations before it.

    Args:
        ids: token or blank of every step.
        durations: frames that every step advances.
        skip: ids that are no tokens: the blank and the pad.
        confidence: confidence of every step.
    """
    steps, frame = [], 0
    for index, (token, duration) in enumerate(zip(ids, durations, strict=True)):
        if token not in skip:
            steps.append((token, frame, duration, index))
        frame += duration
    sure = None if confidence is None else [confidence[index] for *_, index in steps]
    return Emissions([s[0] for s in steps], [s[1] for s in steps], [s[2] for s in steps], sure)


def supported_punctuation(pieces: Iterable[str], blank: str | None = None) -> frozenset[str]:
    """Collect the punctuation that a vocabulary can write inside or after a word.

    Args:
        pieces: the vocabulary.
        blank: its blank piece.

    Returns:
        Characters of Unicode category P in the pieces that start no word and are no special token.
    """
    inner = (p for p in pieces if not p.startswith(("\u2581", "##")) and not is_special(p) and p != blank)
    return frozenset(char for piece in inner for char in piece if unicodedata.category(char).startswith("P"))


def is_special(piece: str) -> bool:
    """Whether a piece is written like a special token, `<...>` or `[...]`."""
    return (piece[:1], piece[-1:]) in {("<", ">"), ("[", "]")} and len(piece) > 1


def char_spans(
    kind: str, emissions: Emissions, texts: Sequence[str], punctuation: Collection[str] = frozenset()
) -> list[Span]:
    """Time every token.

    Args:
        kind: `ctc`, `rnnt` or `tdt`.
        emissions: the tokens.
        texts: text of each token on its own.
        punctuation: see `supported_punctuation`; such a token shrinks to a point in TDT and CTC.

    Returns:
        One span per token.
    """
    spans: list[Span] = []
    for index, (frame, duration) in enumerate(zip(emissions.frames, emissions.durations, strict=True)):
        if kind == "tdt":
            start, end = frame, frame + duration
        elif kind == "rnnt":
            start, end = frame, frame + 1
        else:
            # a CTC token ends where it appears and starts where the one before it did
            start, end = (emissions.frames[index - 1] if index else max(0, frame - 1)), frame
        if index and texts[index] in punctuation:
            if kind == "tdt":
                start = end = spans[-1].end
            elif kind == "ctc":
                end = start
        sure = None if emissions.confidence is None else emissions.confidence[index]
        spans.append(Span(texts[index], start, end, sure))
    return spans


def word_spans(
    chars: Sequence[Span],
    tokens: Sequence[int],
    pieces: Sequence[str],
    decode: Callable[[list[int]], str],
    punctuation: Collection[str],
    aggregation: str = DEFAULT_AGGREGATION,
) -> list[Span]:
    """Join tokens to words.

    A piece that differs from its own text starts a word, punctuation never does: it goes to the open word.

    Args:
        chars: see `char_spans`.
        tokens: their ids.
        pieces: their vocabulary entries.
        decode: ids to text.
        punctuation: see `supported_punctuation`.
        aggregation: `mean`, `min` or `prod` of the tokens' confidences.

    Returns:
        One span per word.
    """
    groups: list[list[int]] = []
    for index, char in enumerate(chars):
        starts = pieces[index] != char.text and char.text not in punctuation
        if starts or not groups:
            groups.append([])
        groups[-1].append(index)
    words = []
    for group in groups:
        members = [chars[i] for i in group]
        text = decode([tokens[i] for i in group])
        words.append(Span(text, members[0].start, members[-1].end, aggregate(members, aggregation)))
    return words


def segment_spans(
    words: Sequence[Span],
    separators: Collection[str],
    gap_threshold: int | None = None,
    aggregation: str = DEFAULT_AGGREGATION,
) -> list[Span]:
    """Join words to segments.

    Args:
        words: see `word_spans`.
        separators: characters that end a segment.
        gap_threshold: frames between words that end a segment; then punctuation counts on a segment's first word only.
        aggregation: see `word_spans`.

    Returns:
        One span per segment.
    """
    segments: list[list[Span]] = [[]]
    for word in words:
        if gap_threshold and segments[-1]:
            if word.start - segments[-1][-1].end >= gap_threshold:
                segments.append([])
            segments[-1].append(word)
            continue
        segments[-1].append(word)
        if word.text and word.text[-1] in separators:
            segments.append([])
    return [
        Span(" ".join(w.text for w in part), part[0].start, part[-1].end, aggregate(part, aggregation))
        for part in segments
        if part
    ]


def aggregate(spans: Sequence[Span], aggregation: str) -> float | None:
    """Aggregate the confidences of some spans; `None` where they have none.

    Raises:
        ValueError: unknown aggregation.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"`aggregation` must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    values = [span.confidence for span in spans if span.confidence is not None]
    return AGGREGATIONS[aggregation](values) if values else None
