"""Tests of the processes that decode files: one that dies, hangs or needs too much memory affects only its file."""

import asyncio
import io
import os
import signal
import sys
import time

import numpy as np
import pytest
import soundfile
from serving_helpers import CLIP, CLIPS, write_wav_header

from transformers_parakeet import load_audio
from transformers_parakeet.serving import uploads
from transformers_parakeet.serving.errors import ApiError
from transformers_parakeet.serving.uploads import UploadDecoder, check_wav_length, decode_upload


def decode_or_misbehave(content, name, sampling_rate, max_duration_s):
    """Decode a file, or do what its content says; runs in a decoder process."""
    if content == b"die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if content == b"exit":
        os._exit(3)
    if content == b"hang":
        while True:
            time.sleep(0.1)
    if content == b"fill the memory":
        return np.ones(10**12, dtype=np.float32)
    return decode_upload(content, name, sampling_rate, max_duration_s)


@pytest.fixture(scope="module")
def decoder():
    """Two processes, which decode a file for at most 1.5 s."""
    decoder = UploadDecoder(2, 16000, 600.0, 1.5)
    yield decoder
    decoder.close()


def decode(decoder, *contents):
    """Decode files at the same time; the samples or the error of each."""

    async def gather():
        """Decode all files."""
        results = (decoder.decode(content, f"file {index}") for index, content in enumerate(contents))
        return await asyncio.gather(*results, return_exceptions=True)

    return asyncio.run(gather())


def test_the_samples_are_those_of_load_audio(decoder):
    results = decode(decoder, *(path.read_bytes() for path in CLIPS))
    for path, samples in zip(CLIPS, results, strict=True):
        assert samples.dtype == np.float32
        np.testing.assert_array_equal(samples, load_audio(str(path)))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"die", "decoding_failed"),
        (b"exit", "decoding_failed"),
        (b"hang", "decoding_timeout"),
        pytest.param(
            b"fill the memory",
            "decoding_failed",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process"),
        ),
        (b"no audio", "invalid_audio"),
        (b"", "invalid_audio"),
    ],
)
def test_a_bad_file_affects_only_itself(decoder, monkeypatch, content, code):
    monkeypatch.setattr(uploads, "decode_upload", decode_or_misbehave)
    good = CLIP.read_bytes()
    results = decode(decoder, good, content, good, good, content, good)
    errors = [results[1], results[4]]
    assert all(isinstance(error, ApiError) for error in errors), errors
    assert [(error.status, error.code) for error in errors] == [(400, code)] * 2
    assert "file 1" in errors[0].message
    expected = load_audio(str(CLIP))
    for index in (0, 2, 3, 5):
        np.testing.assert_array_equal(results[index], expected)


def test_a_recording_that_is_too_long_is_refused():
    decoder = UploadDecoder(1, 16000, 2.0, 30.0)
    try:
        (error,) = decode(decoder, CLIP.read_bytes())
        assert (error.status, error.code) == (413, "audio_too_long")
    finally:
        decoder.close()


def test_a_closed_decoder_answers_that_the_server_stops():
    decoder = UploadDecoder(1, 16000, 600.0, 30.0)
    decode(decoder, CLIP.read_bytes())
    decoder.close()
    with pytest.raises((ApiError, RuntimeError)):
        asyncio.run(decoder.decode(CLIP.read_bytes(), "clip"))


def test_damaged_files_are_errors_not_warnings():
    content = CLIP.read_bytes()
    with pytest.raises(ValueError, match="is damaged"):
        decode_upload(content[: len(content) // 2], "clip", 16000, 600.0)


def test_truncated_wav_files_are_refused():
    samples = bytes(32000)
    check_wav_length(write_wav_header(32000) + samples, "clip")
    # programs that write to a pipe do not know the length
    for num_bytes in (0, 0xFFFFFFFF, 0x7FFFFFFF - 36, 0x7FFFF000):
        check_wav_length(write_wav_header(num_bytes) + samples, "clip")
    # a length that is a bit too large
    check_wav_length(write_wav_header(32100) + samples, "clip")
    with pytest.raises(ValueError, match="clip must have 64000 bytes of samples, as its header states, got 32000"):
        check_wav_length(write_wav_header(64000) + samples, "clip")
    # a chunk with an odd number of bytes before the samples
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(16000), 16000, format="WAV", subtype="PCM_16")
    content = buffer.getvalue()
    position = content.index(b"data")
    content = content[:position] + b"LIST\x03\x00\x00\x00abc\x00" + content[position:]
    check_wav_length(content, "clip")
    with pytest.raises(ValueError, match="got 1000"):
        check_wav_length(content[: position + 12 + 8 + 1000], "clip")
    for content in (b"", b"RIFF", b"RIFF\x00\x00\x00\x00WAVE", b"RIFF\x00\x00\x00\x00WAVEfmt ", CLIP.read_bytes()):
        check_wav_length(content, "clip")
