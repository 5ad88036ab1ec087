"""Checks the subsampling against PyTorch's modules, and in chunks against the whole clip."""

import pytest
import torch
from conftest import encoder_fields
from torch import nn
from torch.nn import functional as F

import transformers_parakeet as tp
from transformers_parakeet.networks.subsampling import (
    ParakeetEncoderSubsamplingConv2D,
    apply_channels_last_conv,
)

ODD_SIZES = [1, 63, 500]
# float64 sums in another order; measured: up to 2e-15
EXACT = {"rtol": 0.0, "atol": 1e-12}


@pytest.fixture
def poisoned_memory():
    """Fill uninitialised memory with NaN, so that reading it changes a result."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def module_gradients(output, inputs):
    """Return the gradients of a fixed function of the output."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("frames", ODD_SIZES)
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (16, 16), (16, 1)])
def test_a_channels_last_convolution_equals_conv2d(frames, channels, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 16, 3, stride=2, padding=1, groups=groups).double()
    images = torch.randn(2, channels, frames, 13).double().requires_grad_()
    plain, fast = conv(images), apply_channels_last_conv(conv, images)
    torch.testing.assert_close(fast, plain, **EXACT)
    assert fast.is_contiguous(memory_format=torch.channels_last)
    inputs = [images, *conv.parameters()]
    torch.testing.assert_close(module_gradients(fast, inputs), module_gradients(plain, inputs), **EXACT)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("frames", ODD_SIZES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_subsampling_equals_its_layers_called_in_turn(frames, is_causal):
    torch.manual_seed(0)
    config = tp.ParakeetEncoderConfig(**encoder_fields(causal_downsampling=is_causal))
    module = ParakeetEncoderSubsamplingConv2D(config).double()
    features = torch.randn(2, frames, 80).double()
    hidden = features[:, None]
    for layer in module.layers:
        if is_causal and getattr(layer, "stride", None) == (2, 2):
            hidden = F.pad(hidden, (2, 1, 2, 1))
        hidden = layer(hidden)
    expected = module.linear(hidden.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(features), expected, **EXACT)
