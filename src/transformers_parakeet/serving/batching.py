"""Runs the model in one thread, on batches of windows of many requests and on live streams.

`window_batches.py` of the package decodes a batch. `app.py` and `realtime.py` submit the work.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..results import TimedText
from ..timestamps import EmittedTokens
from ..tokenization_parakeet import WORD_START
from ..transcription import FailedFile, TranscriptionOptions, build_entry, build_timed_texts, prepare_run
from ..window_batches import MAX_BATCH_SIZE, RecordingState, WindowInput, create_batch_check, decode_batch

logger = logging.getLogger(__name__)

# The shortest window of a batch has at least this fraction of the length of the longest one. Shorter windows wait for
# another batch, because most of their rows would be padding.
MIN_LENGTH_RATIO = 0.5

# function that is called in the thread of the model with the text of the windows decoded so far
OnText = Callable[[str], None]
# function that is called in the thread of the model with the words that are new since the last call, and with the
# number of seconds decoded so far
OnWords = Callable[[tuple[TimedText, ...], float], None]


class QueueFullError(Exception):
    """Raised if the maximum number of requests is waiting for the model."""


class WorkerClosedError(Exception):
    """Raised if work is submitted to a worker that is closed."""


@dataclass(eq=False)
class Job:
    """A recording that waits for the model, or is partly decoded.

    Args:
        recording: the outputs of the windows decoded so far.
        windows: the windows that are not yet decoded.
        future: receives the `TranscriptionResult` or the exception. A job whose future is cancelled is dropped.
        on_text: called after each window with the text so far; `None` for no call.
        on_words: called after each window with the new words; `None` for no call.
        num_reported_frames: number of encoder frames whose words `on_words` received.
        arrival: time of the submission in seconds, on the clock `time.monotonic`.
        next_window: the next window; `None` until it is read.
        total_samples: number of samples of the recording.
    """

    recording: RecordingState
    windows: Iterator[WindowInput]
    future: Future[Any] = field(default_factory=Future)
    on_text: OnText | None = None
    on_words: OnWords | None = None
    num_reported_frames: int = 0
    arrival: float = field(default_factory=time.monotonic)
    next_window: WindowInput | None = None
    total_samples: int = 0

    @property
    def num_samples(self) -> int:
        """Number of samples of the next window, which must have been read."""
        assert self.next_window is not None
        window = self.next_window[1]["window"]
        return int(window.stop - window.start)


class LiveWork(Protocol):
    """Work on live streams, which `ModelWorker` runs between two batches."""

    def has_input(self) -> bool:
        """Return whether streams have new samples."""

    def step(self) -> None:
        """Decode the new samples of all streams."""


def choose_batch(jobs: Sequence[Job], max_windows: int, fits: Callable[[int, int], bool]) -> list[Job]:
    """Choose the jobs whose next windows are decoded together.

    The first job is always chosen, so that every job has its turn. The others are added in their order if the batch
    fits the budget and the lengths are similar.

    Args:
        jobs: the jobs in the order of their turns, at least one; their next windows must have been read.
        max_windows: maximum number of windows.
        fits: function that returns whether a number of windows with a number of samples each can be one batch.

    Returns:
        One or more jobs.
    """
    batch = [jobs[0]]
    shortest = longest = jobs[0].num_samples
    for job in jobs[1:]:
        if len(batch) == max_windows:
            break
        new_shortest, new_longest = min(shortest, job.num_samples), max(longest, job.num_samples)
        if new_shortest >= MIN_LENGTH_RATIO * new_longest and fits(len(batch) + 1, new_longest):
            batch.append(job)
            shortest, longest = new_shortest, new_longest
    return batch


def slice_tokens(emitted_tokens: EmittedTokens, start: int, stop: int) -> EmittedTokens:
    """Return some of the tokens of a clip.

    Args:
        emitted_tokens: the tokens of the clip.
        start: index of the first token.
        stop: index after the last token.
    """
    confidence = emitted_tokens.confidence
    return EmittedTokens(
        emitted_tokens.tokens[start:stop],
        emitted_tokens.frames[start:stop],
        emitted_tokens.durations[start:stop],
        None if confidence is None else confidence[start:stop],
    )


class ModelWorker:
    """A thread that owns the model. It decodes the windows of all waiting requests in batches.

    Args:
        pipeline: pipeline with a model of this package.
        options: decoder, windows, batches and search of all requests.
        max_waiting: maximum number of jobs that are not finished.
        batch_wait_s: seconds for which the first job of a batch waits for other jobs.
        max_waiting_samples: maximum number of samples of the jobs that are not finished; a single job can have more.
        live: work on live streams; `None` for none.
        on_batch: called after each batch with the number of windows and the seconds that it took; `None` for no call.
    """

    def __init__(
        self,
        pipeline: Any,
        options: TranscriptionOptions,
        max_waiting: int,
        batch_wait_s: float,
        max_waiting_samples: float = math.inf,
        live: LiveWork | None = None,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        self.pipeline, self.live, self.on_batch = pipeline, live, on_batch
        self.max_waiting, self.batch_wait_s = max_waiting, batch_wait_s
        self.max_waiting_samples = max_waiting_samples
        self.run = prepare_run(pipeline, options)
        self.max_windows = options.batch_size or MAX_BATCH_SIZE
        check = create_batch_check(pipeline, options.memory_budget)
        # a set batch size replaces the choice by memory, as in `transcribe`
        self.fits = check if options.batch_size is None else lambda num_windows, num_samples: True
        self._jobs: deque[Job] = deque()
        self._condition = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run_loop, name="parakeet-model", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of jobs that are not finished."""
        return len(self._jobs)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and accepts jobs."""
        return self._thread.is_alive() and not self._is_closing

    def submit(
        self,
        samples: Any,
        boosting: Any = None,
        on_text: OnText | None = None,
        on_words: OnWords | None = None,
    ) -> Future[Any]:
        """Submit a recording.

        Args:
            samples: (S,) float32 samples at the sampling rate of the model.
            boosting: boosting tree for this recording; `None` for the boosting of all recordings.
            on_text: called in the thread of the model after each window with the text so far; it must return at once.
            on_words: called in the thread of the model after each window with the new words; it must return at once.

        Returns:
            The future of the `TranscriptionResult`. If it is cancelled, the remaining windows are not decoded.

        Raises:
            QueueFullError: `max_waiting` jobs are not finished, or they have `max_waiting_samples` samples.
            WorkerClosedError: the worker is closed.
        """
        recording = RecordingState(None, boosting=boosting)
        windows = self.pipeline.preprocess(samples, **self.run.preprocess_arguments)
        inputs = ((recording, window) for window in windows)
        job = Job(recording, inputs, on_text=on_text, on_words=on_words, total_samples=len(samples))
        with self._condition:
            if self._is_closing:
                raise WorkerClosedError("the worker must be open, but it is closed: create a new worker")
            if len(self._jobs) >= self.max_waiting:
                raise QueueFullError(f"at most {self.max_waiting} recordings can wait: try again later")
            num_samples = sum(waiting.total_samples for waiting in self._jobs)
            if self._jobs and num_samples + job.total_samples > self.max_waiting_samples:
                raise QueueFullError(f"at most {self.max_waiting_samples} samples can wait: try again later")
            self._jobs.append(job)
            self._condition.notify()
        return job.future

    def notify(self) -> None:
        """Wake the thread, because live streams have new samples."""
        with self._condition:
            self._condition.notify()

    def close(self) -> None:
        """Finish all jobs that were accepted, and end the thread."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        self._thread.join()

    def _has_live_input(self) -> bool:
        """Return whether live streams have new samples."""
        return self.live is not None and self.live.has_input()

    def _run_loop(self) -> None:
        """Run batches and steps of streams until the worker is closed and nothing is left."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._jobs or self._has_live_input() or self._is_closing)
                if not self._jobs and not self._has_live_input():
                    return
            if self.live is not None and self.live.has_input():
                self.live.step()
            if self._jobs:
                self._wait_for_more_jobs()
                self._run_batch()

    def _wait_for_more_jobs(self) -> None:
        """Wait until the first job is `batch_wait_s` old, or until there is work for a full batch or for streams."""
        with self._condition:
            deadline = self._jobs[0].arrival + self.batch_wait_s
            self._condition.wait_for(
                lambda: len(self._jobs) >= self.max_windows or self._has_live_input() or self._is_closing,
                timeout=max(0.0, deadline - time.monotonic()),
            )

    def _run_batch(self) -> None:
        """Decode the next windows of some jobs, and answer the jobs that are finished."""
        with self._condition:
            jobs = list(self._jobs)
        ready = [job for job in jobs if self._read_window(job)]
        batch = choose_batch(ready, self.max_windows, self.fits) if ready else []
        if batch:
            start = time.monotonic()
            # `_read_window` has read the next window of every job in `ready`
            windows = [job.next_window for job in batch if job.next_window is not None]
            decode_batch(self.pipeline, windows, self.run.generate_arguments)
            if self.on_batch is not None:
                self.on_batch(len(batch), time.monotonic() - start)
        finished = {job for job in jobs if job not in ready}
        for job in batch:
            job.next_window = None
            if job.recording.error is not None or job.recording.is_decoded:
                finished.add(job)
            else:
                self._report(job)
        with self._condition:
            # the jobs of the batch have their next turn after the others
            waiting = [job for job in self._jobs if job not in finished]
            self._jobs = deque(sorted(waiting, key=batch.__contains__))
        for job in finished:
            self._answer(job)

    def _read_window(self, job: Job) -> bool:
        """Read the next window of a job unless it is read already.

        Args:
            job: the job, changed in place. If reading fails, its recording has the error.

        Returns:
            Whether the job has a window; false if it is cancelled or has failed.
        """
        if job.future.cancelled() or job.recording.error is not None:
            return False
        if job.next_window is None:
            try:
                job.next_window = next(job.windows)
            # no error in one recording may end the thread
            except Exception as error:
                logger.debug("a recording could not be read", exc_info=True)
                job.recording.error = error
                return False
        return True

    def _report(self, job: Job) -> None:
        """Report the text and the new words of the windows of a job that are decoded so far.

        Args:
            job: the job, which has a decoded window.
        """
        if job.on_text is None and job.on_words is None:
            return
        try:
            emitted_tokens = self.pipeline.merge_outputs(job.recording.outputs)
            if job.on_text is not None:
                job.on_text(self.pipeline.processor.to_text(emitted_tokens))
            if job.on_words is not None:
                words = self._build_new_words(job, emitted_tokens)
                sampling_rate = self.pipeline.processor.feature_extractor.sampling_rate
                job.on_words(words, job.recording.outputs[-1]["window"].stop / sampling_rate)
        # no error in one recording may end the thread
        except Exception as error:
            logger.exception("a text could not be reported")
            job.recording.error = error

    def _build_new_words(self, job: Job, emitted_tokens: EmittedTokens) -> tuple[TimedText, ...]:
        """Build the words that were not reported, except the last one, which the next window can change.

        Only the tokens of these words are converted, so that the cost of all reports grows linearly with the recording.

        Args:
            job: the job; its `num_reported_frames` is changed.
            emitted_tokens: the tokens of all decoded windows.
        """
        start = bisect_left(emitted_tokens.frames, job.num_reported_frames)
        pieces = self.pipeline.processor.tokenizer.convert_ids_to_tokens(emitted_tokens.tokens[start:])
        word_starts = [start + index for index, piece in enumerate(pieces) if piece.startswith(WORD_START)]
        if len(word_starts) < 2:
            return ()
        job.num_reported_frames = emitted_tokens.frames[word_starts[-1]]
        return build_timed_texts(self.pipeline, slice_tokens(emitted_tokens, start, word_starts[-1]), "word", self.run)

    def _answer(self, job: Job) -> None:
        """Set the result or the exception of a job, unless it is cancelled.

        Args:
            job: the job.
        """
        # a future can be cancelled at any time
        with contextlib.suppress(InvalidStateError):
            if job.future.cancelled():
                return
            try:
                entry = build_entry(self.pipeline, job.recording, self.run)
            except Exception as error:
                logger.exception("a result could not be built")
                entry = FailedFile(None, error)
            if isinstance(entry, FailedFile):
                job.future.set_exception(entry.error)
            else:
                job.future.set_result(entry)


__all__ = ["Job", "ModelWorker", "QueueFullError", "WorkerClosedError", "choose_batch"]
