"""Checks token confidence against NeMo's formulas in float64 and against NeMo's own numbers."""

import json
from collections.abc import Callable
from itertools import groupby

import numpy as np
import pytest
import torch
from confidence64 import confidence64
from conftest import TESTS
from safetensors.torch import load_file

from transformers_parakeet.decoding import collapse_ctc, compute_token_confidence, greedy_decode_ctc

GOLDEN = TESTS / "golden"


@pytest.mark.parametrize("method", ["max_prob", "entropy"])
@pytest.mark.parametrize("vocab_size", [2, 29, 1025, 8193])
def test_confidence_equals_the_formula_in_float64(vocab_size: int, method: str):
    logits = 4 * torch.randn(5, 3, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    # a uniform distribution and a certain token
    logits[0, 0] = 0.0
    logits[0, 1, 1] = 200.0
    confidence = compute_token_confidence(logits, method)
    expected = np.apply_along_axis(confidence64, -1, logits.numpy(), method)
    # measured: 1.6e-6 with 8193 tokens, the error of torch's float32 softmax
    np.testing.assert_allclose(confidence.numpy(), expected, atol=5e-6, rtol=0.0)
    assert float(confidence[0, 0]) == pytest.approx(0.0, abs=1e-6)
    assert float(confidence[0, 1]) == pytest.approx(1.0, abs=1e-6)


def test_confidence_does_not_depend_on_a_constant_added_to_the_scores():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    for method in ("max_prob", "entropy"):
        expected = compute_token_confidence(logits + 50, method)
        torch.testing.assert_close(compute_token_confidence(logits.log_softmax(-1), method), expected)


def test_unknown_confidence_methods_are_refused():
    with pytest.raises(ValueError, match="must be one of max_prob, entropy, got 'margin'"):
        compute_token_confidence(torch.zeros(2, 3), "margin")


def aggregate_runs(tokens: list[int], values: list[float], blank_id: int, aggregate: Callable) -> list[float]:
    """Aggregate the values of every run of equal tokens that are not blank."""
    runs = groupby(zip(tokens, values, strict=True), key=lambda pair: pair[0])
    return [aggregate(value for _, value in run) for token, run in runs if token != blank_id]


@pytest.mark.parametrize("clip", ["speech0", "speech1", "speech2", "synthetic", "short"])
@pytest.mark.parametrize(("method", "name"), [("max_prob", "max_prob"), ("entropy", "entropy_default")])
def test_ctc_confidence_equals_nemo(clip: str, method: str, name: str):
    expected = json.loads((GOLDEN / "ctc" / "expected.json").read_text())
    arrays = load_file(GOLDEN / "ctc" / "arrays.safetensors")
    row, blank_id = expected["clips"].index(clip), expected["blank_id"]
    length = int(arrays["encoder_lengths"][row])
    log_probs = arrays["ctc_log_probs"][row : row + 1]
    tokens = greedy_decode_ctc(log_probs, torch.tensor([length]), blank_id)
    nemo = expected["ctc"]["single"][clip]
    assert tokens[0, :length].tolist() == nemo["raw_argmax"]
    frame_confidence = compute_token_confidence(log_probs, method)
    ours = aggregate_runs(nemo["raw_argmax"], frame_confidence[0, :length].tolist(), blank_id, min)
    # measured: 2.3e-6; the golden numbers are rounded to seven digits
    assert ours == pytest.approx(nemo[f"token_confidence.{name}"], abs=1e-5)
    assert collapse_ctc(tokens, blank_id, frame_confidence).to_lists()["confidence"] == ours
