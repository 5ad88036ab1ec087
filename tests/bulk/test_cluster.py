"""Tests of `transformers_parakeet.bulk` with Ray: two nodes, of which one is lost, and workers that end."""

import os
import signal

import psutil
import pytest
from bulk_helpers import EndingTranscriber, Snapshot, read_output, write_archive
from conftest import TESTS

from transformers_parakeet.bulk import BulkJob, BulkOptions, RayOptions, Transcriber, import_ray

BAD = {7, 60, 149, 222, 299}


@pytest.fixture
def cluster():
    """Start two Ray nodes with one CPU each, and connect to them."""
    ray = import_ray()
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    )
    cluster.second_node = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def find_workers():
    """Return the processes of the actors that transcribe."""
    processes = psutil.Process().children(recursive=True)
    return [process for process in processes if "MapWorker" in " ".join(process.cmdline())]


@pytest.mark.slow
def test_a_lost_worker_and_a_lost_node_cost_no_row(cluster, tmp_path, monkeypatch):
    write_archive(tmp_path / "archive", 300, BAD)
    local_job = BulkJob(
        tmp_path / "archive", tmp_path / "local", Transcriber("demo"), BulkOptions("local", files_per_shard=10)
    )
    local_job.run(local_job.plan())
    expected = read_output(tmp_path / "local")
    assert [row["file"] for row in expected] == [f"{number:03d}.flac" for number in range(300)]
    assert {number for number, row in enumerate(expected) if row["error"] is not None} == BAD
    assert all(row["text"] for row in expected if row["error"] is None)

    options = BulkOptions("ray", files_per_shard=10, ray=RayOptions(num_workers=2))
    job = BulkJob(tmp_path / "archive", tmp_path / "ray", Transcriber("demo"), options)
    reports, killed, passes = [], [], []
    run_once = job._run_once

    def count_passes(*arguments, **options):
        """Store the number of shards of every pass."""
        passes.append(len(arguments[1]))
        return run_once(*arguments, **options)

    monkeypatch.setattr(job, "_run_once", count_passes)

    def disturb(report):
        """Kill a worker after the second shard, and a node after the sixth one."""
        reports.append(report)
        if len(reports) == 2:
            worker = find_workers()[0]
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)
        if len(reports) == 6:
            cluster.remove_node(cluster.second_node, allow_graceful=False)

    totals = job.run(job.plan(), disturb)
    assert killed
    # the lost shards are transcribed in a second pass
    assert passes[0] == 30
    assert 1 <= passes[1] <= 6
    assert len(cluster.list_all_nodes()) == 1
    assert (totals.num_files, totals.num_errors) == (300, 5)
    assert read_output(tmp_path / "ray") == expected
    assert len({report.name for report in reports}) == len(reports)

    before = Snapshot.take(tmp_path / "ray")
    plan = job.plan()
    assert plan.shards == ()
    assert job.run(plan).num_files == 0
    assert Snapshot.take(tmp_path / "ray") == before


@pytest.fixture
def importable_helpers(monkeypatch):
    """Let the workers of a new Ray import `bulk_helpers`."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.mark.slow
def test_a_recording_that_ends_every_worker_is_a_row_with_an_error(importable_helpers, tmp_path):
    paths = write_archive(tmp_path / "archive", 6, {2})
    paths[4].write_bytes(b"fatal")
    transcriber = EndingTranscriber("demo")
    transcriber.fatal_size = 5
    options = BulkOptions("ray", files_per_shard=3, ray=RayOptions(num_workers=1))
    job = BulkJob(tmp_path / "archive", tmp_path / "output", transcriber, options)
    totals = job.run(job.plan())
    assert (totals.num_files, totals.num_errors) == (6, 2)
    rows = read_output(tmp_path / "output")
    assert [row["file"] for row in rows] == [path.name for path in paths]
    assert "the worker that transcribed this recording ended each time" in rows[4]["error"]
    assert [number for number, row in enumerate(rows) if row["text"]] == [0, 1, 3, 5]
    assert job.plan().shards == ()


@pytest.mark.slow
def test_workers_that_all_end_are_an_error_and_no_rows(importable_helpers, tmp_path):
    paths = write_archive(tmp_path / "archive", 2, set())
    transcriber = EndingTranscriber("demo")
    transcriber.fatal_size = paths[0].stat().st_size
    options = BulkOptions("ray", ray=RayOptions(num_workers=1))
    job = BulkJob(tmp_path / "archive", tmp_path / "output", transcriber, options)
    with pytest.raises(ChildProcessError, match="all workers ended before one of 1 shards was written"):
        job.run(job.plan())
    assert read_output(tmp_path / "output") == []
