"""Measures time and peak memory of reading and converting a `.nemo` file, against NVIDIA NeMo's `restore_from`.

    python benchmarks/nemo_loading.py MODEL.nemo --nemo-python PYTHON [--repeats 3]
    python benchmarks/nemo_loading.py MODEL.nemo --convert

PYTHON is the interpreter of an environment with nemo_toolkit[asr]. Without --nemo-python, only this package is
measured. Every measurement runs in a new process, and the two sides take turns. Each process reads all weights after
loading, because loading may be deferred until the weights are used.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = """
from transformers_parakeet import load_nemo
load_model = lambda path: load_nemo(path)[0]
"""
NEMO = """
import logging
from nemo.collections.asr.models import ASRModel
logging.getLogger("nemo_logger").setLevel(logging.ERROR)
load_model = lambda path: ASRModel.restore_from(path, map_location="cpu")
"""
# prints one JSON object; `ru_maxrss` is in KiB on Linux
PEAK = """
import json, resource, sys, time
def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
"""
LOAD = """
imported_gb = peak_gb()
start = time.perf_counter()
model = load_model(sys.argv[1])
load_s, loaded_gb = time.perf_counter() - start, peak_gb()
weights = [w for k, w in model.state_dict().items() if w.is_floating_point() and "featurizer" not in k]
checksum = sum(float(bound) for w in weights for bound in w.aminmax())
print(json.dumps({"load_s": load_s, "read_s": time.perf_counter() - start, "imported_gb": imported_gb,
                  "loaded_gb": loaded_gb, "read_gb": peak_gb(), "checksum": checksum}))
"""
CONVERT = """
from transformers_parakeet.nemo import convert_checkpoint
imported_gb = peak_gb()
start, cpu_start = time.perf_counter(), time.process_time()
convert_checkpoint(sys.argv[1], sys.argv[2])
print(json.dumps({"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start,
                  "imported_gb": imported_gb, "peak_gb": peak_gb()}))
"""


def measure(python: str, program: str, *arguments: Path) -> dict[str, float]:
    """Run a program in a new process, and return the numbers that it prints as JSON, in seconds and GB."""
    command = [python, "-W", "ignore", "-c", program, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    result: dict[str, float] = json.loads(process.stdout.strip().splitlines()[-1])
    return result


def read_file(path: Path) -> float:
    """Read a file into the page cache and return its size in GB."""
    # read in chunks to keep the peak memory low, because a new process inherits the peak memory of its parent
    with path.open("rb") as file:
        return sum(len(chunk) for chunk in iter(lambda: file.read(1 << 20), b"")) / 1e9


def measure_loading(path: Path, nemo_python: str | None, repeats: int) -> None:
    """Measure loading, and print a table of the medians.

    Args:
        path: the `.nemo` file.
        nemo_python: interpreter of an environment with NeMo; None to measure this package only.
        repeats: number of processes per side.
    """
    programs = {"load_nemo": (sys.executable, OURS)}
    if nemo_python:
        programs["NeMo"] = (nemo_python, NEMO)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, (python, program) in programs.items():
            runs[name].append(measure(python, program + PEAK + LOAD, path))
    checksums = {round(run["checksum"], 3) for results in runs.values() for run in results}
    assert len(checksums) == 1, f"the two sides must load the same weights, got checksums {checksums}"
    print("| | import | load | load and read all weights | peak of loading | peak after reading |")
    print("| --- | --- | --- | --- | --- | --- |")
    medians = {
        name: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for name, results in runs.items()
    }
    for name, m in medians.items():
        times = f"{m['load_s']:.1f} s | {m['read_s']:.1f} s"
        print(f"| {name} | {m['imported_gb']:.2f} GB | {times} | {m['loaded_gb']:.2f} GB | {m['read_gb']:.2f} GB |")
    if "NeMo" in medians:
        ratio = medians["NeMo"]["read_s"] / medians["load_nemo"]["read_s"]
        print(f"\nload_nemo takes 1 / {ratio:.1f} of NeMo's time, all weights read")


def measure_conversion(path: Path) -> None:
    """Measure the conversion of a `.nemo` file to a folder and back, and print time and peak memory."""
    print("| conversion | import | time | CPU time | peak |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        folder, exported = Path(temporary) / "folder", Path(temporary) / "exported.nemo"
        for name, source, target in (("to a folder", path, folder), ("to a .nemo file", folder, exported)):
            m = measure(sys.executable, PEAK + CONVERT, source, target)
            times = f"{m['wall_s']:.0f} s | {m['cpu_s']:.0f} s"
            print(f"| {name} | {m['imported_gb']:.2f} GB | {times} | {m['peak_gb']:.2f} GB |")


def main() -> None:
    """Measure loading, or conversion with `--convert`, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a .nemo file")
    parser.add_argument("--nemo-python", help="interpreter of an environment with NeMo")
    parser.add_argument("--repeats", type=int, default=3, help="number of processes per side")
    parser.add_argument("--convert", action="store_true", help="measure the conversion to a folder and back instead")
    options = parser.parse_args()
    size_gb = read_file(options.model)
    if options.convert:
        print(f"{options.model.name}: {size_gb:.2f} GB, one new process for each direction\n")
        measure_conversion(options.model)
    else:
        print(f"{options.model.name}: {size_gb:.2f} GB, medians of {options.repeats} new processes for each side\n")
        measure_loading(options.model, options.nemo_python, options.repeats)


if __name__ == "__main__":
    main()
