"""Checks that the search for the best output in bfloat16 finds what float64 finds."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from transformers_parakeet.networks import fast_linear as screening
from transformers_parakeet.networks.fast_linear import ScreenedLinear


def layer(outputs: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and rows as in a joint network: the rows went through a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.08 * torch.randn(outputs, width, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    return weight, bias, torch.randn(24, width, generator=generator).relu()


def exact(weight: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    return F.linear(hidden.double(), weight.double(), bias.double()).argmax(-1)


@pytest.mark.parametrize(("outputs", "width"), [(1, 8), (2, 3), (37, 16), (1025, 640), (8193, 640)])
def test_the_best_output_is_that_of_float64(outputs: int, width: int):
    for seed in range(5):
        weight, bias, hidden = layer(outputs, width, seed)
        assert torch.equal(ScreenedLinear(weight, bias).argmax(hidden), exact(weight, bias, hidden))


def test_rounding_alone_would_choose_otherwise():
    weight, bias, _ = layer(8193, 640)
    hidden = torch.randn(400, 640, generator=torch.Generator().manual_seed(1)).relu()
    rounded = F.linear(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16()).argmax(-1)
    truth = exact(weight, bias, hidden)
    assert not torch.equal(rounded, truth)
    assert torch.equal(ScreenedLinear(weight, bias).argmax(hidden), truth)


def test_near_ties_are_decided_in_float32():
    weight, bias, hidden = layer(2000, 640)
    # every output has a twin that is better by a thousandth of what bfloat16 can tell apart
    twins = torch.cat([weight, weight])
    bias = torch.cat([bias, bias + 2e-5])
    best = ScreenedLinear(twins, bias).argmax(hidden)
    assert torch.equal(best, exact(twins, bias, hidden))
    assert bool((best >= 2000).all())


def test_of_equal_outputs_the_first_is_taken():
    weight, bias, hidden = layer(500, 64)
    best = ScreenedLinear(torch.cat([weight, weight, weight]), bias.repeat(3)).argmax(hidden)
    assert torch.equal(best, exact(weight, bias, hidden))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0])
def test_scales_and_shifts(scale: float, shift: float):
    weight, bias, hidden = layer(1025, 128)
    weight[7] *= 30.0
    bias[3] += 4.0
    weight, bias = scale * weight, scale * bias + shift
    assert torch.equal(ScreenedLinear(weight, bias).argmax(hidden), exact(weight, bias, hidden))


def test_few_outputs_are_computed_again(monkeypatch):
    weight, bias, hidden = layer(8193, 640)
    taken = []
    product = torch.linalg.vecdot
    monkeypatch.setattr(torch.linalg, "vecdot", lambda left, right: taken.append(len(left)) or product(left, right))
    ScreenedLinear(weight, bias).argmax(hidden)
    # measured: 5.6 per row
    assert len(hidden) < taken[0] < 6 * len(hidden)


def test_where_nothing_stands_out_all_outputs_are_computed(monkeypatch):
    weight, _, hidden = layer(4000, 64)
    monkeypatch.setattr(torch.linalg, "vecdot", None)
    # every output is the best within rounding
    flat = weight[:1] + 1e-4 * weight
    none = torch.zeros(4000)
    assert torch.equal(ScreenedLinear(flat, none).argmax(hidden), F.linear(hidden, flat, none).max(-1).indices)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_rows_that_are_not_finite(value: float):
    weight, bias, hidden = layer(4000, 64)
    hidden[3, 5] = value
    assert torch.equal(ScreenedLinear(weight, bias).argmax(hidden), F.linear(hidden, weight, bias).max(-1).indices)


def test_what_it_suits(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert ScreenedLinear.suits(torch.zeros(2048, 512))
    assert not ScreenedLinear.suits(torch.zeros(2047, 512))
    assert not ScreenedLinear.suits(torch.zeros(2048, 512, dtype=torch.float64))
    assert not ScreenedLinear.suits(torch.zeros(2048, 512, device="meta"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert not ScreenedLinear.suits(torch.zeros(2048, 512))
    assert screening.WORTHWHILE == 2048 * 512
