"""Chooses the number of threads of a command from the processor cores that are free for it.

A library call does not change the number of threads, because the number belongs to the whole process.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from .messages import print_note

CGROUP_ROOT = Path("/sys/fs/cgroup")
# folders of the CPU controller of cgroups v1 below the root
CGROUP_V1_CONTROLLERS = ("cpu", "cpu,cpuacct")
# columns of /proc/stat after the name of a core: time in user mode, nice, system, irq, softirq and steal
BUSY_COLUMNS = (1, 2, 3, 6, 7, 8)
# a shorter interval says little about the load, because the system counts in ticks of 10 ms
MIN_INTERVAL_S = 0.2


@dataclass(frozen=True)
class CpuTimes:
    """Processor times since the system or the process was started.

    Args:
        wall_s: time of the clock in seconds.
        busy_s: seconds in which the usable cores computed, summed over the cores.
        own_s: seconds in which this process computed, summed over its threads.
    """

    wall_s: float
    busy_s: float
    own_s: float


def list_cores() -> set[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def read_cpu_times(stat: Path = Path("/proc/stat")) -> CpuTimes | None:
    """Read the processor times of the usable cores and of this process.

    Args:
        stat: the file of Linux with the times of each core.

    Returns:
        The times; `None` if the system has no such file.
    """
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return None
    names = {f"cpu{core}" for core in list_cores()}
    ticks = sum(int(words[column]) for words in lines if words and words[0] in names for column in BUSY_COLUMNS)
    own = os.times()
    return CpuTimes(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system)


def count_taken_cores(start: CpuTimes | None, stop: CpuTimes | None) -> int:
    """Count the cores that other processes used in an interval, rounded to a whole number.

    Args:
        start, stop: processor times at the ends of the interval; `None` if they are unknown.

    Returns:
        The number of cores; 0 if it is unknown or the interval is too short.
    """
    if start is None or stop is None or stop.wall_s - start.wall_s < MIN_INTERVAL_S:
        return 0
    others_s = (stop.busy_s - start.busy_s) - (stop.own_s - start.own_s)
    return max(round(others_s / (stop.wall_s - start.wall_s)), 0)


def read_cgroup_quota(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Read how many cores the cgroup of this process and the groups above it may use.

    Args:
        root: folder where cgroups are mounted.
        membership: the file of Linux with the groups of the process, one line `number:controllers:path` per hierarchy.

    Returns:
        The smallest quota in cores; `None` if there is no quota.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    quotas = []
    for _, controllers, path in lines:
        is_v1 = "cpu" in controllers.split(",")
        if is_v1 or not controllers:
            for mount in [root / name for name in CGROUP_V1_CONTROLLERS] if is_v1 else [root]:
                # in a container the group of the process can be the root of what is mounted
                group = Path(path.strip("/"))
                quotas += [read_group_quota(mount / folder) for folder in (group, *group.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def read_group_quota(group: Path) -> float | None:
    """Read the quota of one cgroup in cores, in the format of cgroups v2 or v1.

    Args:
        group: folder of the group.

    Returns:
        The quota; `None` if the group has none.
    """
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return None
    # v2 writes `max` for no limit, v1 writes -1
    return None if quota in ("max", "-1") else int(quota) / int(period)


def check_threads(requested: int | None) -> None:
    """Check the value of `--threads`.

    Args:
        requested: the value; `None` if the option was not given.

    Raises:
        ValueError: there are fewer usable cores.
    """
    num_cores = len(list_cores())
    if requested is not None and requested > num_cores:
        raise ValueError(
            f"`--threads` must be at most {num_cores}, the number of cores that this process may use, got {requested}: "
            "lower it"
        )


def set_threads(requested: int | None, start: CpuTimes | None, is_quiet: bool = False) -> None:
    """Set the number of threads of torch, and print a note if the load of the cores is the reason for the number.

    Args:
        requested: the number of threads; `None` to choose it. If the environment variable OMP_NUM_THREADS is set, torch
            has read the number from it; otherwise it is at most the number of free cores.
        start: processor times before the model was loaded. The load of the cores is measured from then on.
        is_quiet: whether no note is printed.
    """
    import torch

    if requested is not None:
        torch.set_num_threads(requested)
    elif "OMP_NUM_THREADS" not in os.environ:
        default, num_cores, quota = torch.get_num_threads(), len(list_cores()), read_cgroup_quota()
        num_taken = count_taken_cores(start, read_cpu_times())
        num_threads = choose_threads(default, num_cores, quota, num_taken)
        torch.set_num_threads(num_threads)
        if num_threads < choose_threads(default, num_cores, quota, 0) and not is_quiet:
            print_note(
                f"threads: {num_threads}, because other processes use {num_taken} of {num_cores} cores; `--threads` "
                "sets another number"
            )


def choose_threads(default: int, num_cores: int, quota: float | None, num_taken: int) -> int:
    """Choose a number of threads that does not exceed the free cores.

    Args:
        default: number of threads that torch has chosen.
        num_cores: number of cores that the process may use.
        quota: number of cores that the cgroup may use; `None` for no limit.
        num_taken: number of cores that other processes use.

    Returns:
        The number of threads, at least 1.
    """
    limits = [default, num_cores - num_taken, *([] if quota is None else [int(quota)])]
    return max(min(limits), 1)


__all__ = ["check_threads", "read_cpu_times", "set_threads"]
