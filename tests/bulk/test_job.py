"""Tests of `transformers_parakeet.bulk.BulkJob` in this process."""

import io

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_helpers import DIGITS, Snapshot, read_output, write_archive

from transformers_parakeet.bulk import BulkJob, BulkOptions, RayOptions, Transcriber, worker
from transformers_parakeet.bulk.shards import Shard, Target
from transformers_parakeet.bulk.sources import list_source_files
from transformers_parakeet.bulk.worker import decode_shard
from transformers_parakeet.transcription import transcribe


@pytest.fixture(scope="module")
def transcriber():
    """A transcriber whose model is loaded once."""
    return Transcriber("demo")


def run(source, target, transcriber, **options):
    """Run a job in this process; return its totals."""
    job = BulkJob(source, target, transcriber, BulkOptions("local", **options))
    return job.run(job.plan())


def test_the_output_of_a_folder_and_what_a_second_run_adds(transcriber, tmp_path):
    paths = write_archive(tmp_path / "archive", 7, {3})
    totals = run(tmp_path / "archive", tmp_path / "out", transcriber, files_per_shard=3)
    rows = read_output(tmp_path / "out")
    good = [path for number, path in enumerate(paths) if number != 3]
    expected = {result.file: result for result in transcribe(good, model="demo")}
    assert (totals.num_files, totals.num_errors) == (7, 1)
    assert totals.duration_s == pytest.approx(sum(result.duration for result in expected.values()))
    for path, row in zip(paths, rows, strict=True):
        assert row["file"] == path.name
        assert row["model"] == "demo"
        if path in good:
            assert row["text"] == expected[str(path)].text
            assert [word["text"] for word in row["words"]] == [word.text for word in expected[str(path)].words]
    before = Snapshot.take(tmp_path / "out")
    assert len(before.files) == 3
    assert run(tmp_path / "archive", tmp_path / "out", transcriber, files_per_shard=3).num_files == 0
    # another size of shards finds the same recordings finished
    assert run(tmp_path / "archive", tmp_path / "out", transcriber, files_per_shard=5).num_files == 0
    assert Snapshot.take(tmp_path / "out") == before
    (tmp_path / "archive" / "001b.flac").write_bytes(DIGITS[1].read_bytes())
    assert run(tmp_path / "archive", tmp_path / "out", transcriber, files_per_shard=3).num_files == 1
    after = Snapshot.take(tmp_path / "out")
    assert {name: after.files[name] for name in before.files} == before.files
    assert len(read_output(tmp_path / "out")) == 8


def test_an_interrupted_job_continues(transcriber, tmp_path):
    write_archive(tmp_path / "archive", 6, {0})
    job = BulkJob(tmp_path / "archive", tmp_path / "out", transcriber, BulkOptions("local", files_per_shard=2))

    def interrupt(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(job.plan(), interrupt)
    assert len(read_output(tmp_path / "out")) == 2
    plan = job.plan()
    assert (len(plan.shards), plan.num_files, plan.finished.num_errors) == (2, 4, 1)
    job.run(plan)
    assert [row["file"] for row in read_output(tmp_path / "out")] == [f"{number:03d}.flac" for number in range(6)]


def test_errors_are_tried_again_on_request(transcriber, tmp_path):
    paths = write_archive(tmp_path / "archive", 4, {2})
    run(tmp_path / "archive", tmp_path / "out", transcriber, files_per_shard=2)
    paths[2].write_bytes(DIGITS[0].read_bytes())
    assert run(tmp_path / "archive", tmp_path / "out", transcriber, files_per_shard=2).num_files == 0
    totals = run(tmp_path / "archive", tmp_path / "out", transcriber, files_per_shard=2, retry_errors=True)
    assert (totals.num_files, totals.num_errors) == (2, 0)
    assert [row["error"] for row in read_output(tmp_path / "out")] == [None] * 4


def test_parquet_with_bytes_and_an_object_store(transcriber, tmp_path):
    audio = [{"bytes": path.read_bytes(), "path": path.name} for path in DIGITS]
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({"audio": audio}), tmp_path / "source" / "data.parquet")
    target = f"memory://{tmp_path.name}/out"
    assert run(tmp_path / "source", target, transcriber).num_files == 3
    assert run(tmp_path / "source", target, transcriber).num_files == 0
    (path,) = fsspec.filesystem("memory").find(f"/{tmp_path.name}/out")
    table = pq.read_table(io.BytesIO(fsspec.filesystem("memory").cat_file(path)))
    assert table["file"].to_pylist() == [path.name for path in DIGITS]
    assert table["text"].to_pylist() == [result.text for result in transcribe(DIGITS, model="demo")]


