"""Checks the detectors of speech on planted bursts, and which windows and tokens they leave."""

import sys
import types

import numpy as np
import pytest
import torch

from transformers_parakeet.decoding import Hypotheses
from transformers_parakeet.long_audio import EnergySpeechDetector, SileroSpeechDetector, Window
from transformers_parakeet.long_audio.voice_activity import (
    contains_speech,
    detect_speech,
    drop_tokens_outside_speech,
    join_ranges,
)

RATE = 16000


def plant_bursts(ranges, seconds, noise_level, seed=0):
    """Generate noise with bursts 40 dB above a level of 0.001, (S,) float32.

    Args:
        ranges: start and end of every burst in seconds.
        seconds: length.
        noise_level: standard deviation of the noise between the bursts.
    """
    rng = np.random.default_rng(seed)
    samples = noise_level * rng.standard_normal(int(seconds * RATE))
    for start, stop in ranges:
        samples[int(start * RATE) : int(stop * RATE)] += 0.1 * rng.standard_normal(int(stop * RATE) - int(start * RATE))
    return torch.from_numpy(samples).float()


@pytest.mark.parametrize("noise_level", [0.0, 0.001, 0.01])
def test_planted_bursts_are_found_with_their_margins(noise_level):
    detector = EnergySpeechDetector(margin_s=0.1, min_pause_s=0.3, min_speech_s=0.05)
    # the second and the third burst are 0.2 s apart
    samples = plant_bursts([(1.0, 1.5), (3.0, 3.5), (3.7, 4.0)], 6.0, noise_level)
    ranges = detector(samples)
    expected = [(0.9, 1.6), (2.9, 4.1)]
    # levels are smoothed over 50 ms
    np.testing.assert_allclose(np.array(ranges) / RATE, expected, atol=0.04)


