"""From encoder frames to times of characters, words and segments, exactly as NVIDIA NeMo computes them; pure Python.

Works on token ids, frames and texts of tokens. Seconds are computed and texts are decoded by the processor.
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

# default aggregation of NeMo's `ConfidenceConfig`, from tokens to words
DEFAULT_AGGREGATION = "min"


@dataclass(frozen=True)
class Emissions:
    """The tokens that a model emitted for one clip, without blanks, as Python lists with one entry per token.

    Args:
        tokens: token ids.
        frames: encoder frame at which each token was emitted.
        durations: frames of each token: for TDT the predicted duration, for CTC the number of frames that repeat the
            token, for RNN-T 0 (not used for times).
        confidence: confidence of each token, from 0 to 1; `None` if it was not requested.
    """

    tokens: list[int]
    frames: list[int]
    durations: list[int]
    confidence: list[float] | None = None


@dataclass(frozen=True)
class Span:
    """A piece of text with its time.

    Args:
        text: a token, word or segment.
        start: first encoder frame.
        end: encoder frame after the last one.
        confidence: from 0 to 1; `None` if it was not requested.
    """

    text: str
    start: int
    end: int
    confidence: float | None = None


def ctc_runs(ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """Merge consecutive repeats of frame-wise token ids. Blanks are merged as well and stay in the result.

    Args:
        ids: the best token of every frame.

    Returns:
        (token, first frame, frame after the last one) of every run.
    """
    runs, frame = [], 0
    for token, group in groupby(ids):
        length = len(list(group))
        runs.append((token, frame, frame + length))
        frame += length
    return runs


def transducer_emissions(ids: Sequence[int], durations: Sequence[int], ignored_ids: Collection[int]) -> Emissions:
    """Read the output of stock transformers' `generate`, where the frame of a step is the sum of earlier durations.

    Args:
        ids: label or blank of every step, then padding.
        durations: frames that every step advances.
        ignored_ids: the ids that are not labels: the blank and the padding.

    Returns:
        The labels, without confidence.
    """
    tokens, frames, label_durations = [], [], []
    frame = 0
    for token, duration in zip(ids, durations, strict=True):
        if token not in ignored_ids:
            tokens.append(token)
            frames.append(frame)
            label_durations.append(duration)
        frame += duration
    return Emissions(tokens, frames, label_durations)


def supported_punctuation(pieces: Iterable[str], blank_token: str | None = None) -> frozenset[str]:
    """Collect the punctuation that a vocabulary can write inside or at the end of a word.

    Args:
        pieces: the entries of the vocabulary.
        blank_token: the entry of the blank; `None` if there is none.

    Returns:
        All characters of Unicode category P in pieces that do not start a word and are not special tokens.
    """
    characters: set[str] = set()
    for piece in pieces:
        starts_word = piece.startswith(("\u2581", "##"))
        if not starts_word and not is_special(piece) and piece != blank_token:
            characters.update(character for character in piece if unicodedata.category(character).startswith("P"))
    return frozenset(characters)


def is_special(piece: str) -> bool:
    """Tell whether a vocabulary entry is written like a special token: `<...>` or `[...]`.

    Args:
        piece: the entry.
    """
    return (piece[:1], piece[-1:]) in {("<", ">"), ("[", "]")} and len(piece) > 1


def char_spans(
    kind: str, emissions: Emissions, texts: Sequence[str], punctuation: Collection[str] = frozenset()
) -> list[Span]:
    """Compute the start and end frame of every token.

    As in NeMo, a token of TDT lasts for its duration and a token of RNN-T for one frame. A token of CTC starts at the
    frame of the token before it and ends at its own frame. In TDT and CTC punctuation has no length: for TDT it stands
    at the end of the token before it.

    Args:
        kind: `"ctc"`, `"rnnt"` or `"tdt"`.
        emissions: the tokens.
        texts: text of each token, decoded alone.
        punctuation: see `supported_punctuation`.

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
            start, end = (emissions.frames[index - 1] if index else max(0, frame - 1)), frame
        if index and texts[index] in punctuation:
            if kind == "tdt":
                start = end = spans[-1].end
            elif kind == "ctc":
                end = start
        confidence = None if emissions.confidence is None else emissions.confidence[index]
        spans.append(Span(texts[index], start, end, confidence))
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

    As in NeMo, a token starts a word if its vocabulary entry differs from its text. Punctuation never starts a word.

    Args:
        chars: the spans of the tokens, see `char_spans`.
        tokens: their ids.
        pieces: their vocabulary entries.
        decode: turns a list of ids into text.
        punctuation: see `supported_punctuation`.
        aggregation: `"mean"`, `"min"` or `"prod"` of the confidences of the tokens.

    Returns:
        One span per word.
    """
    groups: list[list[int]] = []
    for index, char in enumerate(chars):
        starts_word = pieces[index] != char.text and char.text not in punctuation
        if starts_word or not groups:
            groups.append([])
        groups[-1].append(index)
    words = []
    for group in groups:
        members = [chars[index] for index in group]
        text = decode([tokens[index] for index in group])
        words.append(Span(text, members[0].start, members[-1].end, aggregate_confidence(members, aggregation)))
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
        separators: characters that end a segment at the end of a word.
        gap_threshold: number of frames between two words that ends a segment; `None` or 0 for no such rule. With it,
            as in NeMo, a separator ends a segment only after the first word of the segment.
        aggregation: `"mean"`, `"min"` or `"prod"` of the confidences of the words.

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
    return [join_words(segment, aggregation) for segment in segments if segment]


def join_words(words: Sequence[Span], aggregation: str) -> Span:
    """Join the words of one segment to one span.

    Args:
        words: the words, at least one.
        aggregation: `"mean"`, `"min"` or `"prod"` of their confidences.
    """
    text = " ".join(word.text for word in words)
    return Span(text, words[0].start, words[-1].end, aggregate_confidence(words, aggregation))


def aggregate_confidence(spans: Sequence[Span], aggregation: str) -> float | None:
    """Aggregate the confidences of spans.

    Args:
        spans: spans with or without confidence.
        aggregation: `"mean"`, `"min"` or `"prod"`.

    Returns:
        The aggregated confidence; `None` if no span has one.

    Raises:
        ValueError: the aggregation is unknown.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"`aggregation` must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    values = [span.confidence for span in spans if span.confidence is not None]
    return AGGREGATIONS[aggregation](values) if values else None
