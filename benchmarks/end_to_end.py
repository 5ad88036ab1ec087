"""Measures the time from samples to text: this package, stock transformers, onnx-asr and NeMo, in one run.

    python benchmarks/end_to_end.py --cache FOLDER --csv RESULTS.csv [--shapes 110M 0.6B] [--rounds 3]
    python benchmarks/end_to_end.py --quick
    python benchmarks/end_to_end.py --baseline CHECKOUT --sides ours-int8 baseline-int8 --shapes 0.6B
    python benchmarks/end_to_end.py --nemo-python PYTHON

All engines have the same random weights. The bias of the blank is chosen so that about 3.5 labels are emitted per
second, as in speech. Every token is a word, so equal texts mean equal tokens. Before an engine is timed, its texts are
checked: in float32, this package must give the texts of stock transformers for each clip alone. For the other sides,
the share of tokens that differ is reported. Rounding changes more tokens than in a trained model, because the scores of
the best tokens are close. In a batch, stock transformers also emits labels after the end of a clip.

In each round, every side runs in a new process, one after the other, so at most one model is in memory. onnx-asr takes
part if it is installed, NeMo if PYTHON is the interpreter of an environment with it. Each row of the CSV file is one
timed run; `end_to_end_tables.py` makes the tables from it.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import end_to_end_tables
import jiwer
import numpy as np
from end_to_end_worker import CASES, SAMPLING_RATE

HERE = Path(__file__).parent
SHAPES = ("110M", "0.6B")
# dtypes of each engine, in the order of the tables
DTYPES = {
    "stock": ("float32", "bfloat16"),
    "ours": ("float32", "bfloat16", "int8"),
    "baseline": ("float32", "bfloat16", "int8"),
    "onnx-asr": ("float32", "int8"),
    "nemo": ("float32",),
}
STAGES = ("features", "encoder", "decoding", "text", "whole")
# instruction sets that decide which kernels run, as Linux names them
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@dataclass(frozen=True)
class Side:
    """One engine in one dtype.

    Args:
        engine: a name in `DTYPES`.
        dtype: a dtype of the engine.
        python: interpreter that runs the engine.
        source: folder that contains transformers_parakeet; `None` for other engines.
    """

    engine: str
    dtype: str
    python: str = sys.executable
    source: Path | None = None

    @property
    def name(self) -> str:
        """Name of the side on the command line, such as `ours-int8`."""
        return f"{self.engine}-{self.dtype}"

    @property
    def format(self) -> str:
        """Format of the model in `end_to_end_models.py`."""
        if self.engine == "onnx-asr":
            return f"onnx-{self.dtype}"
        if self.engine == "nemo":
            return "nemo"
        return "int8" if self.dtype == "int8" else "float32"

    @property
    def folder_name(self) -> str:
        """Name of the folder of the model. Each checkout writes its own int8 model."""
        return f"int8-{self.engine}" if self.format == "int8" else self.format

    def run(self, script: str, *arguments: str | Path, threads: int) -> str:
        """Run a script of this folder with the interpreter and the package of the side.

        Args:
            script: name of the script.
            *arguments: its arguments.
            threads: number of threads.

        Returns:
            The last line that the script printed.

        Raises:
            SystemExit: the script failed.
        """
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        if self.source is not None:
            environment["PYTHONPATH"] = str(self.source)
        command = [self.python, str(HERE / script), *map(str, arguments)]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            raise SystemExit(f"{self.name} failed:\n{process.stderr[-3000:]}")
        return (process.stdout.strip().splitlines() or [""])[-1]

    def describe_job(self, folder: Path, cases: list[str], repeats: int, texts: dict[str, Any], threads: int) -> str:
        """Describe a job for `end_to_end_worker.py`.

        Args:
            folder: cache folder of the shape.
            cases: names of the cases.
            repeats: number of timed runs of each case.
            texts: case -> texts that the engine must return; empty if rounding may change them.
            threads: number of threads.

        Returns:
            The job as JSON. The engine `baseline` is another checkout of the engine `ours`.
        """
        return json.dumps(
            {
                "engine": "ours" if self.engine == "baseline" else self.engine,
                "dtype": self.dtype,
                "folder": str(folder / self.folder_name),
                "audio": str(folder / "noise.npy"),
                "cases": cases,
                "repeats": repeats,
                "expected_texts": texts,
                "threads": threads,
            }
        )


def list_sides(baseline: Path | None, nemo_python: str | None) -> list[Side]:
    """List the sides that can run.

    Args:
        baseline: another checkout of this package; `None` for none.
        nemo_python: interpreter of an environment with NeMo; `None` for none.
    """
    sources = {"ours": HERE.parent / "src", "baseline": baseline and baseline / "src"}
    has_onnx = all(importlib.util.find_spec(package) for package in ("onnx_asr", "onnxruntime"))
    is_available = {"baseline": baseline is not None, "onnx-asr": has_onnx, "nemo": nemo_python is not None}
    return [
        Side(engine, dtype, (nemo_python if engine == "nemo" else None) or sys.executable, sources.get(engine))
        for engine, dtypes in DTYPES.items()
        if is_available.get(engine, True)
        for dtype in dtypes
    ]


def write_noise(path: Path) -> None:
    """Write 120 s of noise whose spectrum changes every 0.1 s, as (S,) float32 samples at 16 kHz."""
    generator = np.random.default_rng(0)
    num_segments, segment_length, num_bands = 1200, SAMPLING_RATE // 10, 16
    spectra = np.fft.rfft(generator.standard_normal((num_segments, segment_length)))
    amplitudes = 0.02 * np.exp(1.5 * generator.standard_normal((num_segments, num_bands)))
    bands = np.arange(spectra.shape[1]) * num_bands // spectra.shape[1]
    noise = np.fft.irfft(spectra * amplitudes[:, bands], segment_length)
    np.save(path, noise.astype(np.float32).ravel())


def write_models(folder: Path, sides: list[Side], threads: int) -> None:
    """Write the noise, and the models that the folder does not contain.

    Args:
        folder: cache folder of the shape; its name is the shape.
        sides: the sides that need models.
        threads: number of threads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "noise.npy").exists():
        write_noise(folder / "noise.npy")
    writer = Side("ours", "float32", source=HERE.parent / "src")
    for side in (writer, *sides):
        target = folder / side.folder_name
        if not target.exists():
            print(f"writing {target}", file=sys.stderr)
            source = folder / ("noise.npy" if side.format == "float32" else "float32")
            package = side if side.source is not None else writer
            package.run("end_to_end_models.py", side.format, folder.name, source, target, threads=threads)


