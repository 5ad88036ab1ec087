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
from transformers_parakeet.training.data import (
    add_durations,
    clip_durations,
    load_speech,
    read_clip,
    read_folder,
    read_manifest,
)

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


# splits


def test_a_split_that_the_source_lacks_is_refused(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "flat")
    (tmp_path / "flat" / "metadata.csv").write_text("file_name,text\n0.wav,one\n")
    made = datasets.Dataset.from_dict({"audio": [str(clips / "0.wav")], "text": ["one"]})
    made.save_to_disk(tmp_path / "saved")
    for source in (SENTENCES, tmp_path / "flat", tmp_path / "saved", made):
        with pytest.raises(ValueError, match="has no split 'validation'"):
            load_speech(source, "validation")
        whole = load_speech(source)["text"]
        assert load_speech(source, "train")["text"] == whole
        assert load_speech(source, default_split="validation")["text"] == whole
    shutil.copytree(clips, tmp_path / "parts" / "train")
    (tmp_path / "parts" / "train" / "metadata.csv").write_text("file_name,text\n0.wav,one\n")
    assert load_speech(tmp_path / "parts")["text"] == ["one"]
    with pytest.raises(ValueError, match="its subfolder 'validation'"):
        load_speech(tmp_path / "parts", "validation")


def test_a_dataset_is_asked_for_its_own_split(clips):
    made = datasets.Dataset.from_dict(
        {"audio": [str(clips / "0.wav")], "text": ["one"]}, split=datasets.Split.VALIDATION
    )
    assert load_speech(made, "validation")["text"] == ["one"]
    with pytest.raises(ValueError, match="has no split 'test'"):
        load_speech(made, "test")


# lines of manifests and metadata


def test_line_separators_of_unicode_belong_to_the_text(tmp_path):
    path = tmp_path / "manifest.jsonl"
    texts = ["one\u2028two", "three\x85four", "five\x0bsix\x1cseven"]
    lines = [json.dumps({"audio_filepath": "a.wav", "text": text}, ensure_ascii=False) for text in texts]
    # a control character below U+0020 must be escaped in JSON, those above may stand as they are
    lines[2] = json.dumps({"audio_filepath": "a.wav", "text": texts[2]})
    path.write_bytes("\r\n".join(lines).encode())
    assert [row["text"] for row in read_manifest(path)] == texts
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(line.replace("audio_filepath", "file_name") for line in lines), encoding="utf-8"
    )
    assert [row["text"] for row in read_folder(tmp_path, "train")] == texts


def test_byte_order_marks_and_blank_lines_are_skipped(tmp_path):
    mark = "\ufeff"
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(mark + '{"audio_filepath": "a.wav", "text": "one"}\n', encoding="utf-8")
    assert read_manifest(manifest)[0]["text"] == "one"
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text(mark + '{"file_name": "a.wav", "text": "one"}\n\n{"file_name": "b.wav", "text": "two"}\n')
    assert [row["text"] for row in read_folder(tmp_path, "train")] == ["one", "two"]
    metadata.unlink()
    (tmp_path / "metadata.csv").write_text(mark + "file_name,text\na.wav,one\n", encoding="utf-8")
    (row,) = read_folder(tmp_path, "train")
    assert (row["audio"], row["text"]) == (str(tmp_path / "a.wav"), "one")


