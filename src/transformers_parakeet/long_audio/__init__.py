"""Long audio: cutting into windows and merging of their hypotheses, and transcription of streams."""

from .stream_words import StreamEvent, StreamUpdate, StreamWord, join_stream_words
from .streaming import ParakeetStream, StreamBatch
from .windows import Window, cut_windows, merge_windows

__all__ = [
    "ParakeetStream",
    "StreamBatch",
    "StreamEvent",
    "StreamUpdate",
    "StreamWord",
    "Window",
    "cut_windows",
    "join_stream_words",
    "merge_windows",
]
