"""Chooses what computes the transducer loss: a Triton kernel that agrees with PyTorch on this device, or PyTorch.

The caller passes the PyTorch layer. The source of the kernel is in the folder `hub_kernels/transducer-loss`.
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

CHOICES = ("auto", "off", "require")
# Hub id of the kernel; the variable `LOCAL_KERNELS` of the library `kernels` can map it to a folder
KERNEL_ID = "transformers-parakeet/transducer-loss"
# major version of the kernel's layer; its `forward` has the arguments of the PyTorch layer
KERNEL_VERSION = 1
# module that holds the kernel in a wheel and in an editable installation
KERNEL_MODULE = f"{__package__}.transducer_kernel"
# the kernel's source in a checkout of the repository; an installed wheel has no such file
KERNEL_SOURCE = (
    Path(__file__).parents[3].joinpath("hub_kernels", "transducer-loss", "torch-ext", "transducer_loss", "__init__.py")
)
ACTIVATIONS = ("relu", "tanh", "sigmoid")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (frames, labels) of the utterances that a kernel is checked on. The kernel's tiles hold 16 frames, 1024 labels or 1024
# tokens. The first utterance has several tiles of frames, the second several tiles of labels, the last has no labels.
CHECK_LENGTHS = ((48, 20), (3, 1100), (17, 0))
# the same for Triton's interpreter on the CPU, which needs minutes for the lengths above
INTERPRETER_CHECK_LENGTHS = ((5, 3), (4, 2))
# memory for the logits of the check, in bytes: at V = 8192 they are computed in several chunks
CHECK_WORKSPACE_BYTES = 2**24
# The kernel's largest error against float64 may be this multiple of PyTorch's largest error in the same dtype. Measured
# with Triton's interpreter at V = 9 and 1025, J = 8 and 640: at most 2.2 in float32, 1.8 in bfloat16, 1.0 in float16.
ERROR_RATIO = 4.0
# smallest allowed error; PyTorch's own is 1e-6 in float32, and a GPU approximates exponentials
MIN_TOLERANCE = 1e-5
# the results that are compared: the loss and its gradients
RESULT_NAMES = (
    "loss",
    "gradient of `encoder_states`",
    "gradient of `predictor_states`",
    "gradient of `head_weight`",
    "gradient of `head_bias`",
)
# number of results, from the first one, that have one row per utterance
RESULTS_PER_UTTERANCE = 3


@dataclass(frozen=True)
class JointSettings:
    """The properties of a joint network and its inputs that a kernel is compiled for.

    Args:
        device: device of the tensors.
        dtype: dtype of the matrix products.
        vocab_size: V, the number of tokens with the blank.
        joint_size: J, the width of the joint network.
        durations: frames of each duration output; None for RNN-T.
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
    """A kernel after its first-use check.

    Args:
        layer: the kernel's layer; None if it cannot be used.
        problem: why it cannot be used; empty if it can.
    """

    layer: nn.Module | None
    problem: str = ""


# kernels that were checked, by repository and settings; the lock makes concurrent first uses run one check
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
    """Choose the layer that computes the transducer loss.

    The environment variable `PARAKEET_KERNEL` overrides `choice`. It may also be the id of a kernel on the Hub,
    `owner/name`, which is then required. A kernel is used only after its loss and gradients have agreed with those of
    `pytorch_loss` at the widths of this joint network, on this device and in this dtype.

    Args:
        choice: `"auto"` uses the kernel on a CUDA device and falls back to PyTorch with one warning; `"off"` uses
            PyTorch; `"require"` uses the kernel or raises.
        pytorch_loss: layer that computes the loss in PyTorch.
        encoder_states: (B, T, J) inputs of the joint network.
        head_weight: (V, J), or (V + D, J) with durations: output layer of the joint network.
        durations: frames of each duration output; None for RNN-T.
        activation: name of the activation of the joint network.

    Returns:
        A layer with the `forward` of `pytorch_loss`.

    Raises:
        RuntimeError: a kernel is required and cannot be used.
        ValueError: `choice` or `PARAKEET_KERNEL` is none of the values above.
    """
    requested = os.environ.get("PARAKEET_KERNEL", choice)
    is_hub_id = "/" in requested
    if requested not in CHOICES and not is_hub_id:
        raise ValueError(f"`kernel` must be one of {', '.join(CHOICES)}, got {requested!r}")
    if requested == "off" or (requested == "auto" and encoder_states.device.type != "cuda"):
        return pytorch_loss
    settings = read_joint_settings(encoder_states, head_weight, durations, activation)
    repository = requested if is_hub_id else read_local_override()
    kernel = check_kernel_once(repository, settings, pytorch_loss)
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
    """Read from its tensors what a kernel is compiled for.

    Args:
        encoder_states: (B, T, J) inputs of the joint network.
        head_weight: (V, J), or (V + D, J) with durations.
        durations: frames of each duration output; None for RNN-T.
        activation: name of the activation of the joint network.

    Returns:
        The settings; the dtype is that of autocast if it is on.
    """
    device_type = encoder_states.device.type
    dtype = torch.promote_types(encoder_states.dtype, head_weight.dtype)
    # a kernel refuses float64 inputs even under autocast
    if dtype in DTYPES and torch.is_autocast_enabled(device_type):
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
    """Return `KERNEL_ID` if the variable `LOCAL_KERNELS` maps it to a folder, else an empty string.

    The value of the variable has the form `owner/name=/folder:owner/name=/folder`.
    """
    entries = os.environ.get("LOCAL_KERNELS", "").split(":")
    return KERNEL_ID if KERNEL_ID in {entry.partition("=")[0] for entry in entries} else ""


