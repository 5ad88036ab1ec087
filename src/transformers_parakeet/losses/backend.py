"""Selects the implementation of the transducer loss: PyTorch, or a Triton kernel that was compared with PyTorch.

The caller passes the layer that computes the loss in PyTorch. The source of the kernel is in the folder
`hub_kernels/transducer-loss`.

Letters: B clips, T frames, U labels, J width of the joint network, V tokens with the blank, D durations.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

KERNEL_CHOICES = ("auto", "off", "require")
# Hub id of the kernel; the variable `LOCAL_KERNELS` of the library `kernels` can map it to a folder
KERNEL_ID = "transformers-parakeet/transducer-loss"
# major version of the kernel; its layer must have a `forward` with the arguments of the PyTorch layer
KERNEL_VERSION = 1
# module that contains the kernel in a wheel and in an editable installation
KERNEL_MODULE = f"{__package__}.transducer_kernel"
# source of the kernel in a checkout of the repository; an installed wheel does not have this file
KERNEL_SOURCE = (
    Path(__file__).parents[3].joinpath("hub_kernels", "transducer-loss", "torch-ext", "transducer_loss", "__init__.py")
)
KERNEL_ACTIVATIONS = ("relu", "tanh", "sigmoid")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (frames, labels) of the clips that a kernel is compared on. The tiles of the kernel contain 16 frames, 1024 labels or
# 1024 tokens. The first clip has several tiles of frames, the second has several tiles of labels, the last has no
# labels.
CHECK_LENGTHS = ((48, 20), (3, 1100), (17, 0))
# (frames, labels) for Triton's interpreter on the CPU, which would need minutes for `CHECK_LENGTHS`
INTERPRETER_CHECK_LENGTHS = ((5, 3), (4, 2))
# workspace of the comparison, in bytes; with V = 8192 it is too small for all logits, so they are computed in chunks
CHECK_WORKSPACE_BYTES = 2**24
# Allowed ratio between the largest error of the kernel and the largest error of PyTorch in the same dtype, both against
# float64. Measured with Triton's interpreter at V = 9 and 1025, J = 8 and 640: at most 2.2 in float32, 1.8 in bfloat16,
# 1.0 in float16.
MAX_ERROR_RATIO = 4.0
# Smallest tolerance of the comparison. The error of PyTorch in float32 is about 1e-6, and a GPU approximates
# exponentials.
MIN_TOLERANCE = 1e-5
# results of `compute_losses_and_gradients`, in order
RESULT_NAMES = (
    "loss",
    "gradient of `encoder_states`",
    "gradient of `predictor_states`",
    "gradient of `head_weight`",
    "gradient of `head_bias`",
)
# number of results, counted from the first, that have one row per clip
NUM_PER_CLIP_RESULTS = 3


@dataclass(frozen=True)
class JointSettings:
    """Properties of a joint network and its inputs for which a kernel is compiled.

    Args:
        device: device of the tensors.
        dtype: dtype of the matrix products.
        vocab_size: V, number of tokens with the blank.
        joint_size: J, width of the joint network.
        durations: number of frames of each duration output; None for RNN-T.
        activation: name of the activation of the joint network.
    """

    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    joint_size: int
    durations: tuple[int, ...] | None
    activation: str


@dataclass(frozen=True)
class CheckedKernel:
    """Result of loading a kernel and comparing it with PyTorch.

    Args:
        layer: layer of the kernel; None if the kernel cannot be used.
        problem: reason why the kernel cannot be used; empty if it can be used.
    """

    layer: nn.Module | None
    problem: str = ""


# results of the comparisons in this process; the lock makes concurrent first calls share one comparison
_checked_kernels: dict[tuple[str, JointSettings], CheckedKernel] = {}
_check_lock = Lock()


def select_loss(
    choice: str,
    pytorch_loss: nn.Module,
    encoder_states: Tensor,
    head_weight: Tensor,
    durations: Sequence[int] | None,
    activation: str,
) -> nn.Module:
    """Select the layer that computes the transducer loss: PyTorch or a Triton kernel.

    The environment variable `PARAKEET_KERNEL` overrides `choice`. The variable may also be the id `owner/name` of a
    kernel on the Hub; this kernel is then required. Before a kernel is used, its loss and gradients are compared with
    `pytorch_loss` at the widths of this joint network, on this device and in this dtype.

    Args:
        choice: `"auto"` uses the kernel on a CUDA device and falls back to PyTorch with one warning; `"off"` uses
            PyTorch; `"require"` uses the kernel or raises an error.
        pytorch_loss: layer that computes the loss in PyTorch.
        encoder_states: (B, T, J) projected encoder states, the inputs of the joint network.
        head_weight: (V, J), or (V + D, J) with durations: weight of the joint network's output layer.
        durations: number of frames of each duration output; None for RNN-T.
        activation: name of the activation of the joint network.

    Returns:
        `pytorch_loss`, or a kernel's layer whose `forward` has the same arguments.

    Raises:
        RuntimeError: a kernel is required and cannot be used.
        ValueError: `choice` or `PARAKEET_KERNEL` has an unknown value.
    """
    requested = os.environ.get("PARAKEET_KERNEL", choice)
    is_hub_id = "/" in requested
    if requested not in KERNEL_CHOICES and not is_hub_id:
        raise ValueError(f"`kernel` must be one of {', '.join(KERNEL_CHOICES)}, got {requested!r}")
    if requested == "off" or (requested == "auto" and encoder_states.device.type != "cuda"):
        return pytorch_loss
    settings = read_joint_settings(encoder_states, head_weight, durations, activation)
    repo_id = requested if is_hub_id else read_local_override()
    kernel = check_kernel_once(repo_id, settings, pytorch_loss)
    if kernel.layer is not None:
        return kernel.layer
    if requested != "auto":
        raise RuntimeError(
            f"the kernel of the transducer loss is required and cannot be used: {kernel.problem}. "
            'Set `kernel` to "auto" or "off" to compute the loss in PyTorch.'
        )
    logger.warning_once(f"The transducer loss is computed in PyTorch, not by its kernel: {kernel.problem}.")
    return pytorch_loss


def read_joint_settings(
    encoder_states: Tensor, head_weight: Tensor, durations: Sequence[int] | None, activation: str
) -> JointSettings:
    """Read the settings for which a kernel is compiled from the tensors of the joint network.

    Args:
        encoder_states: (B, T, J) projected encoder states.
        head_weight: (V, J), or (V + D, J) with durations: weight of the joint network's output layer.
        durations: number of frames of each duration output; None for RNN-T.
        activation: name of the activation of the joint network.

    Returns:
        The settings. Under autocast, their dtype is the dtype of autocast.
    """
    device_type = encoder_states.device.type
    dtype = torch.promote_types(encoder_states.dtype, head_weight.dtype)
    # float64 stays float64, because a kernel does not accept float64 inputs even under autocast
    if dtype in KERNEL_DTYPES and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    num_outputs, joint_size = head_weight.shape
    return JointSettings(
        device=encoder_states.device,
        dtype=dtype,
        vocab_size=num_outputs - len(durations or ()),
        joint_size=joint_size,
        durations=None if durations is None else tuple(durations),
        activation=activation,
    )


def read_local_override() -> str:
    """Return `KERNEL_ID` if the variable `LOCAL_KERNELS` maps it to a folder, otherwise an empty string.

    The value of the variable has the form `owner/name=/folder:owner/name=/folder`.
    """
    entries = os.environ.get("LOCAL_KERNELS", "").split(":")
    mapped_ids = {entry.partition("=")[0] for entry in entries}
    return KERNEL_ID if KERNEL_ID in mapped_ids else ""


def check_kernel_once(repo_id: str, settings: JointSettings, pytorch_loss: nn.Module) -> CheckedKernel:
    """Load a kernel and compare it with PyTorch, or return the result of an earlier call for the same joint network.

    Args:
        repo_id: Hub id of the kernel; empty for the kernel in this package.
        settings: settings of the joint network.
        pytorch_loss: layer that computes the loss in PyTorch.

    Returns:
        The layer of the kernel, or the reason why the kernel cannot be used.
    """
    key = (repo_id, settings)
    with _check_lock:
        if key not in _checked_kernels:
            _checked_kernels[key] = check_kernel(repo_id, settings, pytorch_loss)
        return _checked_kernels[key]


def check_kernel(repo_id: str, settings: JointSettings, pytorch_loss: nn.Module) -> CheckedKernel:
    """Load a transducer-loss kernel and compare its results with the PyTorch loss.

    Args:
        repo_id: Hub id of the kernel; empty for the kernel in this package.
        settings: settings of the joint network.
        pytorch_loss: layer that computes the loss in PyTorch.

    Returns:
        The layer of the kernel, or the reason why the kernel cannot be used. Loading and compilation errors are
        returned as the reason, not raised.
    """
    problem = describe_unsupported_setting(settings)
    if problem is not None:
        return CheckedKernel(None, problem)
    try:
        layer = load_layer(repo_id)
        # the comparison calls the kernel for the first time, which compiles it
        problem = describe_difference(layer, pytorch_loss, settings)
    except ImportError as error:
        return CheckedKernel(None, f"{type(error).__name__}: {error}; install the packages of the extra `kernels`")
    except Exception as error:  # noqa: BLE001  loading and compiling can raise any error
        return CheckedKernel(None, f"{type(error).__name__}: {error}".strip())
    return CheckedKernel(layer) if problem is None else CheckedKernel(None, problem)


def describe_unsupported_setting(settings: JointSettings) -> str | None:
    """Explain why the kernels do not support a joint network.

    Args:
        settings: settings of the joint network.

    Returns:
        The reason; None if the kernels support the joint network.
    """
    if settings.activation not in KERNEL_ACTIVATIONS:
        supported = ", ".join(KERNEL_ACTIVATIONS)
        return (
            f"the kernels support only the activations {supported}, but the joint network has {settings.activation!r}"
        )
    if settings.dtype not in KERNEL_DTYPES:
        return f"the kernels support only float32, float16 and bfloat16, but the inputs are {settings.dtype}"
    return None


def load_layer(repo_id: str) -> nn.Module:
    """Load a kernel and create its layer `TransducerLoss`.

    Args:
        repo_id: Hub id of the kernel, which is loaded with the library `kernels`; empty for the kernel in this
            package, which needs only Triton.

    Returns:
        A new layer without parameters.

    Raises:
        ImportError: Triton is not installed, or the library `kernels` is needed and not installed.
    """
    if not repo_id:
        kernel = load_bundled_kernel()
    else:
        import kernels

        kernel = kernels.get_kernel(repo_id, version=KERNEL_VERSION)
    layer: nn.Module = kernel.layers.TransducerLoss()
    return layer


def load_bundled_kernel() -> ModuleType:
    """Import the kernel in this package.

    An installed package contains the kernel as the module `KERNEL_MODULE`. A checkout that was added to the Python path
    without an installation has no such module. There, the module is created from the source file `KERNEL_SOURCE`.

    Returns:
        The module `KERNEL_MODULE`.

    Raises:
        ImportError: Triton is not installed, or the kernel is missing.
    """
    if KERNEL_MODULE in sys.modules or not KERNEL_SOURCE.is_file():
        return importlib.import_module(KERNEL_MODULE)
    spec = importlib.util.spec_from_file_location(
        KERNEL_MODULE, KERNEL_SOURCE, submodule_search_locations=[str(KERNEL_SOURCE.parent)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{KERNEL_SOURCE} must be a Python file")
    module = importlib.util.module_from_spec(spec)
    # register the module before it runs, because the relative imports in the kernel look it up
    sys.modules[KERNEL_MODULE] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        # do not leave a half-imported module
        del sys.modules[KERNEL_MODULE]
        raise
    return module


def describe_difference(kernel_loss: nn.Module, pytorch_loss: nn.Module, settings: JointSettings) -> str | None:
    """Compare a kernel with PyTorch on a small random batch and describe their difference.

    Both are compared with PyTorch in float64. The allowed error of the kernel is a multiple of the error of PyTorch in
    `settings.dtype`, because this error includes the rounding of the matrix products, such as TF32.

    Args:
        kernel_loss: layer of the kernel.
        pytorch_loss: layer that computes the loss in PyTorch.
        settings: settings of the joint network.

    Returns:
        Description of the difference; None if the kernel agrees with PyTorch.
    """
    expected_arguments = list(inspect.signature(pytorch_loss.forward).parameters)
    kernel_arguments = list(inspect.signature(kernel_loss.forward).parameters)
    if kernel_arguments != expected_arguments:
        return f"its arguments are {', '.join(kernel_arguments)}, they must be {', '.join(expected_arguments)}"
    exact_results = compute_losses_and_gradients(pytorch_loss, settings, torch.float64)
    pytorch_results = compute_losses_and_gradients(pytorch_loss, settings, settings.dtype)
    kernel_results = compute_losses_and_gradients(kernel_loss, settings, settings.dtype)
    pytorch_errors = compute_relative_errors(pytorch_results, exact_results)
    kernel_errors = compute_relative_errors(kernel_results, exact_results)
    tolerance = max(MIN_TOLERANCE, MAX_ERROR_RATIO * max(pytorch_errors))
    differences = [
        f"{name} (relative error {error:.1g})"
        for name, error in zip(RESULT_NAMES, kernel_errors, strict=True)
        # `not error <= tolerance` is also true for NaN
        if not error <= tolerance
    ]
    if not differences:
        return None
    return f"it differs from PyTorch by more than {tolerance:.1g} for {settings}: {', '.join(differences)}"


def draw_joint_inputs(settings: JointSettings, lengths: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Draw random inputs and a random output layer of a joint network, scaled to give logits of order 1.

    Args:
        settings: settings of the joint network; the values are rounded to `settings.dtype`.
        lengths: (number of frames, number of labels) of each clip.

    Returns:
        (B, T, J) encoder states, (B, U+1, J) predictor states, and (V + D, J) weight and (V + D,) bias of the output
        layer, all in `settings.dtype` on the CPU.
    """
    batch_size, joint_size = len(lengths), settings.joint_size
    max_frames, max_labels = (max(counts) for counts in zip(*lengths, strict=True))
    num_outputs = settings.vocab_size + len(settings.durations or ())
    shapes = ((batch_size, max_frames, joint_size), (batch_size, max_labels + 1, joint_size), (num_outputs, joint_size))
    generator = torch.Generator().manual_seed(0)
    encoder_states, predictor_states, weight = (torch.randn(shape, generator=generator) for shape in shapes)
    bias = torch.randn(num_outputs, generator=generator)
    inputs = (encoder_states, predictor_states, weight / joint_size**0.5, bias)
    return [tensor.to(settings.dtype) for tensor in inputs]


