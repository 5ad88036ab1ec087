"""Interface of transformers for models with int8 layers: a quantization config and a quantizer.

    model = AutoModelForTDT.from_pretrained(folder, quantization_config=ParakeetInt8Config())
    model.save_pretrained(int8_folder)
    model = AutoModelForTDT.from_pretrained(int8_folder)

This file also selects the layers. The layers are in `networks/int8_linear.py`, the LSTM is in `networks/int8_lstm.py`.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .networks import Int8Linear, ParakeetEncoderBlock, ParakeetRNNTDecoder, get_int8_class, has_int8_products

logger = logging.get_logger(__name__)

# name of the method in `config.json`
QUANT_METHOD = "parakeet_int8"

# values of the option `quantize`
QUANTIZATIONS = ("int8",)


class ParakeetInt8Config(QuantizationConfigMixin):
    """Selects int8 for the linear layers and pointwise convolutions of the encoder blocks, for inference on a CPU.

    Decoding also computes the LSTM of the prediction network in int8, from its float weights. Pass it to
    `from_pretrained(..., quantization_config=ParakeetInt8Config())`. `save_pretrained` then writes int8 weights and
    this config, so the folder needs no argument when it is loaded again.

    Args:
        quant_method: name of the method in `config.json`, always `"parakeet_int8"`.

    Raises:
        ValueError: `quant_method` has another value.
    """

    def __init__(self, quant_method: str = QUANT_METHOD) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"`quant_method` must be {QUANT_METHOD!r}, got {quant_method!r}: correct it")
        self.quant_method = quant_method


class ParakeetInt8Quantizer(HfQuantizer):
    """Quantises a model while `from_pretrained` loads it; transformers creates and calls this object.

    On a CPU without exact int8 products, the model gets float weights and one warning.
    """

    quantization_config: ParakeetInt8Config

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Check that the model is loaded on the CPU.

        Args:
            *args: not used.
            device_map: device of each module, as in `from_pretrained`; `None` for the CPU.
            **kwargs: not used.

        Raises:
            ValueError: a module is loaded on another device.
        """
        devices = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
        for device in devices:
            check_int8_device(device)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Create int8 layers for a state dict with int8 weights."""
        if self.pre_quantized:
            insert_empty_int8_layers(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Quantise a model with float weights, or pack the int8 weights that were loaded.

        On a CPU without exact int8 products, a model with int8 weights is dequantised.
        """
        if not has_int8_products():
            logger.warning_once(
                "int8 requires a CPU with VNNI or AMX instructions and a release of torch that uses them, which this "
                "machine does not have: the model is used with float weights"
            )
            if self.pre_quantized:
                dequantize_int8_layers(model, model.dtype)
            self.remove_quantization_config(model)
            return model
        if self.pre_quantized:
            pack_int8_layers(model)
        else:
            quantize_encoder_blocks(model)
        set_int8_decoding(model, enabled=True)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace the int8 layers by float layers; `model.dequantize()` calls this."""
        dequantize_int8_layers(model, dtype or model.dtype)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return whether `save_pretrained` can save the model.

        Args:
            *args: not used.
            **kwargs: not used.
        """
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return False


def find_float_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any, type[Int8Linear]]]:
    """Yield the layers of the encoder blocks that int8 layers can replace.

    Subsampling, CTC head, prediction network and joint network are not included. They have a small part of the weights
    of a model with 17 or more encoder blocks. `set_int8_decoding` selects int8 for the LSTM of the prediction network.

    Args:
        model: any model of this package.

    Yields:
        Parent module, name in the parent, layer, and class of the int8 layer.
    """
    blocks = [module for module in model.modules() if isinstance(module, ParakeetEncoderBlock)]
    for parent in [module for block in blocks for module in block.modules()]:
        for name, layer in list(parent.named_children()):
            int8_class = get_int8_class(layer)
            if int8_class is not None:
                yield parent, name, layer, int8_class


def quantize_encoder_blocks(model: nn.Module) -> None:
    """Replace the layers of the encoder blocks by int8 layers with the rounded weights, one layer after another.

    Args:
        model: model of this package that was just loaded on a CPU; changed in place.
    """
    for parent, name, layer, int8_class in find_float_layers(model):
        setattr(parent, name, int8_class.from_float(layer))
        release_file_pages(layer.weight)


