"""Tells whether a module may be bypassed: whether its weight, read directly, gives what calling the module gives.

The faster ways themselves stand where they are used.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

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
    if type(module) is not kind or "forward" in module.__dict__ or has_hooks(module):
        return False
    # written out, because this runs many times in a forward pass
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and (type(tensor) not in PLAIN_TENSORS or tensor.is_meta):
                return False
    return True


def has_hooks(module: nn.Module) -> bool:
    """Tell whether something is called before or after a module, or after every module."""
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
    """Apply an `nn.Conv1d` of kernel 1, or what stands in its place, to (B, N, H).

    A plain convolution is computed as the matrix product that it is.
    """
    if is_plain(conv, nn.Conv1d):
        return torch.nn.functional.linear(hidden, conv.weight[..., 0], conv.bias)  # type: ignore[index, arg-type]
    result: Tensor = conv(hidden.transpose(1, 2)).transpose(1, 2)
    return result
