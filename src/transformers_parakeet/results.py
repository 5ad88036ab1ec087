"""Defines the result of speech recognition for one recording: text, words, segments and tokens with times.

Pure Python without torch. `subtitles.py` writes results to files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any


@dataclass(frozen=True)
class TimedText:
    """The text of a token, word or segment with its time in the recording.

    Args:
        text: the text. The text of a token that starts a word begins with a space, except at the start of the result.
        start: start in seconds.
        end: end in seconds.
        confidence: confidence from 0 to 1; `None` if it was not requested.
    """

    text: str
    start: float
    end: float
    confidence: float | None = None


@dataclass(frozen=True)
class TranscriptionResult:
    """The result of speech recognition for one recording.

    Args:
        text: the text of the whole recording.
        duration: length of the recording in seconds.
        words: the words in order; empty if word times were not requested.
        segments: the segments in order; empty if segment times were not requested.
        tokens: the tokens in order; empty if token times were not requested.
        confidence: confidence of the whole text, from 0 to 1; `None` if it was not requested.
        file: name or URL of the recording; `None` for samples in memory.
        model: Hub id or path of the model.
        settings: options of the recognition, such as the decoder and the dtype; the values can be written as JSON.
        version: version of this package.

    Raises:
        ValueError: the duration is negative or not a number.
    """

    text: str
    duration: float
    words: tuple[TimedText, ...] = ()
    segments: tuple[TimedText, ...] = ()
    tokens: tuple[TimedText, ...] = ()
    confidence: float | None = None
    file: str | None = None
    model: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str | None = None

    def __post_init__(self) -> None:
        """Check the duration."""
        if not 0 <= self.duration < float("inf"):
            raise ValueError(
                f"`duration` must be a number of seconds that is not negative, got {self.duration!r}: pass the number "
                "of samples divided by the sampling rate"
            )


def to_timed_texts(chunks: Iterable[Mapping[str, Any]]) -> tuple[TimedText, ...]:
    """Convert `chunks` of the pipeline, or of `ParakeetProcessor.chunks`, to timed texts.

    Args:
        chunks: one dict per token, word or segment: `text`, `timestamp` (start and end in seconds), and `confidence`
            if it was requested.

    Returns:
        One timed text per chunk.
    """
    timed_texts = []
    for chunk in chunks:
        start, end = chunk["timestamp"]
        timed_texts.append(TimedText(chunk["text"], start, end, chunk.get("confidence")))
    return tuple(timed_texts)


@cache
def get_version() -> str | None:
    """Return the version of the installed package; `None` if it is used without an installation."""
    try:
        return metadata.version("transformers-parakeet")
    except metadata.PackageNotFoundError:
        return None


__all__ = ["TimedText", "TranscriptionResult", "get_version", "to_timed_texts"]
