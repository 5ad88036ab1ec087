"""Tests of `load_audio` with every kind of source, valid, damaged or malicious; most files are generated here."""

import http.server
import io
import json
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from transformers_parakeet import audio, audio_decoding
from transformers_parakeet.audio import AudioError, load_audio

sf = pytest.importorskip("soundfile")
av = pytest.importorskip("av")
pytest.importorskip("soxr")

TESTS = Path(__file__).resolve().parent
# clips in the repository, and a larger collection that only some machines have beside the repository
CLIP_FOLDERS = (TESTS / "data" / "clips", TESTS.parents[1] / "shared" / "data" / "smoke_clips")
SECONDS = 2.0


def chirp(rate: int = 16_000, seconds: float = SECONDS) -> np.ndarray:
    """Generate a sweep from 200 to 3200 Hz (S,), which lies in the pass band of every codec used here."""
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * (200 * t + (3000 / seconds) * t**2 / 2)
    return (0.5 * np.sin(phase)).astype(np.float32)


def correlation(samples: np.ndarray, expected: np.ndarray) -> float:
    """Return the correlation coefficient of two signals over their common length."""
    length = min(len(samples), len(expected))
    return float(np.corrcoef(samples[:length], expected[:length])[0, 1])


def stereo(rate: int) -> np.ndarray:
    """Generate two different channels (S, 2) whose mean is the chirp."""
    mono = chirp(rate)
    return np.stack([1.5 * mono, 0.5 * mono], axis=1)


def write_with_ffmpeg(
    path: Path, codec: str, rate: int, video: bool = False, sound: bool = True, **options: str
) -> None:
    """Write the stereo chirp with an FFmpeg codec.

    Args:
        path: file to write; its suffix determines the container.
        codec: FFmpeg's name of the audio codec.
        rate: samples per second.
        video: add a video track of five frames.
        sound: add the audio track.
        **options: options of the container.
    """
    with av.open(str(path), "w", options=options) as container:
        if video:
            pictures = container.add_stream("mpeg4", rate=10)
            pictures.width = pictures.height = 64
        if sound:
            stream = container.add_stream(codec, rate=rate, layout="stereo")
            write_sound(container, stream, rate)
        if video:
            for _ in range(5):
                container.mux(pictures.encode(av.VideoFrame(64, 64, "yuv420p")))
            container.mux(pictures.encode(None))


