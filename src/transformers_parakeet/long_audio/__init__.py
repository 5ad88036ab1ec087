"""Long audio: windows and the merging of their results."""

from .windows import Window, merge, windows

__all__ = [
    "Window",
    "merge",
    "windows",
]
