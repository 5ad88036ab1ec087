"""Tests of decoding audio files: formats, damaged and malicious files, and exact lengths."""

import contextlib
import gc
import io
import itertools
import json
import os
import tempfile
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile as sf
from audio_files import SECONDS, chirp, correlation, encoded, stereo, write_with_ffmpeg

from transformers_parakeet import audio_decoding
from transformers_parakeet.audio import AudioError, AudioSource, load_audio

TESTS = Path(__file__).resolve().parent


# clips in the repository, and a larger collection that only some machines have beside the repository
CLIP_FOLDERS = (TESTS / "data" / "clips", TESTS.parents[1] / "shared" / "data" / "smoke_clips")


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


def test_the_format_is_detected_from_the_content_not_the_name(tmp_path: Path) -> None:
    for name in ("wav.raw", "wav.mp3", "wav"):
        (tmp_path / name).write_bytes(encoded())
        np.testing.assert_allclose(load_audio(tmp_path / name), chirp(), atol=2 / 32768)


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
    with pytest.warns(UserWarning, match=r"damaged: only 9\.\d+ s were read \(libsndfile: .*lost sync"):
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
    with pytest.raises(AudioError, match="got 1 Hz in the header"):
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
    with pytest.raises(AudioError, match=r"bytes> must have at most 64000 samples"):
        load_audio(data)


def read_blocks(source: Any) -> np.ndarray:
    """Read a source in blocks of 0.3 s from the temporary file."""
    return np.concatenate(list(AudioSource(source, in_memory_s=0.0).blocks(0.3)))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3", "OGG"])
def test_blocks_of_damaged_files_equal_load_audio(container: str, cut: bool) -> None:
    data = bytearray(encoded(44_100, container, np.tile(chirp(44_100), 5)))
    middle = len(data) // 2
    if cut:
        del data[middle:]
    else:
        data[middle : middle + 500] = bytes(500)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = load_audio(bytes(data))
        num_warnings = len(caught)
        np.testing.assert_array_equal(read_blocks(bytes(data)), expected)
    # each source warns once
    assert len(caught) == 2 * num_warnings
    assert {Path(warning.filename).name for warning in caught} <= {"test_audio_decoding.py"}


def test_flac_with_a_damaged_middle_continues_with_the_other_decoder() -> None:
    """libsndfile stops in the middle and FFmpeg skips the damage; all blocks must come from FFmpeg."""
    data = bytearray(encoded(16_000, "FLAC", np.tile(chirp(), 5)))
    data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
    pieces = []
    with av.open(io.BytesIO(bytes(data))) as container:
        for packet in container.demux(audio=0):
            with contextlib.suppress(av.error.InvalidDataError):
                pieces += [frame.to_ndarray().reshape(-1) for frame in packet.decode()]
    expected = np.concatenate(pieces) / np.float32(32768)
    with pytest.warns(UserWarning, match="lost sync"):
        got = read_blocks(bytes(data))
    assert 9.5 * 16_000 < len(expected) < 10 * 16_000
    np.testing.assert_array_equal(got, expected)


