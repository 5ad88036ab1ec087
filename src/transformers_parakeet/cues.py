"""Groups words with times into subtitle cues of at most two lines.

Pure Python without torch. `subtitles.py` writes the cues as SRT and WebVTT.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .results import TimedText

MAX_LINES = 2

# Latin, ellipsis, Chinese and Japanese (full width), Devanagari, Arabic
SENTENCE_ENDS = frozenset(".?!\u2026\u3002\uff1f\uff01\u0964\u061f")
CLAUSE_ENDS = frozenset(",;:\u3001\uff0c\uff1b\uff1a\u060c")
# quotation marks and brackets that can follow the punctuation at the end of a sentence or clause
CLOSING_MARKS = "\"')]\u00bb\u2019\u201d\u300d\u300f\u3011\uff09"
TRAILING_MARKS = SENTENCE_ENDS | CLAUSE_ENDS | frozenset(CLOSING_MARKS)
# titles end with a period, but not a sentence
TITLES = frozenset({"mr.", "mrs.", "ms.", "dr.", "prof.", "st."})

# Costs of a choice of cues; `choose_cues` minimises their sum. The values are our own choice: only their order and
# rough proportions matter.
# costs of a break between two cues, by the end of the first cue
CLAUSE_COST = 1.0
PAUSE_COST = 2.0
PHRASE_COST = 4.0
# cost of a cue with one word that is not a whole sentence
SINGLE_WORD_COST = 3.0
# cost of a cue that starts less than the minimum duration before the next one
SHORT_CUE_COST = 3.0
# cost per second of silence between the words of one cue
SILENCE_COST_PER_S = 2.0
# silence that counts as a pause, in milliseconds
PAUSE_MS = 500


@dataclass(frozen=True)
class SubtitleOptions:
    """Limits of subtitle cues; the defaults are those of Netflix's Timed Text Style Guide for English, except
    `min_duration` and `min_gap`.

    Args:
        line_width: maximum width of a line in characters. Wide characters, such as Chinese ones, count twice.
        max_duration: maximum duration of a cue in seconds. A cue with one word can be longer.
        min_duration: minimum duration of a cue in seconds. A cue is shorter if its neighbours leave less time.
        min_gap: minimum time between two cues in seconds. It is shorter if a cue would otherwise vanish.

    Raises:
        ValueError: an option is out of range.
    """

    line_width: int = 42
    max_duration: float = 7.0
    min_duration: float = 1.0
    min_gap: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.line_width < 1:
            raise ValueError(f"`line_width` must be at least 1 character, got {self.line_width!r}: the default is 42")
        if not 0 <= self.min_duration <= self.max_duration:
            raise ValueError(
                f"`min_duration` must be from 0 to `max_duration` ({self.max_duration!r} seconds), got "
                f"{self.min_duration!r}: correct it"
            )
        if not 0 <= self.min_gap < float("inf"):
            raise ValueError(f"`min_gap` must be at least 0 seconds, got {self.min_gap!r}: the default is 0")


DEFAULT_OPTIONS = SubtitleOptions()


@dataclass(frozen=True)
class CueWord:
    """A word of a cue, or a part of a word that is too long for one line.

    Args:
        text: the text, without line breaks and without spaces at its ends.
        start_ms: start in milliseconds.
        end_ms: end in milliseconds.
        continues_word: whether this is a later part of a word, which is written without a space before it.
    """

    text: str
    start_ms: int
    end_ms: int
    continues_word: bool = False


@dataclass(frozen=True)
class Cue:
    """Words that are displayed together.

    Args:
        lines: the words of each line; one or two lines.
        start_ms: start in milliseconds.
        end_ms: end in milliseconds.
    """

    lines: tuple[tuple[CueWord, ...], ...]
    start_ms: int
    end_ms: int


def build_cues(
    words: Sequence[TimedText],
    duration: float,
    tokens: Sequence[TimedText] = (),
    options: SubtitleOptions = DEFAULT_OPTIONS,
) -> list[Cue]:
    """Group words into cues.

    Every word is in exactly one cue, in the given order. Cues do not overlap and stay inside the recording. Times of
    words that are out of order or outside of the recording are corrected first.

    Args:
        words: the words with times in seconds. Words without text are skipped.
        duration: length of the recording in seconds.
        tokens: the tokens of the words. A Chinese or Japanese word that is longer than a line is broken between its
            tokens. Without tokens, and in other scripts, such a word is a line of its own.
        options: limits of the cues.

    Returns:
        The cues in order of time.
    """
    duration_ms = math.floor(1000 * duration)
    cue_words = correct_times(split_long_words(words, tokens, options.line_width), duration_ms)
    ranges = choose_cues(cue_words, duration_ms, options)
    cues = []
    for first, stop in ranges:
        end_ms = max(word.end_ms for word in cue_words[first:stop])
        lines = break_lines(cue_words[first:stop], options.line_width)
        cues.append(Cue(lines, cue_words[first].start_ms, end_ms))
    return adjust_cue_times(cues, duration_ms, options)


def split_long_words(words: Sequence[TimedText], tokens: Sequence[TimedText], line_width: int) -> list[CueWord]:
    """Convert words to words of cues, and split every word in a script without spaces that is longer than a line.

    Args:
        words: the words with times in seconds.
        tokens: the tokens of all words, between which words are split. If their texts do not match the words, no word
            is split.
        line_width: maximum width of a line in characters.

    Returns:
        The words and parts of words in order. Words without text are left out.
    """
    tokens_per_word = match_tokens(words, tokens) or [[] for _ in words]
    cue_words = []
    for word, word_tokens in zip(words, tokens_per_word, strict=True):
        text = " ".join(word.text.split())
        # Chinese and Japanese characters are wide; a long word of other characters, such as a URL, stays whole
        has_wide_characters = text_width(text) > len(text)
        is_long = text_width(text) > line_width
        parts = attach_punctuation(word_tokens if is_long and has_wide_characters and word_tokens else [word])
        for index, part in enumerate(parts):
            part_text = " ".join(part.text.split())
            cue_words.append(CueWord(part_text, to_milliseconds(part.start), to_milliseconds(part.end), index > 0))
    return cue_words


def attach_punctuation(tokens: Sequence[TimedText]) -> list[TimedText]:
    """Join punctuation to the token before it, so that no line starts with punctuation.

    Args:
        tokens: the tokens of one word.

    Returns:
        The joined tokens. Tokens without text are left out.
    """
    joined: list[TimedText] = []
    for token in tokens:
        text = token.text.strip()
        if joined and text and all(character in TRAILING_MARKS for character in text):
            joined[-1] = replace(joined[-1], text=joined[-1].text + text, end=max(joined[-1].end, token.end))
        elif text:
            joined.append(token)
    return joined


def match_tokens(words: Sequence[TimedText], tokens: Sequence[TimedText]) -> list[list[TimedText]] | None:
    """Find the tokens of each word by comparing the texts without spaces.

    Args:
        words: the words in order.
        tokens: the tokens of all words in order.

    Returns:
        The tokens of each word; `None` if the texts of the tokens do not match the texts of the words.
    """
    tokens_per_word = []
    next_token = 0
    for word in words:
        word_text, token_text = "".join(word.text.split()), ""
        first_token = next_token
        while len(token_text) < len(word_text) and next_token < len(tokens):
            token_text += "".join(tokens[next_token].text.split())
            next_token += 1
        if token_text != word_text:
            return None
        tokens_per_word.append(list(tokens[first_token:next_token]))
    return tokens_per_word


def to_milliseconds(seconds: float) -> int:
    """Round seconds to whole milliseconds.

    Args:
        seconds: the time in seconds.
    """
    return round(1000 * seconds)


def text_width(text: str) -> int:
    """Return the width of a text in characters, where wide characters (Unicode Standard Annex 11) count twice.

    Args:
        text: the text of one line.
    """
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def compute_line_width(words: Sequence[CueWord]) -> int:
    """Return the width of a line in characters, including the spaces between the words.

    Args:
        words: the words of the line.
    """
    return sum(text_width(word.text) for word in words) + sum(not word.continues_word for word in words[1:])


def join_words(words: Sequence[CueWord]) -> str:
    """Join words with spaces, and the parts of a word without spaces.

    Args:
        words: the words.
    """
    return "".join(("" if word.continues_word or not index else " ") + word.text for index, word in enumerate(words))


def correct_times(words: Sequence[CueWord], duration_ms: int) -> list[CueWord]:
    """Limit the times of words to the recording, and increase a start that is before the start of the previous word.

    Args:
        words: the words in order.
        duration_ms: length of the recording in milliseconds.

    Returns:
        The words; each starts at or after the previous word and ends at or after its own start.
    """
    corrected = []
    earliest_ms = 0
    for word in words:
        start_ms = min(max(word.start_ms, earliest_ms), duration_ms)
        end_ms = min(max(word.end_ms, start_ms), duration_ms)
        corrected.append(replace(word, start_ms=start_ms, end_ms=end_ms))
        earliest_ms = start_ms
    return corrected


def ends_with(word: CueWord, marks: frozenset[str]) -> bool:
    """Return whether a word ends with a punctuation mark, optionally followed by quotation marks or brackets.

    Args:
        word: the word.
        marks: the punctuation marks.
    """
    text = word.text.rstrip(CLOSING_MARKS)
    return text[-1:] in marks and text != "" and word.text.lower() not in TITLES


def compute_break_cost(word: CueWord, next_word: CueWord) -> float:
    """Compute the cost of a break between two words, from lowest to highest: sentence end, clause end, pause, other.

    Args:
        word: the last word before the break.
        next_word: the first word after the break.

    Returns:
        The cost; 0 at the end of a sentence.
    """
    if ends_with(word, SENTENCE_ENDS):
        return 0.0
    if ends_with(word, CLAUSE_ENDS):
        return CLAUSE_COST
    return PAUSE_COST if next_word.start_ms - word.end_ms >= PAUSE_MS else PHRASE_COST


def choose_cues(words: Sequence[CueWord], duration_ms: int, options: SubtitleOptions) -> list[tuple[int, int]]:
    """Choose which words form a cue, so that the sum of the costs is as low as possible.

    This is a shortest path: a node is a number of words that are already in cues, and an arc is the next cue.

    Args:
        words: the words in order, with corrected times.
        duration_ms: length of the recording in milliseconds.
        options: limits of the cues.

    Returns:
        `(first, stop)` for each cue, the indices of its first word and after its last word.
    """
    lowest_costs = [0.0] + [math.inf] * len(words)
    first_words = [0] * (len(words) + 1)
    for first in range(len(words)):
        for stop, cost in possible_cues(words, first, duration_ms, options):
            if lowest_costs[first] + cost < lowest_costs[stop]:
                lowest_costs[stop] = lowest_costs[first] + cost
                first_words[stop] = first
    ranges = []
    stop = len(words)
    while stop:
        ranges.append((first_words[stop], stop))
        stop = first_words[stop]
    return ranges[::-1]


def possible_cues(
    words: Sequence[CueWord], first: int, duration_ms: int, options: SubtitleOptions
) -> Iterator[tuple[int, float]]:
    """Yield all cues that start with a certain word and keep the limits, with their costs.

    A line is filled until the next word does not fit. If the words do not fit on two lines in this way, they do not fit
    in any way. A cue of one word is always possible.

    Args:
        words: the words in order, with corrected times.
        first: index of the first word of the cue.
        duration_ms: length of the recording in milliseconds.
        options: limits of the cues.

    Yields:
        `(stop, cost)`: the index after the last word of the cue, and the cost of the cue.
    """
    lines, width, total_width, silence_ms = 1, 0, 0, 0
    latest_end_ms = 0
    for index in range(first, len(words)):
        word = words[index]
        latest_end_ms = max(latest_end_ms, word.end_ms)
        word_width = text_width(word.text) + (width > 0 and not word.continues_word)
        if width and width + word_width > options.line_width:
            lines, width, word_width = lines + 1, 0, text_width(word.text)
        width += word_width
        total_width += word_width
        duration_s = (latest_end_ms - words[first].start_ms) / 1000
        if index > first:
            if lines > MAX_LINES or duration_s > options.max_duration:
                return
            silence_ms += max(0, word.start_ms - words[index - 1].end_ms)
        cost = compute_cue_cost(words, first, index + 1, duration_ms, options)
        unused_fraction = max(0.0, 1 - total_width / (MAX_LINES * options.line_width))
        yield index + 1, cost + SILENCE_COST_PER_S * silence_ms / 1000 + unused_fraction**2


def compute_cue_cost(
    words: Sequence[CueWord], first: int, stop: int, duration_ms: int, options: SubtitleOptions
) -> float:
    """Compute the cost of a cue that depends on the words at its ends and after it.

    Args:
        words: the words in order, with corrected times.
        first: index of the first word of the cue.
        stop: index after the last word of the cue.
        duration_ms: length of the recording in milliseconds.
        options: limits of the cues.

    Returns:
        The costs of the break after the cue, of a single word, and of a short duration.
    """
    is_last = stop == len(words)
    cost = 0.0 if is_last else compute_break_cost(words[stop - 1], words[stop])
    if stop - first == 1:
        starts_sentence = first == 0 or ends_with(words[first - 1], SENTENCE_ENDS)
        is_sentence = starts_sentence and (is_last or ends_with(words[first], SENTENCE_ENDS))
        cost += 0.0 if is_sentence else SINGLE_WORD_COST
    next_start_ms = duration_ms if is_last else words[stop].start_ms
    if next_start_ms - words[first].start_ms < 1000 * options.min_duration:
        cost += SHORT_CUE_COST
    return cost


def break_lines(words: Sequence[CueWord], line_width: int) -> tuple[tuple[CueWord, ...], ...]:
    """Break the words of a cue into one line, or into two lines of similar width.

    If both lines are valid, a break after punctuation is preferred to one that makes the widths more equal by less than
    the costs of `compute_break_cost` (one unit is a quarter of a line).

    Args:
        words: the words of the cue; they fit on two lines.
        line_width: maximum width of a line in characters. A line with one word can be longer.

    Returns:
        The words of each line.
    """
    if len(words) == 1 or compute_line_width(words) <= line_width:
        return (tuple(words),)
    candidates = []
    for index in range(1, len(words)):
        lines = (tuple(words[:index]), tuple(words[index:]))
        widths = [compute_line_width(line) for line in lines]
        if all(len(line) == 1 or width <= line_width for line, width in zip(lines, widths, strict=True)):
            difference = abs(widths[0] - widths[1]) / line_width
            cost = difference + compute_break_cost(words[index - 1], words[index]) / 4
            candidates.append((cost, index))
    index = min(candidates)[1]
    return (tuple(words[:index]), tuple(words[index:]))


def separate_starts(starts_ms: Sequence[int], duration_ms: int) -> list[int]:
    """Change the starts of cues by as few milliseconds as possible, so that every cue can last at least 1 ms.

    Args:
        starts_ms: the starts in milliseconds, in order; cues can have the same start.
        duration_ms: length of the recording in milliseconds.

    Returns:
        Starts that increase and are before the end of the recording. If the recording has fewer milliseconds than cues,
        the last cues start at its end.
    """
    separated: list[int] = []
    next_start_ms = duration_ms
    for index in reversed(range(len(starts_ms))):
        # the cues before this one need `index` milliseconds
        next_start_ms = max(index, min(starts_ms[index], next_start_ms - 1))
        separated.append(min(next_start_ms, duration_ms))
    return separated[::-1]


def adjust_cue_times(cues: Sequence[Cue], duration_ms: int, options: SubtitleOptions) -> list[Cue]:
    """Remove overlaps between cues, and lengthen short cues where the time before or after them is free.

    Args:
        cues: the cues in order of their starts.
        duration_ms: length of the recording in milliseconds.
        options: limits of the cues.

    Returns:
        The cues with new times. Every cue lasts at least 1 ms if the recording has at least as many milliseconds as
        cues.
    """
    gap_ms, min_duration_ms = to_milliseconds(options.min_gap), max(1, to_milliseconds(options.min_duration))
    starts_ms = separate_starts([cue.start_ms for cue in cues], duration_ms)
    adjusted: list[Cue] = []
    for index, (cue, start_ms) in enumerate(zip(cues, starts_ms, strict=True)):
        limit_ms = duration_ms
        if index + 1 < len(cues):
            next_start_ms = starts_ms[index + 1]
            # the gap is shorter if the cue would otherwise last less than 1 ms
            limit_ms = min(next_start_ms, max(next_start_ms - gap_ms, start_ms + 1))
        end_ms = min(max(cue.end_ms, start_ms + min_duration_ms), limit_ms)
        earliest_ms = adjusted[-1].end_ms + gap_ms if adjusted else 0
        if end_ms - start_ms < min_duration_ms:
            start_ms = min(start_ms, max(earliest_ms, end_ms - min_duration_ms))
        adjusted.append(replace(cue, start_ms=start_ms, end_ms=end_ms))
    return adjusted


__all__ = ["DEFAULT_OPTIONS", "Cue", "CueWord", "SubtitleOptions", "build_cues", "join_words"]
