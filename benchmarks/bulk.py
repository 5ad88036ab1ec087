"""Measures bulk transcription with Ray on this machine: two workers against one worker, with one CPU each.

    taskset -c 0,1 python benchmarks/bulk.py [--files 3000] [--model demo] [--repeats 1]

The archive contains copies of the bundled recordings of digits. Each run is a separate process with its own Ray. The
time starts when a third of the shards is finished, so it contains neither the start of Ray nor loading the models; the
last shards, while not all workers have work, are included. The benchmark checks that all runs write the same rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

FILES_PER_SHARD = 25
# numbers of workers that are compared
NUM_WORKERS = (1, 2)


def write_archive(folder: Path, num_files: int) -> None:
    """Write copies of the bundled recordings."""
    import transformers_parakeet as tp

    clips = sorted((tp.demo_model_path() / "clips").glob("*.flac"))
    folder.mkdir()
    for number in range(num_files):
        shutil.copy(clips[number % len(clips)], folder / f"{number:05d}.flac")


def measure(archive: str, target: str, model: str, num_workers: int) -> dict[str, float]:
    """Transcribe the archive in this process with a new Ray.

    Returns:
        `startup_s`: seconds until the first shard is finished; `seconds`: from a third of the shards to the end;
        `audio_s`: seconds of audio in these shards.
    """
    from transformers_parakeet.bulk import BulkJob, BulkOptions, RayOptions, Transcriber

    options = BulkOptions(
        "ray", files_per_shard=FILES_PER_SHARD, ray=RayOptions(num_workers=num_workers, cpus_per_worker=1)
    )
    job = BulkJob(archive, target, Transcriber(model), options)
    plan = job.plan()
    times: list[float] = []
    durations: list[float] = []

    def note(report: Any) -> None:
        """Store when a shard was finished, and the length of its audio."""
        times.append(time.perf_counter())
        durations.append(report.duration_s)

    start = time.perf_counter()
    job.run(plan, note)
    first = len(times) // 3
    return {
        "startup_s": times[0] - start,
        "seconds": times[-1] - times[first],
        "audio_s": sum(durations[first + 1 :]),
    }


def read_rows(folder: str) -> list[dict[str, Any]]:
    """Read all rows of the output, sorted by file."""
    import pyarrow.parquet as pq

    return sorted(pq.read_table(folder).to_pylist(), key=lambda row: row["file"])


def run_case(archive: str, model: str, num_workers: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure in a new process; return the result and the rows."""
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, __file__, "--measure", archive, target, model, str(num_workers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1]), read_rows(target)


def main() -> None:
    """Measure all cases and print a table, or one case in a child process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        archive, target, model, num_workers = options.measure
        print(json.dumps(measure(archive, target, model, int(num_workers))))
        return
    import ray
    import torch

    print(f"{platform.machine()}, torch {torch.__version__}, Ray {ray.__version__}, model {options.model}")
    speeds: dict[int, list[float]] = {number: [] for number in NUM_WORKERS}
    print("| workers | seconds of audio per second | seconds until the first shard |")
    print("| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        archive = str(Path(folder) / "archive")
        write_archive(Path(archive), options.files)
        first_rows = None
        for _ in range(options.repeats):
            for number in NUM_WORKERS:
                result, rows = run_case(archive, options.model, number)
                first_rows = first_rows or rows
                if rows != first_rows or len(rows) != options.files:
                    raise SystemExit(f"the rows of {number} workers differ from those of the first run")
                speeds[number].append(result["audio_s"] / result["seconds"])
                print(f"| {number} | {speeds[number][-1]:.1f} | {result['startup_s']:.1f} |", flush=True)
    ratio = median(speeds[NUM_WORKERS[1]]) / median(speeds[NUM_WORKERS[0]])
    print(f"two workers are {ratio:.2f} times as fast as one, with the same {options.files} rows")


if __name__ == "__main__":
    main()
