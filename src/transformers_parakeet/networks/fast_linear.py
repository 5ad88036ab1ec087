"""Faster ways to compute linear layers: products of few rows on a CPU, and the largest output of a large layer.

Each optimised function gives the result of a plain one that its docstring names. The networks that call them are in
`conformer.py` and `transducer.py`.

Milliseconds of the fastest of many calls with one thread on an AMD EPYC with AVX-512 and bfloat16 instructions, torch
2.13; in brackets with AVX2 only (ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2):

    product with an (8198, 640) weight          1 row        4 rows       8 rows       32 rows
    F.linear                                    2.0 (1.9)    3.1 (3.3)    3.6 (3.7)    6.9
    few_rows_linear                             1.4 (1.3)    1.8 (1.8)    3.1 (3.0)    6.8

    index of the largest of 8193 outputs        1 row        4 rows       8 rows       32 rows
    plain_argmax                                1.3 (1.2)    1.8 (1.8)    3.1 (3.1)    6.7
    Bfloat16Search                              2.0 (1.2)    2.2 (2.7)    2.4 (5.0)    3.4

    gates of an LSTM of two layers, width 640   1 row        4 rows       8 rows
    F.linear                                    2.5 (2.4)    3.2 (3.2)    3.7 (3.9)
    add_gate_products                           1.3 (1.3)    2.1 (2.2)    3.5 (3.6)

With two threads few_rows_linear takes 2.5 instead of 3.6 for 16 rows, 3.5 instead of 5.0 for 32 and 5.6 instead of 7.5
for 64; add_gate_products takes 2.0 instead of 2.8 for 8 rows and 2.5 instead of 3.3 for 16. Without bfloat16
instructions the search is slower than the product, so that `Bfloat16Search.is_faster` is false.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

# classes of tensors that are neither quantised nor sharded
PLAIN_TENSORS = (Tensor, nn.Parameter)

# factor of the unit vectors that `read_affine_layer` passes through a layer: in 16-bit types the bias must not exceed
# the products by far, and a power of two causes no rounding
PROBE_SCALE = 256.0

# largest number of rows for which `few_rows_linear` was measured to be faster than `F.linear`
MAX_FEW_ROWS = 64

# largest number of rows for which `add_gate_products` is faster with the weight as the left factor
MAX_LEFT_FACTOR_ROWS = 4

# largest relative error of rounding to bfloat16, which has 8 significant bits
BFLOAT16_ERROR = 2.0**-8

# the error bound is enlarged by 5 % for the rounding of the float32 sums
ERROR_MARGIN = 1.05

# outputs per group: the largest score of each group is computed faster than the few largest scores of all outputs
GROUP_SIZE = 64

# average number of outputs per row that may be scored again in float32; if there are more, all outputs are scored
MAX_CANDIDATES = 16

# fewest weights and rows for which the search in bfloat16 is faster than the product in float32
MIN_SEARCH_WEIGHTS = 2**20
MIN_SEARCH_ROWS = 8

# weights per output that are compared to detect a change: 16 float32 numbers are one cache line
SAMPLE_WIDTH = 16


def is_plain(module: nn.Module, module_class: type[nn.Module]) -> bool:
    """Tell whether reading the weights of a module gives the same result as calling the module.

    This is false if an adapter or a quantiser has replaced the module, a parametrisation has changed its class, a tool
    has replaced its `forward`, hooks are registered for it or for all modules, or one of its tensors is quantised,
    sharded or on the meta device.

    Args:
        module: the module whose call would be bypassed.
        module_class: the class of torch that the module must have exactly, such as `nn.Linear`.
    """
    if type(module) is not module_class or "forward" in module.__dict__ or has_hooks(module):
        return False
    # plain loops, because this runs many times in a forward pass
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and (type(tensor) not in PLAIN_TENSORS or tensor.is_meta):
                return False
    return True


def has_hooks(module: nn.Module) -> bool:
    """Tell whether forward or backward hooks are registered for a module, or globally for every module."""
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


def pointwise(conv: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a convolution with kernel size 1 over time: `conv(hidden.transpose(1, 2)).transpose(1, 2)`.

    A plain convolution is computed as a matrix product, which needs no transposed copy of its input.

    Args:
        conv: an `nn.Conv1d` of kernel size 1, or a module that replaces it, such as a LoRA adapter.
        hidden: (B, N, channels) frames.

    Returns:
        (B, N, output channels).
    """
    if is_plain(conv, nn.Conv1d):
        return F.linear(hidden, conv.weight[..., 0], conv.bias)  # type: ignore[index, arg-type]
    result: Tensor = conv(hidden.transpose(1, 2)).transpose(1, 2)
    return result


