"""Checks of the arguments of the loss. Every error says what must hold and what the argument is.

Checks of values on the device share one copy to the host.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "tanh", "sigmoid")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS = ("none", "sum", "mean", "mean_batch", "mean_volume")


def is_interpreted() -> bool:
    """Return whether Triton interprets its programs on the CPU, which serves tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_device(tensors: dict[str, Tensor | None]) -> torch.device:
    """Return the device of all tensors.

    Args:
        tensors: tensors by the name of their argument.

    Returns:
        The device.

    Raises:
        ValueError: the tensors are on several devices, or Triton cannot run on the device.
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    device = next(iter(devices.values()))
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"`{name}` on {tensor_device}" for name, tensor_device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {listed}")
    if device.type != "cuda" and not (device.type == "cpu" and is_interpreted()):
        raise ValueError(
            f"tensors must be on a CUDA device, got {device}: move them, or set TRITON_INTERPRET=1 before triton is "
            "imported to test on the CPU"
        )
    return device


def check_dtypes(tensors: dict[str, Tensor | None]) -> None:
    """Refuse tensors of a dtype that the kernel has no code for.

    Args:
        tensors: tensors by the name of their argument.

    Raises:
        TypeError: a tensor is not float32, float16 or bfloat16.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"`{name}` must be float32, float16 or bfloat16, got {tensor.dtype}")


