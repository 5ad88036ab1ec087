"""Reads the windows of many recordings, groups them into batches and decodes the batches.

The pipeline computes the features of the windows and decodes them. `transcription.py` builds the results.
"""

from __future__ import annotations

import os
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from .long_audio import estimate_peak_memory, get_memory_budget

logger = logging.get_logger(__name__)

# Limits of a batch whose size is chosen by memory, so that results and progress appear early: number of windows, and
# length in seconds with padding, which is the length of the longest window times the number of windows
MAX_BATCH_SIZE = 16
MAX_BATCH_S = 240.0


@dataclass
class RecordingState:
    """A file while its windows are read and decoded.

    Args:
        file: path or URL of the file; `None` for samples or bytes in memory.
        outputs: results of the pipeline's `_forward`, one dict per decoded window.
        is_decoded: whether the last window of the file is decoded.
        error: exception that reading or decoding raised; the other windows of the file are then ignored.
        boosting: boosting tree for this file alone; `None` for the boosting of all files.
    """

    file: str | None
    outputs: list[dict[str, Any]] = field(default_factory=list)
    is_decoded: bool = False
    error: Exception | None = None
    boosting: Any = None


# a recording, and the model input of one of its windows, as the pipeline's `preprocess` returns it
WindowInput = tuple[RecordingState, dict[str, Any]]


def create_batch_check(pipeline: Any, memory_budget: int | None) -> Callable[[int, int], bool]:
    """Create a function that returns whether a batch fits the memory budget and the limit `MAX_BATCH_S`.

    Args:
        pipeline: the pipeline.
        memory_budget: number of bytes; see `TranscriptionOptions`.

    Returns:
        Function of the number of windows and the number of samples of the longest window.
    """
    model = pipeline.model
    budget = get_memory_budget(memory_budget, pipeline.device)
    max_samples = MAX_BATCH_S * pipeline.processor.feature_extractor.sampling_rate

    def fits(num_windows: int, num_samples: int) -> bool:
        """Return whether windows with padding to the same length can be one batch."""
        estimate = estimate_peak_memory(model.config, num_samples, num_windows, model.dtype.itemsize)
        return num_windows * num_samples <= max_samples and estimate <= budget

    return fits


def read_windows(
    pipeline: Any,
    files: Iterable[Any],
    recordings: deque[RecordingState],
    preprocess_arguments: dict[str, Any],
) -> Iterator[WindowInput]:
    """Read files one after another, and yield the model inputs of their windows.

    If a file cannot be read, the `error` of its recording is set, and the next file is read.

    Args:
        pipeline: the pipeline.
        files: paths, URLs, bytes, binary file objects or arrays of samples; see `load_audio`.
        recordings: output queue, to which the recording of each file is appended before the file is read.
        preprocess_arguments: arguments of the pipeline's `preprocess`.

    Yields:
        A recording and the model input of its next window.
    """
    for file in files:
        is_named = isinstance(file, (str, os.PathLike))
        recording = RecordingState(os.fspath(file) if is_named else None)
        recordings.append(recording)
        try:
            for window_input in pipeline.preprocess(file, **preprocess_arguments):
                yield recording, window_input
        # no error in one file may prevent the transcription of the other files
        except Exception as error:
            logger.debug("%s could not be read", recording.file, exc_info=True)
            recording.error = error


def batch_windows(
    windows: Iterable[WindowInput], batch_size: int | None, fits: Callable[[int, int], bool]
) -> Iterator[list[WindowInput]]:
    """Group windows into batches, in their order.

    Args:
        windows: the windows of all files.
        batch_size: number of windows in a batch; `None` for at most `MAX_BATCH_SIZE` windows that fit together.
        fits: function that returns whether a number of windows with a number of samples each can be one batch.

    Yields:
        Lists of one or more windows.
    """
    batch: list[WindowInput] = []
    longest = 0
    for recording, window_input in windows:
        num_samples = window_input["window"].stop - window_input["window"].start
        if batch and batch_size is None and not fits(len(batch) + 1, max(longest, num_samples)):
            yield batch
            batch, longest = [], 0
        batch.append((recording, window_input))
        longest = max(longest, num_samples)
        if len(batch) == (batch_size or MAX_BATCH_SIZE):
            yield batch
            batch, longest = [], 0
    if batch:
        yield batch


def count_new_samples(window: Any) -> int:
    """Count the samples of a window that are not context.

    Args:
        window: a `Window`.
    """
    return int((window.stop if window.keep_to is None else window.keep_to) - window.keep_from)


def decode_batch(pipeline: Any, batch: list[WindowInput], generate_arguments: dict[str, Any]) -> None:
    """Decode a batch, and append the outputs to the recordings; if it fails, decode its windows one by one.

    A window that also fails alone sets the `error` of its recording. Recordings with an error are skipped.

    Args:
        pipeline: the pipeline.
        batch: recordings and model inputs of windows.
        generate_arguments: arguments of the pipeline's `_forward`.
    """
    batch = [(recording, window_input) for recording, window_input in batch if recording.error is None]
    if not batch:
        return
    features = [window_input["input_features"][0] for _, window_input in batch]
    masks = [window_input["attention_mask"][0] for _, window_input in batch]
    model_inputs = {
        "input_features": pad_sequence(features, batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
    }
    trees = [recording.boosting for recording, _ in batch]
    if any(tree is not None for tree in trees):
        common_tree = generate_arguments.get("boosting")
        generate_arguments = {
            **generate_arguments,
            "boosting": [common_tree if tree is None else tree for tree in trees],
        }
    hypotheses = None
    try:
        hypotheses = pipeline.forward(model_inputs, **generate_arguments)["hypotheses"]
    except Exception as error:
        logger.debug("a batch of %d windows failed", len(batch), exc_info=True)
        # the functions in the traceback hold tensors, whose memory the next windows may need
        traceback.clear_frames(error.__traceback__)
        if len(batch) == 1:
            batch[0][0].error = error
            return
    if hypotheses is None:
        for entry in batch:
            decode_batch(pipeline, [entry], generate_arguments)
        return
    for row, (recording, window_input) in enumerate(batch):
        output = {name: value for name, value in window_input.items() if name not in model_inputs}
        recording.is_decoded = bool(output.pop("is_last"))
        recording.outputs.append({**output, "hypotheses": hypotheses[row]})


__all__ = [
    "MAX_BATCH_S",
    "MAX_BATCH_SIZE",
    "RecordingState",
    "batch_windows",
    "count_new_samples",
    "create_batch_check",
    "decode_batch",
    "read_windows",
]
