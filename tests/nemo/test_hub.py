"""Finding checkpoints: paths, folders, Hub ids, and the cache without a network."""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import TESTS, run_program
from huggingface_hub import constants
from typer.testing import CliRunner

import transformers_parakeet as tp
from transformers_parakeet import load_nemo
from transformers_parakeet.nemo import download_checkpoint
from transformers_parakeet_cli.app import app

GOLDEN = TESTS / "golden"
CTC = GOLDEN / "ctc" / "model.nemo"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# port 9 (discard), on which no server listens
UNREACHABLE = "http://127.0.0.1:9"


def same_weights(model, expected_model):
    """Return whether two models have the same weights, bit for bit."""
    weights, expected = model.state_dict(), expected_model.state_dict()
    return weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)


class FakeHub:
    """An HTTP server with one repository that implements the requests of the Hub that downloads need.

    `requests` holds method, path and token of every request; `status` other than 200 makes every answer an error.
    """

    def __init__(self, repo="nvidia/parakeet"):
        self.repo, self.files, self.requests, self.status = repo, {}, [], 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(with_body=False)

            def do_GET(self):
                self.answer(with_body=True)

            def answer(self, with_body):
                hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
                status, headers, body = hub.answer(self.path)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path):
        """Return status, headers and body of the answer to a request."""
        parts = path.partition("?")[0].strip("/").split("/")
        if self.status != 200:
            return self.status, {}, b"{}"
        if "/".join(parts[:4]) == f"api/models/{self.repo}":
            if parts[4:] and parts[5] not in ("main", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            if parts[4:5] == ["tree"]:
                entries = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in sorted(self.files)]
                return 200, {}, json.dumps(entries).encode()
            names = [{"rfilename": name} for name in sorted(self.files)]
            return 200, {}, json.dumps({"id": self.repo, "sha": COMMIT, "siblings": names}).encode()
        if "/".join(parts[:2]) != self.repo:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        name = "/".join(parts[4:])
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        body = Path(self.files[name]).read_bytes()
        return 200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body

    def downloads(self):
        """Return the names of the files that were downloaded."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


@pytest.fixture(scope="module")
def server():
    """Run one fake Hub for all tests of the file."""
    hub = FakeHub()
    yield hub
    hub.server.shutdown()


@pytest.fixture
def hub(server, monkeypatch):
    """Return the fake Hub without files, and make huggingface_hub use it."""
    server.files, server.requests, server.status = {}, [], 200
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # transformers creates this client once per process, with the endpoint of that moment; an earlier test can have
    # created it with the endpoint of the real Hub, and requests to it are repeated for a minute
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    return server


def demo_files():
    """Return the files of the demo model, a folder in the format of transformers, by name."""
    return {path.name: path for path in tp.demo_model_path().iterdir() if path.suffix in (".json", ".safetensors")}


def test_the_nemo_file_of_a_hub_repository_is_loaded(hub, tmp_path):
    hub.files = {"parakeet.nemo": CTC, "config.json": tp.demo_model_path() / "config.json"}
    # safetensors in a sub-folder belong to another format
    hub.files["onnx/model.safetensors"] = tp.demo_model_path() / "config.json"
    model, _ = load_nemo("nvidia/parakeet", revision="main", token="secret", cache_dir=tmp_path)
    assert same_weights(model, load_nemo(CTC)[0])
    assert hub.downloads() == ["parakeet.nemo"]
    tokens = [token for _, path, token in hub.requests if "nvidia/parakeet" in path]
    assert tokens == ["Bearer secret"] * 3


def test_of_several_nemo_files_the_one_with_the_name_of_the_repository_is_loaded(hub, tmp_path):
    hub.files = {"parakeet.nemo": CTC, "other.nemo": CTC}
    load_nemo("nvidia/parakeet", cache_dir=tmp_path)
    assert hub.downloads() == ["parakeet.nemo"]
    hub.files = {"one.nemo": CTC, "two.nemo": CTC}
    with pytest.raises(FileNotFoundError, match=r"\.nemo file or safetensors, but it contains one\.nemo, two\.nemo"):
        load_nemo("nvidia/parakeet", cache_dir=tmp_path)
    hub.files = {"README.md": CTC}
    with pytest.raises(FileNotFoundError, match="it contains neither"):
        load_nemo("nvidia/parakeet", cache_dir=tmp_path)


def test_safetensors_on_the_hub_are_preferred_with_a_warning(hub, tmp_path, caplog, monkeypatch):
    hub.files = {**demo_files(), "parakeet.nemo": CTC}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.INFO, "transformers_parakeet.nemo.hub"):
        logging.getLogger("transformers_parakeet.nemo.hub").propagate = True
        model, processor = load_nemo("nvidia/parakeet", revision="main", cache_dir=tmp_path)
    assert "nvidia/parakeet contains safetensors, so parakeet.nemo is not loaded" in caplog.text
    assert same_weights(model, load_nemo(tp.demo_model_path())[0])
    assert processor.decoder_type == "tdt"
    assert "parakeet.nemo" not in hub.downloads()


def test_a_checkpoint_is_downloaded_without_the_files_of_other_formats(hub, tmp_path):
    hub.files = {**demo_files(), "onnx/model.safetensors": CTC, "README.md": CTC}
    folder = download_checkpoint("nvidia/parakeet", cache_dir=tmp_path)
    assert folder.name == COMMIT
    assert {path.name for path in folder.rglob("*") if path.is_file()} == demo_files().keys()
    assert same_weights(load_nemo(folder)[0], load_nemo(tp.demo_model_path())[0])
    hub.files = {"parakeet.nemo": CTC}
    assert download_checkpoint("nvidia/parakeet", cache_dir=tmp_path).name == "parakeet.nemo"
    assert download_checkpoint(CTC) == CTC


@pytest.mark.parametrize("obstacle", ["local_files_only", "offline", "no connection", "server error"])
@pytest.mark.parametrize("form", ["nemo", "safetensors"])
def test_without_the_hub_the_cache_is_used_at_once(obstacle, form, hub, tmp_path, monkeypatch):
    hub.files = {"model.nemo": CTC} if form == "nemo" else demo_files()
    expected, _ = load_nemo("nvidia/parakeet", cache_dir=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", obstacle == "offline")
    hub.requests.clear()
    if obstacle == "no connection":
        monkeypatch.setattr(constants, "ENDPOINT", UNREACHABLE)
        template = UNREACHABLE + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    hub.status = 503 if obstacle == "server error" else 200
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    local = {"cache_dir": tmp_path, "local_files_only": obstacle == "local_files_only"}
    model, processor = load_nemo("nvidia/parakeet", **local)
    assert same_weights(model, expected)
    assert processor.decoder_type == ("ctc" if form == "nemo" else "tdt")
    # at most one request for the list of files, no request for a file, no repetition
    assert len(hub.requests) == (1 if obstacle == "server error" else 0)
    assert waits == []
    with pytest.raises(OSError, match="the cache does not contain nvidia/unknown") as error:
        load_nemo("nvidia/unknown", **local)
    assert "\n" not in str(error.value)
    assert waits == []


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("nvidia/unknown", {}, "nor a Hub repository that you can access"),
        ("nvidia/parakeet", {"revision": "v9"}, "has no revision 'v9'"),
    ],
)
def test_a_refusal_of_the_hub_is_explained_in_one_line(repo, options, message, hub, tmp_path):
    hub.files = {"model.nemo": CTC}
    with pytest.raises(OSError, match=message) as error:
        load_nemo(repo, cache_dir=tmp_path, **options)
    assert "\n" not in str(error.value)


def test_the_command_prints_one_line_if_the_hub_cannot_be_reached(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", UNREACHABLE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    clip = next((tp.demo_model_path() / "clips").glob("*.flac"))
    result = CliRunner().invoke(app, ["transcribe", str(clip), "--model", "nvidia/parakeet"], env={"COLUMNS": "60"})
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "the Hub cannot be reached (ConnectError" in result.stderr


PIPELINE = """
import sys
import transformers_parakeet
from transformers import pipeline
pipe = pipeline("automatic-speech-recognition", model=sys.argv[1])
print(type(pipe).__name__, pipe.model.config.model_type, pipe(sys.argv[2], return_timestamps="word")["chunks"][:2])
"""


@pytest.mark.parametrize("form", ["nemo", "safetensors", "both"])
def test_the_pipeline_accepts_a_hub_id(form, hub, tmp_path):
    hub.files = {} if form == "nemo" else demo_files()
    if form != "safetensors":
        hub.files["parakeet.nemo"] = GOLDEN / "rnnt" / "model.nemo"
    clip = GOLDEN / "clips" / "speech0.wav" if form == "nemo" else tp.demo_model_path() / "clips" / "one_two_three.flac"
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    printed = run_program(PIPELINE, "nvidia/parakeet", clip, **environment)
    local = GOLDEN / "rnnt" / "model.nemo" if form == "nemo" else tp.demo_model_path()
    model, processor = load_nemo(local)
    pipe = tp.ParakeetASRPipeline(
        model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor, device="cpu"
    )
    chunks = pipe(str(clip), return_timestamps="word")["chunks"][:2]
    assert chunks
    assert printed.strip() == f"ParakeetASRPipeline {model.config.model_type} {chunks}"
    assert ("parakeet.nemo" in hub.downloads()) == (form == "nemo")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_pipeline_accepts_a_nemo_file(kind, tmp_path):
    shutil.copy(CTC, tmp_path / "model.nemo")
    path = tmp_path / "model.nemo" if kind == "file" else tmp_path
    pipe = call_pipeline("automatic-speech-recognition", model=str(path), device="cpu", dtype="bfloat16")
    assert type(pipe) is tp.ParakeetASRPipeline
    assert pipe.model.dtype == torch.bfloat16
    with pytest.raises(OSError, match="nothing"):
        call_pipeline("automatic-speech-recognition", model=str(tmp_path.parent / "nothing"))


def call_pipeline(*args, **kwargs):
    """Call transformers' `pipeline` as a program gets it after importing this package."""
    from transformers import pipeline

    return pipeline(*args, **kwargs)


def test_folders_and_files_are_loaded_and_missing_ones_are_named(tmp_path, caplog):
    shutil.copy(CTC, tmp_path / "parakeet.nemo")
    assert same_weights(load_nemo(tmp_path)[0], load_nemo(str(tmp_path / "parakeet.nemo"))[0])
    model, _ = load_nemo(tp.demo_model_path())
    assert type(model).__name__ == json.loads((tp.demo_model_path() / "config.json").read_text())["architectures"][0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it contains neither"):
        load_nemo(tmp_path / "empty")
    for missing in ("none.nemo", "a/b.nemo", os.path.join(tmp_path, "none")):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_nemo(missing)


def test_a_folder_in_another_dtype_equals_from_pretrained(tmp_path):
    model, processor = load_nemo(CTC)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, expected = (
        load_nemo(tmp_path, dtype=torch.bfloat16)[0],
        tp.ParakeetForCTC.from_pretrained(tmp_path, dtype=torch.bfloat16),
    )
    assert same_weights(loaded, expected)
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in expected.state_dict().items()
    }
    assert (loaded.config.dtype, loaded.config.encoder_config.dtype) == (torch.bfloat16, torch.bfloat16)
