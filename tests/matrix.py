"""Runs `tests/smoke.py` for every supported Python and transformers release, and prints the matrix.

    python tests/matrix.py                          every Python, and under 3.11 every transformers release
    python tests/matrix.py --pythons 3.10 3.13      these only
    python tests/matrix.py --releases 5.17.0 5.24.0

Each Python gets a virtual environment in a temporary folder, with torch and this package; the releases of transformers
take turns in it, and the folder is deleted. Interpreters are looked for on PATH, in PYENV_ROOT and in ~/.pyenv. One
environment with a CUDA build of torch takes about 8 GB while it is in use.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# the last release of every minor version
RELEASES = ("5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0")
# the Python under which every release is tried; every Python also runs the release of constraints.txt
EVERY_RELEASE = "3.11"
TORCH = "torch==2.13.0"


def interpreter(version):
    """Return the path of a Python such as `3.10`, or None."""
    on_path = shutil.which(f"python{version}")
    roots = [Path(os.environ.get("PYENV_ROOT", "")), Path.home() / ".pyenv"]
    places = sorted(place for root in roots for place in root.glob(f"versions/{version}.*/bin/python"))
    for candidate in [*([on_path] if on_path else []), *places]:
        report = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([str(candidate), "-c", report], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return str(candidate)
    return None


def run(*command, **environment):
    """Run a command outside the source tree; return whether it succeeded, and the end of what it printed."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **environment}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command], cwd=tempfile.gettempdir(), env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.strip().splitlines() if line.strip()]
    return done.returncode == 0, lines[-1] if lines else ""


def cell(python, release):
    """Install a release where one is named and run the programs; return what the table says of it."""
    if release is not None:
        installed, why = run(python, "-m", "pip", "install", "-q", "--no-cache-dir", f"transformers=={release}")
        if not installed:
            return f"not installed: {why}"
    passed, line = run(python, "-W", "ignore", ROOT / "tests" / "smoke.py")
    if not passed:
        return f"failed: {line}"
    shown, last = run(Path(python).with_name("parakeet"), "demo")
    return line if shown else f"demo failed: {last}"


def column(version, releases):
    """Build the environment of one Python and yield a line per cell."""
    base = interpreter(version)
    if base is None:
        yield f"{version} | - | no interpreter found"
        return
    with tempfile.TemporaryDirectory(prefix=f"matrix-{version}-") as folder:
        python = Path(folder) / "bin" / "python"
        pip = (python, "-m", "pip", "install", "-q", "--no-cache-dir")
        steps = (
            (base, "-m", "venv", folder),
            (*pip, "--upgrade", "pip"),
            (*pip, TORCH),
            (*pip, "-c", ROOT / "constraints.txt", f"{ROOT}[train]"),
        )
        for step in steps:
            done, last = run(*step)
            if not done:
                yield f"{version} | - | not installed: {last}"
                return
        for release in releases:
            yield f"{version} | {release or 'constraints.txt'} | {cell(python, release)}"


def main():
    """Print one line per cell as it is known; leave with 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=PYTHONS)
    parser.add_argument("--releases", nargs="+", help="of transformers, under every Python named")
    options = parser.parse_args()
    print("Python | transformers | result", flush=True)
    failed = False
    for version in options.pythons:
        every = RELEASES if version == EVERY_RELEASE else ()
        releases = options.releases or [None, *every]
        for line in column(version, releases):
            print(line, flush=True)
            failed |= "ok: " not in line
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
