"""Helpers of the audio tests: a test signal, and files that contain it, written by libsndfile or FFmpeg."""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile as sf

SECONDS = 2.0


def chirp(rate: int = 16_000, seconds: float = SECONDS) -> np.ndarray:
    """Generate a sweep from 200 to 3200 Hz (S,), which lies in the pass band of every codec used here."""
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * (200 * t + (3000 / seconds) * t**2 / 2)
    return (0.5 * np.sin(phase)).astype(np.float32)


def correlation(samples: np.ndarray, expected: np.ndarray) -> float:
    """Return the correlation coefficient of two signals over their common length."""
    length = min(len(samples), len(expected))
    return float(np.corrcoef(samples[:length], expected[:length])[0, 1])


def stereo(rate: int) -> np.ndarray:
    """Generate two different channels (S, 2) whose mean is the chirp."""
    mono = chirp(rate)
    return np.stack([1.5 * mono, 0.5 * mono], axis=1)


def write_with_ffmpeg(
    path: Path, codec: str, rate: int, video: bool = False, sound: bool = True, **options: str
) -> None:
    """Write the stereo chirp with an FFmpeg codec.

    Args:
        path: file to write; its suffix determines the container.
        codec: FFmpeg's name of the audio codec.
        rate: samples per second.
        video: add a video track of five frames.
        sound: add the audio track.
        **options: options of the container.
    """
    with av.open(str(path), "w", options=options) as container:
        if video:
            pictures = container.add_stream("mpeg4", rate=10)
            pictures.width = pictures.height = 64
        if sound:
            stream = container.add_stream(codec, rate=rate, layout="stereo")
            write_sound(container, stream, rate)
        if video:
            for _ in range(5):
                container.mux(pictures.encode(av.VideoFrame(64, 64, "yuv420p")))
            container.mux(pictures.encode(None))


def write_sound(container: Any, stream: Any, rate: int) -> None:
    """Encode the stereo chirp into an audio stream of an open container of PyAV."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(stereo(rate).T), format="fltp", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    # samples per frame that each encoder requires
    frame_size = {"aac": 1024, "libopus": 960, "libmp3lame": 1152}[stream.codec_context.name]
    resampler = av.AudioResampler(format=stream.format, layout="stereo", rate=rate, frame_size=frame_size)
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        container.mux(stream.encode(piece))
    container.mux(stream.encode(None))


def encoded(rate: int = 16_000, container: str = "WAV", samples: np.ndarray | None = None, **options: str) -> bytes:
    """Encode samples (default: the chirp) with libsndfile and return the content of the file."""
    file = io.BytesIO()
    sf.write(file, chirp(rate) if samples is None else samples, rate, format=container, **options)
    return file.getvalue()
