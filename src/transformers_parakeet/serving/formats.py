"""Writes results in the response formats of OpenAI's transcription API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..results import TimedText, TranscriptionResult
from ..subtitles import to_srt, to_vtt

# formats of the parameter `response_format`, with the media type of the response
MEDIA_TYPES = {
    "json": "application/json",
    "text": "text/plain; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
    "verbose_json": "application/json",
}
GRANULARITIES = ("segment", "word")

# value of `language` in verbose JSON if the request has none: the models do not report the language
UNKNOWN_LANGUAGE = "unknown"


def build_usage(duration: float) -> dict[str, Any]:
    """Build the object `usage`: the length of the recording.

    Args:
        duration: length in seconds.
    """
    return {"type": "duration", "seconds": round(duration, 3)}


def build_body(
    result: TranscriptionResult, response_format: str, granularities: Sequence[str] = (), language: str | None = None
) -> str:
    """Build the body of a response.

    Args:
        result: the result of the recording.
        response_format: one of `MEDIA_TYPES`.
        granularities: what verbose JSON contains: `"segment"`, `"word"`; empty for segments.
        language: language of the request; `None` for none.
    """
    if response_format == "text":
        return f"{result.text}\n"
    if response_format == "srt":
        return to_srt(result)
    if response_format == "vtt":
        return to_vtt(result)
    fields: dict[str, Any] = {"text": result.text, "usage": build_usage(result.duration)}
    if response_format == "verbose_json":
        fields |= build_details(result, granularities, language)
    return json.dumps(fields, ensure_ascii=False)


def build_details(
    result: TranscriptionResult, granularities: Sequence[str] = (), language: str | None = None
) -> dict[str, Any]:
    """Build the fields that verbose JSON has in addition to those of JSON.

    Args:
        result: the result of the recording.
        granularities: `"segment"`, `"word"`; empty for segments.
        language: language of the request; `None` for none.
    """
    fields: dict[str, Any] = {
        "task": "transcribe",
        "language": language or UNKNOWN_LANGUAGE,
        "duration": result.duration,
    }
    if "word" in granularities:
        fields["words"] = [build_word(word) for word in result.words]
    if "segment" in granularities or not granularities:
        fields["segments"] = [build_segment(index, segment) for index, segment in enumerate(result.segments)]
    return fields


def build_word(word: TimedText) -> dict[str, Any]:
    """Build a word of verbose JSON. The field `confidence` is an addition to OpenAI's fields.

    Args:
        word: the word.
    """
    return {"word": word.text, "start": word.start, "end": word.end, "confidence": word.confidence}


def build_segment(index: int, segment: TimedText) -> dict[str, Any]:
    """Build a segment of verbose JSON. The field `confidence` is an addition to OpenAI's fields.

    The fields `seek`, `temperature`, `avg_logprob`, `compression_ratio`, `no_speech_prob` and `tokens` are those of
    Whisper. OpenAI's client requires them; this model has no such values, so they are zero or empty.

    Args:
        index: number of the segment.
        segment: the segment.
    """
    return {
        "id": index,
        "seek": 0,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": 0.0,
        "compression_ratio": 0.0,
        "no_speech_prob": 0.0,
        "confidence": segment.confidence,
    }


def build_event(fields: dict[str, Any]) -> str:
    """Build a server-sent event with a JSON object.

    Args:
        fields: the fields of the object.
    """
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


__all__ = ["GRANULARITIES", "MEDIA_TYPES", "build_body", "build_details", "build_event", "build_usage", "build_word"]