def compute_losses_and_gradients(loss_layer: nn.Module, settings: JointSettings, dtype: torch.dtype) -> list[Tensor]:
    """Compute the joint-network losses and their gradients for a random batch.

    The values of the batch are first rounded to `settings.dtype` and then converted to `dtype`. So the results in
    float64 and in `settings.dtype` have the same inputs and can be compared.

    Args:
        loss_layer: layer that computes the transducer loss.
        settings: settings of the joint network.
        dtype: dtype of the inputs of the layer.

    Returns:
        (B,) losses, and the gradients of encoder states, predictor states, weight and bias of the output layer.
    """
    device, vocab_size = settings.device, settings.vocab_size
    lengths = CHECK_LENGTHS if device.type == "cuda" else INTERPRETER_CHECK_LENGTHS
    # the caller may be in inference mode or under autocast
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        inputs = [tensor.to(device, dtype).requires_grad_() for tensor in draw_joint_inputs(settings, lengths)]
        frame_lengths, label_lengths = torch.tensor(lengths, device=device).unbind(1)
        batch_size, max_labels = len(lengths), max(num_labels for _, num_labels in lengths)
        # the blank is the last token, V - 1; the labels repeat 0, 1, ..., V - 2
        labels = torch.arange(batch_size * max_labels, device=device).view(batch_size, max_labels) % (vocab_size - 1)
        losses = loss_layer(
            *inputs, labels, frame_lengths, label_lengths, vocab_size - 1, settings.durations, sigma=0.05,
            fastemit_lambda=0.25, activation=settings.activation, reduction="none", zero_infinity=True,
            workspace_bytes=CHECK_WORKSPACE_BYTES,
        )  # fmt: skip
        return [losses.detach(), *torch.autograd.grad(losses.sum(), inputs)]


def compute_relative_errors(results: list[Tensor], exact_results: list[Tensor]) -> list[float]:
    """Compute the largest error of each result relative to the largest absolute value of the exact result.

    Results with one row per clip are compared clip by clip, because large values of a long clip would otherwise hide
    errors in a short clip.

    Args:
        results: losses and gradients from `compute_losses_and_gradients`.
        exact_results: losses and gradients in float64.

    Returns:
        Relative error of each result; NaN if the result contains NaN.
    """
    errors = []
    for result_index, (result, exact) in enumerate(zip(results, exact_results, strict=True)):
        num_rows = len(exact) if result_index < NUM_PER_CLIP_RESULTS else 1
        # (num_rows,)
        max_error = (result.double() - exact).abs().view(num_rows, -1).amax(1)
        max_value = exact.abs().view(num_rows, -1).amax(1)
        errors.append(float((max_error / max_value.clamp(min=1e-30)).max()))
    return errors
