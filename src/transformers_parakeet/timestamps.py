"""Converts encoder frames of tokens to start and end frames of tokens, words and segments, as NVIDIA NeMo does.

Pure Python without torch. The processor decodes token ids to text and converts frames to seconds.
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

# default aggregation from tokens to words in NeMo's `ConfidenceConfig`
DEFAULT_AGGREGATION = "min"


@dataclass(frozen=True)
class EmittedTokens:
    """The tokens that a model emitted for one clip, without blanks; every list has one entry per token.

    Args:
        tokens: token ids.
        frames: encoder frame at which each token was emitted.
        durations: number of frames of each token: the predicted duration for TDT, the number of frames that repeat the
            token for CTC, 0 for RNN-T.
        confidence: confidence of each token, from 0 to 1; `None` if it was not requested.
    """

    tokens: list[int]
    frames: list[int]
    durations: list[int]
    confidence: list[float] | None = None


@dataclass(frozen=True)
class Span:
    """The text of a token, word or segment with its time.

    Args:
        text: text of the token, word or segment.
        start: first encoder frame.
        end: end frame, exclusive.
        confidence: confidence from 0 to 1; `None` if it was not requested.
    """

    text: str
    start: int
    end: int
    confidence: float | None = None


def merge_repeats(frame_tokens: Sequence[int]) -> list[tuple[int, int, int]]:
    """Merge consecutive repeats of the tokens of a CTC head to runs.

    For example, tokens 5 5 0 5 give the runs (5, 0, 2), (0, 2, 3), (5, 3, 4).

    Args:
        frame_tokens: the best token of every frame.

    Returns:
        `(token id, first frame, end frame exclusive)` for each run. Runs of blanks are included.
    """
    runs, start = [], 0
    for token, repeats in groupby(frame_tokens):
        end = start + len(list(repeats))
        runs.append((token, start, end))
        start = end
    return runs


def collect_emitted_tokens(
    step_tokens: Sequence[int], durations: Sequence[int], ignored_ids: Collection[int]
) -> EmittedTokens:
    """Collect the labels and their frames from the steps of a transducer, as stock transformers' `generate` lists them.

    The frame of a step is the sum of the durations of all earlier steps.

    Args:
        step_tokens: label or blank of every step, then padding.
        durations: number of frames that each step advances.
        ignored_ids: token ids that are not labels: the ids of the blank and of the padding.

    Returns:
        The labels, without confidence.
    """
    labels, label_frames, label_durations = [], [], []
    frame = 0
    for token, duration in zip(step_tokens, durations, strict=True):
        if token not in ignored_ids:
            labels.append(token)
            label_frames.append(frame)
            label_durations.append(duration)
        frame += duration
    return EmittedTokens(labels, label_frames, label_durations)


def find_supported_punctuation(vocabulary: Iterable[str], blank_token: str | None = None) -> frozenset[str]:
    """Find the punctuation that a vocabulary can attach to a word.

    Args:
        vocabulary: the entries (pieces) of the vocabulary.
        blank_token: the entry of the blank; `None` if the vocabulary has no blank.

    Returns:
        All characters of the Unicode category P (punctuation) in pieces that neither start a word nor are special
        tokens.
    """
    characters: set[str] = set()
    for piece in vocabulary:
        # marker of SentencePiece at a word start, prefix of WordPiece
        has_prefix = piece.startswith(("\u2581", "##"))
        if not has_prefix and not is_special_token(piece) and piece != blank_token:
            characters.update(character for character in piece if unicodedata.category(character).startswith("P"))
    return frozenset(characters)


def is_special_token(piece: str) -> bool:
    """Return whether a vocabulary entry has the form of a special token: `<...>` or `[...]`.

    Args:
        piece: the vocabulary entry.
    """
    first_character, last_character = piece[:1], piece[-1:]
    return (first_character, last_character) in {("<", ">"), ("[", "]")}


def compute_token_spans(
    head_type: str, emitted_tokens: EmittedTokens, texts: Sequence[str], punctuation: Collection[str] = frozenset()
) -> list[Span]:
    """Compute the start and end frame of every token as NeMo does.

    - TDT: from the frame of the token, for its predicted duration.
    - RNN-T: one frame.
    - CTC: from the frame of the previous token to the frame of the token.

    Punctuation has zero duration in TDT and CTC, unless it is the first token. In TDT it is placed at the end of the
    previous token.

    Args:
        head_type: `"ctc"`, `"rnnt"` or `"tdt"`.
        emitted_tokens: the tokens of the clip.
        texts: text of each token.
        punctuation: the punctuation tokens of the vocabulary.

    Returns:
        One span per token.
    """
    token_spans: list[Span] = []
    for index, (frame, duration) in enumerate(zip(emitted_tokens.frames, emitted_tokens.durations, strict=True)):
        if head_type == "tdt":
            start, end = frame, frame + duration
        elif head_type == "rnnt":
            start, end = frame, frame + 1
        else:
            # the first token starts one frame before its own frame
            start, end = (emitted_tokens.frames[index - 1] if index else max(0, frame - 1)), frame
        # punctuation has zero duration, unless it is the first token
        if index and texts[index] in punctuation:
            if head_type == "tdt":
                start = end = token_spans[-1].end
            elif head_type == "ctc":
                end = start
        confidence = None if emitted_tokens.confidence is None else emitted_tokens.confidence[index]
        token_spans.append(Span(texts[index], start, end, confidence))
    return token_spans


def group_into_words(
    token_spans: Sequence[Span],
    token_ids: Sequence[int],
    pieces: Sequence[str],
    decode: Callable[[list[int]], str],
    punctuation: Collection[str],
    aggregation: str = DEFAULT_AGGREGATION,
) -> list[Span]:
    """Group tokens into words as NeMo does.

    A token starts a word if its vocabulary entry differs from its text, which means that the entry has the word-start
    marker. Punctuation never starts a word.

    Args:
        token_spans: text and frames of each token, see `compute_token_spans`.
        token_ids: id of each token.
        pieces: vocabulary entry of each token.
        decode: function that converts a list of token ids to text.
        punctuation: the punctuation tokens of the vocabulary.
        aggregation: how to compute the confidence of a word from the confidences of its tokens: `"mean"`, `"min"` or
            `"prod"`.

    Returns:
        One span per word.
    """
    # indices of the tokens of each word
    word_indices: list[list[int]] = []
    for index, token_span in enumerate(token_spans):
        starts_word = pieces[index] != token_span.text and token_span.text not in punctuation
        if starts_word or not word_indices:
            word_indices.append([])
        word_indices[-1].append(index)
    words = []
    for indices in word_indices:
        spans = [token_spans[index] for index in indices]
        text = decode([token_ids[index] for index in indices])
        words.append(Span(text, spans[0].start, spans[-1].end, aggregate_confidence(spans, aggregation)))
    return words


def group_into_segments(
    words: Sequence[Span],
    separators: Collection[str],
    gap_threshold: int | None = None,
    aggregation: str = DEFAULT_AGGREGATION,
) -> list[Span]:
    """Group words into segments as NeMo does.

    Without `gap_threshold`, a segment ends after a word that ends with a separator. With it, a segment ends before a
    long gap, and a separator ends the segment only if the word with the separator is the first word of the segment.

    Args:
        words: text and frames of each word, see `group_into_words`.
        separators: characters that end a segment if they are the last character of a word.
        gap_threshold: minimum number of frames between two words that ends a segment; `None` or 0 for no threshold.
        aggregation: how to compute the confidence of a segment from the confidences of its words: `"mean"`, `"min"` or
            `"prod"`.

    Returns:
        One span per segment.
    """
    segments: list[list[Span]] = [[]]
    for word in words:
        if gap_threshold and segments[-1]:
            gap = word.start - segments[-1][-1].end
            if gap >= gap_threshold:
                segments.append([])
            segments[-1].append(word)
            # like NeMo, do not check the separators of this word
            continue
        segments[-1].append(word)
        if word.text and word.text[-1] in separators:
            segments.append([])
    return [join_words(segment, aggregation) for segment in segments if segment]


def join_words(words: Sequence[Span], aggregation: str) -> Span:
    """Join the words of one segment to one span.

    Args:
        words: the words of the segment, at least one.
        aggregation: how to combine the confidences of the words: `"mean"`, `"min"` or `"prod"`.
    """
    text = " ".join(word.text for word in words)
    return Span(text, words[0].start, words[-1].end, aggregate_confidence(words, aggregation))


def aggregate_confidence(spans: Sequence[Span], aggregation: str) -> float | None:
    """Combine the confidences of several spans to one number.

    Args:
        spans: tokens or words; spans without confidence are ignored.
        aggregation: `"mean"`, `"min"` or `"prod"`.

    Returns:
        The combined confidence; `None` if no span has a confidence.

    Raises:
        ValueError: `aggregation` is not one of these.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"`aggregation` must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    confidences = [span.confidence for span in spans if span.confidence is not None]
    return AGGREGATIONS[aggregation](confidences) if confidences else None