def write_sound(container: Any, stream: Any, rate: int) -> None:
    """Encode the stereo chirp into an audio stream of an open container of PyAV."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(stereo(rate).T), format="fltp", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    # samples per frame that each encoder requires
    frame_size = {"aac": 1024, "libopus": 960, "libmp3lame": 1152}[stream.codec_context.name]
    resampler = av.AudioResampler(format=stream.format, layout="stereo", rate=rate, frame_size=frame_size)
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        container.mux(stream.encode(piece))
    container.mux(stream.encode(None))


def encoded(rate: int = 16_000, container: str = "WAV", samples: np.ndarray | None = None, **options: str) -> bytes:
    """Encode samples (default: the chirp) with libsndfile and return the content of the file."""
    file = io.BytesIO()
    sf.write(file, chirp(rate) if samples is None else samples, rate, format=container, **options)
    return file.getvalue()


# name, subtype, rate, minimum correlation; lossy codecs were measured at 0.995 or more
SOUNDFILE_CASES = [
    ("a.wav", "PCM_16", 16_000, 0.99999),
    ("a.wav", "PCM_24", 44_100, 0.99999),
    ("a.wav", "PCM_U8", 44_100, 0.999),
    ("a.wav", "FLOAT", 22_050, 0.99999),
    ("a.wav", "ULAW", 8_000, 0.99),
    ("a.au", "ALAW", 8_000, 0.99),
    ("a.aiff", "PCM_16", 44_100, 0.99999),
    ("a.flac", "PCM_16", 48_000, 0.99999),
    ("a.mp3", "MPEG_LAYER_III", 44_100, 0.99),
    ("a.ogg", "VORBIS", 48_000, 0.99),
    ("a.opus", "OPUS", 48_000, 0.99),
]


@pytest.mark.parametrize(("name", "subtype", "rate", "min_correlation"), SOUNDFILE_CASES)
def test_files_that_libsndfile_writes(
    tmp_path: Path, name: str, subtype: str, rate: int, min_correlation: float
) -> None:
    path = tmp_path / name
    sf.write(path, stereo(rate), rate, format="OGG" if name == "a.opus" else None, subtype=subtype)
    got = load_audio(path)
    assert got.dtype == np.float32
    # both libraries remove the padding that codecs add
    assert abs(len(got) - SECONDS * 16_000) <= 1
    assert correlation(got, chirp()) > min_correlation
    assert np.abs(got).max() == pytest.approx(0.5, abs=0.1)


FFMPEG_CASES = [
    ("a.m4a", "aac", 44_100),
    ("a.mp4", "aac", 16_000),
    ("a.webm", "libopus", 48_000),
    ("a.aac", "aac", 16_000),
]


@pytest.mark.parametrize(("name", "codec", "rate"), FFMPEG_CASES)
def test_files_that_only_ffmpeg_reads(tmp_path: Path, name: str, codec: str, rate: int) -> None:
    path = tmp_path / name
    write_with_ffmpeg(path, codec, rate)
    got = load_audio(str(path))
    # raw AAC has no field for the encoder's delay, which is one frame of 1024 samples
    delay = 1024 if name == "a.aac" else 0
    assert 0 <= len(got) / 16_000 - SECONDS < 3 * 1024 / rate
    assert correlation(got[delay:], chirp()) > 0.99


def test_a_planar_file_with_eight_channels_is_read(tmp_path: Path) -> None:
    # 7.1 surround: `to_ndarray` of PyAV 18.1 reads beyond the end of the frame
    samples = np.tile(chirp(48_000)[:, None], 8)
    with av.open(str(tmp_path / "a.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=48_000, layout="7.1")
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout="7.1")
        frame.sample_rate, frame.pts = 48_000, 0
        resampler = av.AudioResampler(format="fltp", layout="7.1", rate=48_000, frame_size=1024)
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(piece))
    # AAC low-pass filters one of the eight channels, the one for low frequencies
    assert correlation(load_audio(tmp_path / "a.m4a"), chirp()) > 0.95


def test_video_with_and_without_sound(tmp_path: Path) -> None:
    write_with_ffmpeg(tmp_path / "talk.mp4", "aac", 48_000, video=True)
    assert correlation(load_audio(tmp_path / "talk.mp4"), chirp()) > 0.99
    write_with_ffmpeg(tmp_path / "mute.mp4", "aac", 48_000, video=True, sound=False)
    with pytest.raises(AudioError, match=r"mute\.mp4 .*no audio track"):
        load_audio(tmp_path / "mute.mp4")


def test_path_bytes_file_object_and_dict_give_the_same_samples(tmp_path: Path) -> None:
    data = encoded(44_100, samples=stereo(44_100))
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    want = load_audio(path)
    for source in (data, bytearray(data), memoryview(data), io.BytesIO(data), {"bytes": data, "path": None}):
        np.testing.assert_array_equal(load_audio(source), want)
    np.testing.assert_array_equal(load_audio({"bytes": None, "path": str(path)}), want)
    with path.open("rb") as file:
        np.testing.assert_array_equal(load_audio(file), want)
    # the rate in the file takes precedence over the argument
    np.testing.assert_array_equal(load_audio(path, 8_000), want)


def test_the_format_is_detected_from_the_content_not_the_name(tmp_path: Path) -> None:
    for name in ("wav.raw", "wav.mp3", "wav"):
        (tmp_path / name).write_bytes(encoded())
        np.testing.assert_allclose(load_audio(tmp_path / name), chirp(), atol=2 / 32768)


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
    want = np.array([-1, -0.5, 0, 0.25, (scale - 1) / scale])
    np.testing.assert_allclose(load_audio(values.astype(dtype)), want, atol=1e-7)


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
    want = samples.mean(axis=0)
    np.testing.assert_allclose(load_audio(samples), want, atol=1e-6)
    np.testing.assert_allclose(load_audio(samples.T), want, atol=1e-6)
    np.testing.assert_allclose(load_audio(samples.tolist()), want, atol=1e-6)
    np.testing.assert_allclose(load_audio(list(samples)), want, atol=1e-6)


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
    want = chirp()
    for tensor in (torch.tensor(want), torch.tensor(want, requires_grad=True), torch.tensor(want)[None]):
        np.testing.assert_array_equal(load_audio(tensor), want)
    np.testing.assert_allclose(load_audio(torch.tensor(want).bfloat16()), want, atol=2**-9)
    np.testing.assert_array_equal(load_audio([torch.tensor(want), torch.tensor(want)]), want)
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


def test_a_playlist_cannot_open_another_file(tmp_path: Path) -> None:
    (tmp_path / "secret.mp3").write_bytes(encoded(44_100, "MP3"))
    (tmp_path / "list.wav").write_text("ffconcat version 1.0\nfile 'secret.mp3'\n")
    with pytest.raises(AudioError, match=r"list\.wav cannot be read"):
        load_audio(tmp_path / "list.wav")


@pytest.mark.parametrize(
    ("container", "options", "rate"),
    [
        ("MP3", {}, 44_100),
        ("FLAC", {}, 44_100),
        ("WAV", {"subtype": "PCM_16"}, 44_100),
        ("OGG", {"subtype": "VORBIS"}, 44_100),
    ],
)
def test_truncated_files_are_read_as_far_as_possible(container: str, options: dict[str, str], rate: int) -> None:
    data = encoded(rate, container, np.tile(chirp(rate), 10), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = load_audio(data[: len(data) // 2])
    # an Ogg page, about 4 s long here, is read completely or not at all
    assert 0.3 < len(got) / (10 * SECONDS * 16_000) < 0.55
    assert correlation(got, np.tile(chirp(), 10)) > 0.99
    # a truncated WAV or Ogg file looks like a complete one, so there is no warning
    assert len(caught) == (container in ("MP3", "FLAC"))
    assert all("damaged" in str(warning.message) and str(len(data) // 2) in str(warning.message) for warning in caught)


def test_only_the_damaged_part_of_a_file_is_lost() -> None:
    data = bytearray(encoded(44_100, "FLAC", np.tile(chirp(44_100), 5)))
    data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
    with pytest.warns(UserWarning, match=r"damaged, 9\.\d+ s of it were read \(libsndfile: .*lost sync"):
        got = load_audio(bytes(data))
    assert 9.7 < len(got) / 16_000 <= 10


def test_files_that_libsndfile_would_truncate_silently_are_read_completely(tmp_path: Path) -> None:
    # concatenated Ogg and MP3 streams
    for container in ("OGG", "MP3"):
        data = encoded(48_000, container)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(load_audio(data + data)) / 16_000 == pytest.approx(2 * SECONDS, abs=0.1)
    # an MP3 of variable bit rate whose header states no length
    path = tmp_path / "vbr.mp3"
    write_with_ffmpeg(path, "libmp3lame", 44_100, write_xing="0")
    assert len(load_audio(path)) / 16_000 == pytest.approx(SECONDS, abs=0.1)
    # a FLAC stream that was written to a pipe states no length (36 bits at byte 21 are zero)
    flac = bytearray(encoded(44_100, "FLAC"))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    assert len(load_audio(bytes(flac))) == SECONDS * 16_000
    # an interrupted recording leaves the lengths in a WAV header at 0
    wav = bytearray(encoded())
    wav[4:8] = wav[40:44] = bytes(4)
    np.testing.assert_allclose(load_audio(bytes(wav)), chirp(), atol=2 / 32768)


def test_an_implausible_rate_in_a_header_is_refused() -> None:
    wav = bytearray(encoded())
    wav[24:28] = (1).to_bytes(4, "little")
    with pytest.raises(AudioError, match="its header states 1 Hz"):
        load_audio(bytes(wav))


def test_corrupt_files_never_crash() -> None:
    rng = np.random.default_rng(0)
    files = [encoded(), encoded(44_100, "FLAC"), encoded(44_100, "MP3"), encoded(48_000, "OGG")]
    outcomes = set()
    for trial in range(80):
        data = np.frombuffer(files[trial % 4], dtype=np.uint8).copy()
        data[rng.integers(0, 200, 20)] = rng.integers(0, 256, 20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcomes.add(load_audio(data.tobytes()).dtype.name)
            except ValueError:
                outcomes.add("refused")
    assert outcomes == {"float32", "refused"}


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
    with pytest.raises(AudioError, match="more than 999 bytes"):
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


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """Read the manifest of a folder of clips; a folder that does not exist gives no clips."""
    manifest = folder / "manifest.jsonl"
    return [json.loads(line) for line in manifest.read_text().splitlines()] if manifest.is_file() else []


def check_clip(path: Path, duration: float) -> np.ndarray:
    """Load a clip, check its duration in seconds and that there is no warning, and return the samples."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = load_audio(path)
    # the manifest is rounded to 1 ms
    assert abs(len(samples) / 16_000 - duration) < 0.002
    return samples