@pytest.mark.parametrize("gain", [0.0, 1e-4, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["noise", "tone"])
def test_constant_sound_is_not_speech(kind, gain):
    samples = torch.randn(20 * RATE, generator=torch.Generator().manual_seed(0))
    if kind == "tone":
        samples = torch.sin(2 * torch.pi * 440 * torch.arange(20 * RATE) / RATE)
    assert EnergySpeechDetector()(gain * samples) == []


def test_a_word_without_a_pause_is_speech():
    word = plant_bursts([(0.0, 0.28)], 0.28, 0.0)
    assert EnergySpeechDetector()(word) == [(0, len(word))]
    assert EnergySpeechDetector()(1e-4 * word) == []


@pytest.mark.parametrize("num_samples", [0, 1, 159, 160])
def test_audio_without_a_frame_or_with_one_frame_has_no_speech(num_samples):
    assert EnergySpeechDetector()(torch.ones(num_samples)) == []


def test_invalid_options_are_refused():
    for options in ({"margin_s": -1.0}, {"sampling_rate": 0}, {"threshold_db": 0.0}):
        with pytest.raises(ValueError, match="detector"):
            EnergySpeechDetector(**options)


def test_ranges_are_counted_from_the_start_of_the_recording_and_joined_at_the_blocks():
    def detector(samples):
        return [(int(index), int(index) + 1) for index in samples.nonzero()[:, 0]]

    samples = np.array([0, 1, 1, 1, 0, 0, 1, 0], dtype=np.float32)
    for size in (1, 2, 3, 8):
        blocks = [samples[first : first + size] for first in range(0, 8, size)]
        assert detect_speech(blocks, detector) == [(1, 4), (6, 7)]
    assert detect_speech([], detector) == []


def test_ranges_of_a_detector_are_limited_to_the_block():
    blocks = [np.zeros(100, np.float32), np.zeros(50, np.float32)]
    assert detect_speech(blocks, lambda samples: [(-20, 10), (90, 120)]) == [(0, 10), (90, 110)]
    # otherwise a recording could have speech, but no window with speech
    assert detect_speech(blocks[1:], lambda samples: [(50, 70)]) == []


def test_joined_ranges():
    assert join_ranges([(0, 2), (2, 4), (5, 5), (6, 8), (7, 7), (7, 12)]) == [(0, 4), (6, 12)]
    assert join_ranges([(0, 2), (5, 6), (8, 9)], min_gap=3) == [(0, 2), (5, 9)]


def test_windows_with_speech_in_the_kept_range():
    window = Window(0, 100, 20, 80)
    assert contains_speech(window, None)
    assert contains_speech(window, [(79, 200)])
    assert contains_speech(window, [(0, 21)])
    assert not contains_speech(window, [(0, 20), (80, 90)])
    assert contains_speech(Window(0, 100, 20, None), [(99, 120)])


def test_tokens_that_are_not_near_speech_are_dropped():
    frames = [0, 10, 14, 15, 20, 30, 31, 60]
    hypothesis = Hypotheses(
        tokens=torch.arange(8)[None],
        frames=torch.tensor([frames]),
        durations=torch.tensor([[1, 5, 0, 1, 1, 0, 3, 40]]),
        lengths=torch.tensor([8]),
        confidence=torch.linspace(0, 1, 8)[None],
    )
    # speech from frame 20 to frame 25 of 1280 samples; tokens up to 0.4 s = 5 frames away from it count
    left = drop_tokens_outside_speech(hypothesis, [(20 * 1280, 25 * 1280)], RATE, 1280)
    # durations do not count: a CTC head can repeat a token over seconds of silence
    assert left.frames.tolist() == [[15, 20]]
    assert left.confidence.tolist() == [[pytest.approx(3 / 7), pytest.approx(4 / 7)]]
    assert left.lengths.tolist() == [2]
    assert drop_tokens_outside_speech(hypothesis, None, RATE, 1280) is hypothesis
    assert drop_tokens_outside_speech(hypothesis, [], RATE, 1280).lengths.tolist() == [0]


def test_a_missing_silero_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    with pytest.raises(ImportError, match="extra `vad`"):
        SileroSpeechDetector()
    with pytest.raises(ValueError, match="22050"):
        SileroSpeechDetector(sampling_rate=22050)


def test_the_silero_package_gets_the_options_in_its_units(monkeypatch):
    calls = []

    def get_speech_timestamps(samples, model, **options):
        calls.append((len(samples), model, options))
        return [{"start": 100, "end": 900}, {"start": 900, "end": 5000}]

    fake = types.SimpleNamespace(load_silero_vad=lambda: "model", get_speech_timestamps=get_speech_timestamps)
    monkeypatch.setitem(sys.modules, "silero_vad", fake)
    detector = SileroSpeechDetector(threshold=0.6, min_speech_s=0.15, min_pause_s=0.25, margin_s=0.05)
    # the range is limited to the samples
    assert detector(torch.zeros(4000)) == [(100, 4000)]
    options = {"threshold": 0.6, "sampling_rate": 16000, "min_speech_duration_ms": 150,
               "min_silence_duration_ms": 250, "speech_pad_ms": 50}  # fmt: skip
    assert calls == [(4000, "model", options)]


def test_the_silero_package_does_not_change_the_number_of_threads(monkeypatch, tmp_path):
    # as in silero-vad 6.2.3
    program = "import torch; torch.set_num_threads({}); load_silero_vad = str"
    num_threads = torch.get_num_threads()
    (tmp_path / "silero_vad.py").write_text(program.format(num_threads + 1))
    monkeypatch.delitem(sys.modules, "silero_vad", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        SileroSpeechDetector()
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(num_threads)
        sys.modules.pop("silero_vad", None)


def test_silero_finds_a_spoken_digit():
    pytest.importorskip("silero_vad")
    import transformers_parakeet as tp

    digits = tp.load_audio(tp.demo_model_path() / "clips" / "one_two_three.flac")
    samples = torch.cat([torch.zeros(2 * RATE), torch.from_numpy(digits), torch.zeros(2 * RATE)])
    ranges = SileroSpeechDetector()(samples)
    assert ranges
    assert ranges[0][0] >= 1.5 * RATE
    assert ranges[-1][1] <= len(samples) - 1.5 * RATE
    assert SileroSpeechDetector()(torch.zeros(5 * RATE)) == []
