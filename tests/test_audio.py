"""Tests of `load_audio` and `AudioSource` with every kind of source: files, URLs, bytes, arrays, lists and dicts."""

import http.server
import io
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import soxr
from audio_files import SECONDS, chirp, encoded, stereo

from transformers_parakeet import audio
from transformers_parakeet.audio import AudioError, AudioSource, iterate_audio, load_audio


def test_path_bytes_file_object_and_dict_give_the_same_samples(tmp_path: Path) -> None:
    data = encoded(44_100, samples=stereo(44_100))
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    expected = load_audio(path)
    for source in (data, bytearray(data), memoryview(data), io.BytesIO(data), {"bytes": data, "path": None}):
        np.testing.assert_array_equal(load_audio(source), expected)
    np.testing.assert_array_equal(load_audio({"bytes": None, "path": str(path)}), expected)
    with path.open("rb") as file:
        np.testing.assert_array_equal(load_audio(file), expected)
    # the rate in the file takes precedence over the argument
    np.testing.assert_array_equal(load_audio(path, 8_000), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="/dev/fd exists on Unix only")
def test_a_pipe_can_be_read() -> None:
    data = encoded(samples=chirp(seconds=0.5))
    read_end, write_end = os.pipe()
    # shorter than the buffer of a pipe, so this does not block
    os.write(write_end, data)
    os.close(write_end)
    got = load_audio(f"/dev/fd/{read_end}")
    os.close(read_end)
    np.testing.assert_array_equal(got, load_audio(data))


@pytest.mark.parametrize(
    ("dtype", "scale", "offset"),
    [("int8", 128, 0), ("uint8", 128, 128), ("int16", 32768, 0), ("int32", 2**31, 0)],
)
def test_integer_samples_are_scaled(dtype: str, scale: int, offset: int) -> None:
    values = np.array([-scale, -scale // 2, 0, scale // 4, scale - 1], dtype=np.int64) + offset
    expected = np.array([-1, -0.5, 0, 0.25, (scale - 1) / scale])
    np.testing.assert_allclose(load_audio(values.astype(dtype)), expected, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "<f8"])
def test_float_samples_are_not_scaled(dtype: str) -> None:
    got = load_audio(np.array([0.5, -0.25, 1000.0], dtype=dtype))
    assert got.dtype == np.dtype("=f4")
    np.testing.assert_array_equal(got, [0.5, -0.25, 1000.0])


@pytest.mark.parametrize("dtype", ["int64", "uint16", "bool", "complex64", "<U3"])
def test_other_sample_types_are_refused(dtype: str) -> None:
    with pytest.raises(TypeError, match=r"int16 or int32, got"):
        load_audio(np.zeros(9, dtype=dtype))


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_channels_on_either_axis_are_averaged(channels: int) -> None:
    samples = np.random.default_rng(0).standard_normal((channels, 1000)).astype(np.float32)
    expected = samples.mean(axis=0)
    np.testing.assert_allclose(load_audio(samples), expected, atol=1e-6)
    np.testing.assert_allclose(load_audio(samples.T), expected, atol=1e-6)
    np.testing.assert_allclose(load_audio(samples.tolist()), expected, atol=1e-6)
    np.testing.assert_allclose(load_audio(list(samples)), expected, atol=1e-6)


def test_int16_channels_are_scaled_before_they_are_averaged() -> None:
    samples = np.full((2, 100), 32767, dtype=np.int16)
    np.testing.assert_allclose(load_audio(samples), np.full(100, 32767 / 32768), atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 2), (8, 3), (100, 100), (9, 1000), (2, 2, 100), ()])
