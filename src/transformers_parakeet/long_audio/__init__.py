"""Long audio: windows cut in pauses, the choice between whole and windows, voice activity, and streams."""

from .inputs import NORMALIZATIONS, InputOptions, ModelInput, iterate_model_inputs, merge_recording
from .planner import DEFAULT_WINDOW_S, Plan, estimate_peak_memory, find_max_samples, get_memory_budget, plan_recording
from .stream_engine import StreamOptions
from .stream_words import StreamEvent, StreamUpdate, StreamWord, join_stream_words
from .streaming import ParakeetStream, StreamBatch
from .voice_activity import EnergySpeechDetector, SileroSpeechDetector, SpeechDetector, SpeechRange
from .windows import Window, WindowOptions, cut_windows, merge_windows

__all__ = [
    "DEFAULT_WINDOW_S",
    "NORMALIZATIONS",
    "EnergySpeechDetector",
    "InputOptions",
    "ModelInput",
    "ParakeetStream",
    "Plan",
    "SileroSpeechDetector",
    "SpeechDetector",
    "SpeechRange",
    "StreamBatch",
    "StreamEvent",
    "StreamOptions",
    "StreamUpdate",
    "StreamWord",
    "Window",
    "WindowOptions",
    "cut_windows",
    "estimate_peak_memory",
    "find_max_samples",
    "get_memory_budget",
    "iterate_model_inputs",
    "join_stream_words",
    "merge_recording",
    "merge_windows",
    "plan_recording",
]
