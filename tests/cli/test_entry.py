"""The command `parakeet` without the packages of its extra."""

import subprocess
import sys
import textwrap

import pytest


def run_without(package, code):
    """Run a program in which a package cannot be imported; return the finished process."""
    blocked = f"import sys; sys.modules[{package!r}] = None\n"
    command = [sys.executable, "-W", "ignore", "-c", blocked + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("package", ["rich", "typer"])
def test_the_command_names_the_extra_that_is_missing(package):
    done = run_without(package, "from transformers_parakeet_cli import main; main()")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "parakeet" in line]
    assert f"needs the package {package}: install transformers-parakeet with its extra `cli`" in line
    assert "Traceback" not in done.stderr


def test_another_missing_package_is_not_blamed_on_the_extra():
    program = "import sys; sys.argv = ['parakeet', 'demo']; from transformers_parakeet_cli import main; main()"
    done = run_without("transformers_parakeet.nemo", program)
    assert done.returncode == 1
    assert "extra" not in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("package", ["rich", "typer"])
def test_the_package_and_its_pipeline_need_no_extra(package):
    done = run_without(
        package,
        """
        import transformers_parakeet as tp
        from transformers import pipeline

        folder = tp.demo_model_path()
        recogniser = pipeline("automatic-speech-recognition", model=str(folder))
        print(recogniser(str(folder / "clips" / "one_two_three.flac"))["text"])
        """,
    )
    assert done.stdout.strip().endswith("one two three"), done.stderr[-2000:]


def test_the_help_needs_neither_torch_nor_transformers():
    done = run_without(
        "torch",
        """
        import sys
        from transformers_parakeet_cli import main

        sys.modules["transformers"] = sys.modules["numpy"] = None
        for arguments in (["--help"], ["transcribe", "--help"], ["evaluate", "--help"]):
            sys.argv = ["parakeet", *arguments]
            try:
                main()
            except SystemExit as error:
                assert error.code == 0
        """,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Usage: parakeet transcribe" in done.stdout
