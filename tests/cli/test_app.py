"""Tests of the output of the command `parakeet` on the bundled recordings."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
from conftest import run_program
from typer.testing import CliRunner

import transformers_parakeet as tp
from transformers_parakeet_cli.app import app

CLIPS = tp.demo_model_path() / "clips"
MANIFEST = json.loads((CLIPS / "manifest.json").read_text(encoding="utf-8"))
# per cent, of the TDT and the CTC head on the bundled clips, which contain 26 words
DEMO_ERROR_RATES = {"TDT": 100 * 1 / 26, "CTC": 100 * 3 / 26}


def run(*arguments):
    """Run the command in this process and return its result: exit code, stdout and stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_the_demo_shows_every_clip_and_its_word_error_rate():
    result = run("demo")
    assert result.exit_code == 0
    for clip in MANIFEST:
        assert clip["file"] in result.stdout
        assert clip["text"] in result.stdout
    assert sum(len(clip["text"].split()) for clip in MANIFEST) == 26
    for head, expected in DEMO_ERROR_RATES.items():
        rate = float(result.stdout.split(f"word error rate, {head}: ")[1].split("%")[0])
        assert rate == pytest.approx(expected, abs=0.06)
    # start, end and confidence of a word
    assert re.search(r"seven 0\.64-1\.28 +1\.00", result.stdout)


def test_the_demo_names_the_extra_if_jiwer_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    result = run("demo")
    assert result.exit_code == 0
    assert "word error rate, TDT: not computed, because it needs jiwer (in the extra `cli`)" in result.stdout


def test_the_help_lists_every_subcommand():
    result = run("--help")
    assert result.exit_code == 0
    assert "Transcribe audio files." in result.stdout
    for command in ("transcribe", "demo", "convert", "finetune", "evaluate"):
        assert re.search(rf"\b{command}  ", result.stdout)


def test_transcribe_recognises_the_bundled_clips():
    texts = {}
    for clip in MANIFEST:
        result = run("transcribe", CLIPS / clip["file"])
        assert result.exit_code == 0
        texts[clip["text"]] = result.stdout.strip()
    assert 100 * jiwer.wer(list(texts), list(texts.values())) == pytest.approx(DEMO_ERROR_RATES["TDT"], abs=0.06)


def test_json_contains_the_times_of_words():
    clip = next(clip for clip in MANIFEST if clip["file"] == "one_two_three.flac")
    result = run("transcribe", CLIPS / clip["file"], "--format", "json")
    (entry,) = json.loads(result.stdout)
    assert entry["text"] == "one two three"
    assert [word["text"] for word in entry["words"]] == ["one", "two", "three"]
    times = [(word["start"], word["end"]) for word in entry["words"]]
    assert times == [(0.08, 0.48), (1.04, 1.52), (2.16, 2.56)]


def test_an_error_in_one_file_does_not_stop_the_others(tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_text("no audio " * 100)
    good = CLIPS / MANIFEST[0]["file"]
    result = run("transcribe", bad, good)
    assert result.exit_code == 1
    assert str(good) in result.stdout
    assert "bad.wav" in result.stderr


def test_the_error_names_a_model_that_does_not_exist():
    result = run("transcribe", CLIPS / MANIFEST[0]["file"], "--model", "no/such/folder")
    assert result.exit_code == 1
    assert "no/such/folder" in result.stderr


@pytest.mark.parametrize("form", ["folder", "nemo"])
def test_transcribe_uses_the_given_model(form, golden, tmp_path):
    model = golden / "tdt" / "model.nemo"
    if form == "folder":
        model = tmp_path / "model"
        shutil.copytree(tp.demo_model_path(), model)
    result = run("transcribe", CLIPS / MANIFEST[0]["file"], "--model", model)
    assert result.exit_code == 0, result.exception
    if form == "folder":
        assert result.stdout == run("transcribe", CLIPS / MANIFEST[0]["file"]).stdout


def test_errors_go_to_stderr_and_stdout_stays_valid_json(tmp_path):
    nan = tmp_path / "nan.wav"
    soundfile.write(nan, np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    good = [CLIPS / clip["file"] for clip in MANIFEST[:2]]
    result = run("transcribe", good[0], nan, tmp_path / "missing.wav", good[1], "--format", "json")
    assert result.exit_code == 1
    assert [entry["file"] for entry in json.loads(result.stdout)] == [str(file) for file in good]
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert "NaN" in lines[0]
    # each line contains the name of the file once
    assert [line.count(str(file)) for line, file in zip(lines, (nan, tmp_path / "missing.wav"), strict=True)] == [1, 1]


def test_json_is_an_empty_list_if_all_files_fail(tmp_path):
    result = run("transcribe", tmp_path / "missing.wav", "--format", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == []


# limits its memory to 1 GiB more than it uses, which is not enough for a clip of twenty minutes: the attention scores
# alone are 4 * 15000^2 floats
LIMITED_MEMORY = """
import resource, sys
from transformers_parakeet_cli.app import app
from transformers_parakeet_cli.models import load_pipeline
load_pipeline(None)(sys.argv[2])
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, resource.RLIM_INFINITY))
app(["transcribe", sys.argv[1], sys.argv[2], "--format", "json"])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of a process from /proc")
def test_insufficient_memory_for_one_file_does_not_stop_the_others(tmp_path):
    long = tmp_path / "long.wav"
    soundfile.write(long, np.zeros(16000 * 1200, np.float32), 16000)
    good = CLIPS / MANIFEST[0]["file"]
    printed, errors = run_program(LIMITED_MEMORY, long, good, status=1)
    assert [entry["text"] for entry in json.loads(printed)] == [MANIFEST[0]["text"]]
    # other packages may print warnings before
    assert errors.splitlines()[-1].startswith(f"{long}: ")
    assert errors.count(str(long)) == 1
    assert "Traceback" not in errors


def test_error_messages_are_not_wrapped(tmp_path):
    name = tmp_path / ("long" * 30) / "missing.wav"
    result = CliRunner().invoke(app, ["transcribe", str(name)], env={"COLUMNS": "80"})
    assert str(name) in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_json_is_printed_at_once_and_closed_when_interrupted(tmp_path):
    good, waiting = CLIPS / MANIFEST[0]["file"], tmp_path / "waiting.wav"
    os.mkfifo(waiting)
    command = [sys.executable, "-m", "transformers_parakeet_cli", "transcribe", good, waiting, "--format", "json"]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # a shell that runs the tests in the background makes its child processes ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    # opening blocks until the command reads the second file
    with open(waiting, "wb"):
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert [entry["text"] for entry in json.loads(printed)] == [MANIFEST[0]["text"]]