def scripted_decoder(values: list[float], rate: int, problem: str | None) -> Callable[..., Iterator[np.ndarray]]:
    """Make a decoder that yields blocks of 1000 samples with planted values and then stops with a problem."""

    def decode(source: object, state: Any) -> Iterator[np.ndarray]:
        """Yield the planted blocks."""
        state.rate = rate
        for value in values:
            state.num_samples += 1000
            yield np.full(1000, value, dtype=np.float32)
        state.problem = problem

    return decode


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # the first decoder fails: the longer result is used, from its first sample
        (([1, 2], 16_000, "broken"), ([5, 6, 7], 16_000, None), [5, 6, 7]),
        (([1, 2], 16_000, "broken"), ([5], 16_000, None), [1, 2]),
        (([1, 2], 16_000, "broken"), ([5, 6], 16_000, None), [5, 6]),
        (([1, 2], 16_000, "broken"), ([5, 6], 16_000, "broken"), [1, 2]),
        # longer in seconds, not in samples
        (([1, 2], 16_000, "broken"), ([5, 6, 7], 48_000, None), [1, 2]),
        # the second decoder is used only if the first one fails or returns nothing
        (([1], 16_000, None), ([5, 6], 16_000, None), [1]),
        (([], 16_000, None), ([5, 6], 16_000, None), [5, 6]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_decoder_that_fails_never_doubles_or_loses_samples(
    first: Any, second: Any, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders = [scripted_decoder(*first), scripted_decoder(*second)]
    monkeypatch.setattr(audio_decoding, "_order_decoders", lambda *_: decoders)
    for got in (load_audio(b"file"), read_blocks(b"file")):
        np.testing.assert_array_equal(got, np.repeat(np.float32(expected), 1000))


@pytest.mark.parametrize("in_memory_s", [0.0, 60.0])
def test_a_file_is_decoded_once(in_memory_s: float, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(44_100))
    expected = load_audio(path)
    source = AudioSource(path, in_memory_s=in_memory_s)
    path.unlink()
    np.testing.assert_array_equal(source.load(), expected)
    # three iterations at the same time, one of which starts later, with blocks of different lengths
    iterations = [source.blocks(0.3), source.blocks(0.01)]
    blocks = [[next(iterations[0])], [next(iterations[1])], []]
    iterations.append(source.blocks(0.07))
    for group in itertools.zip_longest(*iterations):
        for number, block in enumerate(group):
            blocks[number] += [] if block is None else [block]
    for iteration in blocks:
        np.testing.assert_array_equal(np.concatenate(iteration), expected)


def test_threads_can_read_the_same_source() -> None:
    source = AudioSource(encoded(16_000, "FLAC", np.arange(32_000, dtype=np.int16)), in_memory_s=0.0)
    expected = np.arange(32_000, dtype=np.float32) / 32768
    with ThreadPoolExecutor(4) as pool:
        for blocks in pool.map(lambda length: list(source.blocks(length / 16_000)), [50, 60, 70, 80]):
            np.testing.assert_array_equal(np.concatenate(blocks), expected)


@pytest.mark.parametrize(("in_memory_s", "is_in_memory"), [(0.0, False), (1.9999, False), (2.0, True)])
def test_only_short_files_stay_in_memory(
    in_memory_s: float, is_in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Any] = []
    create_file = tempfile.TemporaryFile

    def create(**options: Any) -> Any:
        """Create a temporary file and remember it."""
        files.append(create_file(**options))
        return files[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", create)
    source = AudioSource(encoded(44_100, "MP3"), in_memory_s=in_memory_s)
    assert len(files) == (0 if is_in_memory else 1)
    # the file contains exactly the samples, and is closed with the last object that reads it
    assert [os.fstat(file.fileno()).st_size for file in files] == [4 * 32_000] * len(files)
    blocks = source.blocks(0.5)
    del source
    assert len(next(blocks)) == 8_000
    assert not any(file.closed for file in files)
    assert [len(block) for block in blocks] == [8_000] * 3
    del blocks
    gc.collect()
    assert all(file.closed for file in files)


@pytest.mark.parametrize("problem", ["No space left on device", "No such file or directory"])
def test_a_temporary_file_that_cannot_be_written_is_reported(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if problem.startswith("No space"):
        full_disk = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda buffering: full_disk)
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(AudioError, match=rf"samples of a\.wav must .* \(230 MB per hour .* \(.*{problem}.* TMPDIR"):
        AudioSource({"bytes": encoded(44_100), "path": "a.wav"}, in_memory_s=1.0)
    # a file that stays in memory needs no temporary file
    assert len(load_audio(encoded(44_100))) == 32_000


def test_a_temporary_file_that_became_shorter_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Any] = []
    create_file = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: files.append(create_file(**options)) or files[-1])
    source = AudioSource({"bytes": encoded(), "path": "a.wav"}, in_memory_s=0.0)
    files[0].truncate(4 * 20_000)
    message = r"temporary file of a\.wav must have 32000 samples, got fewer: check the disk"
    with pytest.raises(AudioError, match=message):
        source.load()
    blocks = source.blocks(1.0)
    assert len(next(blocks)) == 16_000
    with pytest.raises(AudioError, match=message):
        next(blocks)


@pytest.mark.parametrize(
    ("container", "rate", "seconds", "max_bytes"), [("FLAC", 16_000, 600, 4e6), ("MP3", 48_000, 60, 2e6)]
)
def test_blocks_of_a_long_file_need_little_memory(container: str, rate: int, seconds: int, max_bytes: float) -> None:
    data = encoded(rate, container, np.zeros(seconds * rate, dtype=np.int16))
    # NumPy reports its arrays to tracemalloc
    tracemalloc.start()
    try:
        lengths = [len(block) for block in AudioSource(data, in_memory_s=1.0).blocks(2.0)]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lengths == [32_000] * (seconds // 2)
    # measured 3.3 MB (FLAC, three blocks of libsndfile) and 0.8 MB (MP3); all samples are 38 MB and 12 MB
    assert peak_bytes < max_bytes


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [5, 0, 7, 1, 1, 30], [64], [3] * 50, [200, 1]])
def test_joined_blocks_keep_every_sample(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_decoding, "PIECE_LENGTH", 10)
    samples = np.arange(sum(lengths), dtype=np.float32)
    blocks = np.split(samples, np.cumsum(lengths)[:-1]) if lengths else []
    got = list(audio_decoding._join_blocks(blocks))
    assert np.concatenate([[], *got]).tolist() == samples.tolist()
    # a joined block without its last block is shorter than 10 samples
    assert all(10 <= len(block) < 10 + max(lengths) for block in got[:-1])
