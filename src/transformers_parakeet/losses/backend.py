"""Chooses what computes the transducer loss: the Triton kernel that travels with the package, another one, or PyTorch.

The loss itself is in `losses.py`, the kernel in the repository's folder `hub_kernels/transducer-loss`.
"""

from __future__ import annotations

import inspect
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .transducer import TransducerLoss

logger = logging.get_logger(__name__)

CHOICES = ("auto", "off", "require")
# name under which `LOCAL_KERNELS` replaces the kernel that travels with the package
KERNEL_ID = "transformers-parakeet/transducer-loss"
# version whose layer has the arguments of `TransducerLoss`
KERNEL_VERSION = 1
FOLDER = Path(__file__).parents[1] / "hub_kernels" / "transducer-loss"
ACTIVATIONS = ("relu", "tanh", "sigmoid")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# largest distance from PyTorch on the first, small problem, relative to the largest value: products may be in TF32,
# with a relative rounding of 5e-4, and a kernel that is wrong is off by about 1
AGREEMENT = 1e-2


def select_loss(choice: str, states: Tensor, activation: str) -> nn.Module:
    """Choose the layer that computes the transducer loss.

    The environment variable `PARAKEET_KERNEL` stands above the argument; it may also name a kernel on the Hub,
    `owner/name`, which is then required. `LOCAL_KERNELS` of the library `kernels` can give `KERNEL_ID` another folder.
    A kernel is used on a device once it has agreed there with PyTorch, loss and gradients, on a small problem.

    Args:
        choice: `"auto"` takes the kernel on a CUDA device and, where that cannot be, PyTorch with one warning;
            `"off"` takes PyTorch; `"require"` takes the kernel or raises.
        states: inputs of the joint network.
        activation: of the joint network.

    Returns:
        A layer with the `forward` of `TransducerLoss`.

    Raises:
        RuntimeError: a kernel is required and cannot be used.
        ValueError: the choice is none of the three.
    """
    wanted = os.environ.get("PARAKEET_KERNEL", choice)
    source = wanted if "/" in wanted else _source()
    if wanted not in CHOICES and "/" not in wanted:
        raise ValueError(f"`kernel` must be one of {', '.join(CHOICES)}, got {wanted!r}")
    if wanted == "off" or (wanted == "auto" and states.device.type != "cuda"):
        return TransducerLoss()
    layer = _unsupported(states, activation) or _load(source, states.device)
    if isinstance(layer, nn.Module):
        return layer
    if wanted != "auto":
        raise RuntimeError(
            f'the kernel of the transducer loss is required and cannot be used: {layer}; "auto" uses PyTorch'
        )
    logger.warning_once(f"The transducer loss runs in PyTorch, not in its kernel: {layer}.")
    return TransducerLoss()


def _source() -> str:
    """`KERNEL_ID` if the environment gives it a folder, else nothing: the folder of the package."""
    given = os.environ.get("LOCAL_KERNELS", "").split(":")
    return KERNEL_ID if KERNEL_ID in {entry.partition("=")[0] for entry in given} else ""


def _unsupported(states: Tensor, activation: str) -> str | None:
    """Why the kernel has no code for this input, if so."""
    if activation not in ACTIVATIONS:
        return f"it knows the activations {', '.join(ACTIVATIONS)}, and the joint network has {activation!r}"
    if states.dtype not in DTYPES:
        return f"it computes in float32, float16 and bfloat16, and was given {states.dtype}"
    return None


@cache
def _load(source: str, device: torch.device) -> nn.Module | str:
    """Load and try a kernel; return its layer, or why it cannot be used.

    Args:
        source: a Hub id, or nothing for the folder of the package.
        device: to try it on.
    """
    try:
        import kernels

        # found by the kernel's own import: named here because `kernels` does not
        import triton  # noqa: F401
    except ImportError as error:
        return f"{error}; install transformers-parakeet[kernels]"
    try:
        found = kernels.get_kernel(source, version=KERNEL_VERSION) if source else kernels.get_local_kernel(FOLDER)
        layer: nn.Module = found.layers.TransducerLoss()
        # a kernel compiles on its first call
        return _disagreement(layer, device) or layer
    except Exception as error:  # noqa: BLE001  loading and compiling can raise anything, and the reason is passed on
        return f"{type(error).__name__}: {error}".strip()


def _disagreement(layer: nn.Module, device: torch.device) -> str | None:
    """Compare a kernel's layer with `TransducerLoss` on a small problem; return what differs, if anything does."""
    wanted, given = (list(inspect.signature(one.forward).parameters) for one in (TransducerLoss(), layer))
    if wanted != given:
        return f"its arguments are {', '.join(given)}, and should be {', '.join(wanted)}"
    ours, theirs = _try(TransducerLoss(), device), _try(layer, device)
    for name, one, other in zip(("loss", "encoder", "predictor", "weight", "bias"), ours, theirs, strict=True):
        error = float((one - other).abs().max() / one.abs().max())
        # written so that NaN disagrees
        if not error <= AGREEMENT:
            return f"on a small problem its {name} differs from PyTorch's by {error:.1g}"
    return None


def _try(layer: nn.Module, device: torch.device) -> list[Tensor]:
    """Compute the loss of two short clips, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 16), (2, 4, 16), (12, 16), (12,))
    # whatever the caller's modes are, gradients must be had in float32
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        leaves = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
        labels = torch.tensor([[0, 4, 2], [6, 1, 0]], device=device)
        lengths = torch.tensor([[5, 4], [3, 2]], device=device)
        loss = layer(*leaves, labels, *lengths, 8, (0, 1, 2), sigma=0.5, reduction="sum")
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]
