"""Read the audio and the duration of the rows of a speech dataset.

Datasets are opened in `data.py`, and audio files are decoded in `audio.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..audio import AudioError, load_audio
from .manifests import parse_seconds

# libsndfile can seek in these formats without decoding the audio before the position; `load_audio` also reads them with
# libsndfile
SEEKABLE_SUFFIXES = {".wav", ".flac", ".aiff", ".au"}
# seconds; an excerpt that ends this close to the end of the clip is extended to the end, because times in manifests are
# rounded
ROUNDING_TOLERANCE_S = 0.01


def read_clip(row: Mapping[str, Any], sampling_rate: int) -> npt.NDArray[np.float32]:
    """Decode the audio of one dataset row, or the excerpt that the row selects.

    As in NeMo, `offset` and `duration` select an excerpt of the clip. The default offset is 0. A duration of 0, or no
    duration, selects the rest of the clip. Unlike in NeMo, an excerpt that ends within `ROUNDING_TOLERANCE_S` of the
    end of the clip is extended to the end.

    Args:
        row: dataset row with `audio` (any source that `load_audio` accepts), and optionally `offset` and `duration` in
            seconds, and `sampling_rate` in Hz if `audio` is an array.
        sampling_rate: sampling rate in Hz at which the clip is decoded.

    Returns:
        (S,) float32 samples.

    Raises:
        AudioError: the audio cannot be read or ends before the offset, or `offset` or `duration` is not a valid time.
    """
    try:
        offset_s = parse_seconds(row.get("offset"), "offset")
        duration_s = parse_seconds(row.get("duration"), "duration")
    except ValueError as error:
        raise AudioError(str(error)) from error
    source_rate = row.get("sampling_rate")
    if not offset_s and not duration_s:
        return load_audio(row["audio"], source_rate, target_rate=sampling_rate)
    samples = read_excerpt(row["audio"], source_rate, offset_s or 0.0, duration_s or math.inf, sampling_rate)
    if offset_s and not len(samples):
        raise AudioError(
            f"the clip must be longer than its offset, got an offset of {offset_s:g} s: correct it in the manifest"
        )
    return samples


def read_excerpt(
    audio: Any, source_rate: int | None, offset_s: float, duration_s: float, sampling_rate: int
) -> npt.NDArray[np.float32]:
    """Decode an excerpt of a clip.

    If libsndfile can seek in the file, only the excerpt is decoded. Otherwise the whole clip is decoded and cut.

    Args:
        audio: any source that `load_audio` accepts.
        source_rate: sampling rate in Hz of `audio` if it is an array; None for files.
        offset_s: start of the excerpt in seconds.
        duration_s: length of the excerpt in seconds; infinity for the rest of the clip.
        sampling_rate: sampling rate in Hz at which the excerpt is decoded.

    Returns:
        (S,) float32 samples; an empty array if the clip ends before the offset.

    Raises:
        AudioError: the audio cannot be read.
    """
    import soundfile

    if isinstance(audio, str) and Path(audio).suffix.lower() in SEEKABLE_SUFFIXES:
        with contextlib.suppress(soundfile.LibsndfileError), soundfile.SoundFile(audio) as file:
            start, end = compute_excerpt_bounds(offset_s, duration_s, file.samplerate, file.frames)
            # if the excerpt is the whole clip, or the header states no length, `load_audio` below decodes the file
            if file.frames and end - start < file.frames:
                file.seek(start)
                channels = file.read(end - start, dtype="float32", always_2d=True)
                mono = channels.mean(axis=1, dtype=np.float32)
                return load_audio(mono, file.samplerate, target_rate=sampling_rate)
    samples = load_audio(audio, source_rate, target_rate=sampling_rate)
    start, end = compute_excerpt_bounds(offset_s, duration_s, sampling_rate, len(samples))
    return samples[start:end]


def compute_excerpt_bounds(offset_s: float, duration_s: float, sampling_rate: int, num_samples: int) -> tuple[int, int]:
    """Convert the start and length of an excerpt to a range of samples.

    Args:
        offset_s: start of the excerpt in seconds.
        duration_s: length of the excerpt in seconds; infinity for the rest of the clip.
        sampling_rate: sampling rate of the clip in Hz.
        num_samples: length of the clip in samples.

    Returns:
        Start and end (exclusive) of the range, both at most `num_samples`. An end within `ROUNDING_TOLERANCE_S` of the
        end of the clip is moved to the end of the clip.
    """
    start = min(round(offset_s * sampling_rate), num_samples)
    exact_end = (offset_s + duration_s) * sampling_rate
    if exact_end > num_samples - ROUNDING_TOLERANCE_S * sampling_rate:
        return start, num_samples
    return start, max(start, round(exact_end))


def get_clip_name(row: Mapping[str, Any], position: int, collection: str = "batch") -> str:
    """Return a name for a dataset row, to be used in messages.

    Args:
        row: dataset row, usually with `audio` or `id`.
        position: zero-based position of the row in the batch or dataset.
        collection: what the position counts in, "batch" or "dataset".

    Returns:
        The path of the audio file, or else the value of `id`, or else the position in words.
    """
    audio = row.get("audio")
    path = audio.get("path") if isinstance(audio, Mapping) else audio
    name = path if isinstance(path, (str, Path)) else row.get("id")
    return str(name) if name else f"clip {position} of the {collection}"


def get_durations(dataset: Any) -> list[float]:
    """Return the durations of all clips of a dataset, without decoding the clips.

    Args:
        dataset: a dataset with a column `duration` or an attribute `durations`, in seconds.

    Returns:
        The duration of each clip in seconds.

    Raises:
        ValueError: the dataset is streamed, or a duration is missing.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "batches by duration need a dataset with a length, got a stream: set a number of clips per batch instead"
        )
    if "duration" in (getattr(dataset, "column_names", None) or ()):
        durations = list(dataset["duration"])
    else:
        durations = list(getattr(dataset, "durations", ()))
    if len(durations) != len(dataset) or None in durations:
        raise ValueError(
            "batches by duration need the duration of every clip in a column `duration`, in seconds: add it with "
            "`add_durations`"
        )
    return durations


def add_durations(dataset: Any, sampling_rate: int = 16000) -> Any:
    """Add the missing durations of clips to the column `duration` of a dataset, by decoding the clips.

    A clip that cannot be read gets the duration 0. `SpeechCollator` later reports the error when it reads the clip.

    Args:
        dataset: a `datasets` dataset or `ClipRows`.
        sampling_rate: sampling rate in Hz at which clips are decoded.

    Returns:
        A dataset with a duration in seconds in every row; `dataset` itself if every row already has a duration.
    """

    def measure_duration(row: dict[str, Any]) -> dict[str, float]:
        """Return the field `duration` of a row; decode the clip if the row has no duration."""
        try:
            duration_s = parse_seconds(row.get("duration"), "duration")
            if duration_s is None:
                duration_s = len(read_clip(row, sampling_rate)) / sampling_rate
        except (OSError, ValueError):
            duration_s = 0.0
        return {"duration": duration_s}

    if "duration" in dataset.column_names and None not in dataset["duration"]:
        return dataset
    return dataset.map(measure_duration, desc="Measuring durations")


__all__ = ["add_durations", "get_clip_name", "get_durations", "read_clip"]
