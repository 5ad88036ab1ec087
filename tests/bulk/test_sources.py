"""Tests of `transformers_parakeet.bulk.sources`."""

import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_helpers import DIGITS, write_archive

from transformers_parakeet.audio import load_audio
from transformers_parakeet.bulk.sources import MEDIA_SUFFIXES, SourceFile, list_source_files, open_source_files
from transformers_parakeet_cli import inputs


def test_the_endings_are_those_of_the_command():
    assert MEDIA_SUFFIXES == inputs.MEDIA_SUFFIXES


def test_a_folder_gives_its_audio_files_with_relative_names(tmp_path):
    write_archive(tmp_path / "archive" / "b", 2, set())
    write_archive(tmp_path / "archive" / "a", 1, set())
    (tmp_path / "archive" / "notes.txt").write_text("no audio")
    files = list_source_files(tmp_path / "archive")
    assert [file.name for file in files] == ["a/000.flac", "b/000.flac", "b/001.flac"]
    assert files[0].location == str(tmp_path / "archive" / "a" / "000.flac")
    assert files[0].size == DIGITS[0].stat().st_size
    assert list(open_source_files(files[:1])) == [files[0].location]


def test_paths_of_a_manifest_are_relative_to_its_folder(tmp_path):
    lines = [
        {"audio_filepath": "clips/a.wav", "duration": 2.0, "text": "one"},
        {"audio_filepath": "/data/b.wav"},
        {"audio_filepath": "clips/a.wav"},
        {"audio_filepath": "s3://bucket/c.wav", "offset": 0.0},
    ]
    (tmp_path / "list.jsonl").write_text("".join(f"{json.dumps(line)}\n\n" for line in lines))
    assert list_source_files(tmp_path / "list.jsonl") == [
        # 2 s of 16-bit samples at 16 kHz
        SourceFile("clips/a.wav", str(tmp_path / "clips" / "a.wav"), 64000),
        SourceFile("/data/b.wav", "/data/b.wav"),
        SourceFile("s3://bucket/c.wav", "s3://bucket/c.wav"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio_filepath": "a.wav", "offset": 1.5}', r"list.json, line 2 has the offset 1.5 s"),
        ('{"text": "one"}', r"list.json, line 2 must have a text `audio_filepath`"),
        ("[1]", r"list.json, line 2 must have a text `audio_filepath`"),
        ("{", r"list.json, line 2 must be a JSON object"),
    ],
)
def test_a_wrong_line_of_a_manifest_is_refused(line, message, tmp_path):
    (tmp_path / "list.json").write_text(f'{{"audio_filepath": "a.wav"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        list_source_files(tmp_path / "list.json")


def test_a_parquet_file_of_paths(tmp_path):
    pq.write_table(pa.table({"file": ["a.wav", "/b.wav"], "audio": [1, 2]}), tmp_path / "list.parquet")
    files = list_source_files(tmp_path / "list.parquet")
    assert files == [SourceFile("a.wav", str(tmp_path / "a.wav")), SourceFile("/b.wav", "/b.wav")]
    pq.write_table(pa.table({"file": ["a.wav", None]}), tmp_path / "list.parquet")
    with pytest.raises(ValueError, match="row 1 must have a path in the column file"):
        list_source_files(tmp_path / "list.parquet")
    pq.write_table(pa.table({"name": ["a.wav"]}), tmp_path / "list.parquet")
    with pytest.raises(ValueError, match="must have a column of bytes"):
        list_source_files(tmp_path / "list.parquet")


@pytest.mark.parametrize("kind", ["datasets", "bytes"])
def test_parquet_files_with_bytes(kind, tmp_path):
    contents = [DIGITS[index % 3].read_bytes() for index in range(5)]
    if kind == "datasets":
        table = pa.table({"audio": [{"bytes": content, "path": f"{i}.flac"} for i, content in enumerate(contents)]})
        names = [f"{index}.flac" for index in range(5)]
    else:
        table = pa.table({"bytes": contents})
        names = [f"data.parquet#{index}" for index in range(5)]
    (tmp_path / "data").mkdir()
    # three row groups
    pq.write_table(table, tmp_path / "data" / "data.parquet", row_group_size=2)
    files = list_source_files(tmp_path / "data")
    assert [file.name for file in files] == names
    # measured: the metadata gives the mean size with the overhead of the format, less than 100 bytes
    assert files[0].size == pytest.approx(sum(map(len, contents)) / 5, abs=100)
    opened = list(open_source_files([files[4], files[1], files[2]]))
    assert [source["bytes"] for source in opened] == [contents[4], contents[1], contents[2]]
    assert len(load_audio(opened[0])) > 1000


def test_rows_of_bytes_with_the_same_path_get_the_number_of_the_row(tmp_path):
    audio = [
        {"bytes": b"1", "path": "audio.wav"},
        {"bytes": b"2", "path": "other.wav"},
        {"bytes": None, "path": "audio.wav"},
    ]
    pq.write_table(pa.table({"audio": audio}), tmp_path / "data.parquet")
    files = list_source_files(tmp_path / "data.parquet")
    assert [file.name for file in files] == ["data.parquet#0", "other.wav", "data.parquet#2"]
    assert [source["bytes"] for source in open_source_files(files)] == [b"1", b"2", b""]


def test_an_object_store(tmp_path):
    store = fsspec.filesystem("memory")
    store.makedirs("/bucket/talks", exist_ok=True)
    store.pipe_file("/bucket/talks/a.flac", DIGITS[0].read_bytes())
    store.pipe_file("/bucket/list.jsonl", b'{"audio_filepath": "talks/a.flac"}\n')
    (file,) = list_source_files("memory://bucket/talks")
    assert (
        file == SourceFile("a.flac", "memory:///bucket/talks/a.flac", DIGITS[0].stat().st_size) or file.name == "a.flac"
    )
    (listed,) = list_source_files("memory://bucket/list.jsonl")
    assert listed.name == "talks/a.flac"
    for source in (file, listed):
        (opened,) = open_source_files([source])
        assert (load_audio(opened) == load_audio(DIGITS[0])).all()


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        list_source_files(tmp_path / "missing")
    with pytest.raises(ValueError, match="must contain a recording"):
        list_source_files(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="the source must be a folder, a manifest"):
        list_source_files(tmp_path / "a.wav")
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="contains 1 audio files and 1 Parquet files"):
        list_source_files(tmp_path)
