"""Where checkpoints are found: paths, folders, Hub ids, and the cache without a network."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import transformers_parakeet as tp
from transformers_parakeet import hub as hub_module
from transformers_parakeet import load_nemo, nemo

GOLDEN = Path(__file__).parent / "golden"


def same_weights(model, other):
    """Tell whether two models have the same weights, bit for bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


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

        monkeypatch.setattr(hub_module, "HfApi", Api)
        monkeypatch.setattr(hub_module, "hf_hub_download", download)


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
    with caplog.at_level(logging.INFO, "transformers_parakeet.hub"):
        logging.getLogger("transformers_parakeet.hub").propagate = True
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
        monkeypatch.setattr(hub_module, "HfApi", Unreachable)
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
