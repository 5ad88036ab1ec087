"""Lines of NeMo manifests and of the metadata files of folders."""

import json

import pytest
import soundfile
from conftest import noise

from transformers_parakeet.training import add_durations, get_durations, load_speech, read_clip
from transformers_parakeet.training.manifests import SplitRequest, read_audio_folder, read_manifest

TRAIN = SplitRequest("train")


def test_an_invalid_line_of_a_manifest_is_named(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text('{"audio_filepath": "a.wav", "text": "a"}\n\n{"audio_filepath": "b.wav"}\n')
    with pytest.raises(ValueError, match=r"line 3: .*`text`"):
        read_manifest(path)
    path.write_text("no json\n")
    with pytest.raises(ValueError, match="line 1"):
        read_manifest(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="at least one line"):
        read_manifest(path)


def test_unicode_line_separators_belong_to_the_text(tmp_path):
    path = tmp_path / "manifest.jsonl"
    texts = ["one\u2028two", "three\x85four", "five\x0bsix\x1cseven"]
    lines = [json.dumps({"audio_filepath": "a.wav", "text": text}, ensure_ascii=False) for text in texts]
    # JSON requires control characters below U+0020 to be escaped, and allows those above as they are
    lines[2] = json.dumps({"audio_filepath": "a.wav", "text": texts[2]})
    path.write_bytes("\r\n".join(lines).encode())
    assert [row["text"] for row in read_manifest(path)] == texts
    metadata = "\n".join(line.replace("audio_filepath", "file_name") for line in lines)
    (tmp_path / "metadata.jsonl").write_text(metadata, encoding="utf-8")
    assert [row["text"] for row in read_audio_folder(tmp_path, TRAIN)] == texts


def test_byte_order_marks_and_blank_lines_are_skipped(tmp_path):
    mark = "\ufeff"
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(mark + '{"audio_filepath": "a.wav", "text": "one"}\n', encoding="utf-8")
    assert read_manifest(manifest)[0]["text"] == "one"
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text(mark + '{"file_name": "a.wav", "text": "one"}\n\n{"file_name": "b.wav", "text": "two"}\n')
    assert [row["text"] for row in read_audio_folder(tmp_path, TRAIN)] == ["one", "two"]
    metadata.unlink()
    (tmp_path / "metadata.csv").write_text(mark + "file_name,text\na.wav,one\n", encoding="utf-8")
    (row,) = read_audio_folder(tmp_path, TRAIN)
    assert row == {"audio": str(tmp_path / "a.wav"), "text": "one"}


def test_times_in_metadata_are_converted_to_numbers(tmp_path):
    for index in range(2):
        soundfile.write(tmp_path / f"{index}.wav", noise(1.0 + index, index), 16000)
    lines = "file_name,text,duration,offset\n0.wav,one,,\n1.wav,two,0.5,0.25\n"
    (tmp_path / "metadata.csv").write_text(lines)
    rows = list(load_speech(tmp_path))
    assert [(row["duration"], row["offset"]) for row in rows] == [(None, None), (0.5, 0.25)]
    assert [len(read_clip(row, 16000)) for row in rows] == [16000, 8000]
    assert get_durations(add_durations(load_speech(tmp_path))) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "file_name,text,duration\na.wav,one,long\n", "line 2: `duration` must be .* got 'long'"),
        ("metadata.csv", "file_name,text,offset\na.wav,one,-1\n", "line 2: `offset` must be .* got '-1'"),
        ("metadata.csv", "file_name,text\na.wav,one,two\n", "line 2: .* more values than the header"),
        ("metadata.csv", "file_name,text\n,one\n", "line 2: .*`file_name`"),
        ("metadata.jsonl", '{"file_name": "a.wav"}\n\n{"file_name": \n', "line 3: .*JSON object"),
        ("metadata.jsonl", '["file_name"]\n', "line 1: .*JSON object, got list"),
        ("metadata.jsonl", '{"file_name": "a.wav", "duration": NaN}\n', "line 1: `duration` must be .* got nan"),
        ("manifest.json", '{"audio_filepath": "a", "text": null}', "line 1: .* add `text`"),
        ("manifest.json", '{"audio_filepath": "a", "text": "b", "duration": "x"}', "line 1: `duration` .* got 'x'"),
        ("manifest.json", '{"audio_filepath": "a", "text": "b", "offset": -2}', "line 1: `offset` .* got -2"),
    ],
)
def test_the_error_about_an_invalid_line_names_file_and_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_manifest(tmp_path / name) if name == "manifest.json" else read_audio_folder(tmp_path, TRAIN)
    assert name in str(error.value)


def test_a_folder_has_its_metadata_inside_or_in_a_subfolder_per_split(tmp_path):
    clips = tmp_path / "train"
    clips.mkdir()
    for index in range(2):
        soundfile.write(clips / f"{index}.wav", noise(1.0 + index, index), 16000)
    lines = [{"file_name": f"{index}.wav", "transcription": text} for index, text in enumerate(("one", "two"))]
    (clips / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = load_speech(tmp_path)
    assert data["text"] == ["one", "two"]
    assert [len(read_clip(row, 16000)) for row in data] == [16000, 32000]
    (clips / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"must contain a metadata\.csv"):
        load_speech(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\ntrain/0.wav,"one, or so"\n')
    data = load_speech(tmp_path)
    assert data["text"] == ["one, or so"]
    assert len(read_clip(data[0], 16000)) == 16000
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match="at least one line, got none"):
        load_speech(tmp_path)
