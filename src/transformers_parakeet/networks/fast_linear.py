"""Faster linear layers: matrix products with small batches on a CPU, and the argmax of a large output layer.

Each function computes the same result as a standard operation, which its docstring names. The networks that call the
functions are in `conformer.py` and `transducer.py`.

Milliseconds of the fastest of many calls with one thread on an AMD EPYC with AVX-512 and bfloat16 instructions, torch
2.13; in brackets with AVX2 only (ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2):

    product with an (8198, 640) weight          1 row        4 rows       8 rows       32 rows
    F.linear                                    2.0 (1.9)    3.1 (3.3)    3.6 (3.7)    6.9
    small_batch_linear                          1.4 (1.3)    1.8 (1.8)    3.1 (3.0)    6.8

    index of the largest of 8193 outputs        1 row        4 rows       8 rows       32 rows
    full_argmax                                 1.3 (1.2)    1.8 (1.8)    3.1 (3.1)    6.7
    Bfloat16Search                              2.0 (1.2)    2.2 (2.7)    2.4 (5.0)    3.4

    gates of an LSTM of two layers, width 640   1 row        4 rows       8 rows
    F.linear                                    2.5 (2.4)    3.2 (3.2)    3.7 (3.9)
    add_gate_products                           1.3 (1.3)    2.1 (2.2)    3.5 (3.6)

With two threads small_batch_linear takes 2.5 instead of 3.6 for 16 rows, 3.5 instead of 5.0 for 32 and 5.6 instead of
7.5 for 64; add_gate_products takes 2.0 instead of 2.8 for 8 rows and 2.5 instead of 3.3 for 16. On a CPU without
bfloat16 instructions, the search is slower than the matrix product, so `Bfloat16Search.is_faster` returns False.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from .searched_outputs import (
    BFLOAT16_ERROR,
    ERROR_MARGIN,
    RELATIVE_ERROR,
    RoughScores,
    SearchedOutputs,
    find_outputs,
    score_outputs,
)

# classes of tensors that are neither quantised nor sharded
ORDINARY_TENSOR_CLASSES = (Tensor, nn.Parameter)

# factor of the unit vectors that `probe_affine_layer` passes through a layer. A large factor reduces the rounding
# error in 16-bit types if the bias is much larger than the weights; a power of two causes no rounding error.
PROBE_SCALE = 256.0

# largest number of rows for which `small_batch_linear` was measured to be faster than `F.linear`
MAX_SMALL_BATCH = 64

# largest number of rows for which `add_gate_products` is faster with the weight as the left factor
MAX_LEFT_FACTOR_ROWS = 4

# outputs per group: computing the maximum of each group is faster than `topk` over all outputs
GROUP_SIZE = 64

# maximum number of candidates per row, on average over the rows, that the search scores in float32
MAX_CANDIDATES_PER_ROW = 16

# minimum number of weights and of rows for which the bfloat16 search is faster than the float32 product
MIN_SEARCH_WEIGHTS = 2**20
MIN_SEARCH_ROWS = 8

# number of weights per output that are compared to detect a change; 16 float32 numbers fill one cache line
SAMPLE_WIDTH = 16


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


def small_batch_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `F.linear(hidden, weight, bias)`, faster for a small batch and a large float32 weight on a CPU.

    Such a product is memory-bandwidth-bound: reading the weight takes most of the time. The BLAS library reads the
    weight fastest if it is the left factor of a product with at least two columns.

    Args:
        hidden: (R, inputs) batch of R rows.
        weight: (outputs, inputs) weight.
        bias: (outputs,) bias.

    Returns:
        (R, outputs) product; column-major in memory if the fast path was taken.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or len(hidden) > MAX_SMALL_BATCH:
        return F.linear(hidden, weight, bias)
    # a single row is repeated to get two columns
    rows = hidden.repeat(2, 1) if len(hidden) == 1 else hidden.contiguous()
    return torch.mm(weight, rows.t()).t()[: len(hidden)].add_(bias)


def add_gate_products(gates: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Add the product `F.linear(hidden, weight)` to the four gates of an LSTM.

    The product is computed as a batch of four products, one per gate, because the BLAS library distributes a batch over
    all threads. With a small batch the product is memory-bandwidth-bound: reading the weight takes most of the time.
    For very few float32 rows, it is fastest to make the weight the left operand.

    Args:
        gates: (4, R, P) inputs of the gate activations, for R rows and P, the hidden size of the LSTM; (4, 1, P) if
            they are equal for all rows.
        hidden: (R, P) input of the product.
        weight: (4 * P, P) weights of the four gates, in PyTorch's order.

    Returns:
        (4, R, P) sums.
    """
    gate_weights = weight.view(4, -1, hidden.shape[1])
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and len(hidden) <= MAX_LEFT_FACTOR_ROWS:
        # (4, P, P) x (4, P, R)
        products = torch.bmm(gate_weights, hidden.contiguous().t().expand(4, -1, -1))
        return products.transpose(1, 2).contiguous().add_(gates)
    return torch.baddbmm(gates, hidden.expand(4, -1, -1), gate_weights.transpose(1, 2))


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


