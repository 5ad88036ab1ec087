"""Audio, excerpts and durations of rows."""

import datasets
import numpy as np
import pytest
import soundfile
from conftest import noise
from training_helpers import sentence_rows

from transformers_parakeet import AudioError, load_audio
from transformers_parakeet.training import add_durations, get_durations, load_speech, read_clip
from transformers_parakeet.training.clips import get_clip_name

MP3 = sentence_rows()[0]["audio"]


@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_offset_and_duration_select_an_excerpt(clips, suffix):
    path = str(clips / "1.wav") if suffix == "wav" else MP3
    samples = load_audio(path)
    excerpt = read_clip({"audio": path, "offset": 0.25, "duration": 0.5}, 16000)
    assert np.array_equal(excerpt, samples[4000:12000])
    from_offset = read_clip({"audio": path, "offset": 0.25, "duration": None}, 16000)
    assert np.array_equal(from_offset, samples[4000:])
    with pytest.raises(AudioError, match="longer than its offset, got an offset of 99 s"):
        read_clip({"audio": path, "offset": 99, "duration": 1.0}, 16000)


@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_a_duration_without_an_offset_cuts_the_clip_as_in_nemo(clips, suffix):
    path = str(clips / "1.wav") if suffix == "wav" else MP3
    samples = load_audio(path)
    for offset in (None, 0, 0.0):
        row = {"audio": path, "offset": offset, "duration": 0.5}
        assert np.array_equal(read_clip(row, 16000), samples[:8000])
    assert np.array_equal(read_clip({"audio": path, "duration": 0.5}, 16000), samples[:8000])
    assert np.array_equal(read_clip({"audio": {"path": path}, "duration": 0.5}, 16000), samples[:8000])


@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_an_unknown_too_long_or_rounded_duration_gives_the_whole_clip(clips, suffix):
    path = str(clips / "1.wav") if suffix == "wav" else MP3
    samples = load_audio(path)
    clip_s = len(samples) / 16000
    for duration in (None, 0, 60, clip_s, clip_s - 0.004):
        assert np.array_equal(read_clip({"audio": path, "duration": duration}, 16000), samples)


def test_an_excerpt_of_an_array_uses_the_sampling_rate_of_the_row():
    ramp = np.linspace(-0.5, 0.5, 8000, dtype=np.float32)
    row = {"audio": ramp, "sampling_rate": 8000, "offset": 0.25, "duration": 0.5}
    assert np.array_equal(read_clip(row, 16000), load_audio(ramp, 8000)[4000:12000])


@pytest.mark.parametrize(("field", "value"), [("offset", -0.5), ("duration", float("nan")), ("duration", "long")])
def test_an_invalid_time_is_refused(clips, field, value):
    with pytest.raises(AudioError, match=f"`{field}` must be a non-negative number of seconds, got {value!r}"):
        read_clip({"audio": str(clips / "0.wav"), field: value}, 16000)


@pytest.mark.parametrize("channels", [2, 8, 10])
def test_an_excerpt_of_a_file_with_many_channels_is_their_mean(channels, tmp_path):
    path = str(tmp_path / "many.wav")
    data = np.stack([noise(1.0, seed) for seed in range(channels)], axis=1)
    soundfile.write(path, data, 16000, subtype="FLOAT")
    excerpt = read_clip({"audio": path, "offset": 0.25, "duration": 0.5}, 16000)
    assert np.array_equal(excerpt, load_audio(path)[4000:12000])
    # four samples of eight channels must not be taken for eight samples of four channels
    assert len(read_clip({"audio": path, "offset": 0.25, "duration": 4 / 16000}, 16000)) == 4


def test_a_file_whose_header_states_no_length_is_read(tmp_path):
    path = tmp_path / "unfinished.wav"
    soundfile.write(path, noise(1.0), 16000, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    # a recorder leaves the sizes of the RIFF and data chunks at 0 until it closes the file
    content[4:8] = content[40:44] = bytes(4)
    path.write_bytes(content)
    assert len(read_clip({"audio": str(path), "duration": 0.5}, 16000)) == 8000


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"audio": "a.wav", "id": 3}, "a.wav"),
        ({"audio": {"path": "b.wav", "bytes": b""}}, "b.wav"),
        ({"audio": np.zeros(3), "id": "third"}, "third"),
        ({"audio": {"bytes": b"", "path": None}}, "clip 7 of the batch"),
    ],
)
def test_a_clip_is_named_by_file_id_or_position(row, name):
    assert get_clip_name(row, 7) == name


def test_missing_durations_are_measured(clips):
    paths = [str(clips / "0.wav"), str(clips / "1.wav"), "missing.wav"]
    data = load_speech(datasets.Dataset.from_dict({"audio": paths, "text": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match="add_durations"):
        get_durations(data)
    with_durations = add_durations(data)
    assert get_durations(with_durations) == [1.0, 2.0, 0.0]
    assert add_durations(with_durations) is with_durations
    with pytest.raises(ValueError, match="got a stream"):
        get_durations(data.to_iterable_dataset())
