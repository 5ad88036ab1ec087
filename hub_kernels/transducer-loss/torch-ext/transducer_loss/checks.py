"""Checks the arguments of the loss. Each error states the condition and the value of the argument.

Only `check_values` reads values on the device. It copies them to the host once.
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
    """Return whether Triton interprets its programs on the CPU, as tests without a GPU do."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_device(tensors: dict[str, Tensor | None]) -> torch.device:
    """Check that all tensors are on one device that Triton supports, and return this device.

    Args:
        tensors: tensor of each argument, by the name of the argument; None for an argument that was not passed.

    Returns:
        The device of the tensors.

    Raises:
        ValueError: the tensors are on several devices, or Triton cannot run on the device.
    """
    device_by_name = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    device = next(iter(device_by_name.values()))
    if len(set(device_by_name.values())) > 1:
        tensor_devices = ", ".join(f"`{name}` on {tensor_device}" for name, tensor_device in device_by_name.items())
        raise ValueError(f"all tensors must be on one device, got {tensor_devices}")
    if device.type != "cuda" and not (device.type == "cpu" and is_interpreted()):
        raise ValueError(
            f"tensors must be on a CUDA device, got {device}: move them, or set TRITON_INTERPRET=1 before triton is "
            "imported to test on the CPU"
        )
    return device


def check_dtypes(tensors: dict[str, Tensor | None]) -> None:
    """Check that all tensors have a dtype that the kernel supports.

    Args:
        tensors: tensor of each argument, by the name of the argument; None for an argument that was not passed.

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
        durations: number of frames of each duration output; None for RNN-T.
        fastemit_lambda: FastEmit weight.
        omega: probability of computing the RNN-T loss instead of the TDT loss.
        reduction: name of the reduction over the batch.

    Returns:
        The durations as a tuple of integers; None for RNN-T.

    Raises:
        ValueError: an option is out of range.
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
            f"`durations` must be different numbers of frames, none negative and at least one above 0, got {frames}"
        )
    return frames


def check_joint(
    encoder_states: Tensor, predictor_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, activation: str,
    dropout: float,
) -> None:  # fmt: skip
    """Check the shapes of the joint network's inputs and output layer, and its options.

    Args:
        encoder_states: projected encoder states, must have shape (B, T, J).
        predictor_states: projected predictor states, must have shape (B, U+1, J).
        head_weight: weight of the output layer, must have shape (outputs, J).
        head_bias: bias of the output layer, must have shape (outputs,) or be None.
        activation: name of the activation.
        dropout: dropout probability of a hidden unit.

    Raises:
        ValueError: a shape is invalid, or an option is out of range.
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
    """Check the shapes of token logits and duration logits.

    Args:
        token_logits: must have shape (B, T, U+1, V).
        duration_logits: must have shape (B, T, U+1, D), or be None for RNN-T.
        durations: number of frames of each duration output; None for RNN-T.

    Raises:
        ValueError: a shape is invalid, or only one of `duration_logits` and `durations` is None.
    """
    if token_logits.dim() != 4:
        raise ValueError(f"`token_logits` must be (B, T, U+1, V), got {tuple(token_logits.shape)}")
    if (duration_logits is None) != (durations is None):
        raise ValueError("`durations` and `duration_logits` must both be passed for TDT, and both be None for RNN-T")
    if duration_logits is not None and durations is not None:
        shape = (*token_logits.shape[:3], len(durations))
        if tuple(duration_logits.shape) != shape:
            raise ValueError(f"`duration_logits` must have the shape {shape}, got {tuple(duration_logits.shape)}")


def check_lengths(
    labels: Tensor, frame_lengths: Tensor, label_lengths: Tensor, batch: int, num_frames: int, num_positions: int
) -> None:
    """Check the shapes and dtypes of labels and lengths.

    Args:
        labels: label ids, must have shape (B, U).
        frame_lengths: number of valid frames, must have shape (B,).
        label_lengths: number of valid labels, must have shape (B,).
        batch: B.
        num_frames: T.
        num_positions: U + 1.

    Raises:
        TypeError: a tensor does not contain int32 or int64.
        ValueError: a shape is invalid, or the batch is empty.
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
    """Check the values of labels and lengths, and return the lengths as lists.

    This is the only function that waits for the device.

    Args:
        labels: (B, U) label ids.
        frame_lengths: (B,) number of valid frames.
        label_lengths: (B,) number of valid labels.
        num_frames: T.
        vocab_size: number of tokens with the blank.
        blank_id: id of the blank.

    Returns:
        `frame_lengths` and `label_lengths` as lists.

    Raises:
        ValueError: a length is larger than the padded size, or a valid label is the blank or not a token id.
    """
    is_label = torch.arange(labels.shape[1], device=labels.device) < label_lengths[:, None]
    is_invalid = ((labels < 0) | (labels >= vocab_size) | (labels == blank_id)) & is_label
    # stacked, so one copy to the host is enough
    counts = torch.stack((frame_lengths.long(), label_lengths.long(), is_invalid.sum(1)))
    frame_counts, label_counts, invalid_counts = counts.tolist()
    if min(frame_counts) < 0 or max(frame_counts) > num_frames:
        raise ValueError(f"`frame_lengths` must be between 0 and {num_frames}, got {frame_counts}")
    if min(label_counts) < 0 or max(label_counts) > labels.shape[1]:
        raise ValueError(f"`label_lengths` must be between 0 and {labels.shape[1]}, got {label_counts}")
    if max(frame_counts) == 0:
        raise ValueError("at least one utterance must have a frame, got `frame_lengths` of zeros")
    if any(invalid_counts):
        utterance = next(index for index, count in enumerate(invalid_counts) if count)
        utterance_labels = labels[utterance, : label_counts[utterance]].tolist()
        raise ValueError(
            f"`labels` must be ids from 0 to {vocab_size - 1} other than the blank {blank_id}, row {utterance} is "
            f"{utterance_labels}"
        )
    return frame_counts, label_counts
