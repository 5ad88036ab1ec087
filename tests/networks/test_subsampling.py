"""Checks the subsampling against PyTorch's modules, and in chunks against the whole clip."""

import pytest
import torch
from conftest import encoder_fields, module_gradients
from torch import nn
from torch.nn import functional as F

import transformers_parakeet as tp
from transformers_parakeet.networks import subsampling
from transformers_parakeet.networks.subsampling import (
    ParakeetEncoderSubsamplingConv2D,
    apply_channels_last_conv,
    compute_chunk_margins,
)

ODD_SIZES = [1, 63, 500]
# float64 sums in another order; measured: up to 2e-15
EXACT = {"rtol": 0.0, "atol": 1e-12}


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


@pytest.fixture
def short_chunks(monkeypatch):
    """Reduce the chunks to 40 feature frames, 5 encoder frames, and projections to 80 feature frames."""
    monkeypatch.setattr(subsampling, "FRAMES_PER_CHUNK", 40)
    monkeypatch.setattr(subsampling, "FRAMES_PER_PROJECTION", 80)


def random_subsampling(**fields):
    """Return a subsampling module with random weights in float64."""
    torch.manual_seed(0)
    return ParakeetEncoderSubsamplingConv2D(tp.ParakeetEncoderConfig(**encoder_fields(**fields))).double().eval()


@pytest.mark.usefixtures("short_chunks", "poisoned_memory")
@pytest.mark.parametrize(
    "fields",
    [{}, {"causal_downsampling": True}, {"subsampling_conv_kernel_size": 5}, {"subsampling_factor": 4}],
    ids=["symmetric", "causal", "kernel5", "factor4"],
)
@pytest.mark.parametrize("frames", [1, 39, 40, 41, 47, 48, 49, 79, 80, 81, 120, 333])
def test_chunks_equal_the_whole_clip(frames, fields):
    module = random_subsampling(**fields)
    features = torch.randn(3, frames, 80, dtype=torch.float64)
    lengths = torch.tensor([frames, frames // 2, 0])
    for frame_lengths in (None, lengths):
        # with gradients, the whole clip is downsampled at once
        whole = module(features, frame_lengths)
        assert whole.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(module(features, frame_lengths), whole, **EXACT)


@pytest.mark.usefixtures("short_chunks")
def test_replaced_modules_are_called_for_every_chunk():
    module = random_subsampling()
    features, lengths = torch.randn(2, 100, 80, dtype=torch.float64), torch.tensor([100, 30])
    expected = module(features, lengths)
    for index in (0, 3):
        module.layers[index] = nn.Sequential(module.layers[index])
    with torch.no_grad():
        torch.testing.assert_close(module(features, lengths), expected, **EXACT)


def test_the_output_of_the_first_convolution_is_never_complete(monkeypatch):
    module = random_subsampling()
    monkeypatch.setattr(subsampling, "FRAMES_PER_CHUNK", 80)
    sizes = []
    module.layers[0].register_forward_hook(lambda conv, inputs, output: sizes.append(output.shape[2]))
    with torch.no_grad():
        module(torch.randn(1, 2000, 80, dtype=torch.float64))
    # 80 frames and the 8 frames of a margin, at half the rate
    assert max(sizes) == 44
    assert len(sizes) == 25


@pytest.mark.parametrize(("is_causal", "margins"), [(False, (1, 0)), (True, (2, 0))])
def test_the_margins_are_the_frames_that_zeros_at_the_ends_change(is_causal, margins):
    module = random_subsampling(causal_downsampling=is_causal)
    assert compute_chunk_margins(module.config) == margins
    features = torch.randn(1, 320, 80, dtype=torch.float64)
    whole, chunk = module(features)[0, 10:20], module(features[:, 80:160])[0, :10]
    is_equal = torch.isclose(whole, chunk, rtol=0, atol=1e-12).all(-1)
    assert is_equal.tolist() == [False] * margins[0] + [True] * (10 - margins[0])


def test_padding_frames_are_not_read_for_any_dtype_of_the_lengths():
    module = random_subsampling()
    features = torch.randn(2, 100, 80, dtype=torch.float64)
    with torch.no_grad():
        alone = module(features[:1, :61])
    features[0, 61:] = 1e9
    for dtype in (torch.long, torch.int32, torch.float32):
        with torch.no_grad():
            padded = module(features, torch.tensor([61, 100]).to(dtype))
        torch.testing.assert_close(padded[0, :8], alone[0], **EXACT)
        # a padding frame is the bias of the projection
        torch.testing.assert_close(padded[0, 8:], module.linear.bias.expand(5, -1), **EXACT)
