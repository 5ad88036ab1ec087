"""`parakeet verify` on tiny checkpoints in a folder and in a cache of the Hub, and without a network."""

import json
import re

import jiwer
import pytest
import torch
from conftest import TESTS
from huggingface_hub import constants
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from typer.testing import CliRunner
from verification_helpers import save_transducer

import transformers_parakeet as tp
from transformers_parakeet.verification import checkpoint, comparison
from transformers_parakeet_cli.app import app

SENTENCES = TESTS / "data" / "sentences" / "manifest.jsonl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
STOCK_RESULT = {"text": "", "tokens": [], "seconds": 2.0}


def run(*arguments):
    """Run the command in this process and return its result."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def read_table(output):
    """Return the rows of the Markdown table that the command printed, as a dict."""
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", output, re.MULTILINE))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache of the Hub with the repository `nvidia/parakeet-tiny`, a TDT model, of which it returns the folder."""
    cache = tmp_path / "home" / "hub"
    repository = cache / "models--nvidia--parakeet-tiny"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    save_transducer("tdt", folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return folder


def test_a_model_in_the_cache_equals_stock_transformers_and_is_scored(hub_cache):
    result = run("verify", "nvidia/parakeet-tiny", "--data", SENTENCES, "--clips", 3, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    table = read_table(result.stdout)
    assert table["model"] == f"nvidia/parakeet-tiny at {COMMIT}"
    model, processor = tp.load_nemo(hub_cache)
    pipe = tp.ParakeetASRPipeline(model, processor=processor)
    num_tokens = len(pipe(str(checkpoint.CLIP), return_timestamps="char")["chunks"])
    assert table["equal to stock transformers"] == f"yes: {num_tokens} tokens with their times, and the text"
    assert num_tokens > 10
    assert table["text of the bundled clip"] == pipe(str(checkpoint.CLIP))["text"]
    rows = [json.loads(line) for line in SENTENCES.read_text().splitlines()[:3]]
    normalize = EnglishTextNormalizer({})
    texts = [pipe(str(SENTENCES.parent / row["audio_filepath"]))["text"] for row in rows]
    expected = jiwer.wer([normalize(row["text"]) for row in rows], [normalize(text) for text in texts])
    assert float(table["word error rate (95 % interval)"].split("%")[0]) / 100 == pytest.approx(expected, abs=1e-4)
    assert table["test data"].startswith(f"{SENTENCES}, the first 3 clips, ")
    assert f"torch {torch.__version__}" in table["versions"]
    assert result.stderr.splitlines()[-1] == "next: paste the table into an issue of transformers-parakeet"


def test_a_difference_is_printed_and_sets_the_exit_status(golden, monkeypatch):
    monkeypatch.setattr(comparison, "run_stock", lambda folder, clip: (STOCK_RESULT, ""))
    # without clips, no data is read
    result = run("verify", golden / "ctc" / "model.nemo", "--clips", 0, "--data", "missing.jsonl")
    assert result.exit_code == 1
    table = read_table(result.stdout)
    assert re.match(
        r"no: tokens: \d+ against 0 of stock, equal up to number 0; text: ", table["equal to stock transformers"]
    )
    assert "model.nemo differs from stock transformers: tokens" in result.stderr
    assert "converting the .nemo file to a temporary folder" in result.stderr
    assert not [name for name in table if name.startswith("word error rate")]


def test_without_a_network_the_error_names_what_to_do(hub_cache):
    result = run("verify", "nvidia/parakeet-tdt-0.6b-v3")
    assert result.exit_code == 1
    assert "the cache does not contain nvidia/parakeet-tdt-0.6b-v3" in result.stderr
    result = run("verify", "nvidia/parakeet-tiny", "--clips", 2)
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("LibriSpeech test-clean must be downloaded from the Hub, but it cannot be reached (")
    assert "`--data`" in error
    assert "`--clips 0`" in error


def test_a_path_that_does_not_exist_is_named():
    result = run("verify", "missing.nemo")
    assert result.exit_code == 1
    assert "the file missing.nemo does not exist" in result.stderr


def test_only_a_path_in_the_cache_has_a_commit(tmp_path):
    folder = tmp_path / "models--nvidia--x" / "snapshots" / COMMIT
    assert checkpoint.find_commit(folder) == COMMIT
    assert checkpoint.find_commit(folder / "model.nemo") == COMMIT
    assert checkpoint.find_commit(tmp_path / "snapshots" / "model.nemo") is None


def test_the_machine_without_a_gpu_has_no_gpu():
    machine = checkpoint.describe_machine(torch.device("cpu"))
    assert machine.keys() == {"system", "CPU"}
    assert machine["CPU"].endswith(f"{torch.get_num_threads()} threads")
