"""Int8 layers, compared with float64 at odd sizes, and their state dict, copies and refusals."""

import copy
import pickle

import pytest
import torch
from torch import nn

from transformers_parakeet.networks.int8_linear import (
    Int8Linear,
    Int8PointwiseConv,
    get_int8_class,
    has_int8_products,
    quantize_rows,
)

needs_int8 = pytest.mark.skipif(not has_int8_products(), reason="needs a CPU with VNNI or AMX instructions")

# half a step, and the rounding of float32 in `row * (127 / maximum)`: 2 roundings of a value up to 127
HALF_STEP = 0.5 + 127 * 2.0**-22
# (rows, inputs, outputs)
SIZES = [(1, 64, 256), (63, 511, 131), (500, 130, 7), (1, 1, 1), (63, 3, 5), (500, 256, 1024)]


def random_linear(num_inputs, num_outputs, seed=0, has_bias=True):
    """Return a linear layer whose output channels have different scales."""
    torch.manual_seed(seed)
    layer = nn.Linear(num_inputs, num_outputs, bias=has_bias).eval()
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-3, 2, num_outputs)[:, None])
    return layer


def random_rows(num_rows, width, seed=1):
    """Return rows with different scales, some outliers and a row of zeros."""
    rows = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))
    rows *= torch.logspace(-4, 4, num_rows)[:, None]
    rows[:, 0] *= 20
    if num_rows > 2:
        rows[2] = 0
    return rows


@pytest.mark.parametrize("size", SIZES)
def test_rounding_error_of_rows_is_at_most_half_a_step(size, poisoned_memory):
    rows = random_rows(*size[:2])
    values, scales = quantize_rows(rows)
    maxima = rows.double().abs().amax(1, keepdim=True)
    assert torch.allclose(scales.double(), maxima / 127, rtol=1e-6, atol=1e-30)
    assert (values.double() * scales - rows).abs().le(HALF_STEP * maxima / 127).all()
    # the largest value of a row is 127 or -127
    assert torch.equal(values.int().abs().amax(1), torch.where(maxima[:, 0] > 0, 127, 0).int())


@needs_int8
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_the_product_differs_from_float64_by_at_most_the_quantisation_step(size, has_bias, poisoned_memory):
    num_rows, num_inputs, num_outputs = size
    layer = random_linear(num_inputs, num_outputs, has_bias=has_bias)
    rows = random_rows(num_rows, num_inputs)
    int8_layer = Int8Linear.from_float(layer)
    output = int8_layer(rows).double()
    weight, inputs = layer.weight.detach().double(), rows.double()
    bias = layer.bias.detach().double() if has_bias else 0
    # sums of the rounded numbers are exact. Their float32 results are rounded in at most 5 operations, one of which can
    # be before the product of the zero point 128 and the weights is subtracted.
    values, scales = quantize_rows(rows)
    rounded_inputs = values.double() * scales.double()
    rounded_weight = int8_layer.get_weight().double() * int8_layer.weight_scale.double()[:, None]
    product = rounded_inputs @ rounded_weight.T
    zero_point_product = 128 * scales.double() * rounded_weight.abs().sum(1)
    rounding = 5 * 2.0**-24 * (product.abs() + zero_point_product + abs(bias)) + 1e-30
    assert (output - product - bias).abs().le(rounding).all()
    # |x w - x' w'| <= |x| |w - w'| + |x - x'| |w'|, summed over the inputs
    weight_steps = HALF_STEP * weight.abs().amax(1) / 127
    input_steps = HALF_STEP * inputs.abs().amax(1, keepdim=True) / 127
    bound = inputs.abs().sum(1, keepdim=True) * weight_steps + input_steps * rounded_weight.abs().sum(1)
    assert (output - inputs @ weight.T - bias).abs().le(bound + rounding).all()


