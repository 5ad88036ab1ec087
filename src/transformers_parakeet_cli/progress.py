"""Shows the progress of `parakeet transcribe` in seconds of audio, on stderr if it is a terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .inputs import STANDARD_INPUT, Recording
from .messages import error_console


class ProgressBar:
    """A progress bar in seconds of audio, with the speed and the remaining time.

    Args:
        recordings: the recordings that will be transcribed.
        is_visible: whether the bar is shown.
    """

    def __init__(self, recordings: Sequence[Recording], is_visible: bool) -> None:
        self.progress: Any = None
        if not is_visible:
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.percentage:>3.0f} %"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f} s of audio"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        # stdout is not redirected, because results may be printed to it
        self.progress = Progress(*columns, console=error_console, transient=True, redirect_stdout=False)
        total = sum(estimate_duration(recording) for recording in recordings)
        self.task = self.progress.add_task("", total=total, speed="")

    def __enter__(self) -> ProgressBar:
        """Show the bar."""
        self.resume()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar."""
        self.pause()

    def advance(self, seconds: float) -> None:
        """Add transcribed audio.

        Args:
            seconds: length of the audio in seconds.
        """
        if self.progress is None:
            return
        self.progress.advance(self.task, seconds)
        task = self.progress.tasks[self.task]
        # the durations of URLs and of standard input are not known in advance
        self.progress.update(self.task, total=max(task.total, task.completed))
        if task.elapsed:
            self.progress.update(self.task, speed=f"{task.completed / task.elapsed:.0f} times real time")

    def pause(self) -> None:
        """Remove the bar from the terminal, so that text can be printed."""
        if self.progress is not None:
            self.progress.stop()

    def resume(self) -> None:
        """Show the bar again."""
        if self.progress is not None:
            self.progress.start()


def estimate_duration(recording: Recording) -> float:
    """Read the duration of a recording from the header of its file; other sources, such as pipes, are not read.

    Args:
        recording: the recording.

    Returns:
        Seconds; 0 if the header has no duration, or if the recording is not a regular file on this machine.
    """
    # reading the header of a pipe would take its samples away from the transcription
    if recording.name == STANDARD_INPUT or not os.path.isfile(recording.name):
        return 0.0
    import av
    import soundfile

    try:
        return float(soundfile.info(recording.name).duration)
    except (soundfile.SoundFileError, OSError, RuntimeError):
        pass
    try:
        with av.open(recording.name) as container:
            return (container.duration or 0) / av.time_base
    except (av.FFmpegError, OSError, ValueError):
        # the error is reported when the file is transcribed
        return 0.0


__all__ = ["ProgressBar"]
