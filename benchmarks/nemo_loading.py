"""Time and peak memory of `load_nemo` against NVIDIA NeMo's `restore_from`, in alternation, in fresh processes.

    python benchmarks/nemo_loading.py MODEL.nemo --nemo-python PYTHON [--repeats 3]

PYTHON is the interpreter of an environment with nemo_toolkit[asr]. Without it only our side is measured. Every process
reads all weights once more after loading, so that nothing that is put off is left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

OURS = """
from transformers_parakeet import load_nemo as load
load_it = lambda path: load(path)[0]
"""
NEMO = """
import logging
from nemo.collections.asr.models import ASRModel
logging.getLogger("nemo_logger").setLevel(logging.ERROR)
load_it = lambda path: ASRModel.restore_from(path, map_location="cpu")
"""
MEASURE = """
import json, resource, sys, time
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
imported = peak()
start = time.perf_counter()
model = load_it(sys.argv[1])
loaded, high = time.perf_counter() - start, peak()
weights = [w for k, w in model.state_dict().items() if w.is_floating_point() and "featurizer" not in k]
total = sum(float(bound) for w in weights for bound in w.aminmax())
print(json.dumps({"load_s": loaded, "read_s": time.perf_counter() - start, "imported_gb": imported, "peak_gb": high,
                  "read_gb": peak(), "weights": len(weights), "sum": total}))
"""


def measure(python: str, program: str, path: Path) -> dict[str, float]:
    """Load in a process of its own; return seconds and GB."""
    done = subprocess.run([python, "-W", "ignore", "-c", program + MEASURE, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """Print a table of medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--nemo-python", help="interpreter of an environment with NeMo")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    sides = {"load_nemo": (sys.executable, OURS)}
    if options.nemo_python:
        sides["NeMo"] = (options.nemo_python, NEMO)
    # the file into the page cache, in pieces: a process inherits the peak of the one that starts it
    with options.model.open("rb") as file:
        size = sum(len(chunk) for chunk in iter(lambda: file.read(1 << 20), b"")) / 1e9
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, (python, program) in sides.items():
            runs[name].append(measure(python, program, options.model))
    sums = {round(run["sum"], 3) for results in runs.values() for run in results}
    assert len(sums) == 1, f"the sides loaded different weights: {sums}"
    print(f"{options.model.name}: {size:.2f} GB, medians of {options.repeats} fresh processes each, in alternation\n")
    print("| | import | load | load and read all weights | peak of loading | peak after reading |")
    print("| --- | --- | --- | --- | --- | --- |")
    middle = {
        name: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for name, results in runs.items()
    }
    for name, m in middle.items():
        print(f"| {name} | {m['imported_gb']:.2f} GB | {m['load_s']:.1f} s | {m['read_s']:.1f} s "
              f"| {m['peak_gb']:.2f} GB | {m['read_gb']:.2f} GB |")  # fmt: skip
    if "NeMo" in middle:
        ratio = middle["NeMo"]["read_s"] / middle["load_nemo"]["read_s"]
        print(f"\nload_nemo takes 1 / {ratio:.1f} of NeMo's time, all weights read")


if __name__ == "__main__":
    main()
