"""Tests of SpecAugment and dither against their definitions."""

import numpy as np
import pytest
import torch
from conftest import ctc_model, noise

from transformers_parakeet.augmentation import check_spec_augment, dither, spec_augment

SETTINGS = {"freq_masks": 2, "freq_width": 12, "time_masks": 3, "time_width": 20}


def find_masks(features):
    """Return which frames (B, T) and which mel bins (B, F) of features that contain no other zeros are masked."""
    is_zero = features == 0
    return is_zero.all(-1), is_zero.all(1)


def run_lengths(flags):
    """Return the lengths of the runs of true values in a one-dimensional tensor."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.int().numpy(), [0]])))
    return edges[1::2] - edges[::2]


def test_masks_lie_inside_the_clips_and_are_narrower_than_the_maximum_width():
    features = torch.ones(400, 200, 80)
    lengths = torch.full((400,), 120)
    single = {"time_masks": 1, "time_width": 20, "freq_masks": 1, "freq_width": 12}
    frames, bins = find_masks(spec_augment(features, lengths, single, torch.Generator().manual_seed(0)))
    widths = [int(row.sum()) for row in frames]
    heights = [int(row.sum()) for row in bins]
    assert max(widths) == 19
    assert max(heights) == 11
    assert min(widths) == min(heights) == 0
    assert not frames[:, 120:].any()
    assert all(len(run_lengths(row)) <= 1 for row in (*frames, *bins))
    # a start is drawn below (length - width), so the last position is never masked
    assert frames[:, 0].any()
    assert frames[:, 118].any()
    assert not frames[:, 119].any()
    assert bins[:, 0].any()
    assert bins[:, 78].any()


def draw_masked_fraction(rng, num_masks, size, max_width):
    """Draw masks on one axis as NeMo does, and return the fraction of positions that they cover."""
    masked = set()
    for _ in range(num_masks):
        width = int(rng.random() * max_width)
        start = int(rng.random() * (size - width))
        masked |= set(range(start, start + width))
    return len(masked) / size


def test_the_masked_fraction_matches_the_definition():
    rng = np.random.default_rng(0)
    expected_time = np.mean([draw_masked_fraction(rng, 3, 150, 0.2 * 150) for _ in range(1500)])
    expected_bins = np.mean([draw_masked_fraction(rng, 2, 80, 12) for _ in range(1500)])
    features = torch.ones(1500, 160, 80)
    settings = {**SETTINGS, "time_width": 0.2}
    frames, bins = find_masks(spec_augment(features, torch.full((1500,), 150), settings))
    # the standard error of both means is 0.003
    assert frames[:, :150].float().mean() == pytest.approx(expected_time, abs=0.012)
    assert bins.float().mean() == pytest.approx(expected_bins, abs=0.012)


def test_a_short_clip_can_be_masked_completely_but_not_its_padding():
    frames, _ = find_masks(
        spec_augment(torch.ones(50, 30, 8), torch.full((50,), 5), {"time_masks": 4, "time_width": 25})
    )
    assert not frames[:, 5:].any()
    assert frames[:, :5].all(-1).any()


def test_the_generator_determines_the_masks_and_the_input_is_not_changed():
    features = torch.randn(2, 90, 80)
    before = features.clone()
    lengths = torch.tensor([90, 60])
    first, second, third = (
        spec_augment(features, lengths, SETTINGS, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(features, before)
    torch.manual_seed(5)
    from_default_generator = spec_augment(features, lengths, SETTINGS)
    torch.manual_seed(5)
    assert torch.equal(from_default_generator, spec_augment(features, lengths, SETTINGS))


def test_zero_masks_change_nothing_and_mask_value_fills_the_masks():
    features = torch.randn(2, 50, 80)
    lengths = torch.tensor([50, 50])
    assert torch.equal(spec_augment(features, lengths, {}), features)
    filled = spec_augment(features, lengths, {**SETTINGS, "mask_value": -3.0}, torch.Generator().manual_seed(0))
    assert (filled == -3.0).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rect_masks": 2}, "cutout is not implemented"),
        ({"time_warp": 5}, "got time_warp"),
        ({"time_width": 1.5}, "fraction"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_spec_augment(settings)
    with pytest.raises(TypeError, match="mask_value"):
        check_spec_augment({"mask_value": "mean"})
    full = {"rect_masks": 0, "rect_time": 5, "use_vectorized_spec_augment": True, "time_masks": 10, "time_width": 0.05}
    assert check_spec_augment(full)["time_masks"] == 10


def test_the_model_applies_masks_only_in_training():
    model, processor = ctc_model()
    inputs = processor([noise(2.0), noise(1.2, 1)], sampling_rate=16000)
    with torch.no_grad():
        plain = model(**inputs).logits
        model.config.spec_augment = {"time_masks": 4, "time_width": 40, "freq_masks": 2, "freq_width": 40}
        assert torch.equal(model(**inputs).logits, plain)
        model.train()
        for module in model.modules():
            # switch off all other effects of training: dropout and the update of batch norm statistics
            if isinstance(module, torch.nn.BatchNorm1d):
                module.momentum = 0.0
        model.encoder.config.dropout = 0.0
        torch.manual_seed(0)
        first = model(**inputs).logits
        torch.manual_seed(0)
        assert torch.equal(model(**inputs).logits, first)
        torch.manual_seed(1)
        assert not torch.equal(model(**inputs).logits, first)


def test_dither_is_faint_noise_that_depends_only_on_seed_and_samples():
    silence = np.zeros(16000, np.float32)
    noisy = dither(silence, 1e-5, 0)
    assert noisy.dtype == np.float32
    assert noisy.std() == pytest.approx(1e-5, rel=0.02)
    assert abs(noisy.mean()) < 3e-7
    assert np.array_equal(noisy, dither(silence, 1e-5, 0))
    assert not np.array_equal(noisy, dither(silence, 1e-5, 1))
    noise_of_another_clip = dither(noise(1.0), 1e-5, 0) - noise(1.0)
    assert abs(np.corrcoef(noisy, noise_of_another_clip)[0, 1]) < 0.05
    assert dither(silence, 0.0, 0) is silence
