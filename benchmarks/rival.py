"""Runs the cases of a benchmark alternately in two processes: stock transformers and this package.

Importing this package replaces classes of stock transformers, so each side needs a separate process. The script of each
benchmark defines the cases.
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
    """Measurements of one case on one side.

    Args:
        seconds: median duration of a run.
        peak_mib: peak memory of a run in MiB, minus the memory in use before the run.
    """

    seconds: float
    peak_mib: float


def import_cuda() -> Any:
    """Import `torch.cuda` when it is needed, because the parent process does not need torch."""
    return importlib.import_module("torch").cuda


def peak_memory(device: str = "cpu") -> int:
    """Return the peak memory in KiB since the last reset: resident memory on a CPU, allocated memory on a GPU."""
    if device != "cpu":
        return import_cuda().max_memory_allocated() // 1024
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def reset_peak(device: str = "cpu") -> int:
    """Reset the peak memory, and return the memory in use in KiB."""
    gc.collect()
    if device != "cpu":
        import_cuda().reset_peak_memory_stats()
        return peak_memory(device)
    # return free memory to the system; otherwise a run could use it without raising the resident memory
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def serve(prepare: Callable[[Any, str, dict[str, Any]], tuple[Callable[[], Any], Callable[[Any, str], None]]]) -> None:
    """Answer the requests of the parent process, which are one JSON object per line on standard input.

    Args:
        prepare: function that builds a case. The arguments are the module with the classes, the side (`stock` or
            `ours`) and the case. The result is a function that runs the case, and a function that saves a result to a
            path.
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
            memory_before = reset_peak(device)
            run()
            answer = {"peak_mib": (peak_memory(device) - memory_before) / 1024}
        print(json.dumps(answer), file=sys.__stdout__, flush=True)


class Rivals:
    """The two processes of a benchmark, `stock` and `ours`.

    Args:
        script: path of the benchmark script, which calls `serve` if it is started with `--side`.
    """

    def __init__(self, script: str) -> None:
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
        self.processes = {
            side: subprocess.Popen(
                [sys.executable, script, "--side", side],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
            for side in SIDES
        }

    def ask(self, side: str, **request: Any) -> dict[str, Any]:
        """Send one request to a side, and wait for the answer.

        Args:
            side: `stock` or `ours`.
            **request: `do` (`prepare`, `save`, `time` or `peak`) and its arguments.

        Returns:
            `seconds` for `time`, `peak_mib` for `peak`, an empty dict otherwise.

        Raises:
            RuntimeError: the process has ended.
        """
        process = self.processes[side]
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(request), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {side} process ended: run `{sys.argv[0]} --side {side}` to see its error")
        return dict(json.loads(line))

    def results(self, case: dict[str, Any], read: Callable[[str], Any]) -> dict[str, Any]:
        """Prepare a case on both sides, and run the case once.

        Args:
            case: JSON-serialisable description of the case.
            read: function that reads a saved result from a path.

        Returns:
            The result of each side.
        """
        results = {}
        with tempfile.TemporaryDirectory() as folder:
            for side in SIDES:
                self.ask(side, do="prepare", case=case)
                self.ask(side, do="save", path=f"{folder}/{side}")
                results[side] = read(f"{folder}/{side}")
        return results

    def compare(self, rounds: int) -> dict[str, Timing]:
        """Measure the prepared case alternately on both sides.

        Args:
            rounds: number of timed runs per side.

        Returns:
            The timing of each side.
        """
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                seconds[side].append(self.ask(side, do="time")["seconds"])
        # memory is measured in separate runs, because returning free memory to the system makes the next run slower
        peaks = {side: max(self.ask(side, do="peak")["peak_mib"] for _ in range(2)) for side in SIDES}
        return {side: Timing(statistics.median(seconds[side]), peaks[side]) for side in SIDES}


def report(rows: list[tuple[str, dict[str, Timing]]]) -> None:
    """Print the machine, the versions, and a table of timings and ratios.

    Args:
        rows: for each case, the name and the timing of each side.
    """
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {threads}; Python {platform.python_version()}, {versions}\n")
    print("| case | stock s | ours s | times as fast | stock peak MiB | ours peak MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, timing in rows:
        stock, ours = timing["stock"], timing["ours"]
        speed = f"{stock.seconds:.3f} | {ours.seconds:.3f} | {stock.seconds / ours.seconds:.2f}"
        print(f"| {name} | {speed} | {stock.peak_mib:.0f} | {ours.peak_mib:.0f} |")