def check_kernel_once(repository: str, settings: JointSettings, pytorch_loss: nn.Module) -> CheckedKernel:
    """Load and check a kernel, or return the result of an earlier check with the same arguments.

    Args:
        repository: Hub id of the kernel; empty for the kernel that travels with the package.
        settings: the joint network to check the kernel for.
        pytorch_loss: layer that computes the loss in PyTorch.

    Returns:
        The kernel's layer, or why the kernel cannot be used.
    """
    key = (repository, settings)
    with _check_lock:
        if key not in _checked_kernels:
            _checked_kernels[key] = check_kernel(repository, settings, pytorch_loss)
        return _checked_kernels[key]


def check_kernel(repository: str, settings: JointSettings, pytorch_loss: nn.Module) -> CheckedKernel:
    """Load a kernel and compare it with PyTorch.

    Args:
        repository: Hub id of the kernel; empty for the kernel that travels with the package.
        settings: the joint network to check the kernel for.
        pytorch_loss: layer that computes the loss in PyTorch.

    Returns:
        The kernel's layer, or why the kernel cannot be used.
    """
    problem = find_unsupported(settings)
    if problem is not None:
        return CheckedKernel(None, problem)
    try:
        layer = load_layer(repository)
        # the kernel is compiled on its first call, which is in the comparison
        problem = find_difference(layer, pytorch_loss, settings)
    except ImportError as error:
        return CheckedKernel(
            None, f"{type(error).__name__}: {error}; the extra `kernels` installs the packages of the kernel"
        )
    except Exception as error:  # noqa: BLE001  loading and compiling can raise anything; the user gets the reason
        return CheckedKernel(None, f"{type(error).__name__}: {error}".strip())
    return CheckedKernel(layer) if problem is None else CheckedKernel(None, problem)


def find_unsupported(settings: JointSettings) -> str | None:
    """Return why a kernel cannot compute the loss of a joint network, or None if it has code for it."""
    if settings.activation not in ACTIVATIONS:
        return f"its activations are {', '.join(ACTIVATIONS)}, the joint network has {settings.activation!r}"
    if settings.dtype not in DTYPES:
        return f"it computes in float32, float16 and bfloat16, the inputs are {settings.dtype}"
    return None


def load_layer(repository: str) -> nn.Module:
    """Load a kernel and return its layer `TransducerLoss`.

    Args:
        repository: Hub id of the kernel; empty for the kernel that travels with the package, which needs only Triton.

    Returns:
        A new layer; it has no state.

    Raises:
        ImportError: Triton is not installed, or the library `kernels` for a Hub id.
    """
    if not repository:
        kernel = load_bundled_kernel()
    else:
        import kernels

        kernel = kernels.get_kernel(repository, version=KERNEL_VERSION)
    layer: nn.Module = kernel.layers.TransducerLoss()
    return layer