def few_rows_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `F.linear(hidden, weight, bias)`, faster for few rows and a large float32 weight on a CPU.

    Such a product is limited by the time to read the weight. The matrix library reads it fastest as the left factor of
    a product with at least two columns, so a single row is computed twice.

    Args:
        hidden: (R, inputs) rows.
        weight: (outputs, inputs).
        bias: (outputs,).

    Returns:
        (R, outputs); its memory is column-major where the weight was the left factor.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or len(hidden) > MAX_FEW_ROWS:
        return F.linear(hidden, weight, bias)
    rows = hidden.repeat(2, 1) if len(hidden) == 1 else hidden.contiguous()
    return torch.mm(weight, rows.t()).t()[: len(hidden)].add_(bias)


def add_gate_products(gates: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute `gates + F.linear(hidden, weight)` for the four gates of an LSTM, as a batch of four products.

    The products of few rows are limited by the time to read the weight. The matrix library uses all threads for a batch
    of products, and for very few float32 rows reads the weight fastest as the left factor.

    Args:
        gates: (4, R, P), or (4, 1, P) for the same values in each row.
        hidden: (R, P) rows.
        weight: (4P, P).

    Returns:
        (4, R, P).
    """
    weights = weight.view(4, -1, hidden.shape[1])
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and len(hidden) <= MAX_LEFT_FACTOR_ROWS:
        products = torch.bmm(weights, hidden.contiguous().t().expand(4, -1, -1))
        return products.transpose(1, 2).contiguous().add_(gates)
    return torch.baddbmm(gates, hidden.expand(4, -1, -1), weights.transpose(1, 2))


def read_affine_layer(layer: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the weight and the bias of a layer that is affine but cannot be read, such as a linear layer with LoRA.

    The layer is called on zeros, which gives the bias, and on scaled unit vectors, which gives the columns of the
    weight. This is done for every loss, because gradients reach the parameters of the layer through the result. Dropout
    on the input of LoRA then drops the same inputs for all rows.

    Args:
        layer: maps (R, inputs) to (R, outputs).
        width: number of inputs.
        like: a tensor with the dtype and device of the layer's input.

    Returns:
        (outputs, inputs) weight and (outputs,) bias.
    """
    unit_vectors = PROBE_SCALE * torch.eye(width, dtype=like.dtype, device=like.device)
    bias = layer(torch.zeros_like(unit_vectors[:1]))[0]
    return ((layer(unit_vectors) - bias) / PROBE_SCALE).t(), bias


def plain_argmax(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the (R,) indices of the largest outputs of a linear layer for (R, inputs) rows."""
    return few_rows_linear(hidden, weight, bias).max(-1).indices


class Bfloat16Search:
    """Finds the largest output of a linear layer from bfloat16 scores and decides between close outputs in float32.

    The product of few rows with a large weight is limited by the time to read the weight. In bfloat16 these are half
    the bytes, and the CPU has instructions for it. The object holds a rounded copy of the weight, never the weight.

    Args:
        weight: (V, J) float32.
        bias: (V,) float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        num_outputs, width = weight.shape
        # scores of -inf fill the last group
        padded_size = num_outputs + -num_outputs % GROUP_SIZE
        self.rounded_weight = weight.new_zeros(padded_size, width, dtype=torch.bfloat16)
        self.rounded_weight[:num_outputs] = weight
        self.rounded_bias = bias.new_full((padded_size,), -torch.inf, dtype=torch.bfloat16)
        self.rounded_bias[:num_outputs] = bias
        # Cauchy-Schwarz: rounding weight and row changes their product by at most this times the norm of the row
        self.error_per_norm = BFLOAT16_ERROR * (2 + BFLOAT16_ERROR) * torch.linalg.vector_norm(weight, dim=1).amax()
        self.bias_error = BFLOAT16_ERROR * bias.abs().amax()
        self.version = weight._version
        self.weight_sample, self.bias_copy = weight[:, :SAMPLE_WIDTH].clone(), bias.clone()

    @staticmethod
    def is_faster(weight: Tensor) -> bool:
        """Tell whether the search is faster than the float32 product: a large weight on a CPU with bfloat16 products.

        On a CPU without these instructions the search takes twice as long as the float32 product.
        """
        # missing in older releases of torch
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and weight.numel() >= MIN_SEARCH_WEIGHTS
            # torch does not count the changes of an inference tensor, so that a stale copy could not be detected
            and not weight.is_inference()
            and bool(capabilities.get("avx512_bf16"))
        )

    def matches(self, weight: Tensor, bias: Tensor) -> bool:
        """Tell whether the rounded copy belongs to the present values of weight (V, J) and bias (V,).

        Changes through `weight.data` do not raise torch's version counter, so that a sample of each row is compared.
        """
        return (
            self.version == weight._version
            and torch.equal(self.bias_copy, bias)
            and torch.equal(self.weight_sample, weight[:, :SAMPLE_WIDTH])
        )

    def argmax(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return what `plain_argmax(hidden, weight, bias)` returns: the largest output, the first of equal ones.

        Args:
            hidden: (R, J) float32 rows.
            weight: (V, J), the weight that was rounded.
            bias: (V,), the bias that was rounded.

        Returns:
            (R,) indices.
        """
        rows, outputs = self._candidates(hidden)
        if len(rows) > MAX_CANDIDATES * len(hidden):
            return plain_argmax(hidden, weight, bias)
        scores = torch.linalg.vecdot(weight.index_select(0, outputs), hidden.index_select(0, rows)) + bias[outputs]
        best_scores = scores.new_full((len(hidden),), -torch.inf).scatter_reduce_(0, rows, scores, "amax")
        is_best = scores == best_scores[rows]
        best = rows.new_full((len(hidden),), len(weight))
        best.scatter_reduce_(0, rows[is_best], outputs[is_best], "amin")
        # a row that is not finite has no candidates
        return best if bool((best < len(weight)).all()) else plain_argmax(hidden, weight, bias)

    def _candidates(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and output index of each output that may be the largest one of its row, in two (C,) tensors."""
        # output i * groups + g is number i of group g
        scores = F.linear(hidden.bfloat16(), self.rounded_weight, self.rounded_bias).unflatten(1, (GROUP_SIZE, -1))
        group_maxima = scores.amax(1)
        largest = group_maxima.amax(1).float()
        # the last term but one: the scores themselves are rounded
        error = self.error_per_norm * torch.linalg.vector_norm(hidden, dim=1)
        error = ERROR_MARGIN * (error + BFLOAT16_ERROR * largest.abs() + self.bias_error)
        # the error of the largest score and that of another output can add up
        lowest = largest - 2 * error
        # comparisons with NaN are false
        lowest = torch.where(lowest.isfinite(), lowest, torch.nan)
        rows, groups = (group_maxima >= lowest[:, None]).nonzero(as_tuple=True)
        matches, members = (scores[rows, :, groups] >= lowest[rows, None]).nonzero(as_tuple=True)
        return rows[matches], members * scores.shape[2] + groups[matches]


# one search per layer, removed together with the layer; models hold none, because they are copied, saved and trained
_searches: WeakKeyDictionary[nn.Linear, Bfloat16Search] = WeakKeyDictionary()
_searches_lock = threading.Lock()


def prepare_search(layer: nn.Linear, num_outputs: int) -> Bfloat16Search:
    """Return the search among the first outputs of a layer; it is built again when the weight or bias has changed.

    Args:
        layer: the output layer of a model, for which `Bfloat16Search.is_faster` holds.
        num_outputs: number of outputs to search.
    """
    weight, bias = layer.weight[:num_outputs].detach(), layer.bias[:num_outputs].detach()
    with _searches_lock:
        search = _searches.get(layer)
        if search is None or not search.matches(weight, bias):
            search = _searches[layer] = Bfloat16Search(weight, bias)
    return search
