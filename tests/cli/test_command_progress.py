"""Tests of the progress bar of `parakeet transcribe`."""

import io
import os

import pytest
import soundfile
from conftest import TESTS, noise
from rich.console import Console

import transformers_parakeet as tp
from transformers_parakeet_cli import progress
from transformers_parakeet_cli.inputs import Recording
from transformers_parakeet_cli.progress import ProgressBar, estimate_duration

SPEECH = sorted((TESTS / "data" / "clips").glob("speech_*"))


@pytest.mark.parametrize("path", SPEECH, ids=lambda path: path.suffix)
def test_durations_are_read_from_headers(path):
    # measured: the header of an MP3 or Ogg file differs from the decoded length by up to 0.05 s
    assert estimate_duration(Recording(str(path))) == pytest.approx(len(tp.load_audio(path)) / 16000, abs=0.1)


@pytest.mark.parametrize("name", ["-", "https://example.org/a.wav", "missing.wav", __file__])
def test_an_unknown_duration_counts_as_zero(name):
    assert estimate_duration(Recording(name)) == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_pipe_is_not_read_to_estimate_its_duration(tmp_path):
    path, content = tmp_path / "pipe.wav", (TESTS / "golden" / "clips" / "speech0.wav").read_bytes()
    os.mkfifo(path)
    # a pipe that is open for reading and writing holds what is written, up to 64 KiB
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.write(descriptor, content[:4096])
        assert estimate_duration(Recording(str(path))) == 0
        assert os.read(descriptor, 4096) == content[:4096]
    finally:
        os.close(descriptor)


def test_the_bar_counts_seconds_of_audio(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", noise(8.0), 16000)
    stream = io.StringIO()
    monkeypatch.setattr(progress, "error_console", Console(file=stream, force_terminal=True, width=100))
    recordings = [Recording(str(tmp_path / "a.wav")), Recording("-")]
    with ProgressBar(recordings, is_visible=True) as bar:
        bar.advance(2.0)
        bar.pause()
        assert " 25 %" in stream.getvalue()
        assert "2 of 8 s of audio" in stream.getvalue()
        assert "times real time" in stream.getvalue()
        bar.resume()
        # the length of standard input was not known
        bar.advance(10.0)
    assert "12 of 12 s of audio" in stream.getvalue()


def test_a_bar_that_is_not_visible_prints_nothing(capfd):
    with ProgressBar([Recording("a.wav")], is_visible=False) as bar:
        bar.advance(1.0)
    assert capfd.readouterr() == ("", "")
