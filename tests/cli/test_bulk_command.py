"""Tests of `parakeet bulk`."""

import sys

import pyarrow.parquet as pq
from bulk_helpers import write_archive
from typer.testing import CliRunner

from transformers_parakeet_cli.app import app


def run_bulk(*arguments):
    """Run `parakeet bulk` with the demo model in this process and return its result."""
    return CliRunner().invoke(app, ["bulk", *map(str, arguments), "--model", "demo"])


def test_a_folder_in_this_process(tmp_path):
    write_archive(tmp_path / "archive", 5, {1})
    phrases = tmp_path / "phrases.txt"
    phrases.write_text("seven\n")
    arguments = (
        tmp_path / "archive",
        tmp_path / "out",
        "--engine",
        "local",
        "--files-per-shard",
        2,
        "--boost",
        phrases,
    )
    result = run_bulk(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "5 files transcribed, 1 with an error, " in result.stderr
    assert f"{tmp_path / 'out'} has 5 files" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("next: python -c 'import pandas; print(pandas.read_parquet(")
    assert result.stdout == ""
    assert pq.read_table(tmp_path / "out").num_rows == 5
    result = run_bulk(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "5 files in" in result.stderr
    assert "nothing to do" in result.stderr
    result = run_bulk(*arguments, "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")


def test_errors_are_one_line(tmp_path, monkeypatch):
    result = run_bulk(tmp_path / "missing", tmp_path / "out", "--engine", "local")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"there is no file or folder {tmp_path / 'missing'}: correct the path")
    write_archive(tmp_path / "archive", 1, set())
    result = run_bulk(tmp_path / "archive", tmp_path / "out", "--engine", "local", "--workers", 2)
    assert "the engine `local` has one worker" in result.stderr
    monkeypatch.setitem(sys.modules, "ray.data", None)
    result = run_bulk(tmp_path / "archive", tmp_path / "out")
    assert result.exit_code == 1
    assert "the engine `ray` needs the package ray, which is not installed: install the extra `ray`" in result.stderr
