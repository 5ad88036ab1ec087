"""Tests of `parakeet info`."""

import json

import pytest
from conftest import TESTS
from typer.testing import CliRunner

import transformers_parakeet as tp
from transformers_parakeet.long_audio.stream_settings import choose_settings, prepare_encoder
from transformers_parakeet.model_info import read_model_info
from transformers_parakeet_cli.app import app

REAL_CONFIGS = TESTS / "golden" / "real_configs"


def run_info(*arguments):
    """Run `parakeet info` in this process; return its rows, name to values, or its error."""
    result = CliRunner().invoke(app, ["info", *map(str, arguments)])
    if result.exit_code:
        return result.stderr
    rows, name = {}, ""
    # values start in the same column
    column = result.stdout.index(str(arguments[0])) if arguments[0] != "demo" else result.stdout.index("/")
    for line in result.stdout.splitlines():
        name = line[:column].strip() or name
        rows.setdefault(name, []).append(line[column:])
    return rows


def test_the_demo_model_is_described():
    rows = run_info("demo")
    assert rows["model"] == [str(tp.demo_model_path())]
    assert rows["head"] == ["TDT and CTC (hybrid); --decoder transducer or ctc"]
    # the README of the demo model states the number of parameters, 1,788,367
    assert rows["parameters"] == ["1.8 million, float32"]
    assert rows["prediction network"] == ["1 LSTM layer of width 64"]
    assert rows["durations"] == ["0, 1, 2, 3, 4, 5, 6, 7, 8 frames"]
    assert rows["attention"] == ["full: each frame attends to the whole clip"]
    assert rows["memory"][0] == "weights: 7.2 MB in float32, 3.6 MB in bfloat16"
    assert rows["CTC head"] == ["yes"]
    assert rows["NeMo export"] == ["yes, if SentencePiece can express the tokenizer"]


def test_every_trained_context_is_listed():
    rows = run_info(REAL_CONFIGS / "nemotron" / "model.nemo")
    # contexts of the YAML: [70, 13], [70, 6], [70, 1], [70, 0]
    seconds = ["14 frames (1.12 s)", "7 frames (0.56 s)", "2 frames (0.16 s)", "1 frame (0.08 s)"]
    expected = [f"chunks of {chunk}: each frame attends to its chunk and 70 frames before it" for chunk in seconds]
    assert rows["attention"] == [expected[0], *(f"also trained: {text}" for text in expected[1:])]
    assert rows["streaming"] == ["yes, cache-aware: each frame is encoded once, if the features are not normalised"]
    assert rows["CTC head"] == ["no"]


@pytest.mark.parametrize("name", sorted(path.parent.name for path in REAL_CONFIGS.glob("*/model.nemo")))
def test_the_kind_of_streaming_is_that_of_a_stream(name):
    path = REAL_CONFIGS / name / "model.nemo"
    model, processor = tp.load_nemo(path)
    settings = choose_settings(model.encoder, processor.feature_extractor, None, None, None)
    (streaming,) = run_info(path)["streaming"]
    assert streaming.startswith("yes, cache-aware") == settings.is_cache_aware
    assert streaming.startswith("yes, with left and right context") != settings.is_cache_aware
    # the stream changes the attention context of the encoder only if the model was trained for this
    is_changed = prepare_encoder(model.encoder, settings) is not model.encoder
    assert streaming.endswith("for which the model was trained") == is_changed


def test_local_attention_is_described():
    rows = run_info(REAL_CONFIGS / "long_ctc" / "model.nemo")
    assert rows["attention"] == ["local: each frame attends to 128 frames before and 128 frames after it"]
    assert rows["head"] == ["CTC; --decoder ctc"]
    assert "durations" not in rows


def test_json_contains_every_field():
    path = REAL_CONFIGS / "tdt_v3" / "model.nemo"
    result = CliRunner().invoke(app, ["info", str(path), "--json"])
    fields = json.loads(result.stdout)
    info = read_model_info(path)
    assert fields["num_parameters"] == info.num_parameters
    assert fields["peak_bytes"] == {"60.0": info.peak_bytes[60.0], "3600.0": info.peak_bytes[3600.0]}
    assert fields["durations"] == [0, 1, 2, 3, 4]
    assert fields["decoders"] == ["transducer"]


@pytest.mark.parametrize("form", ["missing", "other"])
def test_an_error_is_one_line(form, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    (tmp_path / "model.safetensors").touch()
    error = run_info("missing.nemo" if form == "missing" else tmp_path)
    expected = {"missing": "the file missing.nemo does not exist", "other": "the model type is 'whisper'"}
    assert expected[form] in error
    assert len(error.splitlines()) == 1