@pytest.mark.parametrize("clip", read_manifest(CLIP_FOLDERS[0]), ids=lambda clip: clip["audio"])
def test_clips_in_the_repository_load_completely(clip: dict[str, Any]) -> None:
    folder = CLIP_FOLDERS[0]
    samples = check_clip(folder / clip["audio"], clip["duration"])
    if clip["audio"].startswith("speech_"):
        # measured 0.79 for Vorbis, whose right channel differs from its left one, 0.982 for 8 kHz, 0.990 for the rest
        min_correlation = 0.78 if clip["codec"] == "vorbis" else 0.98
        assert correlation(samples, load_audio(folder / "speech.flac")) > min_correlation


@pytest.mark.skipif(
    not read_manifest(CLIP_FOLDERS[1]), reason="needs the folder smoke_clips in ../shared/data beside the repository"
)
@pytest.mark.parametrize("clip", read_manifest(CLIP_FOLDERS[1]), ids=lambda clip: clip["audio"])
def test_smoke_clips_load_completely(clip: dict[str, Any]) -> None:
    folder = CLIP_FOLDERS[1]
    samples = check_clip(folder / clip["audio"], clip["duration"])
    if clip["audio"].startswith("fmt_"):
        # measured 0.82 for Vorbis, whose right channel differs from its left one, and 0.989 or more for the rest
        min_correlation = 0.81 if "vorbis" in clip["audio"] else 0.98
        assert correlation(samples, load_audio(folder / "libri_2412-153948-0000.flac")) > min_correlation


