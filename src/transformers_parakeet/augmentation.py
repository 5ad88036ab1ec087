"""What training does to audio: SpecAugment on features and dither on samples, with NeMo's settings.

When they apply is decided in `modeling_parakeet.py` (SpecAugment, in training) and `training.py` (dither).
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

# settings of a `.nemo` file that only choose between implementations, or say how large masks are that it may not have
WITHOUT_EFFECT = {"use_vectorized_spec_augment", "use_vectorized_code", "use_numba_spec_augment", "rect_time",
                  "rect_freq", "rng"}  # fmt: skip


def check_spec_augment(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Complete SpecAugment settings with NeMo's defaults.

    Args:
        settings: `freq_masks` and `time_masks`, numbers of bands; `freq_width`, mel bins; `time_width`, frames, or as a
            float a share of the clip; `mask_value`.

    Returns:
        All five settings.

    Raises:
        ValueError: a setting that is not implemented, or a value that cannot be.
        TypeError: `mask_value` is no number.
    """
    known = {**DEFAULTS, **{name: value for name, value in settings.items() if name in DEFAULTS}}
    others = {k: v for k, v in settings.items() if k not in DEFAULTS and k not in WITHOUT_EFFECT}
    if others.pop("rect_masks", 0):
        raise ValueError(f"`rect_masks` must be 0, got {settings['rect_masks']}: cutout is not implemented, remove it")
    if others:
        raise ValueError(
            f"SpecAugment knows {', '.join(DEFAULTS)}, got {', '.join(sorted(others))}: remove it from `spec_augment`"
        )
    if isinstance(known["time_width"], float) and not 0 <= known["time_width"] <= 1:
        raise ValueError(
            f"`time_width` as a float is a share and must lie in [0, 1], got {known['time_width']}: frames are an int"
        )
    if not isinstance(known["mask_value"], (int, float)):
        raise TypeError(f"`mask_value` must be a number, got {known['mask_value']!r}: NeMo's default is 0.0")
    return known


def spec_augment(
    features: Tensor, lengths: Tensor, settings: Mapping[str, Any], generator: torch.Generator | None = None
) -> Tensor:
    """Blank random bands in time and in frequency (arXiv 1904.08779), drawn as NeMo draws them.

    A band's width is uniform below the given one, its start uniform where the whole band fits into the clip.

    Args:
        features: (B, T, F) normalised log-mel features; not changed.
        lengths: (B,) valid frames.
        settings: see `check_spec_augment`.
        generator: source of randomness; default torch's own for the device, which `set_seed` seeds.

    Returns:
        (B, T, F) features.
    """
    known = check_spec_augment(settings)
    frames, bins = features.shape[1:]
    lengths = lengths.to(features.device, torch.float32)
    width = known["time_width"]
    widths = width * lengths if isinstance(width, float) else torch.full_like(lengths, width)
    time = _bands(frames, known["time_masks"], widths, lengths, generator)
    everywhere = torch.full_like(lengths, bins)
    frequency = _bands(bins, known["freq_masks"], torch.full_like(lengths, known["freq_width"]), everywhere, generator)
    return features.masked_fill(time[:, :, None] | frequency[:, None, :], known["mask_value"])


def _bands(size: int, number: int, widths: Tensor, extent: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw (B, size) marks of `number` bands per clip, narrower than `widths` (B,) and inside `extent` (B,)."""
    shape = (len(extent), number)
    drawn = torch.rand((2, *shape), device=extent.device, generator=generator)
    # a clip shorter than the widest band can be blanked as a whole, not beyond
    width = torch.minimum((drawn[0] * widths[:, None]).floor(), extent[:, None])
    start = (drawn[1] * (extent[:, None] - width)).floor()
    position = torch.arange(size, device=extent.device)
    inside = (position >= start[..., None]) & (position < (start + width)[..., None])
    return inside.any(dim=1)


def dither(samples: npt.NDArray[np.float32], amount: float, seed: int) -> npt.NDArray[np.float32]:
    """Add faint noise, so that digital silence has a spectrum; as NeMo's features do in training, with 1e-5.

    The noise follows from the seed and the samples alone: it is the same in any worker, process and order, and after
    an interruption.

    Args:
        samples: (S,) float32.
        amount: standard deviation.
        seed: of the noise.

    Returns:
        (S,) float32.
    """
    if not amount:
        return samples
    rng = np.random.default_rng((seed, len(samples), zlib.crc32(samples.tobytes())))
    return samples + np.float32(amount) * rng.standard_normal(len(samples), dtype=np.float32)
