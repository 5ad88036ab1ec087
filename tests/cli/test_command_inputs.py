"""Tests of the recordings that arguments name, and of the names of their outputs."""

import itertools

import pytest

from transformers_parakeet_cli.inputs import Recording, choose_output_names, find_recordings


def create_files(folder, *names):
    """Create empty files, with their folders."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def find_names(folder, *arguments):
    """Return the paths of the recordings relative to a folder, and the arguments that name none."""
    recordings, errors = find_recordings([str(folder / argument) for argument in arguments])
    return [recording.name.removeprefix(f"{folder}/") for recording in recordings], list(errors)


def test_a_folder_is_searched_for_media_files(tmp_path):
    create_files(tmp_path, "b.MP3", "a/c.wav", "a/d/e.mkv", "notes.txt", "b.srt", ".a.txt.1.partial", "f.flac/g.ogg")
    recordings, errors = find_recordings([str(tmp_path)])
    assert errors == {}
    assert [(recording.file_name, recording.folder) for recording in recordings] == [
        ("c.wav", "a"),
        ("e.mkv", "a/d"),
        ("b.MP3", ""),
        ("g.ogg", "f.flac"),
    ]


def test_patterns_match_files_in_sub_folders(tmp_path):
    create_files(tmp_path, "a.wav", "b/a.wav", "b/c/d.wav", "b/c/d.mp3", "what?.wav", "[x].wav")
    assert find_names(tmp_path, "*.wav") == (["[x].wav", "a.wav", "what?.wav"], [])
    assert find_names(tmp_path, "**/d.*") == (["b/c/d.mp3", "b/c/d.wav"], [])
    # a file whose name has the characters of a pattern is this file
    assert find_names(tmp_path, "[x].wav") == (["[x].wav"], [])
    assert find_names(tmp_path, "?.mp3", "a.wav") == (["a.wav"], [str(tmp_path / "?.mp3")])


def test_every_recording_is_listed_once(tmp_path):
    create_files(tmp_path, "a.wav", "b.wav")
    (tmp_path / "link.wav").symlink_to(tmp_path / "a.wav")
    assert find_names(tmp_path, "a.wav", "./a.wav", "*.wav", ".")[0] == ["a.wav", "b.wav"]
    recordings, _ = find_recordings(["-", "https://a.org/x.wav?b=1", "-", "https://a.org/x.wav?b=1", "missing.wav"])
    assert [recording.name for recording in recordings] == ["-", "https://a.org/x.wav?b=1", "missing.wav"]
    assert [recording.file_name for recording in recordings] == ["stdin", "x.wav", "missing.wav"]


def test_outputs_are_named_after_the_recordings():
    names = ["in/talk.mp3", "in/v1.2 final.wav", "-", "https://a.org/talks/x%20y.ogg?b=c.d", "https://a.org/"]
    recordings = [Recording(name) for name in names]
    assert choose_output_names(recordings) == ["talk", "v1.2 final", "stdin", "x y", "audio"]
    assert choose_output_names([Recording("in/a/b/talk.mp3", "a/b")]) == ["a/b/talk"]


def test_outputs_of_equal_names_get_the_ending_or_a_hash():
    names = ["x/talk.mp3", "x/TALK.wav", "y/talk.mp3", "talk", "other.mp3"]
    outputs = choose_output_names([Recording(name) for name in names])
    assert outputs[1] == "TALK.wav"
    assert outputs[3] == "talk"
    assert outputs[4] == "other"
    assert outputs[0] != outputs[2]
    for output in (outputs[0], outputs[2]):
        assert output.startswith("talk.mp3-")
        assert len(output) == len("talk.mp3-") + 8


@pytest.mark.parametrize("number", [2, 3, 4])
def test_output_names_differ_and_do_not_depend_on_the_order(number):
    names = ["a.wav", "a.mp3", "A.WAV", "b/a.wav", "a", "a.wav.mp3"]
    for chosen in itertools.combinations(names, number):
        outputs = dict(zip(chosen, choose_output_names([Recording(name) for name in chosen]), strict=True))
        assert len({output.casefold() for output in outputs.values()}) == number
        reversed_outputs = choose_output_names([Recording(name) for name in reversed(chosen)])
        assert dict(zip(reversed(chosen), reversed_outputs, strict=True)) == outputs
