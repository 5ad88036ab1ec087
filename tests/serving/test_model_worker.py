"""Tests of the thread of the model: which windows go together, turns, failures, cancelled recordings, and the end."""

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import noise
from serving_helpers import CLIPS, load_demo_pipeline

from transformers_parakeet.serving.batching import (
    MIN_LENGTH_RATIO,
    Job,
    ModelWorker,
    QueueFullError,
    WorkerClosedError,
    choose_batch,
)
from transformers_parakeet.transcription import TranscriptionOptions, transcribe

# seconds after which a result is missing
TIMEOUT_S = 60
SAMPLES = {path: soundfile.read(path, dtype="float32")[0] for path in CLIPS}
LONG = np.concatenate([*SAMPLES.values()])


def make_jobs(*lengths):
    """Make jobs whose next windows have these numbers of samples."""
    return [Job(None, iter(()), next_window=(None, {"window": SimpleNamespace(start=7, stop=7 + n)})) for n in lengths]


def choose_lengths(lengths, max_windows=16, max_samples=10**9):
    """Return the lengths of the windows that are chosen, with a limit on samples with padding."""
    batch = choose_batch(make_jobs(*lengths), max_windows, lambda count, longest: count * longest <= max_samples)
    return [job.num_samples for job in batch]


def test_windows_of_similar_lengths_go_together():
    assert MIN_LENGTH_RATIO == 0.5
    assert choose_lengths([100, 100, 100]) == [100, 100, 100]
    assert choose_lengths([100, 49, 50, 200, 201]) == [100, 50]
    assert choose_lengths([100, 200, 201, 99, 150]) == [100, 200, 150]
    assert choose_lengths([1]) == [1]


def test_a_batch_has_at_most_the_windows_and_samples_of_the_limits():
    assert choose_lengths([100] * 5, max_windows=3) == [100] * 3
    assert choose_lengths([100] * 5, max_samples=400) == [100] * 4
    # the third window would pad the others to 150
    assert choose_lengths([100, 100, 150, 100], max_samples=400) == [100, 100, 100]
    # the first window is decoded even if it is too large
    assert choose_lengths([1000, 1000], max_samples=10) == [1000]


class Gate:
    """Stops the model at each batch until the gate is opened, and records the batches.

    Args:
        monkeypatch: fixture of pytest.

    Attributes:
        sizes: number of windows of each batch.
        fail: function of the input of a batch that can raise an exception.
    """

    def __init__(self, monkeypatch):
        self.is_waiting, self.may_go = threading.Event(), threading.Event()
        self.sizes = []
        self.fail = lambda inputs: None
        forward = load_demo_pipeline().forward

        def run(inputs, **arguments):
            """Wait for the gate, then run the model."""
            self.is_waiting.set()
            assert self.may_go.wait(TIMEOUT_S)
            self.sizes.append(len(inputs["input_features"]))
            self.fail(inputs)
            return forward(inputs, **arguments)

        monkeypatch.setattr(load_demo_pipeline(), "forward", run, raising=False)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


@pytest.fixture
def start(gate):
    """A function that starts a worker, which is closed at the end of the test."""
    workers = []

    def start_worker(max_waiting=100, batch_wait_s=0.0, max_waiting_samples=10**9, **options):
        """Start a worker; the options are fields of `TranscriptionOptions`."""
        options = TranscriptionOptions(**{"chunk_length_s": 30.0, **options})
        workers.append(ModelWorker(load_demo_pipeline(), options, max_waiting, batch_wait_s, max_waiting_samples))
        return workers[-1]

    yield start_worker
    gate.may_go.set()
    for worker in workers:
        worker.close()


def submit_behind_gate(worker, gate, recordings, **options):
    """Submit recordings while the model is busy with a first one, so that all wait together."""
    first = worker.submit(noise(0.3))
    assert gate.is_waiting.wait(TIMEOUT_S)
    futures = [worker.submit(samples, **options) for samples in recordings]
    gate.may_go.set()
    first.result(TIMEOUT_S)
    return futures


