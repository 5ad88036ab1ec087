"""Tests of the features against NeMo's, and of every form of valid and invalid input."""

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise
from safetensors.torch import load_file

import transformers_parakeet as tp
from transformers_parakeet import feature_extraction_parakeet
from transformers_parakeet.feature_extraction_parakeet import compute_mel_triangles, normalize_with_statistics

# measured on the golden clips: features in float32, by NeMo and by us alike, differ from float64 by up to 1.4e-4 (near
# silence the logarithm magnifies rounding); ours differ from NeMo's by up to 3e-6
FLOAT32_ERROR = 2e-4
TOLERANCE = 2 * FLOAT32_ERROR


def extract(clips, **kwargs):
    """Compute features with the default extractor."""
    return tp.ParakeetFeatureExtractor()(clips, sampling_rate=16000, return_tensors="pt", **kwargs)


def read_golden_clips(golden):
    """Read the clips of the golden batch as float32 samples."""
    names = json.loads((golden / "ctc" / "expected.json").read_text())["clips"]
    return [soundfile.read(golden / "clips" / f"{name}.wav", dtype="float32")[0] for name in names]


@pytest.mark.parametrize("bins", [80, 128])
def test_features_equal_those_of_nemo(golden, bins):
    truth = load_file(golden / "batch_features.safetensors")
    clips = read_golden_clips(golden)
    out = tp.ParakeetFeatureExtractor(feature_size=bins)(clips, sampling_rate=16000, return_tensors="pt")
    assert out["attention_mask"].sum(1).tolist() == truth["feature_lengths"].tolist()
    mask = out["attention_mask"][..., None]
    expected = truth[f"features{bins}"].transpose(1, 2) * mask
    torch.testing.assert_close(out["input_features"], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("bins", [80, 128])
def test_features_in_float32_are_close_to_those_in_float64(golden, bins):
    clips = read_golden_clips(golden)
    extractor = tp.ParakeetFeatureExtractor(feature_size=bins)
    features = extractor(clips, sampling_rate=16000, return_tensors="pt")["input_features"]
    triangles, inverse_areas = compute_mel_triangles(bins, 512, 16000)
    extractor.mel_filters = torch.from_numpy(triangles * inverse_areas[:, None])
    waveforms = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(clip).double() for clip in clips], batch_first=True)
    exact, _ = extractor.extract(waveforms, torch.tensor([len(clip) for clip in clips]))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(features.double(), exact, atol=FLOAT32_ERROR, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_does_not_change_the_features(dtype):
    clip = noise(0.5)
    expected = extract(clip)["input_features"]
    torch.set_default_dtype(dtype)
    try:
        features = extract(clip)["input_features"]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(features, expected, atol=0, rtol=0)


def plain_log_mel(extractor, samples):
    """Compute the log-mel energies of a recording with a loop over frames: pre-emphasis, window, DFT, mel filters."""
    filtered = samples - extractor.preemphasis * np.concatenate([[0.0], samples[:-1]])
    padded = np.pad(filtered, extractor.n_fft // 2)
    margin = (extractor.n_fft - extractor.win_length) // 2
    window = np.pad(np.hanning(extractor.win_length), margin)
    starts = range(0, len(samples) + 1, extractor.hop_length)
    frames = np.stack([padded[start : start + extractor.n_fft] * window for start in starts])
    power = np.abs(np.fft.rfft(frames)) ** 2
    return torch.from_numpy(np.log(power @ extractor.mel_filters.double().numpy().T + 2.0**-24))


@pytest.mark.parametrize("frames_per_block", [1, 7, 40])
@pytest.mark.parametrize("samples", [0, 1, 159, 160, 3 * 160 + 1, 41 * 160])
def test_features_in_blocks_equal_those_of_a_loop_over_frames(samples, frames_per_block, monkeypatch):
    extractor = tp.ParakeetFeatureExtractor(normalize=None)
    monkeypatch.setattr(feature_extraction_parakeet, "FRAMES_PER_BLOCK", frames_per_block)
    clip = noise(1.0)[:samples]
    expected = plain_log_mel(extractor, clip.astype(np.float64))
    features, mask = extractor.extract(torch.from_numpy(clip)[None], torch.tensor([samples]))
    # measured: 6e-5, the error of float32 at quiet bins
    torch.testing.assert_close(features[0].double(), expected * mask[0][:, None], atol=FLOAT32_ERROR, rtol=0)


@pytest.mark.parametrize("preemphasis", [0.97, None])
def test_a_block_of_a_recording_gives_the_frames_of_the_recording(preemphasis):
    extractor = tp.ParakeetFeatureExtractor(normalize=None, preemphasis=preemphasis)
    hop, left, right = extractor.hop_length, extractor.left_margin, extractor.right_margin
    recording = torch.from_numpy(noise(1.003))
    whole, _ = extractor.extract(recording[None], torch.tensor([len(recording)]))
    surrounded = torch.nn.functional.pad(recording, (left, right))
    for first, last in [(0, 0), (0, 30), (17, 60), (60, 100), (99, 99)]:
        block = surrounded[first * hop : last * hop + left + right]
        remaining = torch.tensor([len(recording) - first * hop + left])
        frames = extractor.log_mel_of_block(block[None], remaining)
        assert frames.shape == (1, last - first + 1, 80)
        valid = min(last, 99) - first + 1
        # measured: 5e-7 for a block of a single frame, whose matrix product has another order of sums, 0 for the others
        tolerance = 2e-6 if first == last else 0.0
        torch.testing.assert_close(frames[0, :valid], whole[0, first : first + valid], atol=tolerance, rtol=0)


def test_normalisation_with_given_statistics():
    features, mask = torch.randn(2, 30, 80, generator=torch.Generator().manual_seed(0)), torch.ones(2, 30) > 0
    mask[1, 20:] = False
    mean, std = torch.full((80,), 0.5), torch.full((80,), 2.0)
    expected = torch.where(mask[..., None], (features.double() - 0.5) / 2.00001, 0.0)
    normalised = normalize_with_statistics(features, mask, mean, std)
    # measured: 1.2e-7
    torch.testing.assert_close(normalised.double(), expected, atol=1e-6, rtol=0)


def test_normalisation_in_blocks_gives_mean_0_and_standard_deviation_1(monkeypatch):
    monkeypatch.setattr(feature_extraction_parakeet, "FRAMES_PER_BLOCK", 16)
    clips = [noise(1.0), noise(0.43, 1)]
    batch = extract(clips)
    for features, mask in zip(batch["input_features"], batch["attention_mask"], strict=True):
        valid = features[mask].double()
        # measured: 4e-7; the added 1e-5 makes the standard deviation up to 2e-5 smaller
        assert valid.mean(0).abs().max().item() < 1e-5
        assert (valid.std(0) - 1).abs().max().item() < 1e-4


def test_a_clip_of_one_frame_is_zeros_as_in_nemo(golden):
    clip = soundfile.read(golden / "clips" / "short.wav", dtype="float32")[0][:200]
    out = extract(clip)
    assert out["attention_mask"].sum().item() == 1
    assert out["input_features"].abs().max().item() == 0.0


def test_a_padded_batch_equals_single_clips():
    clips = [noise(1.0), noise(0.4, 1), noise(0.05, 2)]
    batch = extract(clips)
    for row, clip in enumerate(clips):
        alone = extract(clip)["input_features"][0]
        frames = len(clip) // 160
        torch.testing.assert_close(batch["input_features"][row, :frames], alone[:frames], atol=1e-5, rtol=1e-5)
        assert batch["input_features"][row, frames:].abs().max().item() == 0.0


@pytest.mark.parametrize("samples", [0, 1, 100, 159, 160, 399])
def test_short_clips_give_finite_features(samples):
    out = extract(noise(1.0)[:samples])
    assert torch.isfinite(out["input_features"]).all()
    assert out["input_features"].shape == (1, 1 + samples // 160, 80)
    assert out["attention_mask"].sum().item() == samples // 160


def test_silence_gives_finite_features():
    features = extract(np.zeros(16000, dtype=np.float32))["input_features"]
    # every bin is constant, so only the rounding error of its mean, divided by 1e-5, remains
    assert features.abs().max().item() < 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(value):
    clip = noise(0.5)
    clip[1234] = value
    with pytest.raises(ValueError, match="1234"):
        extract(clip)


def test_all_forms_of_a_clip_give_the_same_features():
    clip = noise(0.5)
    expected = extract(clip)["input_features"]
    stereo = np.stack([clip, clip])
    forms = [[clip], clip.tolist(), [clip.tolist()], torch.from_numpy(clip), clip.astype(np.float64), [stereo],
             [stereo.T], stereo.T, np.stack([clip] * 3, axis=1), [torch.from_numpy(stereo)]]  # fmt: skip
    for form in forms:
        torch.testing.assert_close(extract(form)["input_features"], expected, atol=1e-5, rtol=1e-5)


def test_int16_is_scaled():
    clip = noise(0.5)
    scaled = extract((clip * 32768).round().astype(np.int16))["input_features"]
    # quantisation to 16 bits adds noise 80 dB below the signal
    assert (scaled - extract(clip)["input_features"]).abs().mean().item() < 1e-2


def test_a_two_dimensional_array_is_a_batch():
    clips = np.stack([noise(0.5, 0), noise(0.5, 1), noise(0.5, 2)])
    torch.testing.assert_close(extract(clips)["input_features"], extract(list(clips))["input_features"])


def test_another_sampling_rate_is_refused_with_a_hint_to_resample():
    with pytest.raises(ValueError, match=r"8000 Hz.*load_audio"):
        tp.ParakeetFeatureExtractor()(noise(0.5), sampling_rate=8000)


@pytest.mark.parametrize(("clips", "error"), [([], ValueError), ("clip.wav", TypeError), (None, TypeError)])
def test_input_that_is_not_audio_is_refused(clips, error):
    with pytest.raises(error, match="audio must"):
        extract(clips)


def test_padding_and_truncation():
    clip = noise(1.0)
    longer = extract(clip, padding="max_length", max_length=32000)
    assert longer["input_features"].shape[1] == 201
    assert longer["attention_mask"].sum().item() == 100
    shorter = extract(clip, padding="max_length", max_length=8000, truncation=True)
    assert shorter["attention_mask"].sum().item() == 50
    assert extract(clip, pad_to_multiple_of=20000)["input_features"].shape[1] == 126
    arrays = tp.ParakeetFeatureExtractor()(clip, sampling_rate=16000, return_tensors="np")
    assert isinstance(arrays["input_features"], np.ndarray)


def test_the_input_array_is_not_changed():
    clip = noise(0.5)
    copy = clip.copy()
    extract(clip)
    np.testing.assert_array_equal(clip, copy)


def test_padding_on_the_left_is_refused():
    """Lengths count from the start of a clip, so padding there would count as speech and the end would be lost."""
    clips = [noise(1.0), noise(0.4, 1)]
    right = tp.ParakeetFeatureExtractor(padding_side="right")
    assert torch.equal(right(clips, sampling_rate=16000)["input_features"], extract(clips)["input_features"])
    left = tp.ParakeetFeatureExtractor(padding_side="left")
    with pytest.raises(ValueError, match="`padding_side` must be 'right', got 'left'"):
        left(clips, sampling_rate=16000)
