"""What the loss takes: every refusal says what must hold and what was given.

All checks of values are answered by one copy from the device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "tanh", "sigmoid")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS = ("none", "sum", "mean", "mean_batch", "mean_volume")


def interpreted() -> bool:
    """Tell whether Triton runs its programs on the CPU, one by one: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_device(tensors: dict[str, Tensor | None]) -> torch.device:
    """Return the one device that all tensors are on.

    Raises:
        ValueError: they are on several devices, or on one without Triton.
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    device = next(iter(devices.values()))
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"`{name}` on {at}" for name, at in devices.items())
        raise ValueError(f"all tensors must be on one device, got {listed}")
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        raise ValueError(
            f"the kernel runs on CUDA devices, got tensors on {device}; "
            "for a test on the CPU set TRITON_INTERPRET=1 before triton is imported"
        )
    return device


def check_dtype(**tensors: Tensor | None) -> None:
    """Refuse dtypes that the kernel has no code for.

    Raises:
        TypeError: a tensor is not float32, float16 or bfloat16.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"`{name}` must be float32, float16 or bfloat16, got {tensor.dtype}")


def check_options(
    blank_id: int, tokens: int, durations: Sequence[int] | None, fastemit_lambda: float, omega: float, reduction: str
) -> tuple[int, ...] | None:
    """Check what does not depend on the minibatch; return the durations as a tuple.

    Raises:
        ValueError: an option is out of its range.
    """
    if not 0 <= blank_id < tokens:
        raise ValueError(f"`blank_id` must be one of the {tokens} tokens, got {blank_id}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"`reduction` must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= omega <= 1:
        raise ValueError(f"`omega` must be a probability, got {omega}")
    if fastemit_lambda < 0:
        raise ValueError(f"`fastemit_lambda` must not be negative, got {fastemit_lambda}")
    if durations is None:
        return None
    spans = tuple(int(duration) for duration in durations)
    if min(spans, default=0) < 0 or max(spans, default=0) < 1 or len(set(spans)) < len(spans):
        raise ValueError(f"`durations` must be different frame counts, none negative and one above 0, got {spans}")
    return spans


def check_lengths(
    labels: Tensor, frame_lengths: Tensor, label_lengths: Tensor, batch: int, frames: int, columns: int
) -> None:
    """Check shapes and dtypes of labels and lengths.

    Raises:
        TypeError: they are not integers.
        ValueError: shapes do not fit each other.
    """
    shapes = {"labels": (batch, columns - 1), "frame_lengths": (batch,), "label_lengths": (batch,)}
    given = {"labels": labels, "frame_lengths": frame_lengths, "label_lengths": label_lengths}
    for name, tensor in given.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"`{name}` must be int32 or int64, got {tensor.dtype}")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"`{name}` must have the shape {shapes[name]}, got {tuple(tensor.shape)}")
    if batch == 0 or frames == 0:
        raise ValueError(f"there must be at least one utterance and one frame, got {batch} and {frames}")


def check_values(
    labels: Tensor, frame_lengths: Tensor, label_lengths: Tensor, frames: int, tokens: int, blank_id: int
) -> tuple[list[int], list[int]]:
    """Check values of labels and lengths; return the lengths. The one place that waits for the device.

    Raises:
        ValueError: a length is outside the padded size, or a label is no token or the blank.
    """
    inside = torch.arange(labels.shape[1], device=labels.device) < label_lengths[:, None]
    wrong = ((labels < 0) | (labels >= tokens) | (labels == blank_id)) & inside
    table = torch.stack((frame_lengths.long(), label_lengths.long(), wrong.sum(1))).tolist()
    if min(table[0]) < 0 or max(table[0]) > frames:
        raise ValueError(f"`frame_lengths` must be between 0 and {frames}, got {table[0]}")
    if min(table[1]) < 0 or max(table[1]) > labels.shape[1]:
        raise ValueError(f"`label_lengths` must be between 0 and {labels.shape[1]}, got {table[1]}")
    if max(table[0]) == 0:
        raise ValueError("at least one utterance must have a frame, got `frame_lengths` of zeros")
    if any(table[2]):
        clip = next(index for index, count in enumerate(table[2]) if count)
        row = labels[clip, : table[1][clip]].tolist()
        raise ValueError(
            f"`labels` must be tokens from 0 to {tokens - 1} other than the blank {blank_id}, row {clip} has {row}"
        )
    return table[0], table[1]
