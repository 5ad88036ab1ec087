"""Tests of output files: complete or absent, with the permissions of other files."""

import os
import stat

import pytest

from transformers_parakeet_cli.outputs import OutputOptions, write_atomically


def test_a_file_replaces_the_existing_one(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, "one\n")
    write_atomically(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "plain.txt").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain.txt").stat().st_mode)


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_an_interrupted_write_keeps_the_existing_file(error, tmp_path, monkeypatch):
    path = tmp_path / "b.txt"
    path.write_text("one")

    def fail(*paths):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        write_atomically(path, "two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_only_missing_formats_are_written_unless_files_are_overwritten(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / ".a.srt.12.partial").touch()
    options = {"formats": ("txt", "srt"), "folder": tmp_path}
    assert OutputOptions(**options).get_missing_formats("a") == ("srt",)
    assert OutputOptions(**options).get_missing_formats("sub/a") == ("txt", "srt")
    assert OutputOptions(**options, overwrite=True).get_missing_formats("a") == ("txt", "srt")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    OutputOptions(("txt",), tmp_path / "a" / "b").create_folder()
    assert (tmp_path / "a" / "b").is_dir()
    for folder in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(ValueError, match=r"`--output-dir` must be a folder that can be written, got .*file"):
            OutputOptions(("txt",), folder).create_folder()
