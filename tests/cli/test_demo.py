"""Tests of `parakeet demo`."""

import json
import re
import sys

import pytest
from typer.testing import CliRunner

import transformers_parakeet as tp
from transformers_parakeet_cli.app import app

MANIFEST = json.loads((tp.demo_model_path() / "clips" / "manifest.json").read_text(encoding="utf-8"))
# per cent, of the TDT and the CTC head on the bundled clips, which contain 26 words
ERROR_RATES = {"TDT": 100 * 1 / 26, "CTC": 100 * 3 / 26}


def run_demo():
    """Run `parakeet demo` in this process and return its result: exit code, stdout and stderr."""
    return CliRunner().invoke(app, ["demo"], env={"COLUMNS": "200"})


def test_the_demo_shows_every_clip_and_its_word_error_rate():
    result = run_demo()
    assert result.exit_code == 0
    for clip in MANIFEST:
        assert clip["file"] in result.stdout
        assert clip["text"] in result.stdout
    assert sum(len(clip["text"].split()) for clip in MANIFEST) == 26
    for head, expected in ERROR_RATES.items():
        rate = float(result.stdout.split(f"word error rate, {head}: ")[1].split("%")[0])
        assert rate == pytest.approx(expected, abs=0.06)
    # start, end and confidence of a word
    assert re.search(r"seven 0\.64-1\.28 +1\.00", result.stdout)


def test_the_demo_names_the_extra_if_jiwer_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    result = run_demo()
    assert result.exit_code == 0
    assert "word error rate, TDT: not computed, because it needs jiwer (in the extra `cli`)" in result.stdout