def load_bundled_kernel() -> ModuleType:
    """Import the kernel that travels with the package.

    A wheel holds it as the module `KERNEL_MODULE`. A checkout that is on the Python path without an installation has no
    such module, so the module is created from the source file in the checkout.

    Returns:
        The module.

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
    # relative imports inside of the kernel look the module up
    sys.modules[KERNEL_MODULE] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[KERNEL_MODULE]
        raise
    return module


def find_difference(layer: nn.Module, pytorch_loss: nn.Module, settings: JointSettings) -> str | None:
    """Compare a kernel with PyTorch on a small batch at the widths of a joint network.

    Both are compared with PyTorch in float64. The error that the kernel may have follows from PyTorch's error in the
    dtype of the settings: it includes the rounding of the matrix products, such as TF32.

    Args:
        layer: layer of the kernel.
        pytorch_loss: layer that computes the loss in PyTorch.
        settings: the joint network to check the kernel for.

    Returns:
        What differs, or None if nothing does.
    """
    expected_arguments = list(inspect.signature(pytorch_loss.forward).parameters)
    arguments = list(inspect.signature(layer.forward).parameters)
    if arguments != expected_arguments:
        return f"its arguments are {', '.join(arguments)}, they must be {', '.join(expected_arguments)}"
    exact = compute_check_results(pytorch_loss, settings, torch.float64)
    pytorch_errors = relative_errors(compute_check_results(pytorch_loss, settings, settings.dtype), exact)
    kernel_errors = relative_errors(compute_check_results(layer, settings, settings.dtype), exact)
    tolerance = max(MIN_TOLERANCE, ERROR_RATIO * max(pytorch_errors))
    differences = [
        f"{name} (relative error {error:.1g})"
        for name, error in zip(RESULT_NAMES, kernel_errors, strict=True)
        # this form of the comparison also catches NaN
        if not error <= tolerance
    ]
    if not differences:
        return None
    return f"it differs from PyTorch by more than {tolerance:.1g} for {settings}: {', '.join(differences)}"


def make_check_states(settings: JointSettings, lengths: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Draw the floating-point inputs of a loss, with logits of order 1 and the rounding of `settings.dtype`.

    Args:
        settings: widths and dtype of the joint network.
        lengths: (frames, labels) of each utterance.

    Returns:
        (B, T, J) encoder states, (B, U+1, J) predictor states, (V + D, J) weight and (V + D,) bias.
    """
    batch, joint_size = len(lengths), settings.joint_size
    num_frames, num_labels = (max(counts) for counts in zip(*lengths, strict=True))
    num_outputs = settings.vocab_size + len(settings.durations or ())
    shapes = ((batch, num_frames, joint_size), (batch, num_labels + 1, joint_size), (num_outputs, joint_size))
    generator = torch.Generator().manual_seed(0)
    encoder_states, predictor_states, weight = (torch.randn(shape, generator=generator) for shape in shapes)
    bias = torch.randn(num_outputs, generator=generator)
    states = (encoder_states, predictor_states, weight / joint_size**0.5, bias)
    return [state.to(settings.dtype) for state in states]


def compute_check_results(layer: nn.Module, settings: JointSettings, dtype: torch.dtype) -> list[Tensor]:
    """Compute the losses of a random batch and their gradients.

    Args:
        layer: layer that computes the transducer loss.
        settings: the joint network to check a kernel for; the values of the inputs are rounded to its dtype.
        dtype: dtype of the inputs.

    Returns:
        (B,) losses, and the gradients of encoder states, predictor states, weight and bias of the output layer.
    """
    lengths = CHECK_LENGTHS if settings.device.type == "cuda" else INTERPRETER_CHECK_LENGTHS
    # the caller may be in inference mode or under autocast
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(settings.device.type, enabled=False):
        states = make_check_states(settings, lengths)
        leaves = [state.to(settings.device, dtype).requires_grad_() for state in states]
        frame_lengths, label_lengths = torch.tensor(lengths, device=settings.device).unbind(1)
        shape = (len(lengths), states[1].shape[1] - 1)
        labels = torch.arange(shape[0] * shape[1], device=settings.device).view(shape) % (settings.vocab_size - 1)
        losses = layer(
            *leaves, labels, frame_lengths, label_lengths, settings.vocab_size - 1, settings.durations, sigma=0.05,
            fastemit_lambda=0.25, activation=settings.activation, reduction="none", zero_infinity=True,
            workspace_bytes=CHECK_WORKSPACE_BYTES,
        )  # fmt: skip
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]


def relative_errors(results: list[Tensor], exact_results: list[Tensor]) -> list[float]:
    """Return the largest error of each result relative to the largest exact value.

    Results with one row per utterance are compared by utterance, so that long utterances do not hide short ones.

    Args:
        results: losses and gradients, see `compute_check_results`.
        exact_results: the same in float64.

    Returns:
        One number per result; NaN if a result holds NaN.
    """
    errors = []
    for index, (result, exact) in enumerate(zip(results, exact_results, strict=True)):
        num_rows = len(exact) if index < RESULTS_PER_UTTERANCE else 1
        largest_error = (result.double() - exact).abs().view(num_rows, -1).amax(1)
        largest_value = exact.abs().view(num_rows, -1).amax(1)
        errors.append(float((largest_error / largest_value.clamp(min=1e-30)).max()))
    return errors