@needs_int8
def test_the_largest_sums_of_products_do_not_saturate():
    layer = nn.Linear(4096, 33, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    for sign in (1.0, -1.0):
        output = Int8Linear.from_float(layer.eval())(torch.full((17, 4096), sign))
        assert torch.allclose(output, torch.full((17, 33), sign * 8192.0), rtol=1e-6)


@needs_int8
@pytest.mark.parametrize("size", [(63, 511, 131), (500, 256, 1024)])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_beside_padding(size):
    num_rows, num_inputs, num_outputs = size
    layer = Int8Linear.from_float(random_linear(num_inputs, num_outputs))
    rows = random_rows(num_rows, num_inputs)
    together = layer(rows)
    for index in (0, 1, 2, num_rows // 2, num_rows - 1):
        assert torch.equal(layer(rows[index : index + 1])[0], together[index])
    padded = torch.cat([rows, torch.full((3, num_inputs), 1e6)])
    assert torch.equal(layer(padded)[:num_rows], together)
    assert torch.equal(layer(rows.view(-1, 1, num_inputs))[:, 0], together)
    permutation = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(rows[permutation]), together[permutation])


@needs_int8
def test_nan_in_a_row_changes_only_this_row():
    layer, rows = Int8Linear.from_float(random_linear(64, 32)), random_rows(5, 64)
    expected = layer(rows)
    rows[1, 7] = torch.nan
    output = layer(rows)
    assert output[1].isnan().all()
    assert torch.equal(output[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_and_other_dtypes(dtype):
    layer = Int8Linear.from_float(random_linear(64, 32).to(dtype))
    assert layer(torch.zeros(2, 0, 64, dtype=dtype)).shape == (2, 0, 32)
    rows = random_rows(9, 64).to(dtype)
    output = layer(rows)
    assert output.dtype == dtype
    # the result is computed in float32 and rounded once
    assert torch.equal(output, layer(rows.float()).to(dtype))


@needs_int8
def test_a_pointwise_convolution_equals_the_linear_layer():
    conv = nn.Conv1d(48, 96, 1).eval()
    linear = nn.Linear(48, 96).eval()
    linear.weight.data, linear.bias.data = conv.weight.data[..., 0], conv.bias.data
    hidden = torch.randn(2, 63, 48)
    int8_conv = Int8PointwiseConv.from_float(conv)
    output = int8_conv(hidden.transpose(1, 2))
    assert torch.equal(output.transpose(1, 2), Int8Linear.from_float(linear)(hidden))
    assert int8_conv.state_dict()["weight"].shape == (96, 48, 1)


@needs_int8
@pytest.mark.parametrize("layer", [nn.Linear(37, 21), nn.Conv1d(37, 21, 1, bias=False)])
def test_the_state_dict_contains_int8_weights_and_loads_into_another_layer(layer):
    int8_class = get_int8_class(layer)
    int8_layer = int8_class.from_float(layer.eval())
    state = int8_layer.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "weight": torch.int8,
        "weight_scale": torch.float32,
        **({} if layer.bias is None else {"bias": torch.float32}),
    }
    weight = state["weight"].double() * state["weight_scale"].double().view(-1, *[1] * (layer.weight.ndim - 1))
    steps = layer.weight.detach().flatten(1).abs().amax(1).double() / 127
    assert (weight - layer.weight).flatten(1).abs().le(HALF_STEP * steps[:, None]).all()
    inputs = torch.randn(2, 37, 5) if layer.weight.ndim == 3 else torch.randn(5, 37)
    expected = int8_layer(inputs)
    # a layer without a packed weight, and a layer that replaces its packed weight
    empty = int8_class.create_empty(layer).eval()
    empty.load_state_dict(state)
    empty.pack()
    other = int8_class.from_float(negate(layer))
    assert not torch.equal(other(inputs), expected)
    other.load_state_dict(state)
    for loaded in (empty, other, copy.deepcopy(int8_layer), pickle.loads(pickle.dumps(int8_layer))):
        assert torch.equal(loaded(inputs), expected)
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())
    restored = int8_layer.to_float(torch.float32)
    assert type(restored) is type(layer)
    assert torch.allclose(restored.weight.double(), weight, rtol=1e-6)


def negate(layer):
    """Return a copy of a layer with the opposite weight."""
    copied = copy.deepcopy(layer)
    copied.weight.data.neg_()
    return copied


@needs_int8
def test_a_change_of_dtype_keeps_the_scales():
    layer = Int8Linear.from_float(random_linear(64, 32))
    scale, rows = layer.weight_scale.clone(), random_rows(3, 64)
    layer.to(torch.bfloat16).float()
    assert torch.equal(layer.weight_scale, scale)
    assert layer(rows).isfinite().all()


@needs_int8
def test_training_and_unloaded_weights_are_refused():
    layer = Int8Linear.from_float(random_linear(8, 8))
    with pytest.raises(RuntimeError, match=r"training=True.*call `model.eval\(\)`"):
        layer.train()(torch.zeros(1, 8))
    with pytest.raises(RuntimeError, match="packed=False"):
        Int8Linear(8, 8, has_bias=True).eval()(torch.zeros(1, 8))
    with pytest.raises(RuntimeError, match="device=meta"):
        layer.eval()(torch.zeros(1, 8, device="meta"))


def test_only_unmodified_layers_are_replaced():
    class Adapter(nn.Linear):
        pass

    assert get_int8_class(nn.Linear(2, 2)) is Int8Linear
    assert get_int8_class(nn.Conv1d(2, 2, 1)) is Int8PointwiseConv
    layers = [Adapter(2, 2), nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 1, groups=2), nn.Conv1d(2, 2, 1, padding=1)]
    assert [get_int8_class(layer) for layer in layers] == [None] * 4


@pytest.mark.parametrize("capabilities", [{}, {"avx2": True, "avx512_f": True, "avx512_vnni": False}])
def test_a_cpu_without_int8_instructions_is_recognised(capabilities, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert not has_int8_products.__wrapped__()
