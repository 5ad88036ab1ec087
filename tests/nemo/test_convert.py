"""Conversion both ways: what is written, and what is checked before it gets its name."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import TESTS, run_stock
from safetensors.torch import save_file
from typer.testing import CliRunner

from transformers_parakeet import NemoError, export_nemo, load_nemo
from transformers_parakeet.cli.app import app
from transformers_parakeet.nemo.convert import convert_checkpoint
from transformers_parakeet.nemo.hub import load_folder

GOLDEN = TESTS / "golden"
CONVERT = "transformers_parakeet.nemo.convert."
FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "processor_config.json",
         "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "500"})


def same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind", ["ctc", "rnnt", "tdt", "hybrid_tdt_ctc", "tdt_agg_tokenizer"])
def test_the_command_converts_there_and_back(kind, tmp_path):
    source, folder, back = GOLDEN / kind / "model.nemo", tmp_path / "folder", tmp_path / "back.nemo"
    result = run("convert", source, folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == f"{folder}: written, and equal to {source} on noise"
    assert {path.name for path in folder.iterdir()} == FILES
    assert run("convert", folder, back).exit_code == 0
    original, _ = load_nemo(source)
    for model, processor in (load_folder(folder), load_nemo(back)):
        assert same_weights(model, original)
        assert processor.tokenizer.get_vocab() == load_nemo(source)[1].tokenizer.get_vocab()
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "back.nemo"}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "`model.nemo`" in card
    assert f"{original.config.vocab_size - 1} SentencePiece pieces" in card


def test_another_dtype(tmp_path):
    convert_checkpoint(GOLDEN / "tdt" / "model.nemo", tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    model, _ = load_folder(tmp_path / "half")
    truth = load_nemo(GOLDEN / "tdt" / "model.nemo")[0].joint.head.weight
    assert torch.equal(model.joint.head.weight, truth.bfloat16())
    with pytest.raises(NemoError, match=r"`dtype` must be one of float32, float16, bfloat16, got 'int8'"):
        convert_checkpoint(GOLDEN / "tdt" / "model.nemo", tmp_path / "other", dtype="int8")


def test_large_weights_are_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(CONVERT + "SHARD_SIZE", "200KB")
    convert_checkpoint(GOLDEN / "tdt" / "model.nemo", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert same_weights(load_folder(tmp_path / "shards")[0], load_nemo(GOLDEN / "tdt" / "model.nemo")[0])


@pytest.mark.parametrize("kind", ["ctc", "hybrid_tdt_ctc"])
def test_stock_transformers_loads_the_folder(kind, tmp_path):
    convert_checkpoint(GOLDEN / kind / "model.nemo", tmp_path / "folder")
    program = """
        import sys, json
        from transformers import AutoConfig, AutoModel, AutoModelForCTC, AutoModelForTDT, AutoProcessor
        from transformers.utils import logging
        config = AutoConfig.from_pretrained(sys.argv[1])
        auto = AutoModelForCTC if config.model_type == "parakeet_ctc" else AutoModelForTDT
        model, info = auto.from_pretrained(sys.argv[1], output_loading_info=True)
        processor = AutoProcessor.from_pretrained(sys.argv[1])
        ids = processor.tokenizer("the song")["input_ids"]
        print(json.dumps([type(model).__name__, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), ids]))
    """
    name, missing, unexpected, ids = json.loads(run_stock(program, tmp_path / "folder").strip().splitlines()[-1])
    model, processor = load_folder(tmp_path / "folder")
    assert name == type(model).__name__
    assert missing == []
    # a hybrid's second head is what stock transformers leaves out
    assert unexpected == ([] if kind == "ctc" else ["ctc_head.bias", "ctc_head.weight"])
    assert ids == processor.tokenizer("the song")["input_ids"]


@pytest.mark.parametrize("way", ["folder", "nemo"])
@pytest.mark.parametrize("what", ["a weight", "a sum"])
def test_a_result_that_differs_is_not_kept(what, way, tmp_path, monkeypatch):
    source = GOLDEN / "tdt" / "model.nemo"
    if way == "nemo":
        convert_checkpoint(source, tmp_path / "source")
    load = load_folder

    def damaged(path, **options):
        model, processor = load(path, **options)
        if what == "a weight":
            weights = {key: weight.clone() for key, weight in model.state_dict().items()}
            weights["encoder.layers.1.norm_out.bias"][0] += 1e-7
            model.load_state_dict(weights)
            save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        else:
            model.encoder.input_scale = 1.0
            model.config.encoder_config.scale_input = model.encoder.config.scale_input = True
            model.encoder.input_scale = 1.5
        return model, processor

    if way == "nemo" and what == "a weight":
        # the file is damaged after it was written
        write = export_nemo
        monkeypatch.setattr(CONVERT + "export_nemo", lambda m, p, path: write(*damaged(tmp_path / "source"), path))
    else:
        monkeypatch.setattr(CONVERT + "load_folder", damaged)
    target = tmp_path / ("out.nemo" if way == "nemo" else "out")
    words = "norm_out.bias" if what == "a weight" else "scores of noise"
    with pytest.raises(NemoError, match=f"changes .*{words}.*nothing was written"):
        convert_checkpoint(tmp_path / "source" if way == "nemo" else source, target)
    assert {path.name for path in tmp_path.iterdir()} == ({"source"} if way == "nemo" else set())


def test_what_is_not_converted(tmp_path):
    folder = tmp_path / "folder"
    convert_checkpoint(GOLDEN / "ctc" / "model.nemo", folder)
    for source, target, words in (
        (GOLDEN / "ctc" / "model.nemo", folder, "exists: name a folder that does not"),
        (folder, tmp_path / "other", "already in the format of transformers"),
        (GOLDEN / "ctc" / "model.nemo", tmp_path / "x.nemo", "is a .nemo file already"),
    ):
        result = run("convert", source, target)
        assert result.exit_code == 1
        assert words in result.stderr
    assert run("convert", tmp_path / "none.nemo", tmp_path / "other").exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    broken = tmp_path / "broken.nemo"
    broken.write_bytes((GOLDEN / "ctc" / "model.nemo").read_bytes()[:200_000])
    with pytest.raises(NemoError, match="cut off"):
        convert_checkpoint(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.nemo"]


def test_pushing_uploads_the_folder(tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo, exist_ok):
            calls.append(("create", repo, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(CONVERT + "HfApi", Api)
    monkeypatch.chdir(tmp_path)
    result = run("convert", GOLDEN / "ctc" / "model.nemo", "someone/model", "--push-to-hub")
    assert result.exit_code == 0, result.output
    assert calls == [("token", None), ("create", "someone/model", True), ("upload", "someone/model", sorted(FILES))]
    assert (tmp_path / "model" / "config.json").is_file()
    with pytest.raises(NemoError, match="only folders are pushed"):
        convert_checkpoint(tmp_path / "model", tmp_path / "x.nemo", push_to_hub=True)