def check_options(
    blank_id: int, vocab_size: int, durations: Sequence[int] | None, fastemit_lambda: float, omega: float,
    reduction: str,
) -> tuple[int, ...] | None:  # fmt: skip
    """Check the options of the loss.

    Args:
        blank_id: id of the blank.
        vocab_size: number of tokens with the blank.
        durations: frames of each duration output; None for RNN-T.
        fastemit_lambda: FastEmit weight.
        omega: probability of the RNN-T loss.
        reduction: how the losses of a batch are reduced.

    Returns:
        The durations as a tuple, or None.

    Raises:
        ValueError: an option is out of its range.
    """
    if not 0 <= blank_id < vocab_size:
        raise ValueError(f"`blank_id` must be from 0 to {vocab_size - 1}, got {blank_id}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"`reduction` must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= omega <= 1:
        raise ValueError(f"`omega` must be a probability, got {omega}")
    if fastemit_lambda < 0:
        raise ValueError(f"`fastemit_lambda` must not be negative, got {fastemit_lambda}")
    if durations is None:
        return None
    frames = tuple(int(duration) for duration in durations)
    if min(frames, default=0) < 0 or max(frames, default=0) < 1 or len(set(frames)) < len(frames):
        raise ValueError(
            f"`durations` must be different numbers of frames, none of them negative and one above 0, got {frames}"
        )
    return frames


def check_joint(
    encoder_states: Tensor, predictor_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, activation: str,
    dropout: float,
) -> None:  # fmt: skip
    """Check the inputs and options of the joint network against each other.

    Args:
        encoder_states: must be (B, T, J).
        predictor_states: must be (B, U+1, J).
        head_weight: must be (outputs, J).
        head_bias: must be (outputs,) or None.
        activation: name of the activation.
        dropout: probability of dropping a hidden unit.

    Raises:
        ValueError: a shape does not fit, or an option is out of its range.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be at least 0 and below 1, got {dropout}")
    if encoder_states.dim() != 3 or predictor_states.dim() != 3 or head_weight.dim() != 2:
        raise ValueError(
            "`encoder_states` must be (B, T, J), `predictor_states` (B, U+1, J) and `head_weight` (outputs, J), got "
            f"{tuple(encoder_states.shape)}, {tuple(predictor_states.shape)} and {tuple(head_weight.shape)}"
        )
    batch, _, joint_size = encoder_states.shape
    if predictor_states.shape[0] != batch or predictor_states.shape[1] < 1 or predictor_states.shape[2] != joint_size:
        raise ValueError(
            f"`predictor_states` must be ({batch}, U+1, {joint_size}) like `encoder_states`, got "
            f"{tuple(predictor_states.shape)}"
        )
    if head_weight.shape[1] != joint_size:
        raise ValueError(f"`head_weight` must have {joint_size} columns, got {tuple(head_weight.shape)}")
    if head_bias is not None and tuple(head_bias.shape) != (len(head_weight),):
        raise ValueError(f"`head_bias` must have the shape ({len(head_weight)},), got {tuple(head_bias.shape)}")


def check_logits(token_logits: Tensor, duration_logits: Tensor | None, durations: tuple[int, ...] | None) -> None:
    """Check the shapes of logits.

    Args:
        token_logits: must be (B, T, U+1, V).
        duration_logits: must be (B, T, U+1, D), or None for RNN-T.
        durations: frames of each duration output; None for RNN-T.

    Raises:
        ValueError: a shape does not fit.
    """
    if token_logits.dim() != 4:
        raise ValueError(f"`token_logits` must be (B, T, U+1, V), got {tuple(token_logits.shape)}")
    if (duration_logits is None) != (durations is None):
        raise ValueError("`durations` and `duration_logits` must both be given for TDT, and both be None for RNN-T")
    if duration_logits is not None and durations is not None:
        shape = (*token_logits.shape[:3], len(durations))
        if tuple(duration_logits.shape) != shape:
            raise ValueError(f"`duration_logits` must have the shape {shape}, got {tuple(duration_logits.shape)}")


def check_lengths(
    labels: Tensor, frame_lengths: Tensor, label_lengths: Tensor, batch: int, num_frames: int, num_positions: int
) -> None:
    """Check shapes and dtypes of labels and lengths.

    Args:
        labels: must be (B, U).
        frame_lengths: must be (B,).
        label_lengths: must be (B,).
        batch: B.
        num_frames: T.
        num_positions: U + 1.

    Raises:
        TypeError: they are not integers.
        ValueError: a shape does not fit, or the batch is empty.
    """
    shapes = {"labels": (batch, num_positions - 1), "frame_lengths": (batch,), "label_lengths": (batch,)}
    tensors = {"labels": labels, "frame_lengths": frame_lengths, "label_lengths": label_lengths}
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"`{name}` must be int32 or int64, got {tensor.dtype}")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"`{name}` must have the shape {shapes[name]}, got {tuple(tensor.shape)}")
    if batch == 0 or num_frames == 0:
        raise ValueError(f"a batch must have at least one utterance and one frame, got {batch} and {num_frames}")


def check_values(
    labels: Tensor, frame_lengths: Tensor, label_lengths: Tensor, num_frames: int, vocab_size: int, blank_id: int
) -> tuple[list[int], list[int]]:
    """Check the values of labels and lengths. This is the only place that waits for the device.

    Args:
        labels: (B, U).
        frame_lengths: (B,).
        label_lengths: (B,).
        num_frames: T.
        vocab_size: number of tokens with the blank.
        blank_id: id of the blank.

    Returns:
        The values of `frame_lengths` and `label_lengths`.

    Raises:
        ValueError: a length is outside of the padded size, or a label is the blank or no token.
    """
    is_label = torch.arange(labels.shape[1], device=labels.device) < label_lengths[:, None]
    is_wrong = ((labels < 0) | (labels >= vocab_size) | (labels == blank_id)) & is_label
    table = torch.stack((frame_lengths.long(), label_lengths.long(), is_wrong.sum(1)))
    frame_counts, label_counts, wrong_counts = table.tolist()
    if min(frame_counts) < 0 or max(frame_counts) > num_frames:
        raise ValueError(f"`frame_lengths` must be between 0 and {num_frames}, got {frame_counts}")
    if min(label_counts) < 0 or max(label_counts) > labels.shape[1]:
        raise ValueError(f"`label_lengths` must be between 0 and {labels.shape[1]}, got {label_counts}")
    if max(frame_counts) == 0:
        raise ValueError("at least one utterance must have a frame, got `frame_lengths` of zeros")
    if any(wrong_counts):
        utterance = next(index for index, count in enumerate(wrong_counts) if count)
        row = labels[utterance, : label_counts[utterance]].tolist()
        raise ValueError(
            f"`labels` must be ids from 0 to {vocab_size - 1} other than the blank {blank_id}, row {utterance} is {row}"
        )
    return frame_counts, label_counts