def get_expected_texts(folder: Path, threads: int) -> dict[str, list[str]]:
    """Return the texts of stock transformers in float32 for each clip alone, from a file or by running all cases once.

    Args:
        folder: cache folder of the shape.
        threads: number of threads.
    """
    path = folder / "texts.json"
    if not path.exists():
        stock = Side("stock", "float32")
        job = stock.describe_job(folder, list(CASES), 0, {}, threads)
        result = json.loads(stock.run("end_to_end_worker.py", job, threads=threads))
        path.write_text(json.dumps({name: case["texts"] for name, case in result["cases"].items()}))
    return dict(json.loads(path.read_text()))


def measure(side: Side, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one side in a new process.

    Args:
        side: the side.
        folder: cache folder of the shape.
        args: the arguments of the command line.

    Returns:
        One row of the CSV file per timed run.
    """
    expected = get_expected_texts(folder, args.threads)
    # onnx-asr and NeMo compute the features in another way
    must_match = side.dtype == "float32" and side.engine in ("ours", "baseline")
    job = side.describe_job(folder, args.cases, args.repeats, expected if must_match else {}, args.threads)
    result = json.loads(side.run("end_to_end_worker.py", job, threads=args.threads))
    version = " ".join(filter(None, (result["engine_version"], get_commit(side.source))))
    constants = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        **describe_machine(),
        "threads": args.threads,
        **{key: result[key] for key in ("python", "torch", "transformers")},
        "engine": side.engine,
        "engine_version": version,
        "dtype": side.dtype,
        "shape": folder.name,
        **{key: round(result[key], 3) for key in ("loading_s", "loading_peak_mib")},
    }
    rows = []
    for name, case in result["cases"].items():
        output = {
            "case": name,
            "peak_mib": round(case["peak_mib"]),
            "labels": sum(len(text.split()) for text in case["texts"]),
            "token_error_rate": round(jiwer.wer(expected[name], case["texts"]), 4),
        }
        for run in case["runs"]:
            seconds = {f"{stage}_s": round(run.get(stage, 0.0), 4) for stage in STAGES}
            rows.append({**constants, **output, **seconds})
    return rows


def get_commit(source: Path | None) -> str:
    """Return the short name of the commit of a checkout; empty if there is none.

    Args:
        source: a folder of the checkout; `None` for another engine.
    """
    if source is None:
        return ""
    command = ["git", "-C", str(source), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def describe_machine() -> dict[str, Any]:
    """Return the processor, its instruction sets of `INSTRUCTION_SETS`, and the number of usable cores."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line
    )
    values = {key.strip(): value.strip() for key, value in fields.items()}
    flags = values.get("flags", "").split()
    return {
        "machine": f"{values.get('model name', platform.processor())}, {platform.machine()}",
        "instructions": " ".join(name for name in INSTRUCTION_SETS if name in flags),
        "cores": len(os.sched_getaffinity(0)),
    }


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file, and write the names of the columns if the file is new.

    Args:
        path: the file.
        rows: the rows, with equal keys.
    """
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=(*SHAPES, "tiny"), default=list(SHAPES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", metavar="ENGINE-DTYPE", help="default: all that are available")
    parser.add_argument("--rounds", type=int, default=3, help="number of processes per side")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs of each case in a process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--baseline", type=Path, help="another checkout of this package")
    parser.add_argument("--nemo-python", help="interpreter of an environment with NeMo")
    parser.add_argument("--cache", type=Path, help="folder that keeps the models; default: a temporary folder")
    parser.add_argument("--csv", type=Path, help="file for the results; rows are appended")
    parser.add_argument("--quick", action="store_true", help="110M shape, one round, only transformers")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.rounds, args.repeats = ["110M"], 1, 3
        args.sides = args.sides or ["stock-float32", "stock-bfloat16", "ours-float32", "ours-bfloat16", "ours-int8"]
    return args


def choose_sides(args: argparse.Namespace) -> list[Side]:
    """Choose the sides that the command line names.

    Args:
        args: the arguments of the command line.

    Raises:
        SystemExit: a side is not available.
    """
    sides = {side.name: side for side in list_sides(args.baseline, args.nemo_python)}
    names = args.sides or list(sides)
    missing = sorted(set(names) - set(sides))
    if missing:
        raise SystemExit(
            f"`--sides` must be some of {', '.join(sides)}, got {', '.join(missing)}: correct them, install onnx-asr "
            "and onnxruntime, or set `--baseline` or `--nemo-python`"
        )
    return [sides[name] for name in names]


def main() -> None:
    """Measure all sides alternately, write the CSV file, and print the tables."""
    args = parse_arguments()
    sides = choose_sides(args)
    with tempfile.TemporaryDirectory() as temporary:
        cache, path = args.cache or Path(temporary), args.csv or Path(temporary) / "results.csv"
        for shape in args.shapes:
            write_models(cache / shape, sides, args.threads)
            for number in range(args.rounds):
                for side in sides:
                    print(f"{shape}, round {number + 1} of {args.rounds}: {side.name}", file=sys.stderr)
                    append_rows(path, measure(side, cache / shape, args))
        print(end_to_end_tables.render(path))


if __name__ == "__main__":
    main()
