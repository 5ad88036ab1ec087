"""Transcribes the recordings of one call of `parakeet transcribe`.

`inputs.py` finds the recordings, and `outputs.py` writes the results.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .inputs import Recording, choose_output_names, find_recordings
from .messages import error_console, format_error, print_error, print_note, print_text, print_traceback
from .models import load_pipeline, pause_garbage_collection, print_model_note
from .outputs import OutputOptions, format_result, print_json_line, print_json_list
from .progress import ProgressBar
from .threads import check_threads, read_cpu_times, set_threads

# lengths of audio from this number of seconds on are printed in hours
MIN_HOURS_S = 360.0


@dataclass(frozen=True)
class Task:
    """A recording whose outputs are missing.

    Args:
        recording: the recording.
        output_name: path of its outputs without ending, relative to the output folder.
        formats: names of the formats that are missing.
    """

    recording: Recording
    output_name: str
    formats: tuple[str, ...]


class Job:
    """The recordings of one call of the command.

    Args:
        arguments: files, folders, patterns, URLs, and `-` for standard input.
        outputs: which outputs are written, and where.
        is_quiet: whether only results and errors are printed.

    Raises:
        ValueError: several recordings cannot be printed to stdout in the format.
    """

    def __init__(self, arguments: Sequence[str], outputs: OutputOptions, is_quiet: bool) -> None:
        self.outputs = outputs
        self.is_quiet = is_quiet
        # name of each recording that failed, in the order of the errors
        self.errors: list[str] = []
        self.recordings, errors = find_recordings(arguments)
        outputs.check_number(len(self.recordings))
        for argument, message in errors.items():
            self.fail(argument, message)

    def fail(self, name: str, message: str) -> None:
        """Record and print that a recording failed.

        Args:
            name: name of the recording.
            message: the error message.
        """
        self.errors.append(name)
        print_error(message)

    def run(
        self,
        model: str,
        model_options: dict[str, Any],
        options: dict[str, Any],
        phrase_file: Path | None = None,
        threads: int | None = None,
    ) -> None:
        """Transcribe the recordings whose outputs are missing.

        Args:
            model: Hub id, folder, `.nemo` file, or `demo`.
            model_options: arguments of `transformers_parakeet.transcription.load_pipeline`.
            options: fields of `TranscriptionOptions`.
            phrase_file: text file with phrases to recognise more often; `None` for no phrases.
            threads: number of threads; `None` for at most the free cores.

        Raises:
            OSError: the model or a file cannot be read.
            ValueError: an option is invalid, or the output folder cannot be written.
        """
        check_threads(threads)
        tasks = self.find_tasks()
        if not tasks:
            # the list of results is empty
            self.write([])
            return
        # an invalid folder is an error before the model is loaded
        self.outputs.create_folder()
        cpu_times = read_cpu_times()
        # imported here, because this imports torch
        with pause_garbage_collection():
            from transformers_parakeet import transcription
            from transformers_parakeet.phrases import read_phrases

        phrases = () if phrase_file is None else tuple(read_phrases(phrase_file))
        all_options = transcription.TranscriptionOptions(
            **options, boost=phrases, confidence=self.outputs.needs_confidence
        )
        pipeline = self.load_pipeline(model, model_options)
        set_threads(threads, cpu_times, self.is_quiet)
        bar_is_visible = not self.is_quiet and error_console.is_terminal
        start_time = time.monotonic()
        durations: list[float] = []
        with ProgressBar([task.recording for task in tasks], bar_is_visible) as bar:
            sources = (task.recording.source for task in tasks)
            entries = transcription.transcribe_files(pipeline, sources, all_options, bar.advance)
            self.write(self.iterate_results(tasks, entries, bar, durations))
        if not self.is_quiet:
            self.print_summary(durations, time.monotonic() - start_time)

    def load_pipeline(self, model: str, model_options: dict[str, Any]) -> Any:
        """Load the model, and print which model it is.

        Args:
            model: Hub id, folder, `.nemo` file, or `demo`.
            model_options: arguments of `transformers_parakeet.transcription.load_pipeline`.
        """
        pipeline = load_pipeline(model, **model_options)
        if not self.is_quiet:
            print_model_note(pipeline, is_default_dtype=model_options["dtype"] is None)
        return pipeline

    def find_tasks(self) -> list[Task]:
        """Return the recordings whose outputs are missing, and print how many have all their outputs."""
        names = choose_output_names(self.recordings)
        pairs = zip(self.recordings, names, strict=True)
        tasks = [Task(recording, name, self.outputs.get_missing_formats(name)) for recording, name in pairs]
        # without output files, every recording is transcribed
        missing = [task for task in tasks if task.formats or self.outputs.folder is None]
        num_complete = len(tasks) - len(missing)
        if num_complete and not self.is_quiet:
            print_note(
                f"{format_count(num_complete)} skipped, because the output exists in {self.outputs.folder}; "
                "--overwrite replaces it"
            )
        return missing

    def iterate_results(
        self, tasks: Sequence[Task], entries: Iterable[Any], bar: ProgressBar, durations: list[float]
    ) -> Iterator[tuple[Task, Any]]:
        """Yield the result of every recording that could be transcribed, and print the errors of the others.

        Args:
            tasks: the recordings.
            entries: a `TranscriptionResult` or `FailedFile` for each recording.
            bar: the progress bar, which is not shown while results and errors are printed.
            durations: output list, to which the length of each transcribed recording in seconds is appended.

        Yields:
            The recording and its `TranscriptionResult`.
        """
        from transformers_parakeet.transcription import FailedFile

        for task, entry in zip(tasks, entries, strict=True):
            bar.pause()
            if isinstance(entry, FailedFile):
                print_traceback(entry.error)
                self.fail(task.recording.name, format_error(entry.error, task.recording.label))
            else:
                durations.append(entry.duration)
                yield task, entry
            bar.resume()

    def write(self, results: Iterable[tuple[Task, Any]]) -> None:
        """Write the results to files, or print them.

        Args:
            results: the recordings and their results.
        """
        outputs = self.outputs
        if outputs.folder is None and outputs.formats == ("json",):
            print_json_list(result for _, result in results)
            return
        for task, result in results:
            if outputs.prints_lines:
                print_json_line(result)
            if outputs.folder is not None:
                try:
                    outputs.write(result, task.output_name, task.formats)
                except OSError as error:
                    self.fail(task.recording.name, format_error(error, task.recording.label))
            elif outputs.formats:
                text = format_result(result, outputs.formats[0], outputs.timestamps)
                print_text(self.add_name(text, task.recording), end="")

    def add_name(self, text: str, recording: Recording) -> str:
        """Add the name of the recording to a text that is printed, if there are several recordings.

        Args:
            text: one or several lines.
            recording: the recording.
        """
        if len(self.recordings) == 1:
            # an empty text is an empty line
            return text or "\n"
        separator = "\n" if self.outputs.timestamps else " "
        return f"{recording.label}:{separator}{text or chr(10)}"

    def print_summary(self, durations: Sequence[float], elapsed_s: float) -> None:
        """Print how many files were transcribed, their length, the speed, and the files that failed.

        Args:
            durations: length of each transcribed recording in seconds.
            elapsed_s: seconds that the transcription took.
        """
        audio_s = sum(durations)
        length = f"{audio_s / 3600:.2f} hours" if audio_s >= MIN_HOURS_S else f"{audio_s:.1f} s"
        if durations:
            folder = self.outputs.folder
            print_note(
                f"{format_count(len(durations))} transcribed, {length} of audio in {elapsed_s:.1f} s "
                f"({audio_s / elapsed_s:.1f} times real time)" + (f"; outputs in {folder}" if folder else "")
            )
        if len(self.errors) > 1 or (self.errors and durations):
            print_note(f"{format_count(len(self.errors))} failed: {', '.join(self.errors)}")


def format_count(number: int) -> str:
    """Format a number of files.

    Args:
        number: the number.
    """
    return f"{number} file" if number == 1 else f"{number} files"


__all__ = ["Job"]
