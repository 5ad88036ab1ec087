"""Rows for training from every kind of source."""

import json
import shutil

import datasets
import numpy as np
import pytest
import soundfile
from conftest import noise
from training_helpers import SENTENCES, sentence_rows

from transformers_parakeet import AudioError, load_audio
from transformers_parakeet.training_data import add_durations, clip_durations, load_speech, read_clip, read_manifest

ROWS = sentence_rows()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with two WAV files."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(2):
        soundfile.write(folder / f"{index}.wav", noise(1.0 + index, index), 16000)
    return folder


def samples(row):
    return read_clip(row, 16000)


def test_a_manifest_gives_paths_texts_and_durations():
    data = load_speech(SENTENCES)
    assert data["text"] == [row["text"] for row in ROWS]
    assert data["audio"] == [row["audio"] for row in ROWS]
    assert clip_durations(data) == [row["duration"] for row in ROWS]
    assert np.array_equal(samples(data[3]), load_audio(ROWS[3]["audio"]))


@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_offset_and_duration_choose_a_part(clips, suffix):
    path = str(clips / "1.wav") if suffix == "wav" else ROWS[0]["audio"]
    whole = load_audio(path)
    part = read_clip({"audio": path, "offset": 0.25, "duration": 0.5}, 16000)
    assert np.array_equal(part, whole[4000:12000])
    rest = read_clip({"audio": path, "offset": 0.25, "duration": None}, 16000)
    assert np.array_equal(rest, whole[4000:])
    with pytest.raises(AudioError, match="beyond its offset of 99 s"):
        read_clip({"audio": path, "offset": 99, "duration": 1.0}, 16000)


def test_a_bad_line_of_a_manifest_is_named(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text('{"audio_filepath": "a.wav", "text": "a"}\n\n{"audio_filepath": "b.wav"}\n')
    with pytest.raises(ValueError, match=r"line 3: .*'text'"):
        read_manifest(path)
    path.write_text("no json\n")
    with pytest.raises(ValueError, match="line 1"):
        read_manifest(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="at least one line"):
        read_manifest(path)


def test_a_folder_of_audio(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "train")
    lines = [{"file_name": f"{index}.wav", "transcription": text} for index, text in enumerate(("one", "two"))]
    (tmp_path / "train" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = load_speech(tmp_path)
    assert data["text"] == ["one", "two"]
    assert [len(samples(row)) for row in data] == [16000, 32000]
    (tmp_path / "train" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"must have a metadata\.csv"):
        load_speech(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\ntrain/0.wav,"one, or so"\n')
    data = load_speech(tmp_path)
    assert data["text"] == ["one, or so"]
    assert len(samples(data[0])) == 16000


def test_datasets_are_taken_decoded_or_not_and_streamed(clips, tmp_path):
    paths = [str(clips / f"{index}.wav") for index in range(2)]
    made = datasets.Dataset.from_dict({"file": paths, "sentence": ["one", "two"], "id": [1, 2]})
    embedded = made.rename_column("file", "audio").cast_column("audio", datasets.Audio())
    for source in (made, embedded, embedded.to_iterable_dataset()):
        data = load_speech(source)
        assert [row["text"] for row in data] == ["one", "two"]
        assert [len(samples(row)) for row in data] == [16000, 32000]
    made.save_to_disk(tmp_path / "one")
    assert load_speech(tmp_path / "one")["text"] == ["one", "two"]
    datasets.DatasetDict({"train": made, "dev": made.select([1])}).save_to_disk(tmp_path / "two")
    assert load_speech(tmp_path / "two", "dev")["text"] == ["two"]
    with pytest.raises(ValueError, match="one of train, dev, got 'test'"):
        load_speech(tmp_path / "two", "test")
    streamed = load_speech(SENTENCES, streaming=True)
    assert next(iter(streamed))["text"] == ROWS[0]["text"]
    assert not hasattr(streamed, "__len__")


def test_columns_can_be_named_and_missing_ones_are():
    made = datasets.Dataset.from_dict({"wav": ["a.wav"], "text": ["noisy"], "clean": ["clean"]})
    data = load_speech(made, audio_column="wav", text_column="clean")
    assert data[0] == {"audio": "a.wav", "text": "clean"}
    with pytest.raises(ValueError, match="column of audio, and has wav, text, clean"):
        load_speech(made)


def test_durations_are_measured_where_they_are_missing(clips):
    paths = [str(clips / f"{index}.wav") for index in range(2)]
    made = load_speech(datasets.Dataset.from_dict({"audio": [*paths, "no.wav"], "text": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match="add_durations"):
        clip_durations(made)
    assert clip_durations(add_durations(made)) == [1.0, 2.0, 0.0]
    with pytest.raises(ValueError, match="streamed"):
        clip_durations(made.to_iterable_dataset())
