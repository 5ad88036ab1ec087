"""Faster linear layers for a small batch on a CPU.

Each function computes the same result as a standard operation, which its docstring names. The search for the largest
output of a layer is in `int8_search.py`. The networks that call the functions are in `conformer.py` and
`transducer.py`.

Milliseconds of the median of many calls with one thread on an Intel Xeon with AMX, torch 2.13. Other CPUs give another
order: on an AMD EPYC the weight as the left factor takes 1.4 instead of 2.0 ms for one float32 row and an (8198, 640)
weight. So `small_batch_linear` measures both products on the machine. The left factor computes one row as two.

    product with a (2560, 640) weight     1 row   2 rows  4 rows  8 rows  16 rows  32 rows
    float32, F.linear                     0.27    0.30    0.54    0.84    0.68     0.93
    float32, left_factor_linear           0.56    0.57    0.56    0.62    0.62     0.85
    bfloat16, F.linear                    0.28    0.28    0.32    0.32    0.33     0.34
    bfloat16, left_factor_linear          -       0.17    0.24    0.23    0.23     0.22
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

# classes of tensors that are neither quantised nor sharded
ORDINARY_TENSOR_CLASSES = (Tensor, nn.Parameter)

# factor of the unit vectors that `probe_affine_layer` passes through a layer. A large factor reduces the rounding
# error in 16-bit types if the bias is much larger than the weights; a power of two causes no rounding error.
PROBE_SCALE = 256.0

# largest number of rows for which `small_batch_linear` does not simply call `F.linear`
MAX_SMALL_BATCH = 64

# numbers of rows for which the products are measured; the next larger one decides for others. The time of
# `F.linear` does not always grow with the rows: on an Intel Xeon ten float32 rows took longer than sixteen.
MEASURED_ROWS = (*range(1, 17), 32, MAX_SMALL_BATCH)

# number of runs of each product in a measurement, of which the fastest counts
MEASURED_RUNS = 3

# Another product is used if its time is below this fraction of the time of `F.linear`, so that noise in the measurement
# rarely changes the choice.
MAX_TIME_FRACTION = 0.9

# number of parts of the weight in `split_linear`; the weight of an LSTM has four gates
NUM_PARTS = 4

# Smallest weight for which the products are measured. The products with a smaller one take less than 0.1 ms.
MIN_MEASURED_WEIGHTS = 2**18

# computes `F.linear(hidden, weight, bias)`
LinearFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def is_unmodified(module: nn.Module, module_class: type[nn.Module]) -> bool:
    """Return whether a module can be computed from its weights without calling the module.

    Args:
        module: module of any class.
        module_class: PyTorch class that the module is expected to have, such as `nn.Linear`.

    Returns:
        False if the class of the module is not exactly `module_class` (because of an adapter, a quantiser or a
        parametrisation), if its `forward` is replaced, if hooks are registered for it or for all modules, or if one
        of its tensors is quantised, sharded or on the meta device. True otherwise.
    """
    # a `forward` that a tool replaced is an attribute of the instance
    if type(module) is not module_class or "forward" in module.__dict__ or has_hooks(module):
        return False
    # loops instead of a generator expression, because this runs many times in a forward pass
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and (type(tensor) not in ORDINARY_TENSOR_CLASSES or tensor.is_meta):
                return False
    return True


def has_hooks(module: nn.Module) -> bool:
    """Return whether forward or backward hooks are registered for a module, or globally for all modules.

    Args:
        module: any module.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def apply_pointwise_conv(conv: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a convolution with kernel size 1 over time: `conv(hidden.transpose(1, 2)).transpose(1, 2)`.

    An unmodified `nn.Conv1d` (not quantised or wrapped) is computed as a matrix product, because this needs no
    transposed copy of the input.

    Args:
        conv: an `nn.Conv1d` with kernel size 1, or a module that replaces it, such as a LoRA adapter.
        hidden: (B, N, input channels) frames.

    Returns:
        (B, N, output channels) frames.
    """
    if is_unmodified(conv, nn.Conv1d):
        return F.linear(hidden, conv.weight[..., 0], conv.bias)  # type: ignore[index, arg-type]
    output: Tensor = conv(hidden.transpose(1, 2)).transpose(1, 2)
    return output


def small_batch_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear(hidden, weight, bias)`, faster for a small batch and a large weight on a CPU.

    Such a product is memory-bandwidth-bound: reading the weight takes most of the time. Which product reads it fastest
    depends on the CPU, so the first call with a shape measures.

    Args:
        hidden: (R, inputs) batch of R rows.
        weight: (outputs, inputs) weight.
        bias: (outputs,) bias; `None` for no bias.

    Returns:
        (R, outputs) product; column-major in memory if the weight was the left factor.
    """
    has_choice = (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and 0 < len(hidden) <= MAX_SMALL_BATCH
        and weight.numel() >= MIN_MEASURED_WEIGHTS
        # a compiled or exported graph must not contain a measurement
        and not torch.compiler.is_compiling()
    )
    product = choose_product(len(hidden), weight) if has_choice else F.linear
    return product(hidden, weight, bias)


def left_factor_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear(hidden, weight, bias)` with the weight as the left factor of a product.

    Args:
        hidden: (R, inputs) batch of R rows.
        weight: (outputs, inputs) weight.
        bias: (outputs,) bias; `None` for no bias.

    Returns:
        (R, outputs) product, column-major in memory.
    """
    # a product with one column is slower than with two, so a single row is used twice
    columns = (hidden.repeat(2, 1) if len(hidden) == 1 else hidden).t()
    product = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return product.t()[: len(hidden)]


def split_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear(hidden, weight, bias)` as a batch of products with parts of the weight.

    The BLAS library distributes the products of a batch over the threads.

    Args:
        hidden: (R, inputs) batch of R rows.
        weight: (outputs, inputs) weight, where `NUM_PARTS` divides the number of outputs.
        bias: (outputs,) bias; `None` for no bias.

    Returns:
        (R, outputs) product.
    """
    rows, parts = hidden.expand(NUM_PARTS, -1, -1), weight.view(NUM_PARTS, -1, weight.shape[1]).transpose(1, 2)
    biases = None if bias is None else bias.view(NUM_PARTS, 1, -1)
    products = torch.bmm(rows, parts) if biases is None else torch.baddbmm(biases, rows, parts)
    return products.transpose(0, 1).flatten(1)


# cache with the fastest product for each shape, dtype and number of threads on this machine
_fastest_products: dict[tuple[int, torch.Size, torch.dtype, int], LinearFunction] = {}
_measurement_lock = threading.Lock()


def choose_product(num_rows: int, weight: Tensor) -> LinearFunction:
    """Choose the function that computes a linear layer fastest, from a cache or by a measurement.

    A measurement takes about 5 ms for a weight of 6 MB. It does not depend on the values, so all calls with the same
    shape use the same function.

    Args:
        num_rows: number of rows of the batch, at most `MAX_SMALL_BATCH`.
        weight: (outputs, inputs) weight on a CPU.

    Returns:
        `F.linear`, `left_factor_linear` or `split_linear`.
    """
    measured_rows = next(rows for rows in MEASURED_ROWS if rows >= num_rows)
    key = (measured_rows, weight.shape, weight.dtype, torch.get_num_threads())
    product = _fastest_products.get(key)
    if product is None:
        # two measurements at the same time would disturb each other
        with _measurement_lock:
            product = _fastest_products.get(key)
            if product is None:
                product = _fastest_products[key] = measure_products(measured_rows, weight.detach())
    return product


def measure_products(num_rows: int, weight: Tensor) -> LinearFunction:
    """Measure which function computes a linear layer fastest.

    Args:
        num_rows: number of rows of the batch.
        weight: (outputs, inputs) weight on a CPU.

    Returns:
        The fastest function if it is clearly faster than `F.linear`, otherwise `F.linear`.
    """
    hidden = weight.new_ones(num_rows, weight.shape[1])
    seconds: dict[LinearFunction, list[float]] = {F.linear: [], left_factor_linear: []}
    if len(weight) % NUM_PARTS == 0 and weight.is_contiguous():
        seconds[split_linear] = []
    # the first round warms up
    for _ in range(1 + MEASURED_RUNS):
        for product, times in seconds.items():
            start = time.perf_counter()
            product(hidden, weight, None)
            times.append(time.perf_counter() - start)
    fastest = {product: min(times[1:]) for product, times in seconds.items()}
    best = min(fastest, key=fastest.__getitem__)
    return best if fastest[best] < MAX_TIME_FRACTION * fastest[F.linear] else F.linear


def probe_affine_layer(layer: nn.Module, num_inputs: int, example: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the weight and bias of an affine layer by calling it, for example of a linear layer wrapped by LoRA.

    Zeros as input give the bias, and scaled unit vectors give the columns of the weight. Gradients pass through weight
    and bias to the parameters of the layer, so they must be computed again for every loss. Dropout on the input of LoRA
    drops the same inputs for all rows that are multiplied by the result.

    Args:
        layer: layer that maps (rows, inputs) to (rows, outputs).
        num_inputs: number of inputs of the layer.
        example: tensor with the dtype and device of the input of the layer; its values are not used.

    Returns:
        (outputs, inputs) weight and (outputs,) bias.
    """
    unit_vectors = PROBE_SCALE * torch.eye(num_inputs, dtype=example.dtype, device=example.device)
    bias = layer(torch.zeros_like(unit_vectors[:1]))[0]
    return ((layer(unit_vectors) - bias) / PROBE_SCALE).t(), bias


def full_argmax(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute all outputs of a linear layer, and return the index of the largest output of each row.

    Args:
        hidden: (R, inputs) batch of R rows.
        weight: (outputs, inputs) weight.
        bias: (outputs,) bias.

    Returns:
        (R,) indices; the first index if several outputs are equal.
    """
    return small_batch_linear(hidden, weight, bias).max(-1).indices