def test_ambiguous_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {shape}")):
        load_audio(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize(
    "source", [[], np.zeros(0), np.zeros((2, 0)), np.zeros((0, 2), dtype="int16"), encoded(samples=np.zeros(0))]
)
def test_empty_audio_stays_empty(source: Any) -> None:
    got = load_audio(source, 44_100)
    assert (got.shape, got.dtype) == ((0,), np.float32)


@pytest.mark.parametrize("length", [1, 100, 399])
@pytest.mark.parametrize(("rate", "target"), [(16_000, 16_000), (44_100, 16_000), (8_000, 16_000), (16_000, 22_050)])
def test_short_audio_keeps_its_length(length: int, rate: int, target: int) -> None:
    got = load_audio(np.ones(length), rate, target_rate=target)
    assert len(got) == round(length * target / rate)
    assert np.isfinite(got).all()


def test_silence_stays_silent() -> None:
    np.testing.assert_array_equal(load_audio(np.zeros(44_100), 44_100), np.zeros(16_000))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(bad: float) -> None:
    samples = np.zeros(500)
    samples[[123, 200]] = bad
    message = rf"2 of 500 in the array are NaN or infinite, the first at position 123 \({bad}\)"
    with pytest.raises(ValueError, match=message):
        load_audio(samples, 44_100)
    with pytest.raises(ValueError, match="2 of 500"):
        load_audio(encoded(samples=samples, subtype="FLOAT"))
    # overflows float32
    with pytest.raises(ValueError, match="1 of 1"):
        load_audio(np.array([1e300]))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_the_signal(rate: int) -> None:
    got = load_audio(chirp(rate), rate)
    assert len(got) == SECONDS * 16_000
    # without the ends, where the filter extends beyond the signal; measured 3e-5 at most
    np.testing.assert_allclose(got[200:-200], chirp()[200:-200], atol=1e-3)


def test_resampling_removes_frequencies_above_half_the_target_rate() -> None:
    tone = np.sin(2 * np.pi * 10_000 * np.arange(48_000) / 48_000)
    assert np.abs(load_audio(tone, 48_000)[200:-200]).max() < 1e-4


@pytest.mark.parametrize("rate", [0, -16_000, 16_000.0, "16000", True, 1, 10**9])
def test_wrong_rates_are_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match="sampling_rate must be an integer number of Hz"):
        load_audio(np.zeros(10), rate)
    with pytest.raises(ValueError, match="target_rate must be an integer number of Hz"):
        load_audio(np.zeros(10), target_rate=rate)
    with pytest.raises(ValueError, match="sampling_rate"):
        load_audio({"array": np.zeros(10), "sampling_rate": rate})


@pytest.mark.parametrize("key", ["array", "raw"])
def test_the_rate_in_a_dict_is_used(key: str) -> None:
    got = load_audio({key: chirp(44_100), "sampling_rate": np.int64(44_100), "path": None}, 8_000)
    assert len(got) == SECONDS * 16_000
    assert len(load_audio({key: chirp(8_000)}, 8_000)) == SECONDS * 16_000
    with pytest.raises(ValueError, match=r"\['audio'\]"):
        load_audio({"audio": chirp()})


def test_tensors_are_read() -> None:
    torch = pytest.importorskip("torch")
    expected = chirp()
    for tensor in (torch.tensor(expected), torch.tensor(expected, requires_grad=True), torch.tensor(expected)[None]):
        np.testing.assert_array_equal(load_audio(tensor), expected)
    np.testing.assert_allclose(load_audio(torch.tensor(expected).bfloat16()), expected, atol=2**-9)
    np.testing.assert_array_equal(load_audio([torch.tensor(expected), torch.tensor(expected)]), expected)
    assert load_audio(torch.tensor([16384, -32768], dtype=torch.int16)).tolist() == [0.5, -1.0]


def test_torchcodec_decoders_are_read() -> None:
    # (2, 2) would be ambiguous as an array; a decoder always returns channels first
    decoded = SimpleNamespace(data=np.array([[0.5, 0.0], [0.25, 0.5]], dtype=np.float32), sample_rate=16_000)
    got = load_audio(SimpleNamespace(get_all_samples=lambda: decoded))
    np.testing.assert_array_equal(got, [0.375, 0.25])


