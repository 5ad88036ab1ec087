# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#     "pyarrow>=17",
#     "transformers-parakeet @ git+https://github.com/transformers-parakeet/transformers-parakeet",
# ]
# ///
"""Transcribes a folder into a folder of Parquet files, as a script for Hugging Face Jobs.

    python examples/hf_jobs_transcribe.py talks texts --model demo
    uv run examples/hf_jobs_transcribe.py talks texts
    hf jobs uv run --flavor l4x1 --secrets HF_TOKEN examples/hf_jobs_transcribe.py \
        hf://datasets/USER/talks hf://datasets/USER/texts

The comment at the top declares the packages, which `uv` installs. SOURCE and TARGET are folders or URLs of fsspec, such
as `hf://datasets/…`; SOURCE can also be a manifest or a Parquet file. TARGET must be outside of SOURCE. A second run
transcribes what is missing. A recording that cannot be read is a row with its error.
"""

from __future__ import annotations

import argparse

from transformers_parakeet.bulk import BulkJob, BulkOptions, ShardReport, Transcriber
from transformers_parakeet.transcription import DEFAULT_MODEL


def print_report(report: ShardReport) -> None:
    """Print a line for a shard, so that the log of the job shows the progress."""
    counts = f"{report.num_files} files, {report.num_errors} with an error"
    print(f"{report.name}: {counts}, {report.duration_s:.0f} s of audio")


def main() -> None:
    """Transcribe the source with one model, on a GPU if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, manifest, Parquet file or URL")
    parser.add_argument("target", help="folder or URL for the Parquet files")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="Hub id, folder, .nemo file, or demo")
    parser.add_argument("--files-per-shard", type=int, default=256, help="maximum number of recordings in a file")
    arguments = parser.parse_args()
    options = BulkOptions("local", files_per_shard=arguments.files_per_shard)
    job = BulkJob(arguments.source, arguments.target, Transcriber(arguments.model), options)
    plan = job.plan()
    print(f"{plan.num_files} files to transcribe, {len(plan.finished.files)} in {arguments.target} already")
    totals = job.run(plan, print_report)
    print(f"{totals.num_files} files, {totals.num_errors} with an error, {totals.duration_s / 3600:.2f} hours of audio")


if __name__ == "__main__":
    main()
