"""Tests of `transformers_parakeet.bulk.ray_data` on a Ray that this process starts."""

import socket

import numpy as np
import psutil
import pytest
from bulk_helpers import DIGITS, Snapshot, read_output, write_archive

from transformers_parakeet.bulk import BulkJob, BulkOptions, RayOptions, Transcriber
from transformers_parakeet.bulk.ray_data import Pool, choose_pool, connect


@pytest.fixture(scope="module")
def ray():
    """Start Ray as a job does."""
    with connect(RayOptions(num_workers=2)) as module:
        yield module


def test_ray_listens_on_the_loopback_address_only(ray):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    addresses = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.type == socket.SOCK_STREAM
    }
    assert any("raylet" in process.name() for process in processes)
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert addresses


@pytest.mark.parametrize("decodes_on_cpus", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_workers_write_what_this_process_writes_and_a_second_run_does_nothing(decodes_on_cpus, ray, tmp_path):
    archive = tmp_path / "archive"
    write_archive(archive, 9, {1, 6})
    # the end of this recording is missing
    content = (archive / "004.flac").read_bytes()
    (archive / "004.flac").write_bytes(content[: len(content) // 2])
    options = BulkOptions("local", files_per_shard=4)
    job = BulkJob(archive, tmp_path / "local", Transcriber("demo"), options)
    totals = job.run(job.plan())
    assert (totals.num_files, totals.num_errors) == (9, 3)
    expected = read_output(tmp_path / "local")

    options = BulkOptions("ray", files_per_shard=4, ray=RayOptions(num_workers=1, decodes_on_cpus=decodes_on_cpus))
    job = BulkJob(archive, tmp_path / "ray", Transcriber("demo"), options)
    names = []
    totals = job.run(job.plan(), lambda report: names.append(report.name))
    assert (totals.num_files, totals.num_errors) == (9, 3)
    assert len(set(names)) == len(names) == 3
    assert read_output(tmp_path / "ray") == expected
    assert "004.flac is damaged: only" in expected[4]["error"]
    assert expected[4]["text"] is not None
    before = Snapshot.take(tmp_path / "ray")
    assert sorted(before.files) == sorted(names)
    assert job.run(job.plan()).num_files == 0
    assert Snapshot.take(tmp_path / "ray") == before


@pytest.mark.slow
def test_the_transcriber_fits_map_batches(ray):
    rows = [{"path": str(path), "speaker": index} for index, path in enumerate(DIGITS)]
    rows.append({"path": "missing.flac", "speaker": 9})
    dataset = ray.data.from_items(rows, override_num_blocks=1).map_batches(
        Transcriber,
        fn_constructor_kwargs={"model": "demo"},
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=4,
    )
    results = sorted(dataset.take_all(), key=lambda row: row["speaker"])
    direct = Transcriber("demo")({"path": [row["path"] for row in rows]})
    assert [row["text"] for row in results] == direct["text"]
    assert direct["text"][-1] is None
    assert "missing.flac" in results[-1]["error"]
    assert [len(row["words"]) for row in results] == [len(words) for words in direct["words"]]
    assert results[0]["words"][0] == direct["words"][0][0]


NODE = {"CPU": 8.0, "memory": 1e9}
GPU_NODE = {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "options", "pool"),
    [
        ([{"CPU": 2.0}], {}, Pool(1, 2, 0, False)),
        ([{"CPU": 1.0}], {}, Pool(1, 1, 0, False)),
        ([NODE], {}, Pool(2, 4, 0, False)),
        ([NODE, NODE], {"num_workers": 4}, Pool(4, 4, 0, False)),
        ([NODE], {"num_workers": 8}, Pool(8, 1, 0, False)),
        ([NODE], {"num_workers": 1}, Pool(1, 8, 0, False)),
        ([NODE], {"num_workers": 1, "decodes_on_cpus": True}, Pool(1, 7, 0, True)),
        ([NODE], {"cpus_per_worker": 2}, Pool(4, 2, 0, False)),
        ([GPU_NODE, NODE], {}, Pool(4, 1, 1, True)),
        ([GPU_NODE], {"num_workers": 2, "decodes_on_cpus": False}, Pool(2, 1, 1, False)),
    ],
    ids=str,
)
def test_the_workers_follow_from_the_machines(nodes, options, pool):
    assert choose_pool(nodes, RayOptions(**options)) == pool


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        ([NODE], {"num_workers": 9}, "9 workers with 1 CPUs each must fit the cluster, which has 8 CPUs"),
        ([NODE, NODE], {"cpus_per_worker": 9}, "at most 8 in one machine"),
        ([{"CPU": 1.0}], {"decodes_on_cpus": True}, "1 workers with 1 CPUs each and a CPU for decoding"),
        ([GPU_NODE], {"num_workers": 5}, "each worker needs a GPU, got 5 workers for 4 GPUs"),
    ],
)
def test_workers_that_the_machines_cannot_run_are_refused(nodes, options, message):
    with pytest.raises(ValueError, match=message):
        choose_pool(nodes, RayOptions(**options))


def test_numbers_of_workers_are_positive():
    with pytest.raises(ValueError, match="`num_workers` must be at least 1, got 0"):
        RayOptions(num_workers=np.int64(0))
