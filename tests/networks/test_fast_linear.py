"""Checks every optimised linear layer against the plain one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformers_parakeet.networks import fast_linear
from transformers_parakeet.networks.fast_linear import (
    MAX_SMALL_BATCH,
    MEASURED_ROWS,
    apply_pointwise_conv,
    choose_product,
    is_unmodified,
    left_factor_linear,
    measure_products,
    probe_affine_layer,
    small_batch_linear,
    split_linear,
)

ODD_SIZES = [1, 63, 500]


def random_layer(num_outputs: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, bias and 24 rows as in a joint network, whose rows are outputs of a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.08 * torch.randn(num_outputs, width, generator=generator)
    bias = torch.randn(num_outputs, generator=generator)
    return weight, bias, torch.randn(24, width, generator=generator).relu()


# linear layers


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("product", [small_batch_linear, left_factor_linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_outputs", ODD_SIZES)
@pytest.mark.parametrize("rows", [*ODD_SIZES, 2, 64, 65])
def test_products_equal_linear(rows: int, num_outputs: int, dtype: torch.dtype, product, has_bias: bool):
    generator = torch.Generator().manual_seed(rows)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, 63), (num_outputs, 63), (num_outputs,))
    )
    bias = bias if has_bias else None
    exact = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    plain_error = (F.linear(hidden, weight, bias).double() - exact).abs().max()
    fast = product(hidden, weight, bias)
    assert fast.shape == (rows, num_outputs)
    assert fast.dtype == dtype
    # sums in another order; measured: at most 2.1 times the largest error of `F.linear`
    assert (fast.double() - exact).abs().max() <= 4 * plain_error + 1e-6


@pytest.mark.parametrize("product", [small_batch_linear, left_factor_linear])
@pytest.mark.parametrize("rows", ODD_SIZES)
def test_gradients_of_products_equal_those_of_linear(rows: int, product):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((rows, 63), (37, 63), (37,))]
    grad_outputs = torch.randn(rows, 37, generator=generator)
    plain = torch.autograd.grad(F.linear(*inputs), inputs, grad_outputs)
    fast = torch.autograd.grad(product(*inputs), inputs, grad_outputs)
    for fast_gradient, plain_gradient in zip(fast, plain, strict=True):
        # float32 sums of up to 500 products in another order; measured: 2e-5
        torch.testing.assert_close(fast_gradient, plain_gradient, atol=1e-4, rtol=0)


@pytest.fixture
def measurements(monkeypatch) -> list[int]:
    """Empty the cache of products, replace the measurement, and return the list of measured numbers of rows."""
    measured_rows: list[int] = []

    def measure(num_rows: int, weight: Tensor):
        measured_rows.append(num_rows)
        return left_factor_linear

    monkeypatch.setattr(fast_linear, "_fastest_products", {})
    monkeypatch.setattr(fast_linear, "measure_products", measure)
    return measured_rows


def test_a_product_is_measured_once_per_shape_dtype_and_number_of_threads(measurements, monkeypatch):
    weight = torch.zeros(512, 512)
    for num_rows in (1, 1, 20, 32, 17, 64, 33):
        assert choose_product(num_rows, weight) is left_factor_linear
    assert measurements == [1, 32, 64]
    choose_product(1, weight.bfloat16())
    choose_product(1, torch.zeros(1024, 512))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    choose_product(1, torch.ones(512, 512))
    assert measurements == [1, 32, 64, 1, 1, 1]
    assert MEASURED_ROWS[-1] == MAX_SMALL_BATCH


def test_threads_measure_a_product_once(measurements):
    weight = torch.zeros(512, 512)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: choose_product(3, weight), range(64))) == {left_factor_linear}
    assert measurements == [3]


def test_small_weights_and_large_batches_and_other_dtypes_are_not_measured(measurements):
    small_batch_linear(torch.zeros(1, 511), torch.zeros(512, 511))
    small_batch_linear(torch.zeros(65, 512), torch.zeros(512, 512))
    small_batch_linear(torch.zeros(0, 512), torch.zeros(512, 512))
    small_batch_linear(torch.zeros(1, 512).double(), torch.zeros(512, 512).double())
    assert small_batch_linear(torch.zeros(1, 512, device="meta"), torch.zeros(512, 512, device="meta")).is_meta
    assert measurements == []
    small_batch_linear(torch.zeros(1, 512), torch.zeros(512, 512))
    assert measurements == [1]


@pytest.mark.parametrize(
    ("left_seconds", "split_seconds", "expected"),
    [(0.8, 2.0, left_factor_linear), (0.8, 0.7, split_linear), (0.95, 0.91, F.linear), (2.0, 2.0, F.linear)],
)
def test_another_product_is_used_if_it_is_clearly_faster(left_seconds, split_seconds, expected, monkeypatch):
    # the standard product takes 1 second, and the clock is read before and after each product
    seconds = (1.0, left_seconds, split_seconds)
    clock = iter([tick for run in range(30) for tick in (10.0 * run, 10.0 * run + seconds[run % 3])])
    monkeypatch.setattr(fast_linear.time, "perf_counter", lambda: next(clock))
    assert measure_products(2, torch.zeros(8, 8)) is expected


def test_a_weight_that_cannot_be_split_is_not_split(monkeypatch):
    monkeypatch.setattr(fast_linear, "split_linear", None)
    for weight in (torch.zeros(9, 8), torch.zeros(8, 8, 2)[..., 0]):
        assert measure_products(2, weight) in (F.linear, left_factor_linear)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 63, 500])
@pytest.mark.usefixtures("poisoned_memory")
def test_the_product_in_parts_equals_linear(rows: int, has_bias: bool):
    weight, bias, _ = random_layer(500, 63)
    hidden = torch.randn(rows, 63, generator=torch.Generator().manual_seed(rows)).requires_grad_()
    arguments = (hidden, weight, bias if has_bias else None)
    product, expected = split_linear(*arguments), F.linear(*arguments)
    # float32 sums in another order; measured: 1.2e-7
    torch.testing.assert_close(product, expected, atol=2e-6, rtol=0)
    gradients = [torch.autograd.grad(output.sum(), hidden)[0] for output in (product, expected)]
    # measured: 1.4e-6
    torch.testing.assert_close(*gradients, atol=5e-6, rtol=0)


@pytest.mark.parametrize("product", [small_batch_linear, left_factor_linear])
def test_products_leave_their_arguments_unchanged(product):
    weight, bias, hidden = random_layer(37, 16)
    copies = [tensor.clone() for tensor in (hidden, weight, bias)]
    product(hidden, weight, bias)
    assert all(torch.equal(tensor, before) for tensor, before in zip((hidden, weight, bias), copies, strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frames", ODD_SIZES)
def test_a_pointwise_convolution_equals_the_convolution(frames: int, bias: bool):
    torch.manual_seed(0)
    conv, hidden = nn.Conv1d(17, 33, 1, bias=bias).double(), torch.randn(2, frames, 17).double()
    expected = conv(hidden.transpose(1, 2)).transpose(1, 2)
    # float64 sums in another order; measured: 4e-16
    torch.testing.assert_close(apply_pointwise_conv(conv, hidden), expected, atol=1e-13, rtol=0)
    conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(apply_pointwise_conv(conv, hidden), 2 * expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_affine_layer_is_read_through_its_outputs(dtype: torch.dtype):
    torch.manual_seed(0)

    class LowRankAdapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = (
                nn.Linear(24, 37),
                nn.Linear(24, 3, bias=False),
                nn.Linear(3, 37, bias=False),
            )

        def forward(self, hidden: Tensor) -> Tensor:
            return self.base(hidden) + self.up(self.down(hidden))

    layer = LowRankAdapter().to(dtype)
    weight, bias = probe_affine_layer(layer, 24, torch.zeros(1, dtype=dtype))
    expected = layer.base.weight + layer.up.weight @ layer.down.weight
    # measured: 1.2e-7 in float32, 2e-3 in bfloat16, of weights up to 0.4
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(weight, expected, atol=tolerance, rtol=0)
    assert torch.equal(bias, layer.base.bias)
    weight.sum().backward()
    assert layer.down.weight.grad.abs().sum() > 0


def test_modules_that_are_not_plain():
    class SubclassedLinear(nn.Linear):
        pass

    assert is_unmodified(nn.Linear(3, 3), nn.Linear)
    assert not is_unmodified(SubclassedLinear(3, 3), nn.Linear)
    assert not is_unmodified(nn.Linear(3, 3, device="meta"), nn.Linear)
    hooked, replaced, wrapped = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    hooked.register_forward_hook(lambda module, inputs, output: output)
    replaced.forward = lambda hidden: hidden
    nn.utils.parametrizations.weight_norm(wrapped)
    assert not any(is_unmodified(module, nn.Linear) for module in (hooked, replaced, wrapped))
    with_global_hook = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    assert not is_unmodified(nn.Linear(3, 3), nn.Linear)
    with_global_hook.remove()
    assert is_unmodified(nn.Linear(3, 3), nn.Linear)
