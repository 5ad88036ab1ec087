"""Tests the wheel: builds an sdist, builds the wheel from it, installs it in an empty environment and runs tests there.

    python tests/wheel.py                                     builds the wheel and runs the tests listed in `TESTS`
    python tests/wheel.py --wheel dist/NAME.whl tests         a wheel that exists, and other tests
    python tests/wheel.py --transformers 5.17.0               with another release of transformers

The tests run in a copy of the repository without `src`, so that only the installed package can be imported. Building
needs the package `build`. The environment and the copy are deleted at the end.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCH = "torch==2.13.0"
# what the tests need in addition to the extras `cli`, `kernels`, `onnx` and `train`
TEST_PACKAGES = (
    *("pytest>=8", "pytest-xdist>=3.6", "librosa>=0.10", "parameterized>=0.9", "pillow>=10", "srt>=3.5"),
    *("onnx-asr>=0.12", "torchao>=0.12", "webvtt-py>=0.5.1"),
)
# kernel, import and command; the first also runs the kernel's own tests
TESTS = ("tests/losses/test_backend.py", "tests/test_registration.py", "tests/cli")
# tests of the source tree, which an installed wheel does not have
SOURCE_TESTS = ("tests/test_architecture.py", "tests/test_docs.py", "tests/test_packaging.py")
COPIED_FOLDERS = ("benchmarks", "conversion", "docs", "examples", "hub_kernels", "tests")


def run(*command, folder, status=0):
    """Run a command in a folder, without the source tree on its path.

    Args:
        command: program and arguments.
        folder: working directory.
        status: exit status that the command must have.

    Returns:
        What the command printed.

    Raises:
        SystemExit: the status is another one.
    """
    print("$", *command, flush=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(done.stdout[-3000:], flush=True)
    if done.returncode != status:
        raise SystemExit(f"{command[0]} ended with status {done.returncode}, expected {status}")
    return done.stdout


def build_wheel(folder):
    """Build an sdist of the repository and a wheel from the unpacked sdist; return the path of the wheel."""
    # without --sdist and --wheel, `build` builds the wheel from the sdist
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, folder=folder)
    return next(folder.glob("*.whl"))


def make_environment(folder, transformers):
    """Create a virtual environment with torch and a release of transformers; return its Python."""
    run(sys.executable, "-m", "venv", folder, folder=folder.parent)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "-q", "--upgrade", "pip", folder=folder)
    if transformers == "constraints":
        run(
            python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "torch", "transformers", folder=folder
        )
    elif transformers == "newest":
        run(python, "-m", "pip", "install", "-q", TORCH, "transformers", folder=folder)
    else:
        run(python, "-m", "pip", "install", "-q", TORCH, f"transformers=={transformers}", folder=folder)
    return python


def copy_tests(folder, python):
    """Copy the repository without `src`, with the kernel's source from the installed wheel.

    Args:
        folder: receives the copy.
        python: Python of the environment with the wheel.
    """
    for name in COPIED_FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    code = (
        "import importlib.util as u; print(u.find_spec('transformers_parakeet.losses').submodule_search_locations[0])"
    )
    losses = run(python, "-W", "ignore", "-c", code, folder=folder).strip().splitlines()[-1]
    source = folder / "hub_kernels" / "transducer-loss" / "torch-ext" / "transducer_loss"
    shutil.rmtree(source)
    shutil.copytree(Path(losses) / "transducer_kernel", source)


def check_without_extras(python, folder):
    """Check that the wheel without extras transcribes, and that its command names the extra `cli`."""
    code = (
        "import transformers_parakeet as tp; from transformers import pipeline; folder = tp.demo_model_path(); "
        "recogniser = pipeline('automatic-speech-recognition', model=str(folder)); "
        "print('text:', recogniser(str(folder / 'clips' / 'one_two_three.flac'))['text'])"
    )
    printed = run(python, "-W", "ignore", "-c", code, folder=folder)
    if "text: one two three" not in printed:
        raise SystemExit("the wheel without extras must transcribe the demo clip")
    # other packages may install typer and rich, but not jiwer: then the demo runs and computes no error rate
    installed = run(python, "-c", "import importlib.util as u; print(u.find_spec('typer') is not None)", folder=folder)
    status = 0 if "True" in installed else 1
    printed = run(python.with_name("parakeet"), "demo", folder=folder, status=status)
    if "extra `cli`" not in printed:
        raise SystemExit("the command without its packages must name the extra `cli`")


def main():
    """Build, install and test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=TESTS)
    parser.add_argument("--wheel", type=Path, help="a wheel that exists; default: build one")
    parser.add_argument("--transformers", default="constraints", help="a release, `newest`, or that of constraints.txt")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wheel-") as temporary:
        folder = Path(temporary)
        wheel = options.wheel.resolve() if options.wheel else build_wheel(folder)
        python = make_environment(folder / "environment", options.transformers)
        run(python, "-m", "pip", "install", "-q", wheel, folder=folder)
        check_without_extras(python, folder)
        run(python, "-m", "pip", "install", "-q", f"{wheel}[cli,kernels,onnx,train]", *TEST_PACKAGES, folder=folder)
        copy = folder / "copy"
        copy.mkdir()
        copy_tests(copy, python)
        ignored = [f"--ignore={path}" for path in SOURCE_TESTS]
        selection = ("-m", "not slow and not gpu", "-p", "no:cacheprovider")
        run(python, "-W", "ignore", "-m", "pytest", *selection, *ignored, *options.tests, folder=copy)
    print("ok:", wheel.name)


if __name__ == "__main__":
    main()
