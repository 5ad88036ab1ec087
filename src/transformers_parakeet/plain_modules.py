"""Tells whether a module may be bypassed: whether its weight, read directly, gives what calling the module gives.

The faster ways themselves stand where they are used.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

# hooks of one module, and those that torch keeps for all modules
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)

# of a tensor that is neither quantised, sharded, nor a stand-in
PLAIN_TENSORS = (Tensor, nn.Parameter)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a module is exactly of a class of torch, and nothing has been done to it.

    It is not plain when an adapter or a quantiser has replaced the module, a parametrisation has changed its class, a
    tool has replaced its `forward`, it or all modules have hooks, or a weight is quantised, sharded or on the meta
    device. Then the module has to be called.

    Args:
        module: the module.
        kind: the class.
    """
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if any(getattr(module, name) for name in HOOKS) or any(getattr(torch_module, name) for name in GLOBAL_HOOKS):
        return False
    tensors: list[Any] = [*module._parameters.values(), *module._buffers.values()]
    return all(tensor is None or (type(tensor) in PLAIN_TENSORS and not tensor.is_meta) for tensor in tensors)


def pointwise(conv: nn.Module, hidden: Tensor) -> Tensor:
    """Apply an `nn.Conv1d` of kernel 1, or what stands in its place, to (B, N, H).

    A plain convolution is computed as the matrix product that it is.
    """
    if is_plain(conv, nn.Conv1d):
        return torch.nn.functional.linear(hidden, conv.weight[..., 0], conv.bias)  # type: ignore[index, arg-type]
    result: Tensor = conv(hidden.transpose(1, 2)).transpose(1, 2)
    return result