def test_seconds_in_metadata_are_numbers_or_missing(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "data")
    lines = "file_name,text,duration,offset\n0.wav,one,,\n1.wav,two,0.5,0.25\n"
    (tmp_path / "data" / "metadata.csv").write_text(lines)
    rows = list(load_speech(tmp_path / "data"))
    assert [(row["duration"], row["offset"]) for row in rows] == [(None, None), (0.5, 0.25)]
    assert [len(samples(row)) for row in rows] == [16000, 8000]
    assert clip_durations(add_durations(load_speech(tmp_path / "data"))) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "file_name,text,duration\na.wav,one,long\n", "line 2: `duration` must be .* got 'long'"),
        ("metadata.csv", "file_name,text,offset\na.wav,one,-1\n", "line 2: `offset` must be .* got '-1'"),
        ("metadata.csv", "file_name,text\na.wav,one,two\n", "line 2: .* more values than the header has names"),
        ("metadata.csv", "file_name,text\n,one\n", "line 2: .*`file_name`"),
        ("metadata.jsonl", '{"file_name": "a.wav"}\n\n{"file_name": \n', "line 3: .*JSON object"),
        ("metadata.jsonl", '["file_name"]\n', "line 1: .*JSON object"),
        ("metadata.jsonl", '{"file_name": "a.wav", "duration": NaN}\n', "line 1: `duration` must be .* got nan"),
        ("manifest.json", '{"audio_filepath": "a", "text": null}', "line 1: .* add 'text'"),
        ("manifest.json", '{"audio_filepath": "a", "text": "b", "duration": "x"}', "line 1: `duration` .* got 'x'"),
        ("manifest.json", '{"audio_filepath": "a", "text": "b", "offset": -2}', "line 1: `offset` .* got -2"),
    ],
)
def test_a_bad_line_of_metadata_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_manifest(tmp_path / name) if name == "manifest.json" else read_folder(tmp_path, "train")
    assert name in str(error.value)


# parts of clips


@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_a_duration_without_an_offset_crops_as_in_nemo(clips, suffix):
    path = str(clips / "1.wav") if suffix == "wav" else ROWS[0]["audio"]
    whole = load_audio(path)
    for offset in (None, 0, 0.0):
        assert np.array_equal(samples({"audio": path, "offset": offset, "duration": 0.5}), whole[:8000])
    assert np.array_equal(samples({"audio": path, "duration": 0.5}), whole[:8000])
    assert np.array_equal(samples({"audio": {"path": path}, "duration": 0.5}), whole[:8000])
    # unknown durations, those beyond the end, and those that rounding made smaller give the whole clip
    seconds = len(whole) / 16000
    for duration in (None, 0, 60, seconds, seconds - 0.004):
        assert np.array_equal(samples({"audio": path, "duration": duration}), whole)


def test_a_part_of_an_array_has_the_rate_of_the_row():
    ramp = np.linspace(-0.5, 0.5, 8000, dtype=np.float32)
    row = {"audio": ramp, "sampling_rate": 8000, "offset": 0.25, "duration": 0.5}
    assert np.array_equal(samples(row), load_audio(ramp, 8000)[4000:12000])


def test_seconds_of_a_row_must_be_seconds(clips):
    with pytest.raises(AudioError, match=r"`offset` must be .* got -0\.5"):
        samples({"audio": str(clips / "0.wav"), "offset": -0.5})
    with pytest.raises(AudioError, match=r"`duration` must be .* got nan"):
        samples({"audio": str(clips / "0.wav"), "duration": float("nan")})


@pytest.mark.parametrize("channels", [2, 8, 10])
def test_a_part_of_a_clip_with_many_channels(channels, tmp_path):
    path = str(tmp_path / "many.wav")
    data = np.stack([noise(1.0, seed) for seed in range(channels)], axis=1)
    soundfile.write(path, data, 16000, subtype="FLOAT")
    part = samples({"audio": path, "offset": 0.25, "duration": 0.5})
    assert np.array_equal(part, load_audio(path)[4000:12000])
    # four samples of eight channels look like channels first
    assert len(samples({"audio": path, "offset": 0.25, "duration": 4 / 16000})) == 4


def test_a_header_without_a_length_does_not_hide_the_samples(tmp_path):
    path = tmp_path / "unfinished.wav"
    soundfile.write(path, noise(1.0), 16000, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    # the sizes of RIFF and data stay 0 until a recorder closes the file
    content[4:8] = content[40:44] = bytes(4)
    path.write_bytes(content)
    assert len(samples({"audio": str(path), "duration": 0.5})) == 8000