def test_long_recordings_are_left_to_the_worker_with_the_model(tmp_path, monkeypatch):
    write_archive(tmp_path / "archive", 3, {1})
    shard = Shard(tuple(list_source_files(tmp_path / "archive")))
    decoded = decode_shard(shard)
    assert [entry.audio is not None for entry in decoded] == [True, False, True]
    assert "cannot be read as audio" in decoded[1].error
    monkeypatch.setattr(worker, "MAX_DECODED_S", 0.1)
    assert decode_shard(shard)[0] == worker.DecodedFile()


def test_decoding_before_the_worker_gives_the_same_rows(transcriber, tmp_path):
    paths = write_archive(tmp_path / "archive", 5, {1})
    content = paths[3].read_bytes()
    paths[3].write_bytes(content[: len(content) // 2])
    shard = Shard(tuple(list_source_files(tmp_path / "archive")))
    shard_worker = worker.ShardWorker(transcriber, Target(tmp_path / "out", {}))
    decoded = decode_shard(shard)
    rows = shard_worker.transcribe(shard, decoded)
    assert rows == shard_worker.transcribe(shard, [worker.DecodedFile()] * 5)
    # the worker with the model reads some of the recordings
    assert rows == shard_worker.transcribe(shard, [*decoded[:2], *[worker.DecodedFile()] * 3])
    assert [row["error"] is None for row in rows] == [True, False, True, False, True]
    assert "is damaged: only" in rows[3]["error"]


def test_a_shard_that_was_written_without_a_report_counts(transcriber, tmp_path, monkeypatch):
    write_archive(tmp_path / "archive", 4, {3})
    job = BulkJob(tmp_path / "archive", tmp_path / "out", transcriber, BulkOptions("local", files_per_shard=2))
    run_once = job._run_once
    monkeypatch.setattr(job, "_run_once", lambda *arguments, **options: list(run_once(*arguments, **options))[:1])
    totals = job.run(job.plan())
    assert (totals.num_files, totals.num_errors) == (4, 1)
    assert len(read_output(tmp_path / "out")) == 4


def test_recordings_whose_workers_end_are_tried_alone_and_then_written_as_errors(transcriber, tmp_path, monkeypatch):
    paths = write_archive(tmp_path / "archive", 5, set())
    job = BulkJob(tmp_path / "archive", tmp_path / "out", transcriber, BulkOptions("local", files_per_shard=2))
    run_once, passes = job._run_once, []

    def run_without_fatal(ray, shards, is_careful):
        """Run the shards without those with the third recording, as if their worker had ended."""
        passes.append(([len(shard.files) for shard in shards], is_careful))
        return run_once(
            ray, [shard for shard in shards if paths[2].name not in [f.name for f in shard.files]], is_careful
        )

    monkeypatch.setattr(job, "_run_once", run_without_fatal)
    totals = job.run(job.plan())
    assert passes == [([2, 2, 1], False), ([2], True), ([1, 1], True), ([1], True)]
    assert (totals.num_files, totals.num_errors) == (5, 1)
    rows = read_output(tmp_path / "out")
    assert [row["file"] for row in rows] == [path.name for path in paths]
    assert "the worker that transcribed this recording ended each time" in rows[2]["error"]
    assert job.plan().shards == ()


def test_workers_that_all_end_are_an_error(transcriber, tmp_path, monkeypatch):
    write_archive(tmp_path / "archive", 2, set())
    job = BulkJob(tmp_path / "archive", tmp_path / "out", transcriber, BulkOptions("local"))
    monkeypatch.setattr(job, "_run_once", lambda *arguments, **options: [])
    with pytest.raises(ChildProcessError, match="all workers ended before one of 1 shards was written"):
        job.run(job.plan())


def test_what_prevents_all_work_is_an_error(tmp_path):
    write_archive(tmp_path / "archive", 2, set())
    with pytest.raises(OSError, match=r"the shard part-\w+.parquet cannot be transcribed: .*missing.nemo"):
        run(tmp_path / "archive", tmp_path / "out", Transcriber(tmp_path / "missing.nemo"))
    assert read_output(tmp_path / "out") == []


def test_wrong_options_are_refused(transcriber, tmp_path):
    with pytest.raises(ValueError, match="`engine` must be one of ray, local, got 'spark'"):
        BulkOptions("spark")
    with pytest.raises(ValueError, match="`files_per_shard` must be at least 1, got 0"):
        BulkOptions(files_per_shard=0)
    with pytest.raises(ValueError, match="the engine `local` has one worker"):
        BulkOptions("local", ray=RayOptions(num_workers=2))
    for target in (tmp_path / "archive" / "out", tmp_path / "archive"):
        with pytest.raises(ValueError, match="the target must be outside of the source"):
            BulkJob(f"{tmp_path / 'archive'}/", target, transcriber)
    write_archive(tmp_path / "archive", 1, set())
    run(tmp_path / "archive", tmp_path / "out", transcriber)
    with pytest.raises(ValueError, match="choose another folder, or use the same model and options"):
        run(tmp_path / "archive", tmp_path / "out", Transcriber("demo", decoder="ctc"))
