"""Long audio: cut into overlapping windows, decode each, keep every token once by its time.

Knows samples, frames and emissions; the model is run by the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..timestamps import Emissions


@dataclass(frozen=True)
class Window:
    """A stretch of audio and the part of it whose tokens count; in samples of the whole clip.

    Args:
        start: first sample.
        stop: sample after the last.
        keep_from: tokens before this sample belong to the window before.
        keep_to: tokens from this sample on belong to the next window; `None` for the last window.
    """

    start: int
    stop: int
    keep_from: int
    keep_to: int | None


def windows(samples: int, length: int, left: int, right: int) -> Iterator[Window]:
    """Cut a clip into windows that overlap by `left + right` samples.

    Args:
        samples: length of the clip.
        length: samples of a window; 0 for one window over the whole clip.
        left: samples at a window's start that are context only.
        right: samples at its end that are context only.

    Yields:
        Windows whose kept parts cover the clip once.

    Raises:
        ValueError: the context leaves nothing to keep.
    """
    if length and length <= left + right:
        raise ValueError(
            f"a chunk must be longer than its strides: got {length} samples with strides of {left} and {right}; "
            "raise `chunk_length_s` or lower `stride_length_s`"
        )
    start = 0
    while length and start + length < samples:
        yield Window(start, start + length, start + left if start else 0, start + length - right)
        start += length - left - right
    yield Window(start, samples, start + left if start else 0, None)


def merge(parts: Sequence[Emissions], spans: Sequence[Window], frame_samples: int) -> Emissions:
    """Join what the windows of one clip emitted, each token once, frames counted from the clip's start.

    Args:
        parts: tokens of each window, frames counted from the window's start.
        spans: the windows.
        frame_samples: samples per encoder frame.
    """
    tokens, frames, durations, confidence = [], [], [], []
    for part, window in zip(parts, spans, strict=True):
        first = window.start // frame_samples
        for index, frame in enumerate(part.frames):
            at = window.start + frame * frame_samples
            if at < window.keep_from or (window.keep_to is not None and at >= window.keep_to):
                continue
            tokens.append(part.tokens[index])
            frames.append(first + frame)
            durations.append(part.durations[index])
            if part.confidence is not None:
                confidence.append(part.confidence[index])
    has_confidence = bool(parts) and parts[0].confidence is not None
    return Emissions(tokens, frames, durations, confidence if has_confidence else None)
