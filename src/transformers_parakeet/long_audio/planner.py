"""Decides whether a recording is recognised as a whole or in windows, from an estimate of the memory that it needs.

`windows.py` chooses the positions of the windows.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

# length of a window in seconds if a recording does not fit the memory budget
DEFAULT_WINDOW_S = 60.0
# longest recording in seconds that is recognised as a whole with full attention, whose time grows with the square of
# the length. The model cards of the 0.6B checkpoints state this length for full attention.
MAX_FULL_ATTENTION_S = 24 * 60.0
# smallest default budget in bytes
MIN_BUDGET_BYTES = 10**9
# the default budget is this fraction of the free memory
BUDGET_FRACTION = 1 / 4
# bytes of a number in float32
FLOAT_BYTES = 4

# Number of tensors of each kind in the estimate, which is an upper limit. For the sizes of the 110M models, attention
# that is limited on both sides, float32 and a CPU it gives 0.33 GB for 5 minutes and 0.59 GB for 15 minutes, where a
# CTC model needed 0.18 and 0.32 GB, and 0.72 GB for 20 minutes, where a TDT model needed 0.40 GB.
SAMPLE_COPIES = 1
FEATURE_COPIES = 2
# encoder frames of width H
HIDDEN_COPIES = 8
# relative positions of width H, of which there are 2 N - 1: sinusoids, and their projection in one block
POSITION_COPIES = 4
# logits of a CTC head, and their conversion to scores
LOGIT_COPIES = 2
# attention scores, spectra and subsampling, in bytes; independent of the length of the recording
WORKSPACE_BYTES = 200 * 10**6


@dataclass(frozen=True)
class Plan:
    """How a recording is recognised.

    Args:
        mode: `"whole"` or `"windows"`.
        window_s: maximum length of a window in seconds; `None` for the mode `"whole"`.
        reason: why this mode was chosen, for the log.
    """

    mode: str
    window_s: float | None
    reason: str


def estimate_peak_memory(config: Any, num_samples: int, batch_size: int = 1, dtype_bytes: int = FLOAT_BYTES) -> int:
    """Estimate the memory that recognising clips as a whole needs, in addition to that of the model.

    Args:
        config: configuration of a model of this package.
        num_samples: number of samples of the longest clip.
        batch_size: number of clips that are recognised together.
        dtype_bytes: bytes per number of the model: 4 for float32, 2 for bfloat16.

    Returns:
        Peak memory in bytes.
    """
    encoder = config.encoder_config
    num_frames = ceil(num_samples / config.inputs_to_logits_ratio) + 1
    num_feature_frames = num_frames * encoder.subsampling_factor
    bytes_per_clip = num_samples * FLOAT_BYTES * SAMPLE_COPIES
    bytes_per_clip += num_feature_frames * encoder.num_mel_bins * FLOAT_BYTES * FEATURE_COPIES
    bytes_per_clip += num_frames * encoder.hidden_size * dtype_bytes * HIDDEN_COPIES
    bytes_per_clip += num_frames * config.vocab_size * FLOAT_BYTES * LOGIT_COPIES
    total = WORKSPACE_BYTES + batch_size * bytes_per_clip
    if not has_limited_context(encoder):
        total += 2 * num_frames * encoder.hidden_size * dtype_bytes * POSITION_COPIES
    return total


def has_limited_context(encoder_config: Any) -> bool:
    """Return whether the attention of an encoder is limited on both sides.

    Args:
        encoder_config: configuration of the encoder.
    """
    return min(encoder_config.attention_context_size) >= 0


def find_max_samples(config: Any, memory_budget: int, batch_size: int = 1, dtype_bytes: int = FLOAT_BYTES) -> int:
    """Find the length of the longest recording that fits a memory budget as a whole.

    Args:
        config: configuration of a model of this package.
        memory_budget: bytes above the memory of the model.
        batch_size: number of recordings that are recognised together.
        dtype_bytes: bytes per number of the model.

    Returns:
        Number of samples; 0 if no recording fits.
    """
    fits, exceeds = 0, 1
    while estimate_peak_memory(config, exceeds, batch_size, dtype_bytes) <= memory_budget:
        fits, exceeds = exceeds, 2 * exceeds
    # the estimate increases with the length, so bisection finds the limit
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if estimate_peak_memory(config, middle, batch_size, dtype_bytes) <= memory_budget:
            fits = middle
        else:
            exceeds = middle
    return fits


def plan_recording(
    num_samples: int,
    max_samples: int,
    window_s: float | None,
    sampling_rate: int,
    memory_budget: int,
    has_full_attention: bool,
) -> Plan:
    """Choose how a recording is recognised.

    Args:
        num_samples: length of the recording in samples.
        max_samples: longest recording that fits the memory budget as a whole; see `find_max_samples`.
        window_s: length of a window in seconds that the caller requests; 0 for no windows, `None` to choose by memory.
        sampling_rate: samples per second.
        memory_budget: memory budget in bytes, named in the reason.
        has_full_attention: whether the attention of the model is not limited on both sides. A recording longer than
            `MAX_FULL_ATTENTION_S` is then recognised in windows unless the caller requests otherwise.

    Returns:
        The plan. A recording that is not longer than a window is recognised as a whole.
    """
    if window_s == 0:
        return Plan("whole", None, "`chunk_length_s` is 0")
    if window_s is not None:
        if num_samples <= window_s * sampling_rate:
            return Plan("whole", None, f"the recording is not longer than `chunk_length_s`, {window_s:g} s")
        return Plan("windows", window_s, f"`chunk_length_s` is {window_s:g}")
    duration_s = num_samples / sampling_rate
    if has_full_attention and duration_s > MAX_FULL_ATTENTION_S:
        reason = f"the recording has {duration_s:.0f} s, and full attention is used up to {MAX_FULL_ATTENTION_S:.0f} s"
        return Plan("windows", DEFAULT_WINDOW_S, reason)
    limit = f"{max_samples / sampling_rate:.0f} s fit the memory budget of {memory_budget / 1e9:.2f} GB"
    if num_samples <= max(max_samples, DEFAULT_WINDOW_S * sampling_rate):
        return Plan("whole", None, f"the recording has {duration_s:.0f} s, and {limit}")
    return Plan("windows", DEFAULT_WINDOW_S, f"the recording is longer than fits as a whole: {limit}")


def get_memory_budget(memory_budget: int | None, device: torch.device) -> int:
    """Return the memory budget in bytes.

    Args:
        memory_budget: bytes; `None` for a quarter of the free memory of the device, at least 1 GB.
        device: device of the model.

    Returns:
        Bytes.

    Raises:
        ValueError: `memory_budget` is not a positive integer.
    """
    check_memory_budget(memory_budget)
    if memory_budget is None:
        return max(MIN_BUDGET_BYTES, int(BUDGET_FRACTION * get_free_memory(device)))
    return memory_budget


def check_memory_budget(memory_budget: int | None) -> None:
    """Check that a memory budget is a positive integer or `None`.

    Args:
        memory_budget: bytes; `None` for the default.

    Raises:
        ValueError: it is neither.
    """
    is_integer = isinstance(memory_budget, int) and not isinstance(memory_budget, bool)
    if memory_budget is not None and not (is_integer and memory_budget > 0):
        raise ValueError(
            f"`memory_budget` must be a positive number of bytes, got {memory_budget!r}: pass an integer, for example "
            "2 * 10**9 for 2 GB, or None for a quarter of the free memory"
        )


def get_free_memory(device: torch.device) -> int:
    """Return the number of bytes that can be allocated on a device.

    On a CPU it is the smaller one of the free memory of the machine and of the control group of the process, which
    limits the memory of a container.

    Args:
        device: device of the model.

    Returns:
        Bytes; 0 if the system does not report its memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free_memory = min(read_machine_memory(Path("/proc/meminfo")), read_group_memory(Path("/sys/fs/cgroup")))
    if free_memory < inf:
        return int(free_memory)
    return read_system_memory()


