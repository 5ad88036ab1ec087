"""`parakeet verify` on a tiny checkpoint in a cache of the Hub, and without a network."""

import json
import sys

import jiwer
import pytest
import torch
from conftest import TESTS
from huggingface_hub import constants
from typer.testing import CliRunner
from verification.test_comparison import save_transducer

from transformers_parakeet import load_nemo
from transformers_parakeet.verification.checkpoint import CLIP, describe_machine, find_commit
from transformers_parakeet_cli.app import app

SENTENCES = TESTS / "data" / "sentences" / "manifest.jsonl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(*arguments):
    """Run the command in this process and return its result."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
