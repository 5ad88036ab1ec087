"""Long audio: the choice between whole and windows, windows cut in pauses, features in blocks, and voice activity."""

from .inputs import NORMALIZATIONS, InputOptions, ModelInput, iterate_model_inputs, merge_recording
from .planner import DEFAULT_WINDOW_S, Plan, estimate_peak_memory, find_max_samples, get_memory_budget, plan_recording
from .voice_activity import EnergySpeechDetector, SileroSpeechDetector, SpeechDetector, SpeechRange
from .windows import Window, WindowOptions, cut_windows, merge_windows

__all__ = [
    "DEFAULT_WINDOW_S",
    "NORMALIZATIONS",
    "EnergySpeechDetector",
    "InputOptions",
    "ModelInput",
    "Plan",
    "SileroSpeechDetector",
    "SpeechDetector",
    "SpeechRange",
    "Window",
    "WindowOptions",
    "cut_windows",
    "estimate_peak_memory",
    "find_max_samples",
    "get_memory_budget",
    "iterate_model_inputs",
    "merge_recording",
    "merge_windows",
    "plan_recording",
]