def read_machine_memory(path: Path) -> float:
    """Read the available memory of a Linux machine.

    Args:
        path: the file /proc/meminfo.

    Returns:
        Bytes; infinity if the file does not exist or does not contain the value.
    """
    if not path.is_file():
        return inf
    match = re.search(r"^MemAvailable:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    return inf if match is None else 1024 * int(match[1])


def read_group_memory(folder: Path) -> float:
    """Read the free memory of the control group of a container, in version 2 or version 1 of the Linux interface.

    Args:
        folder: the folder /sys/fs/cgroup.

    Returns:
        Bytes; infinity if the group has no limit. Cached files that the system can remove count as free.
    """
    for limit_name, usage_name, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit_path, usage_path = folder / limit_name, folder / usage_name
        if limit_path.is_file() and usage_path.is_file() and (limit := limit_path.read_text().strip()).isdigit():
            statistics = usage_path.with_name("memory.stat")
            match = (
                re.search(rf"^{cache_key} (\d+)$", statistics.read_text(), re.MULTILINE)
                if statistics.is_file()
                else None
            )
            cache = 0 if match is None else int(match[1])
            return max(0, int(limit) - int(usage_path.read_text()) + cache)
    return inf


def read_system_memory() -> int:
    """Return the available memory, or else the installed memory, that `os.sysconf` reports; 0 if it reports neither."""
    names = getattr(os, "sysconf_names", {})
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if name in names:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    return 0
