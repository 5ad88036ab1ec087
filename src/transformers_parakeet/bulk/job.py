"""Transcribes an archive into a folder of Parquet files, and does in a second run only what is missing.

`sources.py` finds the recordings, `shards.py` groups them, and `ray_data.py` or this process runs the shards.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .ray_data import RayOptions, connect, run_shards
from .shards import FinishedShards, Shard, Target, plan_shards
from .sources import list_source_files
from .transcriber import Transcriber, build_error_row
from .worker import ShardReport, ShardWorker, build_report

logger = logging.get_logger(__name__)

ENGINES = ("ray", "local")
# number of times that a shard is tried if its worker ends; after the second time, its recordings are tried one by one
MAX_TRIES = 4
# options that do not change the results, so that a second run may have others
SPEED_OPTIONS = ("batch_size", "memory_budget")


@dataclass(frozen=True)
class BulkOptions:
    """How an archive is transcribed.

    Args:
        engine: `"ray"` for workers on this machine or a cluster, `"local"` for this process.
        files_per_shard: maximum number of recordings in a Parquet file.
        retry_errors: whether shards with an error are transcribed again.
        ray: the Ray cluster and its workers.

    Raises:
        ValueError: an option is invalid.
    """

    engine: str = "ray"
    files_per_shard: int = 256
    retry_errors: bool = False
    ray: RayOptions = field(default_factory=RayOptions)

    def __post_init__(self) -> None:
        """Check the options."""
        if self.engine not in ENGINES:
            raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {self.engine!r}: correct it")
        if self.files_per_shard < 1:
            raise ValueError(f"`files_per_shard` must be at least 1, got {self.files_per_shard}: raise it")
        if self.engine == "local" and self.ray != RayOptions():
            raise ValueError("the engine `local` has one worker and no cluster: leave out these options, or use `ray`")


@dataclass(frozen=True)
class BulkPlan:
    """What a job has to do.

    Args:
        shards: the shards that are missing.
        num_files: number of recordings in them.
        finished: the content of the output folder before the job.
    """

    shards: tuple[Shard, ...]
    num_files: int
    finished: FinishedShards


@dataclass(frozen=True)
class BulkTotals:
    """What a job did.

    Args:
        num_files: number of recordings that were transcribed, with those that failed.
        num_errors: number of recordings with an error.
        duration_s: length of the recordings in seconds.
        elapsed_s: seconds that the job took.
    """

    num_files: int
    num_errors: int
    duration_s: float
    elapsed_s: float


class BulkJob:
    """The transcription of an archive.

    Args:
        source: folder, manifest, Parquet file, or URL of one; see `list_source_files`.
        target: folder or URL of the Parquet files, outside of the source.
        transcriber: the model and its options.
        options: engine, size of the shards and workers.

    Raises:
        ValueError: the target is in the source.
    """

    def __init__(
        self,
        source: str | Path,
        target: str | Path,
        transcriber: Transcriber,
        options: BulkOptions | None = None,
    ) -> None:
        self.source, self.options = str(source), options or BulkOptions()
        self.target = Target(target, describe_settings(transcriber))
        source_location = self.source if "://" in self.source else os.path.abspath(self.source)
        if f"{self.target.location}/".startswith(f"{source_location.rstrip('/')}/"):
            raise ValueError(
                f"the target must be outside of the source, or a second run would read its files as recordings, got "
                f"{target} in {source}: choose another folder"
            )
        self.worker = ShardWorker(transcriber, self.target)

    def plan(self) -> BulkPlan:
        """Find the recordings, and plan the shards that are missing.

        Raises:
            OSError: the source or the target cannot be read.
            ValueError: the source contains no recording, or the target contains results with other settings.
        """
        files = list_source_files(self.source)
        finished = self.target.read_finished(self.options.retry_errors)
        shards = plan_shards(files, finished, self.options.files_per_shard)
        return BulkPlan(tuple(shards), sum(len(shard.files) for shard in shards), finished)

    def run(self, plan: BulkPlan, on_report: Callable[[ShardReport], None] | None = None) -> BulkTotals:
        """Transcribe the shards of a plan and write them.

        Args:
            plan: result of `plan`.
            on_report: called for every shard that is written.

        Raises:
            OSError: a worker cannot load the model, cannot read a Parquet file or cannot write; or all workers ended.
                The shards that are written remain.
            ImportError: Ray is not installed.
            ValueError: the cluster has too few CPUs.
        """
        start = time.monotonic()
        reports = []
        if plan.shards:
            self.target.create()
            # the generator ends Ray when it is closed, also after an error
            with closing(self._run_until_done(plan.shards)) as all_reports:
                for report in all_reports:
                    if report.failure is not None:
                        raise OSError(f"the shard {report.name} cannot be transcribed: {report.failure}")
                    reports.append(report)
                    if on_report is not None:
                        on_report(report)
        return BulkTotals(
            sum(report.num_files for report in reports),
            sum(report.num_errors for report in reports),
            sum(report.duration_s for report in reports),
            time.monotonic() - start,
        )

    def _run_until_done(self, shards: Sequence[Shard]) -> Generator[ShardReport, None, None]:
        """Run the shards, and again those whose worker ended; write error rows for recordings that end every worker."""
        with ExitStack() as stack:
            ray = stack.enter_context(connect(self.options.ray)) if self.options.engine == "ray" else None
            is_any_done = False
            for attempt in range(MAX_TRIES):
                done = set()
                for report in self._run_once(ray, shards, is_careful=attempt >= 1):
                    done.add(report.name)
                    yield report
                for report in self._read_unreported(shards, done):
                    done.add(report.name)
                    yield report
                missing = [shard for shard in shards if shard.name not in done]
                if not missing:
                    return
                is_any_done = is_any_done or bool(done)
                if attempt == 1 and not is_any_done:
                    raise ChildProcessError(
                        f"all workers ended before one of {len(shards)} shards was written: check their memory, for "
                        "example with fewer workers, and try a few recordings with `--engine local`"
                    )
                logger.warning("the workers of %d shards ended; these shards are transcribed again", len(missing))
                shards = missing if attempt == 0 else _split_shards(missing)
        for shard in shards:
            yield self._write_error(shard)

    def _run_once(self, ray: Any, shards: Sequence[Shard], is_careful: bool) -> Iterator[ShardReport]:
        """Run the shards once; `is_careful` for workers without a second shard, which would end with the first one."""
        if ray is None:
            return (self.worker.run(shard) for shard in shards)
        return run_shards(ray, shards, self.worker, self.options.ray, tasks_per_worker=1 if is_careful else 2)

    def _read_unreported(self, shards: Sequence[Shard], done: set[str]) -> list[ShardReport]:
        """Return reports of the shards whose worker ended after it had written the file."""
        written = [shard for shard in shards if shard.name not in done and self.target.exists(shard.name)]
        return [build_report(shard, self.target.read_rows(shard.name, ["error", "duration"])) for shard in written]

    def _write_error(self, shard: Shard) -> ShardReport:
        """Write a shard of one recording whose worker ended every time."""
        message = "the worker that transcribed this recording ended each time: try it with `parakeet transcribe`"
        (file,) = shard.files
        rows = [{"file": file.name, **build_error_row(message, self.worker.transcriber.model)}]
        self.target.write(shard.name, rows)
        return build_report(shard, rows)


def _split_shards(shards: Sequence[Shard]) -> list[Shard]:
    """Return a shard for each recording."""
    return [Shard((file,)) for shard in shards for file in shard.files]


def describe_settings(transcriber: Transcriber) -> dict[str, Any]:
    """Return what determines the results of a transcriber; the values can be written as JSON.

    Args:
        transcriber: the transcriber.
    """
    options = {name: value for name, value in vars(transcriber.options).items() if name not in SPEED_OPTIONS}
    loading = {name: value for name, value in transcriber.loading_options.items() if name != "device"}
    settings = {"model": transcriber.model, **loading, **options}
    return {name: value if _is_json(value) else str(value) for name, value in settings.items() if value is not None}


def _is_json(value: Any) -> bool:
    """Return whether a value can be written as JSON."""
    return isinstance(value, (bool, int, float, str, list, tuple))


__all__ = ["ENGINES", "BulkJob", "BulkOptions", "BulkPlan", "BulkTotals", "describe_settings"]