@pytest.mark.parametrize("count", [100, 1_600, 1_700, 16_000, 17_777])
def test_ogg_vorbis_gives_exactly_the_encoded_samples(count: int, tmp_path: Path) -> None:
    """FFmpeg returns up to 248 samples too many, and at some rates too few, so libsndfile must be used."""
    samples = chirp()[:count]
    data = encoded(16_000, "OGG", samples, subtype="VORBIS")
    (tmp_path / "a.ogg").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (data, tmp_path / "a.ogg"):
            got = load_audio(source)
            assert len(got) == count
            np.testing.assert_array_equal(got, sf.read(io.BytesIO(data), dtype="float32")[0])
        # FFmpeg reads all of several concatenated streams
        assert len(load_audio(data + data)) >= 2 * count


def test_opus_shorter_than_the_delay_of_its_decoder_is_not_reported_as_damaged() -> None:
    data = encoded(48_000, "OGG", chirp(48_000)[:480], subtype="OPUS")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_audio(data)) == 160


@pytest.mark.parametrize(("container", "rate"), [("FLAC", 16_000), ("OGG", 16_000), ("MP3", 16_000)])
def test_the_number_of_decoded_samples_is_limited(container: str, rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(rate, container, np.zeros(5 * rate, np.float32))
    assert len(data) < 10_000 * (1 + (container == "MP3"))
    monkeypatch.setattr(audio_decoding, "MAX_SAMPLES", 4 * rate)
    with pytest.raises(AudioError, match=r"bytes> must contain at most 64000 samples"):
        load_audio(data)
