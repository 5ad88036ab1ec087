"""Fixtures and helpers: tiny models and tokenizers, golden files, and programs that run in a separate process."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

import transformers_parakeet as tp

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# models this small run slower with two threads than with one
torch.set_num_threads(1)

# test_neighbours.py runs this folder in a separate process
collect_ignore = ["neighbours"]

TESTS = Path(__file__).parent
WORDS = ["the quick brown fox jumps over the lazy dog", "she sells sea shells by the sea shore, again."] * 8


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the folder of `.nemo` files and of what NeMo computes from them."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def demo_server():
    """Run `parakeet serve --model demo` in a separate process, and return the address of the server."""
    pytest.importorskip("fastapi")
    from serving_helpers import start_command

    with start_command() as (url, _):
        yield url


@pytest.fixture
def poisoned_memory():
    """Fill uninitialised memory with NaN, so that reading it changes a result."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    """Refuse test ids that contain the address of an object: pytest-xdist needs the same ids in all its processes."""
    with_address = [item.nodeid for item in items if re.search(r"\b0x[0-9a-f]{6,}", item.nodeid)]
    if with_address:
        raise pytest.UsageError(f"a test id must not contain the address of an object, got {with_address[:3]}: set ids")


def encoder_fields(**changes):
    """Return configuration fields of an encoder that runs in milliseconds.

    Args:
        **changes: fields with other values than the default ones here.
    """
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "subsampling_conv_channels": 16,
        "num_mel_bins": 80,
        "layerdrop": 0.0,
        "initializer_range": 0.2,
    }
    return {**fields, **changes}


def tiny_tokenizer(kind="ctc", size=120):
    """Train a BPE tokenizer whose special tokens have the same order as in the released checkpoints.

    Args:
        kind: "ctc", whose blank is "<pad>"; or a transducer, whose blank is "<blank>".
        size: number of tokens with the blank.
    """
    backend = Tokenizer(BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    special_tokens = ["<unk>"] if kind == "ctc" else ["<unk>", "<|nospeech|>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=size - 1, special_tokens=special_tokens, show_progress=False)
    backend.train_from_iterator(WORDS, trainer)
    backend.add_special_tokens(["<pad>" if kind == "ctc" else "<blank>"])
    return tp.ParakeetTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def noise(seconds, seed=0):
    """Generate white noise at 16 kHz, (S,) float32."""
    return (0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))).astype(np.float32)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with `0.wav`, 1 s long, and `1.wav`, 2 s long."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(2):
        soundfile.write(folder / f"{index}.wav", noise(1.0 + index, index), 16000)
    return folder


def module_gradients(output, inputs):
    """Return the gradients of a fixed function of the output."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


def ctc_model(seed=0, **changes):
    """Create a random CTC model and its processor with `tiny_tokenizer()`.

    Args:
        seed: seed of the weights.
        **changes: see `encoder_fields`.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = tp.ParakeetCTCConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, encoder_config=encoder_fields(**changes)
    )
    return tp.ParakeetForCTC(config).eval(), tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tokenizer)


def run_stock(code, *arguments):
    """Run a program in a separate process that does not import this package, and return its standard output.

    Args:
        code: Python source.
        *arguments: command line arguments of the program.
    """
    return run_program(code, *arguments, PYTHONPATH="")


def run_program(code, *arguments, status=0, **environment):
    """Run a program in a separate process and check its exit status.

    Args:
        code: Python source.
        *arguments: command line arguments of the program.
        status: expected exit status.
        **environment: environment variables to set.

    Returns:
        Its standard output; if `status` is not 0, a pair of standard output and standard error.
    """
    program = textwrap.dedent(code)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **environment}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)], capture_output=True, text=True, env=env
    )
    assert done.returncode == status, done.stderr[-3000:]
    return (done.stdout, done.stderr) if status else done.stdout
