"""Writes the result of speech recognition as plain text, JSON, SRT, WebVTT, TSV or TextGrid.

Pure Python without torch. `cues.py` groups words into subtitle cues. docs/output_formats.md describes the formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from .cues import DEFAULT_OPTIONS, Cue, CueWord, SubtitleOptions, build_cues, join_words, to_milliseconds
from .results import TimedText, TranscriptionResult


def to_txt(result: TranscriptionResult) -> str:
    """Write the text of a result on one line.

    Args:
        result: the result of one recording.

    Returns:
        The text and a line break; an empty string if the text is empty.
    """
    text = " ".join(result.text.split())
    return f"{text}\n" if text else ""


def to_json(result: TranscriptionResult, indent: int | None = 2) -> str:
    """Write a result as JSON, as docs/results.schema.json describes it.

    Args:
        result: the result of one recording.
        indent: number of spaces per level of indentation; `None` for one line.

    Returns:
        One JSON object with a line break at its end. All keys are present, always in the same order.

    Raises:
        ValueError: a number is infinite or not a number.
        TypeError: the settings contain a value that JSON does not have.
    """
    fields: dict[str, Any] = {
        "file": result.file,
        "duration": result.duration,
        "text": result.text,
        "confidence": result.confidence,
        "segments": [asdict(segment) for segment in result.segments],
        "words": [asdict(word) for word in result.words],
        "tokens": [asdict(token) for token in result.tokens],
        "model": result.model,
        "settings": dict(result.settings),
        "version": result.version,
    }
    text = json.dumps(fields, ensure_ascii=False, indent=indent, allow_nan=False)
    # Python stores a byte of a file name that is not UTF-8 as a surrogate, which a UTF-8 file cannot contain; its
    # replacement, such as \udcff, is the same character in JSON
    return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def to_tsv(result: TranscriptionResult) -> str:
    """Write the segments of a result as tab-separated values, in the layout of openai-whisper's TSV files.

    Args:
        result: the result of one recording.

    Returns:
        The header `start`, `end`, `text`, and one row per segment with times in whole milliseconds.

    Raises:
        ValueError: the result has text but no segments.
    """
    check_times(result, "segments", "TSV")
    rows = ["start\tend\ttext"]
    rows += [
        f"{to_milliseconds(segment.start)}\t{to_milliseconds(segment.end)}\t{' '.join(segment.text.split())}"
        for segment in result.segments
    ]
    return "\n".join(rows) + "\n"


def to_srt(result: TranscriptionResult, options: SubtitleOptions = DEFAULT_OPTIONS) -> str:
    """Write a result as SubRip subtitles (SRT).

    Args:
        result: the result of one recording.
        options: limits of the cues.

    Returns:
        The numbered cues; an empty string if there are no words.

    Raises:
        ValueError: the result has text but no words.
    """
    check_times(result, "words", "SRT")
    blocks = []
    for number, cue in enumerate(build_cues(result.words, result.duration, result.tokens, options), start=1):
        times = f"{format_time(cue.start_ms, ',')} --> {format_time(cue.end_ms, ',')}"
        blocks.append("\n".join([str(number), times, *map(join_words, cue.lines)]) + "\n")
    return "\n".join(blocks)


def to_vtt(result: TranscriptionResult, options: SubtitleOptions = DEFAULT_OPTIONS, word_times: bool = False) -> str:
    """Write a result as WebVTT subtitles (https://www.w3.org/TR/webvtt1/).

    Args:
        result: the result of one recording.
        options: limits of the cues.
        word_times: whether to write a timestamp tag with the start time before each word of a cue.

    Returns:
        The header `WEBVTT` and the cues.

    Raises:
        ValueError: the result has text but no words.
    """
    check_times(result, "words", "WebVTT")
    blocks = ["WEBVTT\n"]
    for cue in build_cues(result.words, result.duration, result.tokens, options):
        times = f"{format_time(cue.start_ms, '.')} --> {format_time(cue.end_ms, '.')}"
        lines = add_word_times(cue) if word_times else [escape_vtt(join_words(line)) for line in cue.lines]
        blocks.append("\n".join([times, *lines]) + "\n")
    return "\n".join(blocks)


def to_textgrid(result: TranscriptionResult) -> str:
    """Write a result as a TextGrid of Praat, with the tiers `words`, `segments` and `tokens`.

    The file has the long text format (https://www.fon.hum.uva.nl/praat/manual/TextGrid_file_formats.html). Pauses are
    intervals without text.

    Args:
        result: the result of one recording.

    Returns:
        The text of the file.

    Raises:
        ValueError: the result has text but no words.
    """
    check_times(result, "words", "TextGrid")
    tiers = {"words": result.words, "segments": result.segments, "tokens": result.tokens}
    end = max([result.duration, *(item.end for items in tiers.values() for item in items)])
    limits = ["xmin = 0", f"xmax = {end:.3f}"]
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", *limits, "tiers? <exists>"]
    lines += [f"size = {len(tiers)}", "item []:"]
    for tier_number, (name, items) in enumerate(tiers.items(), start=1):
        intervals = fill_pauses(items, end)
        lines += [f"    item [{tier_number}]:", '        class = "IntervalTier"', f'        name = "{name}"']
        lines += [f"        {line}" for line in (*limits, f"intervals: size = {len(intervals)}")]
        for number, (start, stop, text) in enumerate(intervals, start=1):
            quoted = " ".join(text.split()).replace('"', '""')
            lines.append(f"        intervals [{number}]:")
            fields = (f"xmin = {start:.3f}", f"xmax = {stop:.3f}", f'text = "{quoted}"')
            lines += [f"            {field}" for field in fields]
    return "\n".join(lines) + "\n"


def fill_pauses(items: Sequence[TimedText], end: float) -> list[tuple[float, float, str]]:
    """Build intervals that follow each other without gaps: the texts, and empty texts between them.

    A text that overlaps with the text before it starts at the end of that text. A TextGrid cannot contain a text
    without duration, so such a text is added to the interval before it, or to the first interval.

    Args:
        items: texts with times, in the order of their starts.
        end: end of the last interval in seconds.

    Returns:
        Start and end of each interval in seconds, and its text.
    """
    intervals: list[tuple[float, float, str]] = []
    position, waiting_text = 0.0, ""
    for item in items:
        start, stop = max(position, round(item.start, 3)), min(round(item.end, 3), end)
        if stop > start:
            if start > position:
                intervals.append((position, start, ""))
            intervals.append((start, stop, f"{waiting_text} {item.text}"))
            position, waiting_text = stop, ""
        elif intervals:
            last_start, last_stop, last_text = intervals[-1]
            intervals[-1] = (last_start, last_stop, f"{last_text} {item.text}")
        else:
            waiting_text += f" {item.text}"
    if position < end:
        intervals.append((position, end, waiting_text))
    return intervals


def add_word_times(cue: Cue) -> list[str]:
    """Write the lines of a WebVTT cue with a timestamp tag before each word.

    WebVTT requires that timestamp tags increase and lie between the start and the end of the cue. A word gets no tag if
    its start is not after the previous tag and before the end of the cue. The first word appears with the cue.

    Args:
        cue: the cue.

    Returns:
        The escaped lines with tags such as `<00:00:01.500>`.
    """
    latest_ms = cue.start_ms

    def tag_words(line: Sequence[CueWord]) -> Iterator[CueWord]:
        """Yield the words of a line with escaped texts and tags before them."""
        nonlocal latest_ms
        for word in line:
            tag = ""
            if word is not cue.lines[0][0] and latest_ms < word.start_ms < cue.end_ms:
                tag = f"<{format_time(word.start_ms, '.')}>"
                latest_ms = word.start_ms
            yield CueWord(tag + escape_vtt(word.text), word.start_ms, word.end_ms, word.continues_word)

    return [join_words(list(tag_words(line))) for line in cue.lines]


def escape_vtt(text: str) -> str:
    """Escape the characters that have a meaning in WebVTT; this also removes the arrow `-->` from the text.

    Args:
        text: the text of a cue.
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def format_time(time_ms: int, separator: str) -> str:
    """Format a time as hours, minutes, seconds and milliseconds.

    Args:
        time_ms: the time in milliseconds.
        separator: character before the milliseconds: a comma in SRT, a period in WebVTT.
    """
    seconds, milliseconds = divmod(time_ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{separator}{milliseconds:03d}"


def check_times(result: TranscriptionResult, level: str, format_name: str) -> None:
    """Check that a result with text has the times that a format needs.

    Args:
        result: the result of one recording.
        level: `"words"` or `"segments"`.
        format_name: name of the format in the error message.

    Raises:
        ValueError: the result has text, but no words or segments.
    """
    if result.text.strip() and not getattr(result, level):
        raise ValueError(
            f"a result must have `{level}` to be written as {format_name}, got text without {level}: request the times "
            f"of {level} from the pipeline"
        )


# function that writes each format; the keys are also the endings of file names
FORMATS: dict[str, Callable[[TranscriptionResult], str]] = {
    "txt": to_txt,
    "json": to_json,
    "srt": to_srt,
    "vtt": to_vtt,
    "tsv": to_tsv,
    "textgrid": to_textgrid,
}

__all__ = ["FORMATS", "to_json", "to_srt", "to_textgrid", "to_tsv", "to_txt", "to_vtt"]
