"""The command: what it prints, on the bundled recordings."""

import json
import re
import shutil

import jiwer
import pytest
from typer.testing import CliRunner

import transformers_parakeet as tp
from transformers_parakeet.cli import app

CLIPS = tp.demo_model_path() / "clips"
MANIFEST = json.loads((CLIPS / "manifest.json").read_text(encoding="utf-8"))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_the_demo_shows_every_clip_and_its_word_error_rate():
    result = run("demo")
    assert result.exit_code == 0
    for clip in MANIFEST:
        assert clip["file"] in result.stdout
        assert clip["text"] in result.stdout
    assert len(MANIFEST) >= 5
    for head in ("TDT", "CTC"):
        rate = float(result.stdout.split(f"word error rate, {head}: ")[1].split("%")[0])
        assert rate < 20
    # the times and the confidence of a word
    assert re.search(r"seven \d\.\d\d-\d\.\d\d +[01]\.\d\d", result.stdout)


def test_the_demo_model_recognises_what_it_was_made_for():
    texts = {}
    for clip in MANIFEST:
        result = run("transcribe", CLIPS / clip["file"])
        assert result.exit_code == 0
        texts[clip["text"]] = result.stdout.strip()
    assert jiwer.wer(list(texts), list(texts.values())) < 0.2


def test_json_has_the_times_of_words():
    clip = next(clip for clip in MANIFEST if clip["file"] == "one_two_three.flac")
    result = run("transcribe", CLIPS / clip["file"], "--format", "json")
    (entry,) = json.loads(result.stdout)
    assert entry["text"] == "one two three"
    assert [word["text"] for word in entry["words"]] == ["one", "two", "three"]
    times = [(word["start"], word["end"]) for word in entry["words"]]
    assert times == sorted(times)


def test_several_files_are_named_and_a_bad_one_is_not_the_end(tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_text("no audio " * 100)
    good = CLIPS / MANIFEST[0]["file"]
    result = run("transcribe", bad, good)
    assert result.exit_code == 1
    assert str(good) in result.stdout
    assert "bad.wav" in result.stderr


def test_a_model_that_is_not_there_is_named():
    result = run("transcribe", CLIPS / MANIFEST[0]["file"], "--model", "no/such/folder")
    assert result.exit_code == 1
    assert "no/such/folder" in result.stderr


@pytest.mark.parametrize("form", ["folder", "nemo"])
def test_other_models_are_taken(form, golden, tmp_path):
    model = golden / "tdt" / "model.nemo"
    if form == "folder":
        model = tmp_path / "model"
        shutil.copytree(tp.demo_model_path(), model)
    result = run("transcribe", CLIPS / MANIFEST[0]["file"], "--model", model)
    assert result.exit_code == 0, result.exception
    if form == "folder":
        assert result.stdout == run("transcribe", CLIPS / MANIFEST[0]["file"]).stdout
