"""Checks the optimised convolutions of the encoder against PyTorch's modules; test_modeling.py checks the encoder."""

import pytest
import torch
from conftest import encoder_fields, module_gradients
from torch import nn
from torch.nn import functional as F

import transformers_parakeet as tp
from transformers_parakeet.networks import conformer
from transformers_parakeet.networks.conformer import (
    ParakeetEncoderConvolutionModule,
    ParakeetEncoderFeedForward,
    ParakeetEncoderRelPositionalEncoding,
    activate,
    apply_depthwise_conv,
    fold_batch_norm,
)

ODD_SIZES = [1, 63, 500]
# float64 sums in another order; measured: up to 2e-15
EXACT = {"rtol": 0.0, "atol": 1e-12}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_position_embeddings_do_not_lose_precision_in_a_half_precision_model(dtype):
    encode_positions = ParakeetEncoderRelPositionalEncoding(tp.ParakeetEncoderConfig(**encoder_fields())).to(dtype)
    positions = torch.arange(999, -1000, -1, dtype=torch.float64)[:, None]
    angles = positions * 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    expected = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    embeddings = encode_positions(torch.zeros(1, 1000, 32, dtype=dtype))
    assert embeddings.dtype == dtype
    # at most half a unit in the last place below 1, and 1e-4 for the angles in float32
    torch.testing.assert_close(embeddings.double(), expected, atol=torch.finfo(dtype).eps / 2 + 1e-4, rtol=0)


def batch_norm(width):
    """Return a batch norm in evaluation mode with random statistics and parameters."""
    norm = nn.BatchNorm1d(width).double().eval()
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frames", ODD_SIZES)
def test_a_depthwise_convolution_equals_conv1d(frames, bias):
    torch.manual_seed(0)
    conv = nn.Conv1d(17, 17, 9, padding=4, groups=17, bias=bias).double()
    hidden = torch.randn(2, frames, 17).double().requires_grad_()
    plain = conv(hidden.transpose(1, 2)).transpose(1, 2)
    fast = apply_depthwise_conv(hidden, conv.weight, conv.bias, 4)
    torch.testing.assert_close(fast, plain, **EXACT)
    inputs = [hidden, *conv.parameters()]
    torch.testing.assert_close(module_gradients(fast, inputs), module_gradients(plain, inputs), **EXACT)


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_batch_norm_equals_convolution_and_norm(bias):
    torch.manual_seed(0)
    conv, norm = nn.Conv1d(17, 17, 9, padding=4, groups=17, bias=bias).double(), batch_norm(17)
    hidden = torch.randn(2, 17, 63).double()
    weight, folded_bias = fold_batch_norm(conv, norm)
    folded = F.conv1d(hidden, weight, folded_bias, padding=4, groups=17)
    # the filter is folded in float32; measured: 8e-7
    torch.testing.assert_close(folded, norm(conv(hidden)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 3, 7, 8, 9, 30])
def test_the_feed_forward_module_in_ranges_of_frames_equals_its_layers(frames, monkeypatch):
    torch.manual_seed(0)
    module = ParakeetEncoderFeedForward(tp.ParakeetEncoderConfig(**encoder_fields())).double().eval()
    hidden = torch.randn(2, frames, 32).double()
    expected = module.linear2(F.silu(module.linear1(hidden)))
    # the inner activations of 4 frames of 2 clips
    monkeypatch.setattr(conformer, "FEED_FORWARD_WORKSPACE_BYTES", 4 * 2 * 48 * 8)
    sizes = []
    module.linear1.register_forward_hook(lambda linear, inputs, output: sizes.append(output.shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(module(hidden), expected, **EXACT)
    assert sizes == [4] * (frames // 4) + [frames % 4] * (frames % 4 > 0)
    # with gradients, all frames are computed at once
    torch.testing.assert_close(module(hidden), expected, **EXACT)
    assert sizes[-1] == frames


@pytest.mark.parametrize("training", [False, True])
def test_the_convolution_module_ignores_frames_outside_the_clips(training):
    torch.manual_seed(0)
    module = ParakeetEncoderConvolutionModule(tp.ParakeetEncoderConfig(**encoder_fields(conv_norm_type="layer_norm")))
    module.double().train(training)
    hidden, valid = torch.randn(2, 63, 32).double(), torch.arange(63) < torch.tensor([[63], [20]])
    changed = torch.where(valid[..., None], hidden, 1e3)
    torch.testing.assert_close(module(changed, valid)[valid], module(hidden, valid)[valid], **EXACT)


def test_an_activation_overwrites_its_input_only_if_nothing_else_needs_it():
    source, silu = nn.Linear(3, 3), nn.SiLU()
    own_silu = tp.networks.conformer.ACT2FN["silu"]
    hidden = torch.randn(5, 3)
    expected = F.silu(hidden)
    with torch.no_grad():
        torch.testing.assert_close(activate(silu, hidden, source), expected)
        overwritten = hidden.clone()
        assert activate(own_silu, overwritten, source) is overwritten
        torch.testing.assert_close(overwritten, expected)
        source.register_forward_hook(lambda module, inputs, output: None)
        assert activate(own_silu, hidden, source) is not hidden
    assert activate(own_silu, hidden, nn.Linear(3, 3)) is not hidden
    torch.testing.assert_close(own_silu(hidden), expected)
