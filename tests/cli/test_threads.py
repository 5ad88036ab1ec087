"""Tests of the choice of the number of threads."""

import os

import pytest
import torch
from typer.testing import CliRunner

import transformers_parakeet as tp
from transformers_parakeet_cli import threads
from transformers_parakeet_cli.app import app
from transformers_parakeet_cli.threads import (
    CpuTimes,
    choose_threads,
    count_taken_cores,
    list_cores,
    read_cgroup_quota,
    read_cpu_times,
    set_threads,
)

CLIP = next((tp.demo_model_path() / "clips").glob("*.flac"))
OPTIONS = ["--model", "demo", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def restored_threads():
    """Set the number of threads of torch to its value before the test."""
    num_threads = torch.get_num_threads()
    yield num_threads
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize(
    ("default", "num_cores", "quota", "num_taken", "expected"),
    [
        (2, 2, None, 0, 2),
        (2, 2, None, 1, 1),
        (2, 2, None, 5, 1),
        # torch has chosen fewer threads than cores, for example one for each physical core
        (4, 8, None, 3, 4),
        (4, 8, None, 6, 2),
        (8, 8, 2.5, 0, 2),
        (8, 8, 0.5, 0, 1),
        (8, 8, 16.0, 2, 6),
    ],
)
def test_threads_do_not_exceed_the_free_cores(default, num_cores, quota, num_taken, expected):
    assert choose_threads(default, num_cores, quota, num_taken) == expected


def test_cores_taken_by_other_processes_are_counted():
    start = CpuTimes(wall_s=100.0, busy_s=50.0, own_s=3.0)
    # in 2 s the cores computed for 3.5 s, of which 1.6 s are those of this process
    assert count_taken_cores(start, CpuTimes(102.0, 53.5, 4.6)) == 1
    assert count_taken_cores(start, CpuTimes(102.0, 52.0, 4.6)) == 0
    # ticks of the system can be counted before those of the process
    assert count_taken_cores(start, CpuTimes(102.0, 51.0, 9.0)) == 0
    assert count_taken_cores(start, CpuTimes(100.1, 50.2, 3.0)) == 0
    assert count_taken_cores(None, None) == 0


def test_processor_times_are_those_of_the_usable_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "list_cores", lambda: {0, 2})
    stat = tmp_path / "stat"
    # idle (4th number) and waiting for I/O (5th) are not computing; the last two are contained in the first two
    stat.write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 20 30 999 888 4 5 6 50 10\ncpu1 7 7 7 7 7 7 7 7 7 7\n"
        "cpu2 1 0 0 0 0 0 0 0 0 0\nintr 5\n"
    )
    assert read_cpu_times(stat).busy_s == pytest.approx(166 / os.sysconf("SC_CLK_TCK"))
    assert read_cpu_times(tmp_path / "missing") is None


def write_group(folder, **files):
    """Write the files of a cgroup."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_quota_of_cgroups_v2_is_the_smallest_of_all_groups_above(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/user/job\n")
    root = tmp_path / "mount"
    write_group(root / "user" / "job", cpu__max="max 100000\n")
    assert read_cgroup_quota(root, membership) is None
    write_group(root / "user", cpu__max="250000 100000\n")
    assert read_cgroup_quota(root, membership) == 2.5
    write_group(root, cpu__max="50000 100000\n")
    assert read_cgroup_quota(root, membership) == 0.5


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_cgroups_v1(tmp_path, mount):
    membership = tmp_path / "cgroup"
    # in a container the folder of the group can be missing, and its files are in the root of what is mounted
    membership.write_text("4:memory:/elsewhere\n3:cpu,cpuacct:/docker/1234\n0::/\n")
    root = tmp_path / "mount"
    write_group(root / mount, cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert read_cgroup_quota(root, membership) is None
    write_group(root / mount / "docker" / "1234", cpu__cfs_quota_us="150000\n", cpu__cfs_period_us="100000\n")
    assert read_cgroup_quota(root, membership) == 1.5


def test_a_system_without_cgroups_has_no_quota(tmp_path):
    assert read_cgroup_quota(tmp_path, tmp_path / "missing") is None
    (tmp_path / "cgroup").write_text("")
    assert read_cgroup_quota(tmp_path, tmp_path / "cgroup") is None


def test_a_note_names_the_load(restored_threads, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "list_cores", lambda: {0, 1, 2})
    monkeypatch.setattr(threads, "read_cgroup_quota", lambda: None)
    monkeypatch.setattr(threads, "read_cpu_times", lambda: CpuTimes(2.0, 2.1, 0.0))
    torch.set_num_threads(3)
    set_threads(None, CpuTimes(0.0, 0.0, 0.0), is_quiet=True)
    assert torch.get_num_threads() == 2
    assert not capsys.readouterr().err
    torch.set_num_threads(3)
    set_threads(None, CpuTimes(0.0, 0.0, 0.0))
    assert "threads: 2, because other processes use 1 of 3 cores" in capsys.readouterr().err
    # a number that the user has set is not changed
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    set_threads(None, CpuTimes(0.0, 0.0, 0.0))
    assert torch.get_num_threads() == 3
    assert not capsys.readouterr().err


def test_the_option_of_the_command(restored_threads):
    num_cores = len(list_cores())
    result = CliRunner().invoke(app, ["transcribe", str(CLIP), *OPTIONS, "--threads", str(num_cores)])
    assert result.exit_code == 0, result.stderr
    assert torch.get_num_threads() == num_cores
    torch.set_num_threads(1)
    # without the option, torch gets no more threads than it had
    assert CliRunner().invoke(app, ["transcribe", str(CLIP), *OPTIONS]).exit_code == 0
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("command", [["transcribe", str(CLIP), "--model", "demo"], ["evaluate", "demo", str(CLIP)]])
def test_more_threads_than_cores_are_refused(command, restored_threads):
    num_cores = len(list_cores())
    result = CliRunner().invoke(app, [*command, "--threads", str(num_cores + 1)])
    assert result.exit_code == 1
    assert f"`--threads` must be at most {num_cores}, the number of cores" in result.stderr
    assert torch.get_num_threads() == restored_threads
    assert CliRunner().invoke(app, [*command, "--threads", "0"]).exit_code == 2
