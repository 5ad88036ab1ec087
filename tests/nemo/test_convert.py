"""Conversion in both directions: the files that are written, and the comparison before they get their final names."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import TESTS, run_stock
from safetensors.torch import save_file
from typer.testing import CliRunner

from transformers_parakeet import NemoError, export_nemo, load_nemo
from transformers_parakeet.nemo.convert import convert_checkpoint
from transformers_parakeet.nemo.reader import load_folder
from transformers_parakeet_cli.app import app

GOLDEN = TESTS / "golden"
CONVERT = "transformers_parakeet.nemo.convert."
FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "processor_config.json",
         "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


def run(*arguments):
    """Run the command `parakeet` and return its result."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "500"})


def same_weights(model, expected_model):
    """Return whether two models have the same weights, bit for bit."""
    weights, expected = model.state_dict(), expected_model.state_dict()
    return weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["ctc", "rnnt", "tdt", "hybrid_tdt_ctc", "tdt_agg_tokenizer"])
def test_the_command_converts_to_a_folder_and_back(kind, tmp_path):
    source, folder, back = GOLDEN / kind / "model.nemo", tmp_path / "folder", tmp_path / "back.nemo"
    result = run("convert", source, folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == f"wrote {folder}; weights and output for random noise equal those of {source}"
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


def test_a_conversion_can_change_the_dtype(tmp_path):
    convert_checkpoint(GOLDEN / "tdt" / "model.nemo", tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    model, _ = load_folder(tmp_path / "half")
    original, _ = load_nemo(GOLDEN / "tdt" / "model.nemo")
    assert torch.equal(model.joint.head.weight, original.joint.head.weight.bfloat16())
    with pytest.raises(NemoError, match=r"`dtype` must be one of float32, float16, bfloat16, got 'int8'"):
        convert_checkpoint(GOLDEN / "tdt" / "model.nemo", tmp_path / "other", dtype="int8")


def test_large_weights_are_split_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(CONVERT + "MAX_SHARD_SIZE", "200KB")
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
    # stock transformers does not load the CTC head of a hybrid
    assert unexpected == ([] if kind == "ctc" else ["ctc_head.bias", "ctc_head.weight"])
    assert ids == processor.tokenizer("the song")["input_ids"]


@pytest.mark.parametrize("target_format", ["folder", "nemo"])
@pytest.mark.parametrize("damage", ["a weight", "the logits"])
def test_a_result_that_differs_is_not_written(damage, target_format, tmp_path, monkeypatch):
    source = GOLDEN / "tdt" / "model.nemo"
    if target_format == "nemo":
        convert_checkpoint(source, tmp_path / "source")
    original_load = load_folder

    def load_damaged(path, **options):
        """Load a folder with one weight or the scale of the input changed."""
        model, processor = original_load(path, **options)
        if damage == "a weight":
            weights = {key: weight.clone() for key, weight in model.state_dict().items()}
            weights["encoder.layers.1.norm_out.bias"][0] += 1e-7
            model.load_state_dict(weights)
            save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        else:
            model.encoder.input_scale = 1.0
            model.config.encoder_config.scale_input = model.encoder.config.scale_input = True
            model.encoder.input_scale = 1.5
        return model, processor

    if target_format == "nemo" and damage == "a weight":
        # the file gets the damaged weight
        monkeypatch.setattr(
            CONVERT + "export_nemo", lambda m, p, path: export_nemo(*load_damaged(tmp_path / "source"), path)
        )
    else:
        monkeypatch.setattr(CONVERT + "load_folder", load_damaged)
    target = tmp_path / ("out.nemo" if target_format == "nemo" else "out")
    words = "norm_out.bias" if damage == "a weight" else "logits of noise"
    with pytest.raises(NemoError, match=f"changes .*{words}.*nothing was written"):
        convert_checkpoint(tmp_path / "source" if target_format == "nemo" else source, target)
    assert {path.name for path in tmp_path.iterdir()} == ({"source"} if target_format == "nemo" else set())


def test_conversions_without_a_valid_source_or_target_are_refused(tmp_path):
    folder = tmp_path / "folder"
    convert_checkpoint(GOLDEN / "ctc" / "model.nemo", folder)
    for source, target, words in (
        (GOLDEN / "ctc" / "model.nemo", folder, "exists: give an empty folder"),
        (folder, tmp_path / "other", "already a transformers checkpoint"),
        (GOLDEN / "ctc" / "model.nemo", tmp_path / "x.nemo", "is already a .nemo file"),
    ):
        result = run("convert", source, target)
        assert result.exit_code == 1
        assert words in result.stderr
    assert run("convert", tmp_path / "none.nemo", tmp_path / "other").exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failed_conversion_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    broken = tmp_path / "broken.nemo"
    broken.write_bytes((GOLDEN / "ctc" / "model.nemo").read_bytes()[:200_000])
    with pytest.raises(NemoError, match="truncated"):
        convert_checkpoint(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.nemo"]


def test_push_to_hub_uploads_the_folder(tmp_path, monkeypatch):
    calls = []

    class FakeApi:
        """Records the calls that upload a folder."""

        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo, exist_ok):
            calls.append(("create", repo, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(CONVERT + "HfApi", FakeApi)
    monkeypatch.chdir(tmp_path)
    result = run("convert", GOLDEN / "ctc" / "model.nemo", "someone/model", "--push-to-hub")
    assert result.exit_code == 0, result.output
    assert calls == [("token", None), ("create", "someone/model", True), ("upload", "someone/model", sorted(FILES))]
    assert (tmp_path / "model" / "config.json").is_file()
    with pytest.raises(NemoError, match="requires a folder as target"):
        convert_checkpoint(tmp_path / "model", tmp_path / "x.nemo", push_to_hub=True)