def test_numbers_in_a_list_are_amplitudes() -> None:
    assert load_audio([0, 1, -0.5]).tolist() == [0.0, 1.0, -0.5]
    assert load_audio((0, 2, 0)).tolist() == [0.0, 2.0, 0.0]
    with pytest.raises(ValueError, match="same length"):
        load_audio([[0.0, 1.0], [0.0]])


@pytest.mark.parametrize("source", [None, 3, object(), {1.0, 2.0}])
def test_other_types_are_refused(source: Any) -> None:
    with pytest.raises(TypeError, match=f"got {type(source).__name__}"):
        load_audio(source)


def test_files_that_are_not_audio_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_audio(tmp_path / "nowhere.wav")
    with pytest.raises(AudioError, match="directory"):
        load_audio(tmp_path)
    (tmp_path / "empty.wav").touch()
    for empty, name in ((tmp_path / "empty.wav", r"empty\.wav"), (b"", "<0 bytes>"), (io.BytesIO(), "<file object>")):
        with pytest.raises(AudioError, match=rf"{name} is empty \(0 bytes\)"):
            load_audio(empty)
    (tmp_path / "text.wav").write_text("It was a bright cold day in April.\n" * 99)
    with pytest.raises(AudioError, match=r"text\.wav cannot be read as audio \(libsndfile: .+; FFmpeg: .+\)"):
        load_audio(tmp_path / "text.wav")
    with pytest.raises(TypeError, match="must be binary"):
        load_audio(io.StringIO("text"))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a complete WAV file and one that ends early; any other path is not found."""

    def do_GET(self) -> None:
        """Answer one request."""
        data = encoded()
        if self.path not in ("/a%20b.wav?x=1", "/short.wav"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:1000] if self.path == "/short.wav" else data)

    def log_message(self, *_: object) -> None:
        """Keep the test output clean."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a local HTTP server and give its address."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_are_downloaded(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    np.testing.assert_allclose(load_audio(f"{address}/a b.wav?x=1"), chirp(), atol=2 / 32768)
    with pytest.raises(AudioError, match=r"could not download 'http://127.*missing\.wav'.*404"):
        load_audio(f"{address}/missing.wav")
    with pytest.raises(AudioError, match="got 1000 of 64044 bytes"):
        load_audio(f"{address}/short.wav")
    monkeypatch.setattr(audio, "MAX_STREAM_BYTES", 999)
    with pytest.raises(AudioError, match="larger than 999 bytes"):
        load_audio(f"{address}/a b.wav?x=1")


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:1/a.wav", "https://[bad/a.wav"])
def test_urls_that_cannot_be_downloaded_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(AudioError, match="could not download"):
        load_audio(url)


@pytest.mark.parametrize(
    ("package", "source"), [("soundfile", encoded()), ("av", encoded(44_100, "MP3")), ("soxr", encoded(8_000))]
)
def test_a_missing_package_is_named(package: str, source: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is needed .*pip install {package}"):
        load_audio(source)


def test_arrays_at_the_target_rate_need_no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("soundfile", "av", "soxr"):
        monkeypatch.setitem(sys.modules, package, None)
    np.testing.assert_array_equal(load_audio(chirp()), chirp())


# rates of the source and of the result
RATES = [(16_000, 16_000), (44_100, 16_000), (8_000, 16_000), (48_000, 22_050)]


@pytest.mark.parametrize(("rate", "target_rate"), RATES)
@pytest.mark.parametrize("block_s", [0.00113, 0.5, 1.9999, 30.0])
def test_blocks_equal_resampling_of_the_whole_file(rate: int, target_rate: int, block_s: float) -> None:
    """The streaming resampler gives bit for bit the same samples as soxr on the whole clip: measured difference 0."""
    data = encoded(rate, "FLAC", stereo(rate))
    samples = sf.read(io.BytesIO(data), dtype="float32")[0].mean(axis=1, dtype=np.float32)
    expected = samples if rate == target_rate else soxr.resample(samples, rate, target_rate, quality="HQ")
    for in_memory_s in (0.0, 60.0):
        source = AudioSource(data, target_rate=target_rate, in_memory_s=in_memory_s)
        assert (source.num_samples, source.sampling_rate) == (len(expected), target_rate)
        for _ in range(2):
            blocks = list(source.blocks(block_s))
            block_length = round(block_s * target_rate)
            assert {len(block) for block in blocks[:-1]} <= {block_length}
            assert 0 < len(blocks[-1]) <= block_length
            np.testing.assert_array_equal(np.concatenate(blocks), expected)
        np.testing.assert_array_equal(source.load(), expected)
    np.testing.assert_array_equal(load_audio(data, target_rate=target_rate), expected)
    blocks = list(iterate_audio(data, target_rate=target_rate, block_s=block_s))
    np.testing.assert_array_equal(np.concatenate(blocks), expected)


@pytest.mark.parametrize(
    ("count", "rate", "target_rate"),
    # the exact length ends in one half in all but the first case; soxr rounds some halves up and some down
    [(100, 44_100, 16_000), (1, 32_000, 16_000), (1040, 12_000, 11_025), (2240, 96_000, 22_050), (4, 1_000, 16_000)],
)
def test_the_number_of_resampled_samples_is_known_before_resampling(count: int, rate: int, target_rate: int) -> None:
    source = AudioSource(np.ones(count), rate, target_rate=target_rate)
    assert source.num_samples == len(soxr.resample(np.ones(count), rate, target_rate)) == len(source.load())


def test_every_kind_of_source_can_be_iterated_twice(address: str, tmp_path: Path) -> None:
    data = encoded(samples=chirp())
    (tmp_path / "a.wav").write_bytes(data)
    read_end, write_end = os.pipe()
    threading.Thread(target=lambda: (os.write(write_end, data), os.close(write_end))).start()
    encoded_sources = [
        data, io.BytesIO(data), tmp_path / "a.wav", {"path": str(tmp_path / "a.wav")}, {"bytes": data},
        f"{address}/a b.wav?x=1", f"/dev/fd/{read_end}",
    ]  # fmt: skip
    expected = sf.read(io.BytesIO(data), dtype="float32")[0]
    array_sources: list[Any] = [expected, np.stack([expected, expected]), expected.tolist(), {"raw": expected}]
    decoded = SimpleNamespace(data=expected[None], sample_rate=16_000)
    for audio_source in (*encoded_sources, *array_sources, SimpleNamespace(get_all_samples=lambda: decoded)):
        source = AudioSource(audio_source, in_memory_s=0.0)
        for _ in range(2):
            np.testing.assert_array_equal(np.concatenate(list(source.blocks(0.3))), expected)
    os.close(read_end)


def test_sources_have_names_for_error_messages(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded())
    assert AudioSource(tmp_path / "a.wav").name == str(tmp_path / "a.wav")
    assert AudioSource(encoded()).name == "<64044 bytes>"
    assert AudioSource([0.0]).name == "the array"


@pytest.mark.parametrize("source", [[], encoded(samples=np.zeros(0)), {"array": np.zeros(0), "sampling_rate": 8_000}])
def test_empty_audio_has_no_blocks(source: Any) -> None:
    assert list(iterate_audio(source)) == []
    assert AudioSource(source).num_samples == 0


def test_samples_that_are_not_finite_are_refused_before_the_first_block() -> None:
    samples = np.zeros(200_000, dtype=np.float32)
    samples[[70_000, 70_001, 199_999]] = np.nan, np.inf, -np.inf
    message = r"3 of 200000 in <\d+ bytes> are NaN or infinite, the first at position 70000 \(nan\)"
    with pytest.raises(ValueError, match=message):
        AudioSource(encoded(44_100, samples=samples, subtype="FLOAT"), in_memory_s=0.0)


@pytest.mark.parametrize("block_s", [0.0, -1.0, 1e-5])
def test_blocks_shorter_than_a_sample_are_refused(block_s: float) -> None:
    with pytest.raises(ValueError, match=r"block_s must be at least one sample \(1 / 16000 s\)"):
        iterate_audio(chirp(), block_s=block_s)
