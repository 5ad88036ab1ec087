"""The products of an LSTM in int8, for decoding a few rows on a CPU with int8 instructions.

The int8 product is that of `int8_linear.py`. The prediction network in `transducer.py` uses `prepare_int8_lstm`, and
computes the rest of a step in float.

A product of a few rows with a large weight is memory-bandwidth-bound, and an int8 weight has a quarter of the bytes of
a float32 weight. A call of the product also takes about 0.1 ms for any weight, so a layer has one product with the
stacked weights of its input and its hidden state, except for the first layer, whose inputs have another scale.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .int8_linear import MAX_INT8, MIN_MAXIMUM, ZERO_POINT, multiply_unsigned, pack_weight, quantize_rows


class Int8Product:
    """Product of rows in [-1, 1] with an int8 weight.

    Args:
        weight: (outputs, inputs) float weight; the object holds a rounded copy.
    """

    def __init__(self, weight: Tensor) -> None:
        values, scales = quantize_rows(weight)
        self.packed_weight = pack_weight(values)
        # scale of the weights of an output, times the scale 1 / 127 of the rows
        self.scales = scales[:, 0] / MAX_INT8

    def multiply(self, rows: Tensor) -> Tensor:
        """Round each number to a multiple of 1 / 127, and multiply the rows by the weight.

        Args:
            rows: (R, inputs) numbers in [-1, 1].

        Returns:
            (R, outputs) float32 product.
        """
        # the conversion to integers truncates, so half a step is added
        unsigned_values = torch.add(ZERO_POINT + 0.5, rows.float(), alpha=MAX_INT8).to(torch.uint8)
        return multiply_unsigned(unsigned_values, self.packed_weight, self.scales)


class Int8Lstm:
    """Computes the gates of an LSTM with int8 weights.

    The object holds rounded copies of the weights, but no reference to the LSTM, so it does not keep a deleted model in
    memory. It never changes, so threads can share it.

    Args:
        lstm: unmodified `nn.LSTM` with biases on a CPU; `has_int8_products` must be true.
    """

    def __init__(self, lstm: nn.LSTM) -> None:
        self.weight_versions = get_weight_versions(lstm)
        self.products: list[Int8Product] = []
        self.biases: list[Tensor] = []
        for index in range(lstm.num_layers):
            input_weight, hidden_weight, input_bias, hidden_bias = (
                getattr(lstm, f"{name}_l{index}").detach() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            if index == 0:
                self.embedding_product = Int8Product(input_weight)
                weight = hidden_weight
            else:
                weight = torch.cat((input_weight, hidden_weight), dim=1)
            self.products.append(Int8Product(weight))
            self.biases.append(input_bias.float() + hidden_bias.float())

    @torch.no_grad()
    def compute_gates(self, layer_index: int, layer_input: Tensor, hidden: Tensor) -> Tensor:
        """Compute the gates of one layer, before their activations. Gradients are not computed.

        A row has the same bits in every batch: hidden states are in (-1, 1) and have a fixed scale, an embedding has
        its own scale, and sums of int8 products are exact integers.

        Args:
            layer_index: index of the LSTM layer.
            layer_input: (B, P) embeddings for the first layer, otherwise hidden states of the previous layer; P is the
                width of the LSTM.
            hidden: (B, P) hidden states of this layer before the step.

        Returns:
            (B, 4 * P) float32 gates in PyTorch's order.
        """
        product, bias = self.products[layer_index], self.biases[layer_index]
        if layer_index > 0:
            return product.multiply(torch.cat((layer_input, hidden), dim=1)).add_(bias)
        embeddings = layer_input.float()
        # (B, 1) scale of each embedding
        maxima = embeddings.abs().amax(1, keepdim=True).clamp_min_(MIN_MAXIMUM)
        gates = self.embedding_product.multiply(embeddings / maxima).mul_(maxima)
        return gates.add_(product.multiply(hidden)).add_(bias)


def get_weight_versions(lstm: nn.LSTM) -> list[tuple[int, int]]:
    """Get numbers that change if a weight is replaced, or changed other than through `weight.data`.

    Args:
        lstm: unmodified `nn.LSTM`.

    Returns:
        Address and version counter of each weight and bias.
    """
    # an inference tensor has no version counter
    weights = (weight for weight in lstm._parameters.values() if weight is not None)
    return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]


# cache with the rounded weights of each LSTM; an entry disappears when its LSTM is deleted. The rounded weights are not
# an attribute of the LSTM, because they would then be copied and saved with the model.
_int8_lstms: WeakKeyDictionary[nn.LSTM, Int8Lstm] = WeakKeyDictionary()
_int8_lstms_lock = threading.Lock()


def prepare_int8_lstm(lstm: nn.LSTM) -> Int8Lstm:
    """Get the int8 form of an LSTM from a cache, or build it if the LSTM is new or has changed.

    Args:
        lstm: unmodified `nn.LSTM` with biases on a CPU; `has_int8_products` must be true.
    """
    with _int8_lstms_lock:
        int8_lstm = _int8_lstms.get(lstm)
        if int8_lstm is None or int8_lstm.weight_versions != get_weight_versions(lstm):
            int8_lstm = _int8_lstms[lstm] = Int8Lstm(lstm)
    return int8_lstm
