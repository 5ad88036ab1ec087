"""Checks that features computed from blocks of samples equal the features of the whole recording."""

import numpy as np
import pytest
import torch

import transformers_parakeet as tp
from transformers_parakeet.audio import AudioSource
from transformers_parakeet.long_audio import Window
from transformers_parakeet.long_audio.recording import (
    RunningStatistics,
    compute_recording_features,
    iterate_log_mel,
    iterate_window_features,
    normalize_window,
    summarize_recording,
)

CPU = torch.device("cpu")
RATE = 16000


def speech_like(seconds: float, seed: int = 0) -> np.ndarray:
    """Generate noise whose level and spectrum change, (S,) float32."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal(int(RATE * seconds))
    samples = samples + np.cumsum(samples) * 0.05
    time = np.arange(len(samples)) / RATE
    return (0.05 * samples * (0.02 + np.sin(2 * time) ** 2)).astype(np.float32)


def blocks_of(samples: np.ndarray, seconds: float):
    """Return the blocks of an array."""
    return AudioSource(samples).blocks(seconds)


@pytest.mark.parametrize("num_samples", [0, 1, 159, 160, 255, 256, 257, 417, 1600, 16000, 16159, 23456])
@pytest.mark.parametrize("block_s", [0.01, 0.05, 0.37, 10.0])
def test_log_mel_in_blocks_equals_that_of_the_whole_recording(num_samples, block_s):
    extractor = tp.ParakeetFeatureExtractor(normalize=None)
    samples = speech_like(2.0)[:num_samples]
    expected = extractor(samples, sampling_rate=RATE)["input_features"][0, : num_samples // 160]
    blocks = list(iterate_log_mel(blocks_of(samples, block_s), extractor, CPU))
    log_mel = torch.cat(blocks) if blocks else torch.zeros(0, 80)
    assert log_mel.shape == expected.shape
    # largest error 9.5e-7, of the matrix multiplication, which rounds differently for other numbers of frames
    torch.testing.assert_close(log_mel, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_samples", [1, 160, 16159, 40000])
@pytest.mark.parametrize("normalize", ["per_feature", None])
def test_features_of_a_recording_in_blocks_equal_those_of_the_feature_extractor(num_samples, normalize):
    extractor = tp.ParakeetFeatureExtractor(normalize=normalize)
    samples = speech_like(2.5)[:num_samples]
    expected = extractor(samples, sampling_rate=RATE)
    features, mask = compute_recording_features(blocks_of(samples, 0.37), num_samples, extractor, CPU)
    assert torch.equal(mask, expected["attention_mask"])
    # largest error 9.5e-7
    torch.testing.assert_close(features, expected["input_features"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"feature_size": 128}, {"preemphasis": None}, {"win_length": 320}, {"hop_length": 200, "n_fft": 400}],
)
def test_windows_are_slices_of_the_features_of_the_whole_recording(changes):
    extractor = tp.ParakeetFeatureExtractor(**changes)
    hop = extractor.hop_length
    samples = speech_like(7.0)
    whole = extractor(samples, sampling_rate=RATE)["input_features"][0]
    summary = summarize_recording(blocks_of(samples, 2.0), len(samples), extractor, CPU)
    num_frames = len(samples) // hop
    edges = [(0, 100), (64, 180), (96, 180), (200, 201), (240, num_frames)]
    windows = [Window(first * hop, stop * hop, first * hop, stop * hop) for first, stop in edges]
    pieces = list(iterate_window_features(blocks_of(samples, 2.0), windows, extractor, CPU))
    assert [window for window, _ in pieces] == windows
    for (first, stop), (_, log_mel) in zip(edges, pieces, strict=True):
        features, mask = normalize_window(log_mel, extractor, summary)
        num_frames = stop - first
        # windows of similar length have the same shape: a multiple of 200 frames
        assert features.shape == (1, -(-num_frames // 200) * 200, extractor.feature_size)
        assert mask[0].tolist() == [True] * num_frames + [False] * (features.shape[1] - num_frames)
        # largest error 3.3e-6
        torch.testing.assert_close(features[0, :num_frames], whole[first:stop], rtol=0, atol=2e-5)
        assert not features[0, num_frames:].any()


def test_statistics_of_a_window_and_no_normalisation():
    samples = speech_like(3.0)
    extractor = tp.ParakeetFeatureExtractor(normalize=None)
    window = Window(8000, 32000, 8000, None)
    ((_, log_mel),) = iterate_window_features(blocks_of(samples, 1.0), [window], extractor, CPU)
    raw, _ = normalize_window(log_mel.clone(), extractor, None)
    torch.testing.assert_close(raw[0, : len(log_mel)], log_mel, rtol=0, atol=0)
    features, _ = normalize_window(log_mel.clone(), tp.ParakeetFeatureExtractor(), None)
    expected = (log_mel.double() - log_mel.double().mean(0)) / (log_mel.double().std(0) + 1e-5)
    # largest error 2.2e-6
    torch.testing.assert_close(features[0, : len(log_mel)].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("splits", [[500], [1, 499], [0, 3, 497], [250, 250], [7] * 70 + [10]])
def test_running_statistics_equal_those_of_all_frames(splits):
    # a mean that is large compared with the deviation, where a sum of squares in single precision fails
    frames = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * 1e-2 - 16.0
    statistics = RunningStatistics(0, torch.zeros(4).double(), torch.zeros(4).double())
    for part in frames.split(splits):
        statistics.add(part)
    # largest relative error 3e-15
    torch.testing.assert_close(statistics.mean, frames.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.compute_std(), frames.double().std(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_samples", [0, 160, 16000])
def test_silent_and_empty_recordings_have_finite_statistics(num_samples):
    extractor = tp.ParakeetFeatureExtractor()
    summary = summarize_recording(blocks_of(np.zeros(num_samples, np.float32), 0.5), num_samples, extractor, CPU)
    assert summary.num_samples == num_samples
    assert len(summary.levels) == num_samples // 160
    assert summary.std.tolist() == [0.0] * 80
    features, _ = normalize_window(torch.full((5, 80), float(summary.mean[0])), extractor, summary)
    assert not features.any()


def test_levels_do_not_depend_on_the_blocks():
    samples = speech_like(5.0)
    extractor = tp.ParakeetFeatureExtractor()
    whole, parts = (
        summarize_recording(blocks_of(samples, seconds), len(samples), extractor, CPU) for seconds in (60.0, 0.4)
    )
    assert torch.equal(whole.levels, parts.levels)
    assert len(whole.levels) == 500