def test_batched_results_are_those_of_each_recording_alone(start, gate):
    worker = start()
    futures = submit_behind_gate(worker, gate, [*SAMPLES.values(), LONG, *SAMPLES.values()])
    results = [future.result(TIMEOUT_S) for future in futures]
    assert max(gate.sizes) > 4
    recordings = [*SAMPLES.values(), LONG, *SAMPLES.values()]
    alone = [next(iter(transcribe([samples], load_demo_pipeline(), chunk_length_s=30.0))) for samples in recordings]
    for result, expected in zip(results, alone, strict=True):
        assert result.text == expected.text
        assert [word[:3] for word in map(describe, result.words)] == [
            word[:3] for word in map(describe, expected.words)
        ]
        assert [word.confidence for word in result.words] == pytest.approx(
            [word.confidence for word in expected.words], abs=1e-4
        )
    assert len({result.text for result in results[:8]}) == 8


def describe(word):
    """Return text, start, end and confidence of a word."""
    return word.text, word.start, word.end, word.confidence


def test_phrases_of_one_recording_do_not_change_the_others(start, gate):
    pipeline = load_demo_pipeline()
    tree = pipeline.processor.boosting_tree([("seven", 20.0)])
    worker = start()
    first = worker.submit(noise(0.3))
    assert gate.is_waiting.wait(TIMEOUT_S)
    samples = SAMPLES[CLIPS[0]]
    futures = [worker.submit(samples, boosting) for boosting in (None, tree, None)]
    gate.may_go.set()
    first.result(TIMEOUT_S)
    texts = [future.result(TIMEOUT_S).text for future in futures]
    assert gate.sizes[1:] == [3]
    alone = next(iter(transcribe([samples], pipeline, boost=[("seven", 20.0)]))).text
    plain = next(iter(transcribe([samples], pipeline))).text
    assert texts == [plain, alone, plain]
    assert alone != plain


def test_a_short_recording_does_not_wait_for_all_windows_of_a_long_one(start, gate):
    worker = start(batch_size=1, chunk_length_s=5.0)
    answered = []
    futures = submit_behind_gate(worker, gate, [LONG, noise(1.0)])
    for name, future in zip(("long", "short"), futures, strict=True):
        future.add_done_callback(lambda _, name=name: answered.append((name, len(gate.sizes))))
    for future in futures:
        future.result(TIMEOUT_S)
    # noise, one window of the long recording, then the short one
    (short, long) = answered
    assert short == ("short", 3)
    assert long[0] == "long"
    assert long[1] > 6


def test_recordings_within_the_wait_go_together(start, gate):
    gate.may_go.set()
    worker = start(batch_wait_s=1.0)
    start_time = time.monotonic()
    futures = [worker.submit(noise(1.0, seed)) for seed in range(3)]
    for future in futures:
        future.result(TIMEOUT_S)
    assert gate.sizes == [3]
    # a full batch does not wait
    worker.max_windows = 2
    futures = [worker.submit(noise(1.0, seed)) for seed in range(2)]
    for future in futures:
        future.result(TIMEOUT_S)
    assert gate.sizes == [3, 2]
    assert time.monotonic() - start_time >= 1.0


def test_a_failing_window_affects_only_its_recording(start, gate, monkeypatch):
    good = SAMPLES[CLIPS[0]]
    broken = good.copy()
    preprocess = load_demo_pipeline().preprocess

    def preprocess_and_break(samples, **arguments):
        """Compute the windows; those of the broken recording get infinite features."""
        for window in preprocess(samples, **arguments):
            if samples is broken:
                window["input_features"][:] = float("inf")
            yield window

    def fail(inputs):
        """Fail for a batch with infinite features."""
        if inputs["input_features"].isinf().any():
            raise RuntimeError(f"{len(inputs['input_features'])} windows failed")

    monkeypatch.setattr(load_demo_pipeline(), "preprocess", preprocess_and_break, raising=False)
    gate.fail = fail
    worker = start()
    futures = submit_behind_gate(worker, gate, [good, broken, good])
    with pytest.raises(RuntimeError, match="1 windows failed"):
        futures[1].result(TIMEOUT_S)
    assert futures[0].result(TIMEOUT_S).text == futures[2].result(TIMEOUT_S).text != ""
    # the batch of three, and the three windows alone
    assert gate.sizes == [1, 3, 1, 1, 1]
    assert worker.is_alive


