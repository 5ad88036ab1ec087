"""Linear layers and pointwise convolutions with int8 weights and int8 activations, for CPUs with int8 instructions.

Which layers of a model are replaced, and how such a model is loaded and saved, is in `quantization_parakeet.py`.

Weights have one scale per output channel, activations one scale per row (per frame). A row has the same bits in
every batch, because its scale depends on no other row and the sums of int8 products are exact integers.

Milliseconds of the fastest of many calls, float32 / int8 with the rounding of the rows, one thread of a shared Intel
Xeon with AVX512-VNNI and without AMX, torch 2.13:

    weight         1 row         8 rows        63 rows       125 rows      750 rows
    (4096, 1024)   0.64 / 0.41   1.91 / 0.50   5.52 / 1.41   9.47 / 2.44   39.9 / 13.9
    (1024, 4096)   0.61 / 0.32   1.83 / 0.40   4.53 / 1.33   8.00 / 2.50   39.2 / 14.5
    (1024, 1024)   0.15 / 0.13   0.43 / 0.15   1.08 / 0.38   1.83 / 0.62    9.6 / 4.2
    (2048, 512)    0.18 / 0.31   0.53 / 0.15   1.06 / 0.65   1.77 / 0.97   11.3 / 4.3

Without AMX, products of signed activations take 500 to 7000 times as long, so activations are unsigned.
`torch._int_mm` needs no packed weights, but its int32 result needs three more passes to scale it.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# largest int8 number of a quantised value; symmetric, so -128 is not used
MAX_INT8 = 127

# oneDNN computes products of unsigned activations and signed weights, so activations are stored as value + 128
ZERO_POINT = 128

# smallest positive maximum of a row: the scale of a row of zeros must not be 0
MIN_MAXIMUM = 1e-30

# bytes of the float32 rows that are quantised at once, so that the intermediate results fit into the cache of a core
QUANTIZATION_BLOCK_BYTES = 2**19

# instruction sets with exact sums of int8 products; older CPUs round them to 16 bits
INT8_CAPABILITIES = ("avx512_vnni", "avx_vnni", "amx_int8")


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8 with the scale (largest absolute value of the row) / 127.

    Args:
        rows: (R, K) rows of floating-point numbers.

    Returns:
        (R, K) int8 values and (R, 1) float32 scales; `values * scales` differs from `rows` by at most half a scale,
        and by the rounding of float32. NaN in a row gives the scale NaN.
    """
    values = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scales = torch.empty(len(rows), 1, device=rows.device)
    rows_per_block = max(1, QUANTIZATION_BLOCK_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(rows), rows_per_block):
        block = rows[start : start + rows_per_block].float()
        maxima = torch.maximum(block.amax(1, keepdim=True), block.amin(1, keepdim=True).neg_()).clamp_min_(MIN_MAXIMUM)
        values[start : start + rows_per_block] = block.mul(MAX_INT8 / maxima).round_()
        scales[start : start + rows_per_block] = maxima.div_(MAX_INT8)
    return values, scales


@cache
def has_int8_products() -> bool:
    """Return whether this CPU and this build of torch compute exact int8 products fast.

    This requires VNNI or AMX instructions and oneDNN. A small product of the largest values is compared with the exact
    result.
    """
    # older releases of torch do not have `get_capabilities`
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not any(capabilities.get(name) for name in INT8_CAPABILITIES):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    weight = torch.full((32, 64), -MAX_INT8, dtype=torch.int8)
    product = multiply_int8(torch.full((16, 64), MAX_INT8, dtype=torch.int8), pack_weight(weight), torch.ones(32))
    return bool((product == -64.0 * MAX_INT8**2).all())


def pack_weight(weight: Tensor) -> Tensor:
    """Rearrange a weight to the memory layout of oneDNN's products.

    Args:
        weight: (outputs, inputs) int8 weight.

    Returns:
        Packed weight; `to_dense` returns the (inputs, outputs) transposed weight.
    """
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


