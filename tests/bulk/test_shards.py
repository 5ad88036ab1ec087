"""Tests of `transformers_parakeet.bulk.shards`."""

import os

import pyarrow.parquet as pq
import pytest

from transformers_parakeet.bulk import shards
from transformers_parakeet.bulk.shards import FinishedShards, Shard, Target, plan_shards
from transformers_parakeet.bulk.sources import SourceFile
from transformers_parakeet.bulk.transcriber import build_error_row

FILES = [SourceFile(f"{number:02d}.wav", f"/data/{number:02d}.wav", 10) for number in range(10)]


def get_names(planned):
    """Return the names of the recordings of each shard."""
    return [[file.name for file in shard.files] for shard in planned]


def test_shards_have_a_number_and_a_size(monkeypatch):
    assert [len(shard.files) for shard in plan_shards(FILES, FinishedShards(), 4)] == [4, 4, 2]
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 25)
    assert [len(shard.files) for shard in plan_shards(FILES, FinishedShards(), 4)] == [3, 3, 3, 1]


def test_the_name_depends_on_the_names_of_the_recordings_only():
    first = Shard((FILES[0], FILES[1]))
    assert first.name == Shard((SourceFile("00.wav", "/elsewhere/00.wav"), FILES[1])).name
    assert first.name != Shard((FILES[1], FILES[0])).name
    assert first.name.startswith("part-")
    assert first.name.endswith(".parquet")


def test_a_second_plan_has_the_missing_shards_of_the_first_one():
    planned = plan_shards(FILES, FinishedShards(), 4)
    finished = FinishedShards(files=frozenset(file.name for file in planned[1].files))
    assert plan_shards(FILES, finished, 4) == [planned[0], planned[2]]
    assert plan_shards(FILES, FinishedShards(files=frozenset(file.name for file in FILES)), 4) == []


def test_new_recordings_of_a_source_become_shards_together():
    finished = FinishedShards(files=frozenset(file.name for file in FILES[:8] if file.name not in ("02.wav", "06.wav")))
    assert get_names(plan_shards(FILES, finished, 4)) == [["08.wav", "09.wav"], ["02.wav", "06.wav"]]


def build_rows(*names, error=None):
    """Return rows for recordings of these names."""
    return [{"file": name, **build_error_row(error, "demo")} for name in names]


@pytest.mark.parametrize("location", ["local", "memory"])
def test_the_content_of_a_target(location, tmp_path):
    target = Target(tmp_path / "out" if location == "local" else f"memory://{tmp_path.name}/out", {"model": "demo"})
    assert target.read_finished() == FinishedShards()
    target.create()
    target.write("part-1.parquet", build_rows("a", "b"))
    target.write("part-2.parquet", build_rows("c", error="broken"))
    assert target.exists("part-2.parquet")
    assert not target.exists("part-3.parquet")
    finished = target.read_finished()
    assert finished == FinishedShards(frozenset({"part-1.parquet", "part-2.parquet"}), frozenset("abc"), 1)
    # the shard with the error is deleted
    assert target.read_finished(retry_errors=True).files == frozenset("ab")
    assert not target.exists("part-2.parquet")


def test_a_file_has_all_columns_even_without_values(tmp_path):
    target = Target(tmp_path, {"model": "demo"})
    target.write("part-1.parquet", build_rows("a"))
    schema = pq.read_schema(tmp_path / "part-1.parquet")
    assert schema.names == ["file", "text", "words", "confidence", "duration", "error", "model"]
    assert str(schema.field("words").type).startswith("list<")
    assert schema.metadata[b"transformers_parakeet"] == b'{"model": "demo"}'


def test_results_of_other_settings_are_refused(tmp_path):
    Target(tmp_path, {"model": "demo"}).write("part-1.parquet", build_rows("a"))
    with pytest.raises(ValueError, match=r'settings \{"model": "other"\}, but part-1.parquet has \{"model": "demo"\}'):
        Target(tmp_path, {"model": "other"}).read_finished()


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    target = Target(tmp_path, {})

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        target.write("part-1.parquet", build_rows("a"))
    assert list(tmp_path.iterdir()) == []


def test_partial_and_other_files_do_not_count(tmp_path):
    (tmp_path / ".part-1.parquet.0f.partial").write_bytes(b"x")
    (tmp_path / "notes.parquet").write_bytes(b"x")
    assert Target(tmp_path, {}).read_finished() == FinishedShards()