class Bfloat16Search:
    """Finds the largest output of a linear layer, with bfloat16 scores of all outputs and float32 scores of the best.

    The product of a small batch with a large weight is memory-bandwidth-bound. In bfloat16 the weight has half the
    bytes, and some CPUs have instructions for bfloat16 products. The object holds a rounded copy of the weight, but no
    reference to the weight itself, so it does not keep a deleted model in memory.

    Args:
        weight: (V, J) float32 weight of the layer.
        bias: (V,) float32 bias of the layer.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        num_outputs, num_inputs = weight.shape
        # outputs with the score -inf fill the last group
        num_padded_outputs = num_outputs + -num_outputs % GROUP_SIZE
        self.bfloat16_weight = weight.new_zeros(num_padded_outputs, num_inputs, dtype=torch.bfloat16)
        self.bfloat16_weight[:num_outputs] = weight
        self.bfloat16_bias = bias.new_full((num_padded_outputs,), -torch.inf, dtype=torch.bfloat16)
        self.bfloat16_bias[:num_outputs] = bias
        # Cauchy-Schwarz inequality: rounding weight and input changes a score by at most this factor times the norm of
        # the input
        self.error_per_norm = BFLOAT16_ERROR * (2 + BFLOAT16_ERROR) * torch.linalg.vector_norm(weight, dim=1).amax()
        self.bias_error = BFLOAT16_ERROR * bias.abs().amax()
        self.weight_version = weight._version
        self.weight_sample, self.bias_copy = weight[:, :SAMPLE_WIDTH].clone(), bias.clone()

    @staticmethod
    def is_faster(weight: Tensor) -> bool:
        """Return whether the search is faster than the float32 product of a small batch with this weight.

        This requires a large float32 weight on a CPU with bfloat16 instructions (AVX512-BF16). On other CPUs the search
        takes twice as long as the float32 product.

        Args:
            weight: (outputs, inputs) weight of the layer.
        """
        # older releases of torch do not have `get_capabilities`
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and weight.numel() >= MIN_SEARCH_WEIGHTS
            # an inference tensor has no version counter, so an outdated rounded copy could not be detected
            and not weight.is_inference()
            and bool(capabilities.get("avx512_bf16"))
        )

    def is_up_to_date(self, weight: Tensor, bias: Tensor) -> bool:
        """Return whether the rounded copies still match the weight and bias of the layer.

        Changes through `weight.data` do not increase PyTorch's version counter, so some values of each weight row are
        compared with a stored sample as well.

        Args:
            weight: (V, J) present weight of the layer.
            bias: (V,) present bias of the layer.
        """
        return (
            self.weight_version == weight._version
            and torch.equal(self.bias_copy, bias)
            and torch.equal(self.weight_sample, weight[:, :SAMPLE_WIDTH])
        )

    def argmax(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Find the index of the largest output of the linear layer in each row, as `full_argmax` does.

        Args:
            hidden: (R, J) float32 batch of R rows.
            weight: (V, J) float32 weight of the layer. This object holds only a bfloat16 copy of it.
            bias: (V,) float32 bias of the layer. This object holds only a bfloat16 copy of it.

        Returns:
            (R,) indices; the first index if several outputs are equal.
        """
        outputs = self.search(hidden, weight, bias)
        return full_argmax(hidden, weight, bias) if outputs is None else outputs.best_tokens

    def search(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> SearchedOutputs | None:
        """Find the largest output of the linear layer in each row, and keep the bfloat16 scores of all outputs.

        Args:
            hidden, weight, bias: see `argmax`.

        Returns:
            The scores; `None` if a row has infinite or NaN scores, or too many outputs that could be the largest.
        """
        rough_scores = self._score(hidden)
        best_scores = rough_scores.group_maxima.amax(1).float()
        # the best score may be too high and the score of a candidate too low, each by the error bound
        errors = rough_scores.fixed_errors + RELATIVE_ERROR * best_scores.abs()
        thresholds = best_scores - 2 * errors
        # comparisons with NaN are false
        thresholds = torch.where(thresholds.isfinite(), thresholds, torch.nan)
        rows, outputs = find_outputs(rough_scores, thresholds)
        if len(rows) > MAX_CANDIDATES_PER_ROW * len(hidden):
            return None
        # float32 scores of the candidates
        scores = score_outputs(hidden, weight, bias, rows, outputs)
        maxima = scores.new_full((len(hidden),), -torch.inf).scatter_reduce_(0, rows, scores, "amax")
        # the smallest output index with the best score; len(weight) in a row without candidates
        is_best = scores == maxima[rows]
        best_outputs = rows.new_full((len(hidden),), len(weight))
        best_outputs.scatter_reduce_(0, rows[is_best], outputs[is_best], "amin")
        # a row with infinite or NaN scores has no candidates
        if not bool((best_outputs < len(weight)).all()):
            return None
        return SearchedOutputs((weight, bias), hidden, best_outputs, (rows, outputs, scores), rough_scores)

    def _score(self, hidden: Tensor) -> RoughScores:
        """Compute the bfloat16 scores of all outputs.

        Args:
            hidden: (R, J) float32 batch of R rows.
        """
        # output i * num_groups + g is member i of group g
        scores = F.linear(hidden.bfloat16(), self.bfloat16_weight, self.bfloat16_bias).unflatten(1, (GROUP_SIZE, -1))
        # rounding of weight and input (Cauchy-Schwarz), and of the bias
        errors = self.error_per_norm * torch.linalg.vector_norm(hidden, dim=1) + self.bias_error
        return RoughScores(scores, scores.amax(1), ERROR_MARGIN * errors)


# cache with one search per layer; an entry disappears when its layer is deleted. The search is not an attribute of the
# layer, because it would then be copied and saved with the model.
_searches: WeakKeyDictionary[nn.Linear, Bfloat16Search] = WeakKeyDictionary()
_searches_lock = threading.Lock()


def prepare_search(layer: nn.Linear, num_outputs: int) -> Bfloat16Search:
    """Get the search over the first outputs of a layer from a cache, or build it if the layer is new or has changed.

    Args:
        layer: output layer of a joint network; `Bfloat16Search.is_faster` must be true for its weight.
        num_outputs: number of outputs to search.

    Returns:
        A search that matches the present weight and bias of the layer.
    """
    weight, bias = layer.weight[:num_outputs].detach(), layer.bias[:num_outputs].detach()
    with _searches_lock:
        search = _searches.get(layer)
        if search is None or not search.is_up_to_date(weight, bias):
            search = _searches[layer] = Bfloat16Search(weight, bias)
    return search