def multiply_int8(values: Tensor, packed_weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Compute the product of int8 rows with a packed int8 weight, and multiply each output by the scale of its weights.

    Args:
        values: (R, inputs) int8 rows; overwritten.
        packed_weight: result of `pack_weight`.
        weight_scale: (outputs,) float32 scales.

    Returns:
        (R, outputs) float32 product.
    """
    # value + 128 as an unsigned number is the same as flipping the highest bit
    return multiply_unsigned(values.view(torch.uint8).bitwise_xor_(ZERO_POINT), packed_weight, weight_scale)


def multiply_unsigned(unsigned_values: Tensor, packed_weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Compute the product of `multiply_int8` for values that are stored as value + 128.

    The sums are exact integers, and only their conversion to float32 and the multiplication by the scale are rounded.
    With a scale of the rows or a bias as an argument of the operator, rounding depends on the number of rows.

    Args:
        unsigned_values: (R, inputs) uint8 rows: int8 values + 128.
        packed_weight: result of `pack_weight`.
        weight_scale: (outputs,) float32 scales.

    Returns:
        (R, outputs) float32 product.
    """
    weight_zero_points = torch.zeros(len(weight_scale), dtype=torch.int32)
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned_values, 1.0, ZERO_POINT, packed_weight, weight_scale, weight_zero_points,
        None, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return product


class Int8Linear(nn.Module):
    """Linear layer with int8 weights, for inference on a CPU.

    State dict: `weight` (outputs, inputs) int8, `weight_scale` (outputs,) float32, and `bias` (outputs,), if the layer
    has one. The float weight is `weight * weight_scale[:, None]`. After `pack`, the weight exists only in the layout of
    oneDNN, and the state dict converts it back.

    Args:
        num_inputs: number of inputs.
        num_outputs: number of outputs.
        has_bias: whether the layer has a bias.
        dtype: dtype of the bias.
    """

    weight: Tensor | None
    weight_scale: Tensor

    def __init__(self, num_inputs: int, num_outputs: int, has_bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = num_inputs, num_outputs
        self.register_buffer("weight", torch.zeros(self._get_weight_shape(), dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(num_outputs, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_outputs, dtype=dtype), requires_grad=False) if has_bias else None
        self.packed_weight: Tensor | None = None

    def _get_weight_shape(self) -> tuple[int, ...]:
        """Return the shape of the weight in the state dict."""
        return (self.out_features, self.in_features)

    @classmethod
    @torch.no_grad()
    def from_float(cls, layer: Any) -> Int8Linear:
        """Create the int8 layer of a float layer, with a packed weight.

        Args:
            layer: `nn.Linear`, or for `Int8PointwiseConv` an `nn.Conv1d` with kernel size 1.
        """
        int8_layer = cls.create_empty(layer)
        weight = layer.weight.detach().flatten(1)
        values, scales = quantize_rows(weight)
        int8_layer.weight = values.view(int8_layer._get_weight_shape())
        int8_layer.weight_scale = scales[:, 0]
        if layer.bias is not None:
            int8_layer.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        int8_layer.pack()
        return int8_layer.train(layer.training)

    @classmethod
    def create_empty(cls, layer: Any) -> Int8Linear:
        """Create an int8 layer with the sizes of a float layer, without its weights.

        Args:
            layer: `nn.Linear`, or for `Int8PointwiseConv` an `nn.Conv1d` with kernel size 1.
        """
        num_outputs, num_inputs = layer.weight.shape[:2]
        return cls(num_inputs, num_outputs, layer.bias is not None, layer.weight.dtype)

    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """Create a float layer with the dequantised weight.

        Args:
            dtype: dtype of the weight.
        """
        layer = self._create_float_layer()
        weight = self.get_weight().flatten(1).float() * self.weight_scale[:, None]
        layer.weight = nn.Parameter(weight.view(self._get_weight_shape()).to(dtype))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(dtype))
        return layer.train(self.training)

    def _create_float_layer(self) -> nn.Linear | nn.Conv1d:
        """Create a float layer of the same sizes on the meta device."""
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")

    def pack(self) -> None:
        """Replace the weight by its packed form, which `forward` needs."""
        if self.weight is not None:
            self.packed_weight = pack_weight(self.weight.flatten(1))
            self.weight = None

    def get_weight(self) -> Tensor:
        """Return the int8 weight with the shape in the state dict."""
        if self.packed_weight is None:
            assert self.weight is not None
            return self.weight
        # the packed weight is that of the transposed product
        return self.packed_weight.to_dense().t().contiguous().view(self._get_weight_shape())

    def forward(self, hidden: Tensor) -> Tensor:
        """Quantise each row, and multiply the rows by the weight. Gradients are not computed.

        Args:
            hidden: (..., inputs) float rows on a CPU.

        Returns:
            (..., outputs) product in the dtype of `hidden`.

        Raises:
            RuntimeError: the layer is in training mode, its weight is not packed, or the input is not on a CPU.
        """
        if self.training or self.packed_weight is None or hidden.device.type != "cpu":
            raise RuntimeError(
                "an int8 layer requires evaluation mode, loaded weights and a CPU, got "
                f"training={self.training}, packed={self.packed_weight is not None}, device={hidden.device}: "
                "call `model.eval()`, or load the model without `quantize`"
            )
        with torch.no_grad():
            values, scales = quantize_rows(hidden.reshape(-1, self.in_features))
            product = multiply_int8(values, self.packed_weight, self.weight_scale).mul_(scales)
            if self.bias is not None:
                product.add_(self.bias)
            return product.to(hidden.dtype).view(*hidden.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """Change device or dtype as in `nn.Module`, but keep the scales in float32."""
        weight_scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = weight_scale.to(self.weight_scale.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add the weight in its usual layout to the state dict."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.get_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a weight in its usual layout, and pack it if the old weight was packed."""
        was_packed = self.packed_weight is not None
        self.weight, self.packed_weight = self.get_weight(), None
        super()._load_from_state_dict(state_dict, prefix, *args)
        if was_packed:
            self.pack()

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:
        """Copy the layer; the copy shares the packed weight, which never changes."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        # the memo contains objects that are used instead of copied
        memo[id(self.packed_weight)] = self.packed_weight
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for `pickle`, which cannot store a packed weight."""
        buffers = {**self._buffers, "weight": self.get_weight()}
        is_packed = self.packed_weight is not None
        return {**self.__dict__, "_buffers": buffers, "packed_weight": None, "is_packed": is_packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, and pack the weight if it was packed."""
        is_packed = state.pop("is_packed")
        super().__setstate__(state)
        if is_packed:
            self.pack()

    def extra_repr(self) -> str:
        """Describe the sizes for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8PointwiseConv(Int8Linear):
    """Convolution over time with kernel size 1 and int8 weights; `weight` has the shape (outputs, inputs, 1)."""

    def _get_weight_shape(self) -> tuple[int, ...]:
        """Return the shape of the weight in the state dict."""
        return (self.out_features, self.in_features, 1)

    def _create_float_layer(self) -> nn.Linear | nn.Conv1d:
        """Create a float layer of the same sizes on the meta device."""
        return nn.Conv1d(self.in_features, self.out_features, 1, bias=self.bias is not None, device="meta")

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the convolution as a linear layer, as `Int8Linear.forward` does.

        Args:
            hidden: (B, inputs, N) frames.

        Returns:
            (B, outputs, N) frames.
        """
        return super().forward(hidden.transpose(1, 2)).transpose(1, 2)


def get_int8_class(layer: nn.Module) -> type[Int8Linear] | None:
    """Return the int8 class that can replace a layer; `None` if there is none.

    Args:
        layer: any module. Subclasses of `nn.Linear` and `nn.Conv1d`, such as adapters, are not replaced.
    """
    if type(layer) is nn.Linear:
        return Int8Linear
    if type(layer) is nn.Conv1d and layer.kernel_size == (1,) and layer.groups == 1:
        has_plain_frames = layer.stride == (1,) and layer.padding == (0,)
        return Int8PointwiseConv if has_plain_frames else None
    return None
