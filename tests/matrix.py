"""Runs `tests/smoke.py` for every supported Python and transformers release, and prints a table.

    python tests/matrix.py                          every Python; every transformers release with Python 3.11
    python tests/matrix.py --pythons 3.10 3.13      only these
    python tests/matrix.py --releases 5.17.0 5.24.0

Each Python gets a virtual environment in a temporary folder with torch and this package. The releases of transformers
are installed in it one after the other, then the folder is deleted. Interpreters are searched on PATH, in PYENV_ROOT
and in ~/.pyenv. An environment with a CUDA build of torch takes about 8 GB.
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
# the Python with which every release is tested; every Python is tested with the release in constraints.txt
PYTHON_FOR_ALL_RELEASES = "3.11"
TORCH = "torch==2.13.0"


def find_interpreter(version):
    """Return the path of a Python such as `3.10` that can create virtual environments, or None."""
    on_path = shutil.which(f"python{version}")
    folders = [Path(os.environ.get("PYENV_ROOT", "")), Path.home() / ".pyenv"]
    in_pyenv = sorted(path for folder in folders for path in folder.glob(f"versions/{version}.*/bin/python"))
    for candidate in [*([on_path] if on_path else []), *in_pyenv]:
        program = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        finished = subprocess.run([str(candidate), "-c", program], capture_output=True, text=True)
        if finished.stdout.strip() == version:
            return str(candidate)
    return None


def run(*command, **environment):
    """Run a command outside of the source tree; return whether it succeeded, and its last line of output."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **environment}
    env.pop("PYTHONPATH", None)
    finished = subprocess.run(
        [str(word) for word in command], cwd=tempfile.gettempdir(), env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = [line for line in finished.stdout.strip().splitlines() if line.strip()]
    return finished.returncode == 0, lines[-1] if lines else ""


def try_release(python, release):
    """Run `tests/smoke.py` and the demo with a release of transformers.

    Args:
        python: Python of the virtual environment.
        release: release of transformers to install, or None for the installed one.

    Returns:
        The result as the table prints it.
    """
    if release is not None:
        succeeded, last_line = run(python, "-m", "pip", "install", "-q", "--no-cache-dir", f"transformers=={release}")
        if not succeeded:
            return f"not installed: {last_line}"
    succeeded, result = run(python, "-W", "ignore", ROOT / "tests" / "smoke.py")
    if not succeeded:
        return f"failed: {result}"
    succeeded, last_line = run(Path(python).with_name("parakeet"), "demo")
    return result if succeeded else f"demo failed: {last_line}"


def try_python(version, releases):
    """Create the environment of one Python and yield a row of the table for each release of transformers.

    Args:
        version: such as `3.10`.
        releases: releases of transformers; None is the release in constraints.txt.
    """
    interpreter = find_interpreter(version)
    if interpreter is None:
        yield f"{version} | - | no interpreter found"
        return
    with tempfile.TemporaryDirectory(prefix=f"matrix-{version}-") as folder:
        python = Path(folder) / "bin" / "python"
        pip_install = (python, "-m", "pip", "install", "-q", "--no-cache-dir")
        commands = (
            (interpreter, "-m", "venv", folder),
            (*pip_install, "--upgrade", "pip"),
            (*pip_install, TORCH),
            (*pip_install, "-c", ROOT / "constraints.txt", f"{ROOT}[cli,train]"),
        )
        for command in commands:
            succeeded, last_line = run(*command)
            if not succeeded:
                yield f"{version} | - | not installed: {last_line}"
                return
        for release in releases:
            yield f"{version} | {release or 'constraints.txt'} | {try_release(python, release)}"


def main():
    """Print one row after the other; exit with status 1 if a row is not ok."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=PYTHONS)
    parser.add_argument("--releases", nargs="+", help="releases of transformers, for every Python")
    options = parser.parse_args()
    print("Python | transformers | result", flush=True)
    has_failed = False
    for version in options.pythons:
        default_releases = [None, *(RELEASES if version == PYTHON_FOR_ALL_RELEASES else ())]
        for row in try_python(version, options.releases or default_releases):
            print(row, flush=True)
            has_failed |= "ok: " not in row
    sys.exit(int(has_failed))


if __name__ == "__main__":
    main()
