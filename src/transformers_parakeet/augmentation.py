"""Augments training audio as NeMo does: SpecAugment on features, and dither (faint noise) on samples.

`modeling_parakeet.py` applies SpecAugment in training; the data collator of `training` applies dither.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# NeMo's defaults: nemo/collections/asr/parts/submodules/spectr_augment.py
DEFAULTS: dict[str, Any] = {"freq_masks": 0, "time_masks": 0, "freq_width": 10, "time_width": 10, "mask_value": 0.0}

# settings that a `.nemo` file can contain and that change no result here: the first three choose between NeMo's
# implementations, `rect_time` and `rect_freq` are sizes of cutout masks, whose number must be 0, `rng` is a generator
IGNORED_SETTINGS = {
    "use_vectorized_spec_augment",
    "use_vectorized_code",
    "use_numba_spec_augment",
    "rect_time",
    "rect_freq",
    "rng",
}


def check_spec_augment(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check SpecAugment settings and add NeMo's defaults for those that are missing.

    Args:
        settings: `freq_masks` and `time_masks`: number of masks; `freq_width`: maximum width in mel bins; `time_width`:
            maximum width in frames if an int, or as a fraction of the clip if a float; `mask_value`: value of masked
            features.

    Returns:
        All five settings.

    Raises:
        ValueError: A setting is not implemented, or its value is invalid.
        TypeError: `mask_value` is not a number.
    """
    known = {**DEFAULTS, **{name: value for name, value in settings.items() if name in DEFAULTS}}
    unknown = {name: value for name, value in settings.items() if name not in DEFAULTS and name not in IGNORED_SETTINGS}
    if unknown.pop("rect_masks", 0):
        raise ValueError(f"`rect_masks` must be 0, got {settings['rect_masks']}: cutout is not implemented, remove it")
    if unknown:
        raise ValueError(
            f"`spec_augment` must contain only {', '.join(DEFAULTS)}, got {', '.join(sorted(unknown))}: remove the rest"
        )
    if isinstance(known["time_width"], float) and not 0 <= known["time_width"] <= 1:
        raise ValueError(
            f"`time_width` as a float is a fraction of the clip and must be in [0, 1], got {known['time_width']}: "
            "pass an int for a number of frames"
        )
    if not isinstance(known["mask_value"], (int, float)):
        raise TypeError(f"`mask_value` must be a number, got {known['mask_value']!r}: NeMo's default is 0.0")
    return known


def spec_augment(
    features: Tensor, lengths: Tensor, settings: Mapping[str, Any], generator: torch.Generator | None = None
) -> Tensor:
    """Mask random bands of frames and of mel bins (SpecAugment, arXiv 1904.08779), with NeMo's distribution.

    The width of a mask is uniform below its maximum, and its start is uniform over the positions where the mask lies
    inside the clip.

    Args:
        features: (B, T, F) normalised log-mel features; not changed.
        lengths: (B,) number of valid frames.
        settings: number and maximum width of the masks on each axis, and the value of masked features; see
            `check_spec_augment`.
        generator: source of randomness; None means torch's default generator for the device.

    Returns:
        (B, T, F) features with the masks applied.

    Raises:
        ValueError: A setting is not implemented, or its value is invalid.
        TypeError: `mask_value` is not a number.
    """
    settings = check_spec_augment(settings)
    num_frames, num_bins = features.shape[1:]
    lengths = lengths.to(features.device, torch.float32)
    time_width = settings["time_width"]
    # a float is a fraction of the clip, an int a number of frames
    max_time_widths = time_width * lengths if isinstance(time_width, float) else torch.full_like(lengths, time_width)
    is_masked_frame = _draw_masks(num_frames, settings["time_masks"], max_time_widths, lengths, generator)
    max_bin_widths = torch.full_like(lengths, settings["freq_width"])
    bin_counts = torch.full_like(lengths, num_bins)
    is_masked_bin = _draw_masks(num_bins, settings["freq_masks"], max_bin_widths, bin_counts, generator)
    is_masked = is_masked_frame[:, :, None] | is_masked_bin[:, None, :]
    return features.masked_fill(is_masked, settings["mask_value"])


def _draw_masks(
    size: int, num_masks: int, max_widths: Tensor, lengths: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw random masks along one axis, time or frequency, for every clip of a batch.

    Args:
        size: number of positions on the axis.
        num_masks: masks per clip.
        max_widths: (B,) every mask of a clip is narrower than this.
        lengths: (B,) number of positions that are valid; masks lie inside them.
        generator: source of randomness; None means torch's default generator.

    Returns:
        (B, size), true where a position is masked.
    """
    # (2, B, num_masks): one uniform number in [0, 1) for the width and one for the start
    uniform = torch.rand((2, len(lengths), num_masks), device=lengths.device, generator=generator)
    # a short clip can be masked completely
    width = torch.minimum((uniform[0] * max_widths[:, None]).floor(), lengths[:, None])
    start = (uniform[1] * (lengths[:, None] - width)).floor()
    position = torch.arange(size, device=lengths.device)
    # (B, num_masks, size)
    is_inside = (position >= start[..., None]) & (position < (start + width)[..., None])
    return is_inside.any(dim=1)


def dither(samples: npt.NDArray[np.float32], amount: float, seed: int) -> npt.NDArray[np.float32]:
    """Add faint Gaussian noise, so that digital silence has a spectrum; NeMo adds 1e-5 in training.

    The noise depends only on the seed and the samples, so it is the same in any worker process, in any order of the
    clips, and after training is resumed.

    Args:
        samples: (S,) float32.
        amount: standard deviation of the noise; 0 returns `samples` itself.
        seed: seed of the noise.

    Returns:
        (S,) float32.
    """
    if not amount:
        return samples
    rng = np.random.default_rng((seed, len(samples), zlib.crc32(samples.tobytes())))
    return samples + np.float32(amount) * rng.standard_normal(len(samples), dtype=np.float32)
