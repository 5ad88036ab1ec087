"""Measures the error of the word boundaries of `parakeet align` with the demo model.

    python benchmarks/alignment.py DATA [--strings 200]

DATA is a folder with packed speech, of which the dev and test splits of fsdd are used. Recordings of single digits are
joined to strings by `examples/digit_strings.py`, so the places of the joins are known. An aligned boundary is the
middle between the end of a word and the start of the next one. Its error is the distance to the middle of the pause at
the join. A quarter of the pauses is shorter than 0.03 s, the others last 0.05 to 0.5 s.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from digit_strings import DigitString, create_evaluation_strings, read_digit_recordings

from transformers_parakeet import ParakeetASRPipeline
from transformers_parakeet.alignment import align
from transformers_parakeet.transcription import load_pipeline

DECODERS = ("transducer", "ctc")


def measure_boundaries(pipeline: ParakeetASRPipeline, decoder: str, strings: list[DigitString]) -> list[float]:
    """Return the absolute errors of all boundaries between words in seconds.

    Args:
        pipeline: the loaded model.
        decoder: name of the head.
        strings: strings of digits with the times of each digit.
    """
    errors = []
    for string in strings:
        words = align(string.audio, string.text, pipeline, decoder=decoder).words
        boundaries = [(first.end + second.start) / 2 for first, second in pairwise(words)]
        joins = [(first.end_s + second.start_s) / 2 for first, second in pairwise(string.spans)]
        errors += [abs(boundary - join) for boundary, join in zip(boundaries, joins, strict=True)]
    return errors


def main() -> None:
    """Print the mean and median error of each split and head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder with packed speech")
    parser.add_argument("--strings", type=int, default=200, help="number of strings per split")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_pipeline("demo", device="cpu", dtype="float32")
    print("| strings | head | boundaries | mean error ms | median ms | 95 % below ms |")
    print("| --- " * 6 + "|")
    for split in ("dev", "test"):
        strings = create_evaluation_strings(read_digit_recordings(options.data, split), options.strings, seed=0)
        for decoder in DECODERS:
            errors = 1000 * np.array(measure_boundaries(pipeline, decoder, strings))
            numbers = f"{errors.mean():.0f} | {np.median(errors):.0f} | {np.percentile(errors, 95):.0f}"
            print(f"| fsdd {split} | {decoder} | {len(errors)} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
