"""Checks levels of frames and the search for pauses against plain loops and planted pauses."""

import numpy as np
import pytest
import torch

from transformers_parakeet.long_audio.pauses import (
    Pause,
    compute_frame_powers,
    compute_smoothed_levels,
    find_longest_pause,
)


def test_levels_equal_a_plain_loop():
    samples = np.random.default_rng(0).standard_normal(1650).astype(np.float32)
    powers = compute_frame_powers(torch.from_numpy(samples), 160)
    expected = [np.mean(samples[160 * t : 160 * t + 160].astype(np.float64) ** 2) for t in range(10)]
    # largest relative error 1.3e-7 in float32
    np.testing.assert_allclose(powers.numpy(), expected, rtol=1e-6)
    levels = compute_smoothed_levels(powers).numpy()
    smoothed = [np.mean(expected[max(0, t - 2) : t + 3]) for t in range(10)]
    # largest error 5e-7 dB
    np.testing.assert_allclose(levels, 10 * np.log10(np.array(smoothed) + 1e-10), atol=1e-5)


@pytest.mark.parametrize("num_samples", [0, 1, 159, 160, 161, 480])
def test_short_and_silent_recordings_have_finite_levels(num_samples):
    levels = compute_smoothed_levels(compute_frame_powers(torch.zeros(num_samples), 160))
    assert levels.tolist() == pytest.approx([-100.0] * (num_samples // 160))


def test_the_longest_pause_is_found_and_of_equal_ones_the_last():
    levels = torch.full((100,), -20.0)
    levels[10:14] = levels[40:52] = levels[70:82] = -55.0
    assert find_longest_pause(levels, 0, 100) == Pause(70, 82)
    assert find_longest_pause(levels, 0, 60) == Pause(40, 52)
    # only the part inside the range counts
    assert find_longest_pause(levels, 5, 42) == Pause(10, 14)
    assert find_longest_pause(levels, 5, 42).middle == 12


@pytest.mark.parametrize("value", [-100.0, -20.0])
def test_a_constant_level_is_one_pause(value):
    assert find_longest_pause(torch.full((30,), value), 10, 20) == Pause(10, 20)


def test_pauses_do_not_depend_on_the_level_of_the_recording_or_of_its_noise():
    rng = np.random.default_rng(1)
    speech = 0.3 * rng.standard_normal(160 * 200) * np.sin(np.arange(160 * 200) / 3000) ** 2
    speech[160 * 74 : 160 * 104] = 0
    for noise, gain in ((0.0, 1.0), (0.001, 0.01), (0.02, 1.0)):
        samples = gain * (speech + noise * rng.standard_normal(len(speech)))
        levels = compute_smoothed_levels(compute_frame_powers(torch.from_numpy(samples).float(), 160))
        assert abs(find_longest_pause(levels, 0, 200).middle - 89) <= 3
