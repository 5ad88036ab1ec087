"""Long audio: windows, and the merging of their hypotheses."""

from .windows import Window, cut_windows, merge_windows

__all__ = [
    "Window",
    "cut_windows",
    "merge_windows",
]
