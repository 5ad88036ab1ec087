"""Conversion both ways: what is written, what is checked before it gets its name, and where checkpoints are found."""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import run_stock
from huggingface_hub import constants
from safetensors.torch import save_file
from typer.testing import CliRunner

import transformers_parakeet as tp
from transformers_parakeet import NemoError, conversion, load_nemo, nemo
from transformers_parakeet.cli import app
from transformers_parakeet.conversion import convert
from transformers_parakeet.nemo import load_folder

GOLDEN = Path(__file__).parent / "golden"
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
    convert(GOLDEN / "tdt" / "model.nemo", tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    model, _ = load_folder(tmp_path / "half")
    truth = load_nemo(GOLDEN / "tdt" / "model.nemo")[0].joint.head.weight
    assert torch.equal(model.joint.head.weight, truth.bfloat16())
    with pytest.raises(NemoError, match=r"`dtype` must be one of float32, float16, bfloat16, got 'int8'"):
        convert(GOLDEN / "tdt" / "model.nemo", tmp_path / "other", dtype="int8")


def test_large_weights_are_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SHARD_SIZE", "200KB")
    convert(GOLDEN / "tdt" / "model.nemo", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert same_weights(load_folder(tmp_path / "shards")[0], load_nemo(GOLDEN / "tdt" / "model.nemo")[0])


@pytest.mark.parametrize("kind", ["ctc", "hybrid_tdt_ctc"])
def test_stock_transformers_loads_the_folder(kind, tmp_path):
    convert(GOLDEN / kind / "model.nemo", tmp_path / "folder")
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
        convert(source, tmp_path / "source")
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
        write = conversion.export_nemo
        monkeypatch.setattr(conversion, "export_nemo", lambda m, p, path: write(*damaged(tmp_path / "source"), path))
    else:
        monkeypatch.setattr(conversion, "load_folder", damaged)
    target = tmp_path / ("out.nemo" if way == "nemo" else "out")
    words = "norm_out.bias" if what == "a weight" else "scores of noise"
    with pytest.raises(NemoError, match=f"changes .*{words}.*nothing was written"):
        convert(tmp_path / "source" if way == "nemo" else source, target)
    assert {path.name for path in tmp_path.iterdir()} == ({"source"} if way == "nemo" else set())


def test_what_is_not_converted(tmp_path):
    folder = tmp_path / "folder"
    convert(GOLDEN / "ctc" / "model.nemo", folder)
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
        convert(broken, tmp_path / "out")
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

    monkeypatch.setattr(conversion, "HfApi", Api)
    monkeypatch.chdir(tmp_path)
    result = run("convert", GOLDEN / "ctc" / "model.nemo", "someone/model", "--push-to-hub")
    assert result.exit_code == 0, result.output
    assert calls == [("token", None), ("create", "someone/model", True), ("upload", "someone/model", sorted(FILES))]
    assert (tmp_path / "model" / "config.json").is_file()
    with pytest.raises(NemoError, match="only folders are pushed"):
        convert(tmp_path / "model", tmp_path / "x.nemo", push_to_hub=True)


class Hub:
    """A Hub of one repository, in place of huggingface_hub's functions."""

    def __init__(self, monkeypatch, files):
        self.files, self.asked = files, []
        hub = self

        class Api:
            def __init__(self, token=None):
                self.token = token

            def list_repo_files(self, repo, revision=None):
                hub.asked.append(("list", repo, revision, self.token))
                return sorted(hub.files)

        def download(repo, name, **options):
            self.asked.append(("get", repo, name, options["revision"], options["token"], options["cache_dir"]))
            return str(self.files[name])

        monkeypatch.setattr(nemo, "HfApi", Api)
        monkeypatch.setattr(nemo, "hf_hub_download", download)


def test_a_hub_id_with_a_nemo_file(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, {"README.md": None, "parakeet.nemo": GOLDEN / "ctc" / "model.nemo", "config.json": None})
    model, _ = load_nemo("nvidia/parakeet", revision="v2", token="secret", cache_dir=tmp_path)
    assert same_weights(model, load_nemo(GOLDEN / "ctc" / "model.nemo")[0])
    assert hub.asked == [
        ("list", "nvidia/parakeet", "v2", "secret"),
        ("get", "nvidia/parakeet", "parakeet.nemo", "v2", "secret", tmp_path),
    ]


def test_of_several_nemo_files_the_one_named_like_the_repository_is_taken(monkeypatch):
    path = GOLDEN / "ctc" / "model.nemo"
    hub = Hub(monkeypatch, {"parakeet.nemo": path, "other.nemo": path})
    load_nemo("nvidia/parakeet")
    assert hub.asked[-1][2] == "parakeet.nemo"
    Hub(monkeypatch, {"one.nemo": path, "two.nemo": path})
    with pytest.raises(FileNotFoundError, match=r"one \.nemo file or safetensors, it holds one\.nemo, two\.nemo"):
        load_nemo("nvidia/parakeet")
    Hub(monkeypatch, {"README.md": None})
    with pytest.raises(FileNotFoundError, match="it holds neither"):
        load_nemo("nvidia/parakeet")


def test_safetensors_on_the_hub_are_preferred_and_it_is_said(monkeypatch, caplog):
    hub = Hub(monkeypatch, {"parakeet.nemo": None, "model.safetensors": None, "config.json": None})
    asked = []
    monkeypatch.setattr(nemo, "load_folder", lambda source, **options: asked.append((source, options)) or ("m", "p"))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.INFO, "transformers_parakeet.nemo"):
        logging.getLogger("transformers_parakeet.nemo").propagate = True
        assert load_nemo("nvidia/parakeet", revision="main") == ("m", "p")
    assert "nvidia/parakeet holds safetensors: they are loaded, not parakeet.nemo" in caplog.text
    assert asked == [("nvidia/parakeet", {"dtype": None, "revision": "main", "token": None, "cache_dir": None,
                                          "local_files_only": False})]  # fmt: skip
    assert [call[0] for call in hub.asked] == ["list"]


def cached(cache, repo, files):
    """Lay files out as huggingface_hub's cache does."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    base = cache / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    (base / "snapshots" / commit).mkdir(parents=True)
    for name, path in files.items():
        shutil.copy(path, base / "snapshots" / commit / name)


@pytest.mark.parametrize("how", ["local_files_only", "offline", "no connection"])
def test_without_the_hub_the_cache_is_used(how, tmp_path, monkeypatch):
    cached(tmp_path, "nvidia/parakeet", {"model.nemo": GOLDEN / "ctc" / "model.nemo"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "offline")

    class Unreachable:
        def __init__(self, token=None):
            pass

        def list_repo_files(self, repo, revision=None):
            assert how == "no connection"
            raise ConnectionError("no route")

    if how != "offline":
        monkeypatch.setattr(nemo, "HfApi", Unreachable)
    model, _ = load_nemo("nvidia/parakeet", cache_dir=tmp_path, local_files_only=how == "local_files_only")
    assert same_weights(model, load_nemo(GOLDEN / "ctc" / "model.nemo")[0])
    with pytest.raises(OSError, match=r"(?i)cache|offline|snapshot"):
        load_nemo("nvidia/unknown", cache_dir=tmp_path, local_files_only=how == "local_files_only")


def test_folders(tmp_path, caplog):
    shutil.copy(GOLDEN / "ctc" / "model.nemo", tmp_path / "some.nemo")
    assert same_weights(load_nemo(tmp_path)[0], load_nemo(str(tmp_path / "some.nemo"))[0])
    model, _ = load_nemo(tp.demo_model_path())
    assert type(model).__name__ == json.loads((tp.demo_model_path() / "config.json").read_text())["architectures"][0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it holds neither"):
        load_nemo(tmp_path / "empty")
    for missing in ("none.nemo", "a/b.nemo", os.path.join(tmp_path, "none")):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            load_nemo(missing)