def insert_empty_int8_layers(model: nn.Module) -> None:
    """Replace the layers of the encoder blocks by int8 layers without weights, before a state dict is loaded.

    Args:
        model: any model of this package on the meta device; changed in place.
    """
    with torch.device("meta"):
        for parent, name, layer, int8_class in find_float_layers(model):
            setattr(parent, name, int8_class.create_empty(layer))


def pack_int8_layers(model: nn.Module) -> None:
    """Pack the weights of all int8 layers after a state dict was loaded.

    Args:
        model: model with int8 layers; changed in place.
    """
    for module in model.modules():
        if isinstance(module, Int8Linear) and module.weight is not None:
            weight = module.weight
            module.pack()
            release_file_pages(weight)


def set_int8_decoding(model: nn.Module, enabled: bool) -> None:
    """Select whether decoding computes the LSTM of the prediction network in int8.

    Args:
        model: any model of this package; changed in place.
        enabled: whether the LSTM is computed in int8.
    """
    for module in model.modules():
        if isinstance(module, ParakeetRNNTDecoder):
            module.uses_int8 = enabled


def dequantize_int8_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace all int8 layers by float layers with the dequantised weights, and decode with the float LSTM.

    Args:
        model: model with int8 layers; changed in place.
        dtype: dtype of the float layers.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Int8Linear):
                setattr(parent, name, layer.to_float(dtype))
    set_int8_decoding(model, enabled=False)


def release_file_pages(tensor: Tensor) -> None:
    """Release the memory pages of a weight that is mapped from a file, after the last use of the weight.

    The file stays mapped as long as any weight of it is used, and the pages of the other weights would stay in memory.
    If the weight is used again, the system reads it from the file, without changes made in memory. Nothing happens if
    the weight is not mapped from a file, or on systems other than Linux.

    Args:
        tensor: contiguous weight.
    """
    mappings = Path("/proc/self/maps")
    if not mappings.exists() or not hasattr(mmap, "MADV_DONTNEED") or tensor.device.type != "cpu":
        return
    # only whole pages: neighbouring pages contain parts of other weights
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    for line in mappings.read_text(encoding="utf-8", errors="replace").splitlines():
        # "start-stop permissions offset device inode path"; the inode of memory without a file is 0
        addresses, _, _, _, inode = line.split(maxsplit=5)[:5]
        first, last = (int(address, 16) for address in addresses.split("-"))
        if inode != "0" and first <= start < stop <= last:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
            return


def check_quantization(quantize: str | None) -> None:
    """Check the option `quantize`.

    Args:
        quantize: `"int8"`, or `None` for no quantisation.

    Raises:
        ValueError: the value is unknown.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ValueError(f"`quantize` must be 'int8' or None, got {quantize!r}: correct it")


def has_int8_weights(config: Any) -> bool:
    """Return whether a checkpoint contains int8 weights of this package.

    Args:
        config: configuration of the checkpoint, before the model is loaded.
    """
    quantization_config = getattr(config, "quantization_config", None) or {}
    return dict(quantization_config).get("quant_method") == QUANT_METHOD


def check_int8_device(device: Any) -> None:
    """Check that int8 layers can run on a device.

    Args:
        device: `torch.device`, its name, or a GPU index.

    Raises:
        ValueError: the device is not a CPU.
    """
    if str(device).partition(":")[0] != "cpu":
        raise ValueError(f"int8 requires the device 'cpu', got {str(device)!r}: use `device='cpu'`, or no quantisation")


def quantize_model(model: Any) -> None:
    """Quantise a loaded model to int8, as `from_pretrained(..., quantization_config=ParakeetInt8Config())` does.

    Args:
        model: model of this package with float weights on a CPU; changed in place. On a CPU without exact int8
            products, it stays as it is, and a warning is logged.
    """
    quantizer = ParakeetInt8Quantizer(ParakeetInt8Config(), pre_quantized=False)
    model.hf_quantizer = quantizer
    quantizer.preprocess_model(model)
    quantizer.postprocess_model(model)


def register_int8() -> None:
    """Register the config and the quantizer with transformers; a repeated call has no effect."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(ParakeetInt8Config)
        register_quantizer(QUANT_METHOD)(ParakeetInt8Quantizer)


__all__ = [
    "ParakeetInt8Config",
    "ParakeetInt8Quantizer",
    "check_int8_device",
    "check_quantization",
    "has_int8_weights",
    "quantize_model",
    "register_int8",
]
