"""Long audio: cutting into windows, and merging of the hypotheses of the windows."""

from .planner import DEFAULT_WINDOW_S, estimate_peak_memory
from .windows import Window, cut_windows, merge_windows

__all__ = [
    "DEFAULT_WINDOW_S",
    "Window",
    "cut_windows",
    "estimate_peak_memory",
    "merge_windows",
]
