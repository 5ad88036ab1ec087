"""Datasets from every kind of source, their columns and their splits."""

import datasets
import numpy as np
import pytest
import soundfile
from conftest import noise
from training_helpers import SENTENCES, sentence_rows

from transformers_parakeet import load_audio
from transformers_parakeet.training import get_durations, load_speech, read_clip

ROWS = sentence_rows()


def write_folder(folder, text="one"):
    """Write a folder of audio with one clip; return it."""
    folder.mkdir(parents=True)
    soundfile.write(folder / "0.wav", noise(1.0), 16000)
    (folder / "metadata.csv").write_text(f"file_name,text\n0.wav,{text}\n")
    return folder


def test_a_manifest_gives_paths_texts_and_durations():
    data = load_speech(SENTENCES)
    assert data["text"] == [row["text"] for row in ROWS]
    assert data["audio"] == [row["audio"] for row in ROWS]
    assert get_durations(data) == [row["duration"] for row in ROWS]
    assert np.array_equal(read_clip(data[3], 16000), load_audio(ROWS[3]["audio"]))


def test_audio_columns_stay_encoded_also_in_streams(clips):
    paths = [str(clips / f"{index}.wav") for index in range(2)]
    data = datasets.Dataset.from_dict({"file": paths, "sentence": ["one", "two"], "id": [1, 2]})
    with_audio = data.rename_column("file", "audio").cast_column("audio", datasets.Audio())
    for source in (data, with_audio, with_audio.to_iterable_dataset()):
        rows = list(load_speech(source))
        assert [row["text"] for row in rows] == ["one", "two"]
        assert [row["id"] for row in rows] == [1, 2]
        assert [len(read_clip(row, 16000)) for row in rows] == [16000, 32000]


def test_saved_datasets_are_opened(clips, tmp_path):
    paths = [str(clips / f"{index}.wav") for index in range(2)]
    data = datasets.Dataset.from_dict({"file": paths, "sentence": ["one", "two"]})
    data.save_to_disk(tmp_path / "single")
    assert load_speech(tmp_path / "single")["text"] == ["one", "two"]
    datasets.DatasetDict({"train": data, "dev": data.select([1])}).save_to_disk(tmp_path / "splits")
    assert load_speech(tmp_path / "splits", "dev")["text"] == ["two"]
    with pytest.raises(ValueError, match="one of train, dev, got 'test'"):
        load_speech(tmp_path / "splits", "test")


def test_a_manifest_can_be_streamed():
    stream = load_speech(SENTENCES, streaming=True)
    assert next(iter(stream))["text"] == ROWS[0]["text"]
    assert not hasattr(stream, "__len__")


def test_columns_can_be_named():
    data = datasets.Dataset.from_dict({"wav": ["a.wav"], "text": ["noisy"], "clean": ["clean"]})
    renamed = load_speech(data, audio_column="wav", text_column="clean")
    assert renamed[0] == {"audio": "a.wav", "text": "clean"}
    with pytest.raises(ValueError, match="column of audio, got the columns wav, text, clean"):
        load_speech(data)


def test_a_split_that_the_data_lacks_is_refused(clips, tmp_path):
    folder = write_folder(tmp_path / "flat")
    data = datasets.Dataset.from_dict({"audio": [str(clips / "0.wav")], "text": ["one"]})
    data.save_to_disk(tmp_path / "saved")
    for source in (SENTENCES, folder, tmp_path / "saved", data):
        with pytest.raises(ValueError, match="has no split 'validation'"):
            load_speech(source, "validation")
        texts = load_speech(source)["text"]
        assert load_speech(source, "train")["text"] == texts
        assert load_speech(source, default_split="validation")["text"] == texts


def test_a_split_is_a_subfolder(tmp_path):
    write_folder(tmp_path / "data" / "train")
    assert load_speech(tmp_path / "data")["text"] == ["one"]
    with pytest.raises(ValueError, match="its subfolder 'validation'"):
        load_speech(tmp_path / "data", "validation")
    write_folder(tmp_path / "data" / "validation", "two")
    assert load_speech(tmp_path / "data", "validation")["text"] == ["two"]
    assert load_speech(tmp_path / "data", default_split="validation")["text"] == ["two"]


def test_a_dataset_that_is_one_split_has_only_this_split(clips):
    data = datasets.Dataset.from_dict(
        {"audio": [str(clips / "0.wav")], "text": ["one"]}, split=datasets.Split.VALIDATION
    )
    assert load_speech(data, "validation")["text"] == ["one"]
    with pytest.raises(ValueError, match="has no split 'test'"):
        load_speech(data, "test")


def test_a_hub_dataset_that_cannot_be_loaded_is_an_error_with_a_remedy(monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("Couldn't reach 'nodata' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        OSError, match=r"no file or folder nodata on this machine.*\(Couldn't reach.*: correct the path"
    ):
        load_speech("nodata")
