"""`parakeet bulk`: transcription of an archive into a folder of Parquet files, on this machine or on a Ray cluster."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .job import MIN_HOURS_S, format_count
from .messages import error_console, print_error_and_exit, print_next_command, print_note
from .transcribe import (
    DEFAULT_MODEL,
    AttentionOption,
    BatchSize,
    Boost,
    ChunkLength,
    DecoderOption,
    DtypeOption,
    Model,
    QuantizeOption,
    get_value,
)


class Engine(str, Enum):
    """Values of `--engine`."""

    ray = "ray"
    local = "local"


Source = Annotated[
    str, typer.Argument(help="Folder of audio or Parquet files, manifest (.json, .jsonl), Parquet file, or URL of one.")
]
Target = Annotated[str, typer.Argument(help="Folder or URL of the Parquet files; a second run continues a first one.")]
EngineOption = Annotated[
    Engine, typer.Option(help="ray: workers on this machine or a cluster; local: in this process, one worker.")
]
Workers = Annotated[int | None, typer.Option(help="Number of models. Default: one per GPU, or one per 4 CPUs.", min=1)]
CpusPerWorker = Annotated[int | None, typer.Option(help="CPUs and threads of a worker. Default: chosen.", min=1)]
Address = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster. Default: RAY_ADDRESS, or a new Ray on this machine.")
]
DecodeOnCpus = Annotated[
    bool | None,
    typer.Option(
        "--decode-on-cpus/--decode-in-workers",
        help="Where audio files are decoded. Default: on CPUs if there are GPUs.",
    ),
]
FilesPerShard = Annotated[int, typer.Option(help="Maximum number of recordings in a Parquet file.", min=1)]
RetryErrors = Annotated[bool, typer.Option("--retry-errors", help="Transcribe Parquet files with errors again.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: cuda if a worker has a GPU.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only errors.")]


def bulk(
    source: Source,
    target: Target,
    model: Model = DEFAULT_MODEL,
    engine: EngineOption = Engine.ray,
    workers: Workers = None,
    cpus_per_worker: CpusPerWorker = None,
    address: Address = None,
    decode_on_cpus: DecodeOnCpus = None,
    files_per_shard: FilesPerShard = 256,
    retry_errors: RetryErrors = False,
    decoder: DecoderOption = None,
    batch_size: BatchSize = None,
    chunk_length: ChunkLength = None,
    attention: AttentionOption = None,
    boost: Boost = None,
    device: Device = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    quiet: Quiet = False,
) -> None:
    """Transcribe an archive into a folder of Parquet files.

    A recording that cannot be read is a row with its error, and the exit status is 0.
    """
    with print_error_and_exit():
        choices = {"decoder": decoder, "attention": attention, "dtype": dtype, "quantize": quantize}
        options = {
            **{name: get_value(choice) for name, choice in choices.items()},
            "device": device,
            "batch_size": batch_size,
            "chunk_length_s": chunk_length,
            "boost": read_boost(boost),
        }
        ray_options = {
            "address": address,
            "num_workers": workers,
            "cpus_per_worker": cpus_per_worker,
            "decodes_on_cpus": decode_on_cpus,
        }
        bulk_options = {"engine": engine.value, "files_per_shard": files_per_shard, "retry_errors": retry_errors}
        run_job(source, target, model, options, bulk_options, ray_options, quiet)


def read_boost(path: Path | None) -> tuple[Any, ...]:
    """Read the phrases of `--boost`.

    Args:
        path: text file; `None` for no phrases.
    """
    if path is None:
        return ()
    from transformers_parakeet.phrases import read_phrases

    return tuple(read_phrases(path))


def run_job(
    source: str,
    target: str,
    model: str,
    options: dict[str, Any],
    bulk_options: dict[str, Any],
    ray_options: dict[str, Any],
    is_quiet: bool,
) -> None:
    """Plan and run a job, and print what it did.

    Args:
        source, target, model: see the command.
        options: options of `Transcriber`.
        bulk_options: fields of `BulkOptions` except `ray`.
        ray_options: fields of `RayOptions`.
        is_quiet: whether only errors are printed.
    """
    from transformers.utils import logging

    from transformers_parakeet.bulk import BulkJob, BulkOptions, RayOptions, Transcriber

    # the progress of loading the weights
    logging.disable_progress_bar()
    job = BulkJob(
        source, target, Transcriber(model, **options), BulkOptions(**bulk_options, ray=RayOptions(**ray_options))
    )
    plan = job.plan()
    if is_quiet:
        job.run(plan)
        return
    if plan.finished.files:
        print_note(
            f"{format_count(len(plan.finished.files))} in {target} already, {plan.finished.num_errors} with an error"
        )
    with BulkProgress(plan.num_files) as progress:
        totals = job.run(plan, progress.advance)
    hours = (
        f"{totals.duration_s / 3600:.2f} hours" if totals.duration_s >= MIN_HOURS_S else f"{totals.duration_s:.1f} s"
    )
    if totals.num_files:
        print_note(
            f"{format_count(totals.num_files)} transcribed, {totals.num_errors} with an error, {hours} of audio in "
            f"{totals.elapsed_s:.1f} s ({totals.duration_s / totals.elapsed_s:.1f} times real time); {target} has "
            f"{format_count(len(plan.finished.files) + totals.num_files)}"
        )
    else:
        print_note("nothing to do")
    print_next_command("python", "-c", f"import pandas; print(pandas.read_parquet({json.dumps(target)}))")


class BulkProgress:
    """A progress bar in recordings, on stderr if it is a terminal.

    Args:
        num_files: number of recordings of the job.
    """

    def __init__(self, num_files: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.percentage:>3.0f} %"),
            BarColumn(),
            TextColumn("{task.completed} of {task.total} files, {task.fields[errors]} with an error"),
            TextColumn("{task.fields[hours]:.1f} hours of audio"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=error_console, transient=True, disable=not error_console.is_terminal)
        self.task = self.progress.add_task("", total=num_files, errors=0, hours=0.0)
        self.num_errors, self.duration_s = 0, 0.0

    def __enter__(self) -> BulkProgress:
        """Show the bar."""
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar."""
        self.progress.stop()

    def advance(self, report: Any) -> None:
        """Add a shard.

        Args:
            report: its `ShardReport`.
        """
        self.num_errors += report.num_errors
        self.duration_s += report.duration_s
        self.progress.update(self.task, advance=report.num_files, errors=self.num_errors, hours=self.duration_s / 3600)


__all__ = ["bulk"]