def test_a_recording_that_cannot_be_read_affects_only_itself(start, gate):
    worker = start()
    futures = submit_behind_gate(worker, gate, [SAMPLES[CLIPS[0]], np.full(16000, np.nan, np.float32)])
    assert futures[0].result(TIMEOUT_S).text
    with pytest.raises(ValueError, match="must be finite"):
        futures[1].result(TIMEOUT_S)
    assert worker.is_alive


def test_a_function_for_texts_that_fails_affects_only_its_recording(start, gate):
    worker = start(chunk_length_s=5.0)

    def fail(text):
        """Fail as a closed event loop does."""
        raise RuntimeError("closed")

    (future,) = submit_behind_gate(worker, gate, [LONG], on_text=fail)
    with pytest.raises(RuntimeError, match="closed"):
        future.result(TIMEOUT_S)
    texts = []
    result = worker.submit(LONG, on_text=texts.append).result(TIMEOUT_S)
    assert len(texts) > 2
    assert [len(text) for text in texts] == sorted(len(text) for text in texts)
    assert result.text.startswith(texts[0].rpartition(" ")[0])


def test_cancelled_recordings_are_not_decoded(start, gate):
    worker = start(batch_size=1, chunk_length_s=5.0)
    first = worker.submit(noise(0.3))
    assert gate.is_waiting.wait(TIMEOUT_S)
    futures = [worker.submit(LONG) for _ in range(3)]
    for future in futures:
        assert future.cancel()
    last = worker.submit(SAMPLES[CLIPS[0]])
    gate.may_go.set()
    first.result(TIMEOUT_S)
    assert last.result(TIMEOUT_S).text
    assert sum(gate.sizes) <= 3
    with pytest.raises(CancelledError):
        futures[0].result(TIMEOUT_S)
    wait_until_idle(worker)


def wait_until_idle(worker):
    """Wait until no recording waits."""
    deadline = time.monotonic() + TIMEOUT_S
    while worker.num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_queue_is_limited_by_recordings_and_by_samples(start, gate):
    worker = start(max_waiting=2, max_waiting_samples=40_000)
    futures = [worker.submit(noise(1.0))]
    assert gate.is_waiting.wait(TIMEOUT_S)
    with pytest.raises(QueueFullError, match="at most 40000 samples"):
        worker.submit(noise(2.0))
    futures.append(worker.submit(noise(1.0)))
    with pytest.raises(QueueFullError, match="at most 2 recordings"):
        worker.submit(noise(0.1))
    assert worker.num_waiting == 2
    gate.may_go.set()
    for future in futures:
        future.result(TIMEOUT_S)
    wait_until_idle(worker)
    # one recording may have more samples
    assert worker.submit(noise(3.0)).result(TIMEOUT_S).duration == pytest.approx(3.0)


def test_close_finishes_what_was_accepted(start, gate):
    worker = start(batch_size=1, chunk_length_s=5.0)
    futures = [worker.submit(samples) for samples in (LONG, *SAMPLES.values())]
    closing = threading.Thread(target=worker.close)
    closing.start()
    while worker.is_alive:
        time.sleep(0.01)
    with pytest.raises(WorkerClosedError):
        worker.submit(noise(1.0))
    gate.may_go.set()
    closing.join(TIMEOUT_S)
    assert all(future.done() for future in futures)
    assert all(future.result().text for future in futures)


def test_many_threads_get_their_own_results(start, gate):
    gate.may_go.set()
    worker = start(batch_wait_s=0.008)
    expected = {path: worker.submit(samples).result(TIMEOUT_S).text for path, samples in SAMPLES.items()}
    with ThreadPoolExecutor(8) as pool:
        paths = CLIPS * 5
        texts = list(pool.map(lambda path: worker.submit(SAMPLES[path]).result(TIMEOUT_S).text, paths))
    assert texts == [expected[path] for path in paths]
    assert len(gate.sizes) < len(paths)
