"""Augments training data as NeMo does: SpecAugment on features, and dither (faint noise) on waveforms.

`modeling_parakeet.py` applies SpecAugment in training; the data collator in `training/collator.py` applies dither.
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
DEFAULT_SETTINGS: dict[str, Any] = {
    "freq_masks": 0,
    "time_masks": 0,
    "freq_width": 10,
    "time_width": 10,
    "mask_value": 0.0,
}

# settings of `.nemo` files that do not change the result: the first three select one of NeMo's implementations,
# `rect_time` and `rect_freq` are sizes of cutout masks (their number, `rect_masks`, must be 0), `rng` is a generator
IGNORED_SETTINGS = {
    "use_vectorized_spec_augment",
    "use_vectorized_code",
    "use_numba_spec_augment",
    "rect_time",
    "rect_freq",
    "rng",
}


def check_spec_augment(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check SpecAugment settings, and set missing settings to NeMo's defaults.

    Args:
        settings: SpecAugment settings by name:
            - `freq_masks`, `time_masks`: number of frequency masks and of time masks;
            - `freq_width`: maximum width of a frequency mask in mel bins;
            - `time_width`: maximum width of a time mask, in frames if an int, as a fraction of the clip if a float;
            - `mask_value`: value of masked features.

    Returns:
        The five settings listed above.

    Raises:
        ValueError: A setting is not implemented, or its value is invalid.
        TypeError: `mask_value` is not a number.
    """
    if settings.get("rect_masks", 0):
        raise ValueError(
            f"`rect_masks` must be 0, got {settings['rect_masks']}: remove it, because cutout is not implemented"
        )
    unknown_names = sorted(set(settings) - set(DEFAULT_SETTINGS) - IGNORED_SETTINGS - {"rect_masks"})
    if unknown_names:
        raise ValueError(
            f"`spec_augment` must contain only {', '.join(DEFAULT_SETTINGS)}, got {', '.join(unknown_names)}: remove "
            "the unknown settings"
        )
    full_settings = {name: settings.get(name, default) for name, default in DEFAULT_SETTINGS.items()}
    time_width, mask_value = full_settings["time_width"], full_settings["mask_value"]
    if isinstance(time_width, float) and not 0 <= time_width <= 1:
        raise ValueError(
            f"`time_width` as a float is a fraction of the clip and must be in [0, 1], got {time_width}: pass an int "
            "for a number of frames"
        )
    if not isinstance(mask_value, (int, float)):
        raise TypeError(f"`mask_value` must be a number, got {mask_value!r}: NeMo's default is 0.0")
    return full_settings


def spec_augment(
    features: Tensor, lengths: Tensor, settings: Mapping[str, Any], generator: torch.Generator | None = None
) -> Tensor:
    """Mask random bands of frames and of mel bins (SpecAugment, arXiv 1904.08779), with NeMo's distribution.

    The width of a mask is uniformly distributed below its maximum. The start of a mask is uniformly distributed over
    the positions at which the mask lies inside the clip.

    Args:
        features: (B, T, F) normalised log-mel features; not modified.
        lengths: (B,) number of valid frames.
        settings: number and maximum width of the time and frequency masks, and the value of masked features; see
            `check_spec_augment`.
        generator: random generator; None for torch's default generator of the device.

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
    # a float is a fraction of the clip, and an int is a number of frames
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
    """Draw random masks along one axis (time or frequency) for every clip of a batch.

    Args:
        size: size of the axis, padding included: the number of frames or mel bins.
        num_masks: number of masks per clip.
        max_widths: (B,) maximum mask width of each clip (exclusive).
        lengths: (B,) number of valid positions of each clip; masks do not extend beyond them.
        generator: random generator; None for torch's default generator of the device.

    Returns:
        (B, size) bool tensor, True at masked positions.
    """
    # (B, num_masks) each, uniformly distributed in [0, 1)
    uniform_widths, uniform_starts = torch.rand(
        (2, len(lengths), num_masks), device=lengths.device, generator=generator
    )
    # limited to the length of the clip, so a short clip can be masked completely
    widths = torch.minimum((uniform_widths * max_widths[:, None]).floor(), lengths[:, None])
    starts = (uniform_starts * (lengths[:, None] - widths)).floor()
    positions = torch.arange(size, device=lengths.device)
    # (B, num_masks, size)
    is_inside_mask = (positions >= starts[..., None]) & (positions < (starts + widths)[..., None])
    return is_inside_mask.any(dim=1)


def dither(samples: npt.NDArray[np.float32], std: float, seed: int) -> npt.NDArray[np.float32]:
    """Add faint Gaussian noise to a waveform (dither), which gives digital silence a nonzero spectrum.

    The noise depends only on the seed and the samples. A clip therefore gets identical noise in every worker process,
    and after training is resumed.

    Args:
        samples: (S,) float32 samples.
        std: standard deviation of the noise (1e-5 in NeMo); if 0, `samples` is returned unchanged.
        seed: random seed.

    Returns:
        (S,) float32 samples with noise.
    """
    if not std:
        return samples
    rng = np.random.default_rng((seed, len(samples), zlib.crc32(samples.tobytes())))
    return samples + np.float32(std) * rng.standard_normal(len(samples), dtype=np.float32)
