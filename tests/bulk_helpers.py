"""Archives of digits for the tests of `transformers_parakeet.bulk`, and a transcriber whose process ends.

The workers of Ray import this file.
"""

import os
import shutil
from dataclasses import dataclass

import pyarrow.parquet as pq

import transformers_parakeet as tp
from transformers_parakeet.bulk import Transcriber

CLIPS = tp.demo_model_path() / "clips"
DIGITS = sorted(CLIPS.glob("fsdd_test_*.flac"))


def write_archive(folder, num_files, bad):
    """Write a folder of recordings of digits.

    Args:
        folder: the folder, which is created.
        num_files: number of files.
        bad: numbers of the files that are not audio.

    Returns:
        The paths.
    """
    folder.mkdir(parents=True)
    paths = [folder / f"{number:03d}.flac" for number in range(num_files)]
    for number, path in enumerate(paths):
        if number in bad:
            path.write_bytes(b"this is not audio")
        else:
            shutil.copy(DIGITS[number % len(DIGITS)], path)
    return paths


def read_output(folder):
    """Return the rows of all Parquet files in a folder, sorted by file."""
    rows = [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: row["file"])


@dataclass(frozen=True)
class Snapshot:
    """Names and modification times of the files of a folder."""

    files: dict

    @staticmethod
    def take(folder):
        """Read the folder."""
        return Snapshot({path.name: path.stat().st_mtime_ns for path in folder.iterdir()})


class EndingTranscriber(Transcriber):
    """A transcriber whose process ends at recordings of a certain size, as with a decoder that crashes."""

    fatal_size = 0

    def transcribe(self, sources):
        """End the process if there is such a recording."""
        if any(isinstance(source, str) and os.path.getsize(source) == self.fatal_size for source in sources):
            os._exit(1)
        return super().transcribe(sources)
