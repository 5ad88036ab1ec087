"""Long audio: cutting into windows, and merging of the hypotheses of the windows."""

from .windows import Window, cut_windows, merge_windows

__all__ = [
    "Window",
    "cut_windows",
    "merge_windows",
]
