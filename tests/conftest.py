"""Fixtures: tiny models and tokenizers, golden files, and stock transformers in a process of its own."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

import transformers_parakeet as tp

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# on models this small a second thread costs more than it brings
torch.set_num_threads(1)

# run by test_neighbours.py in a process of its own
collect_ignore = ["neighbours"]

TESTS = Path(__file__).parent
WORDS = ["the quick brown fox jumps over the lazy dog", "she sells sea shells by the sea shore, again."] * 8


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of NeMo's own numbers."""
    return TESTS / "golden"


def pytest_collection_modifyitems(items):
    """Refuse names of tests that differ between two runs: pytest-xdist compares those of its processes."""
    changing = [item.nodeid for item in items if re.search(r"\b0x[0-9a-f]{6,}", item.nodeid)]
    if changing:
        raise pytest.UsageError(f"a test's id must not hold the address of an object, give ids: {changing[:3]}")


def encoder_fields(**changes):
    """Fields of an encoder that runs in milliseconds."""
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
    """A trained BPE tokenizer in the layout of the released checkpoints."""
    backend = Tokenizer(BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    special = ["<unk>"] if kind == "ctc" else ["<unk>", "<|nospeech|>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=size - 1, special_tokens=special, show_progress=False)
    backend.train_from_iterator(WORDS, trainer)
    backend.add_special_tokens(["<pad>" if kind == "ctc" else "<blank>"])
    return tp.ParakeetTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def noise(seconds, seed=0):
    """A clip of noise, 16 kHz."""
    return (0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))).astype(np.float32)


def ctc_model(seed=0, **changes):
    """A random CTC model that fits `tiny_tokenizer()`."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = tp.ParakeetCTCConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, encoder_config=encoder_fields(**changes)
    )
    return tp.ParakeetForCTC(config).eval(), tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tokenizer)


def run_stock(code, *arguments):
    """Run a program with stock transformers, in a process that never imports this package; return what it prints."""
    return run_program(code, *arguments, PYTHONPATH="")


def run_program(code, *arguments, status=0, **environment):
    """Run a program in a process of its own; return what it prints, with another status than 0 also its errors."""
    program = textwrap.dedent(code)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **environment}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)], capture_output=True, text=True, env=env
    )
    assert done.returncode == status, done.stderr[-3000:]
    return (done.stdout, done.stderr) if status else done.stdout
