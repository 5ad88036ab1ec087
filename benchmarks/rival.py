"""Runs a benchmark's cases in two processes, stock transformers and this package, in turn.

Importing this package replaces stock classes, so each side lives in a process of its own; what a case does is for the
benchmark to say.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDES = ("stock", "ours")


@dataclass(frozen=True)
class Timing:
    """Median seconds of a case on one side, and its peak memory above what was there before, in MiB."""

    seconds: float
    peak_mib: float


def gpu() -> Any:
    """Return torch's module for the GPU; torch itself is for the side's process to import."""
    return importlib.import_module("torch").cuda


def peak_memory(device: str = "cpu") -> int:
    """Return the largest resident size since the last reset, or the largest memory in use on a GPU, in KiB."""
    if device != "cpu":
        return gpu().max_memory_allocated() // 1024
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def reset_peak(device: str = "cpu") -> int:
    """Start a new peak; return the memory in use now, in KiB."""
    gc.collect()
    if device != "cpu":
        gpu().reset_peak_memory_stats()
        return peak_memory(device)
    # memory that the allocator keeps for later would hide what a run needs
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def serve(prepare: Callable[[Any, str, dict[str, Any]], tuple[Callable[[], Any], Callable[[Any, str], None]]]) -> None:
    """Answer the parent's requests: prepare a case, run it once, save its result.

    Args:
        prepare: (module with the classes, side, case) -> (function to time, function that saves its result to a path).
    """
    side = sys.argv[2]
    module = importlib.import_module("transformers_parakeet" if side == "ours" else "transformers")
    run: Callable[[], Any] = lambda: None  # noqa: E731
    save: Callable[[Any, str], None] = lambda result, path: None  # noqa: E731
    device = "cpu"
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "prepare":
            device = request["case"].get("device", "cpu")
            run, save = prepare(module, side, request["case"])
        elif request["do"] == "save":
            save(run(), request["path"])
        elif request["do"] == "time":
            start = time.perf_counter()
            run()
            answer = {"seconds": time.perf_counter() - start}
        else:
            before = reset_peak(device)
            run()
            answer = {"peak_mib": (peak_memory(device) - before) / 1024}
        print(json.dumps(answer), file=sys.__stdout__, flush=True)


class Rivals:
    """The two processes of a benchmark script."""

    def __init__(self, script: str) -> None:
        env = {**os.environ, "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
        self.processes = {
            side: subprocess.Popen(
                [sys.executable, script, "--side", side],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env,
            )
            for side in SIDES
        }  # fmt: skip

    def ask(self, side: str, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        process = self.processes[side]
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(request), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {side} side stopped; run `{sys.argv[0]} --side {side}` by hand to see why")
        return dict(json.loads(line))

    def results(self, case: dict[str, Any], read: Callable[[str], Any]) -> dict[str, Any]:
        """Prepare a case on both sides and return what each computes."""
        out = {}
        with tempfile.TemporaryDirectory() as folder:
            for side in SIDES:
                self.ask(side, do="prepare", case=case)
                self.ask(side, do="save", path=f"{folder}/{side}")
                out[side] = read(f"{folder}/{side}")
        return out

    def compare(self, rounds: int) -> dict[str, Timing]:
        """Time the prepared case on both sides in turn."""
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                times[side].append(self.ask(side, do="time")["seconds"])
        # on its own: giving memory back to the system first makes the run slower
        peaks = {side: max(self.ask(side, do="peak")["peak_mib"] for _ in range(2)) for side in SIDES}
        return {side: Timing(statistics.median(times[side]), peaks[side]) for side in SIDES}


def report(rows: list[tuple[str, dict[str, Timing]]]) -> None:
    """Print the machine, the versions and a table of ratios."""
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {threads}; Python {platform.python_version()}, {versions}\n")
    print("| case | stock s | ours s | times as fast | stock peak MiB | ours peak MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, timing in rows:
        stock, ours = timing["stock"], timing["ours"]
        ratio = stock.seconds / ours.seconds
        print(f"| {name} | {stock.seconds:.3f} | {ours.seconds:.3f} | {ratio:.2f} "
              f"| {stock.peak_mib:.0f} | {ours.peak_mib:.0f} |")  # fmt: skip
