"""Decodes audio files to mono float32 samples, with libsndfile or FFmpeg.

Paths, URLs, arrays and resampling are in `audio.py`.
"""

import importlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]

# samples per second; no recording lies outside, and a wrong header must not cause a huge resampling job
MIN_RATE, MAX_RATE = 1_000, 1_000_000
# channels; 7.1 surround has 8
MAX_CHANNELS = 8
# samples that a file may contain (12 hours at 48 kHz, 8 GiB): a small compressed file can expand without limit
MAX_SAMPLES = 2**31
# values that libsndfile decodes per call (4 MiB); memory is never allocated by the length in a header
BLOCK_VALUES = 1 << 20
# seconds (one week); a longer duration in a header is a placeholder for an unknown length
MAX_HEADER_DURATION_S = 7 * 86_400.0
# a file is reported as truncated if less than this fraction of the duration in its header was decoded; some headers
# contain an estimate
MIN_DECODED_FRACTION = 0.9
# seconds that any file may lack: Opus headers include 6.5 ms of decoder delay and a block of up to 20 ms
MAX_MISSING_S = 0.03
# size in bytes of the fixed part of an Ogg page header, and the flag of the first page of a stream (RFC 3533)
OGG_HEADER_BYTES, OGG_FIRST_PAGE = 27, 2
# distance from zero to full scale of the integer sample formats; uint8 is centred on 128
FULL_SCALE = {"int8": 128.0, "uint8": 128.0, "int16": 32768.0, "int32": 2147483648.0}


class AudioError(ValueError):
    """Audio that cannot be read; the message contains the name of the file and the reason of each decoder."""


class _TooManySamplesError(Exception):
    """A file contains more than `MAX_SAMPLES` samples.

    This is not a ValueError, because the decoding functions treat a ValueError as a damaged file.
    """


@dataclass(frozen=True)
class _DecodedFile:
    """The samples that one decoder read from a file.

    Args:
        samples: (S,) mono.
        rate: samples per second; 0 if the decoder could not open the file.
        problem: why the file was not read completely; None if it was.
    """

    samples: FloatArray
    rate: int
    problem: str | None

    @property
    def duration_s(self) -> float:
        """Duration in seconds."""
        return len(self.samples) / self.rate if self.rate else 0.0


class _SampleBuffer:
    """Collects decoded blocks of mono samples, at most `MAX_SAMPLES` samples in total."""

    def __init__(self) -> None:
        self.blocks: list[FloatArray] = []
        self.num_samples = 0

    def append(self, block: FloatArray) -> None:
        """Add a block (S,).

        Raises:
            _TooManySamplesError: The total exceeds `MAX_SAMPLES`.
        """
        self.blocks.append(block)
        self.num_samples += len(block)
        if self.num_samples > MAX_SAMPLES:
            raise _TooManySamplesError

    def concatenate(self) -> FloatArray:
        """Return all samples (S,) in the order in which they were added."""
        return np.concatenate(self.blocks) if self.blocks else np.zeros(0, dtype=np.float32)


def decode_audio(source: str | bytes, name: str) -> tuple[FloatArray, int]:
    """Decode an audio file to mono samples at the sampling rate of the file.

    A damaged file is read as far as possible, with a warning.

    Args:
        source: path of the file, or its content.
        name: name of the file for messages.

    Returns:
        Samples (S,) and their rate in Hz.

    Raises:
        AudioError: The file is empty, no decoder can read it, it is too long, or its sampling rate is implausible.
    """
    results = _run_decoders(source, name)
    # of two results of the same duration, prefer the one without a problem
    best = max(results, key=lambda result: (result.duration_s, result.problem is None))
    problems = "; ".join(result.problem for result in results if result.problem is not None)
    if len(best.samples) == 0 and best.problem is not None:
        raise AudioError(f"{name} cannot be read as audio ({problems}): check that it is a complete audio file")
    if not MIN_RATE <= best.rate <= MAX_RATE:
        raise AudioError(
            f"the sampling rate of {name} must be in [{MIN_RATE}, {MAX_RATE}] Hz, its header states {best.rate} Hz: "
            "check that the file is not damaged"
        )
    if any(result.rate and result.problem for result in results):
        warnings.warn(f"{name} is damaged, {best.duration_s:.2f} s of it were read ({problems})", stacklevel=5)
    return best.samples, best.rate


def _run_decoders(source: str | bytes, name: str) -> list[_DecodedFile]:
    """Decode a file with the first decoder, and with the second one only if the first one was not successful.

    Args:
        source: path of the file, or its content.
        name: name of the file for messages.

    Returns:
        One or two results.

    Raises:
        AudioError: The file is empty or too long.
    """
    with _open_binary(source) as file:
        first_bytes = file.read(4)
    if not first_bytes:
        raise AudioError(f"{name} is empty (0 bytes): pass a file that contains audio")
    results: list[_DecodedFile] = []
    for decoder in _order_decoders(source, first_bytes):
        try:
            result = decoder(source)
        except _TooManySamplesError as error:
            raise AudioError(f"{name} must contain at most {MAX_SAMPLES} samples, got more: split it") from error
        results.append(result)
        # an interrupted recording can have a WAV header that states 0 samples, so no samples count as a failure
        if result.problem is None and len(result.samples):
            break
    return results


def _order_decoders(source: str | bytes, first_bytes: bytes) -> list[Callable[[str | bytes], _DecodedFile]]:
    """Choose the decoder to try first from the first bytes of a file.

    FFmpeg comes first for MP3, AAC and Ogg, except for a single Vorbis stream. libsndfile 1.2.2 stops without an error
    after the first of several concatenated MP3 or Ogg streams, and truncates an MP3 without a Xing header because it
    estimates the length. For Vorbis, libsndfile returns exactly the encoded samples, while FFmpeg returns a few more or
    fewer at the end.

    Args:
        source: path of the file, or its content.
        first_bytes: the first four bytes.

    Returns:
        Both decoding functions, in the order in which they are to be tried.
    """
    # MP3 and AAC frames start with 11 bits that are set
    has_frame_sync = len(first_bytes) > 1 and first_bytes[0] == 0xFF and first_bytes[1] & 0xE0 == 0xE0
    is_tagged_or_ogg = first_bytes.startswith((b"ID3", b"OggS"))
    if has_frame_sync or (is_tagged_or_ogg and not _is_single_vorbis_stream(source)):
        return [_decode_with_ffmpeg, _decode_with_libsndfile]
    return [_decode_with_libsndfile, _decode_with_ffmpeg]


def _is_single_vorbis_stream(source: str | bytes) -> bool:
    """Return whether a file consists of complete Ogg pages of one Vorbis stream (RFC 3533, section 6).

    Args:
        source: path of the file, or its content.
    """
    is_first_page = True
    with _open_binary(source) as file:
        while header := file.read(OGG_HEADER_BYTES):
            if len(header) < OGG_HEADER_BYTES or not header.startswith(b"OggS"):
                return False
            # the last byte of the header is the number of segments; their sizes, one byte each, follow
            page_size = sum(file.read(header[-1]))
            page = file.read(page_size)
            starts_stream = bool(header[5] & OGG_FIRST_PAGE)
            if len(page) < page_size or starts_stream != is_first_page:
                return False
            if is_first_page and not page.startswith(b"\x01vorbis"):
                return False
            is_first_page = False
    return True


def _open_binary(source: str | bytes) -> BinaryIO:
    """Open a path, or the content of a file, for reading bytes."""
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _decode_with_libsndfile(source: str | bytes) -> _DecodedFile:
    """Decode a file with libsndfile.

    Args:
        source: path of the file, or its content.

    Returns:
        The samples that could be read, their rate, and why reading stopped early if it did.

    Raises:
        _TooManySamplesError: The file contains more than `MAX_SAMPLES` samples.
    """
    soundfile = import_package("soundfile")
    buffer = _SampleBuffer()
    rate, problem = 0, None
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            if file.frames > MAX_HEADER_DURATION_S * file.samplerate:
                # libsndfile cannot read a FLAC stream that states no length, such as one written to a pipe
                return _DecodedFile(buffer.concatenate(), 0, "libsndfile: the header states no length")
            rate = int(file.samplerate)
            block_length = max(1, BLOCK_VALUES // file.channels)
            while len(block := file.read(block_length, dtype="float32", always_2d=True)):
                buffer.append(average_channels(block, axis=1))
            problem = _describe_missing_audio(buffer.num_samples / rate, file.frames / rate)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        # soundfile's own errors are RuntimeErrors; for a name that ends in .raw it raises a TypeError
        problem = str(getattr(error, "error_string", error))
    return _DecodedFile(buffer.concatenate(), rate, problem and f"libsndfile: {problem}")


def _decode_with_ffmpeg(source: str | bytes) -> _DecodedFile:
    """Decode the first audio track of a file with FFmpeg, through PyAV.

    Args:
        source: path of the file, or its content.

    Returns:
        The samples that could be read, their rate, and why reading stopped early if it did.

    Raises:
        _TooManySamplesError: The file contains more than `MAX_SAMPLES` samples.
    """
    av = import_package("av")
    buffer = _SampleBuffer()
    rate, problem = 0, None
    # a playlist (HLS, ffconcat) could make FFmpeg open other files and URLs; an empty whitelist prevents that
    options = {"protocol_whitelist": "none"}
    try:
        with _open_binary(source) as file, av.open(file, metadata_errors="ignore", options=options) as container:
            rate, problem = _decode_track(av, container, buffer)
    except (av.error.FFmpegError, RuntimeError, ValueError, OSError) as error:
        problem = str(getattr(error, "strerror", None) or error)
    return _DecodedFile(buffer.concatenate(), rate, problem and f"FFmpeg: {problem}")


def _decode_track(av: ModuleType, container: Any, buffer: _SampleBuffer) -> tuple[int, str | None]:
    """Decode the first audio track of an opened file and append its mono blocks to `buffer`.

    Args:
        av: the module PyAV.
        container: the file, opened by `av.open`.
        buffer: receives the samples.

    Returns:
        The sampling rate in Hz (0 if there is no track that can be decoded), and a description of the problem, or None.
    """
    if not container.streams.audio:
        return 0, "the file has no audio track"
    track = container.streams.audio[0]
    if track.codec_context is None:
        return 0, "the codec of the audio track is not supported"
    rate, problem = _decode_packets(av, container, track, buffer)
    header_duration_s = float(track.duration * track.time_base) if track.duration and track.time_base else 0.0
    decoded_duration_s = buffer.num_samples / max(1, rate)
    return rate, problem or _describe_missing_audio(decoded_duration_s, header_duration_s)


def _decode_packets(av: ModuleType, container: Any, track: Any, buffer: _SampleBuffer) -> tuple[int, str | None]:
    """Decode the packets of an audio track and append their mono blocks to `buffer`; skip damaged packets.

    Args:
        av: the module PyAV.
        container: the file, opened by `av.open`.
        track: the audio track of `container`.
        buffer: receives the samples; empty at the start.

    Returns:
        The sampling rate in Hz, and a description of the problem, or None.
    """
    rate, num_damaged = int(track.rate or 0), 0
    try:
        for packet in container.demux(track):
            try:
                audio_frames = packet.decode()
            except av.error.InvalidDataError:
                # the packets after a damaged one can usually be decoded
                num_damaged += 1
                continue
            for audio_frame in audio_frames:
                if not buffer.num_samples:
                    # an AAC header can state half of the actual rate, so the first decoded frame decides
                    rate = int(audio_frame.sample_rate)
                if audio_frame.sample_rate != rate:
                    return rate, f"the sampling rate changes to {audio_frame.sample_rate} Hz within the file"
                buffer.append(_frame_to_mono(av, audio_frame))
    except (av.error.FFmpegError, ValueError) as error:
        return rate, str(getattr(error, "strerror", None) or error)
    return rate, f"{num_damaged} damaged packets were skipped" if num_damaged else None


def _frame_to_mono(av: ModuleType, audio_frame: Any) -> FloatArray:
    """Convert a decoded frame of PyAV to mono samples (S,).

    Args:
        av: the module PyAV.
        audio_frame: an `av.AudioFrame` of any sample format and channel layout.

    Raises:
        ValueError: The frame has more than `MAX_CHANNELS` channels.
    """
    num_channels = audio_frame.layout.nb_channels
    if num_channels > MAX_CHANNELS:
        raise ValueError(f"the audio must have at most {MAX_CHANNELS} channels, got {num_channels}")
    if num_channels == MAX_CHANNELS and audio_frame.format.is_planar:
        # PyAV 18.1 reads beyond the end of a planar frame with eight channels, so convert it to interleaved samples
        resampler = av.AudioResampler(format="flt", layout=audio_frame.layout, rate=audio_frame.sample_rate)
        (audio_frame,) = resampler.resample(audio_frame)
    values = to_float32(audio_frame.to_ndarray())
    if not audio_frame.format.is_planar:
        # interleaved (1, S * C) -> (C, S)
        values = values.reshape(-1, num_channels).T
    return average_channels(values, axis=0)


def _describe_missing_audio(decoded_duration_s: float, header_duration_s: float) -> str | None:
    """Describe how much shorter the decoded audio is than its header states; return None if it is complete.

    Args:
        decoded_duration_s: seconds that were decoded.
        header_duration_s: seconds according to the header; 0 if unknown.
    """
    min_duration_s = min(MIN_DECODED_FRACTION * header_duration_s, header_duration_s - MAX_MISSING_S)
    if decoded_duration_s >= min_duration_s:
        return None
    return f"only {decoded_duration_s:.2f} s of the {header_duration_s:.2f} s stated in the header"


def to_float32(array: npt.NDArray[Any]) -> FloatArray:
    """Convert samples to float32; scale integer formats to [-1, 1), keep the values of floating-point formats.

    Args:
        array: samples of any shape.

    Returns:
        Samples of the same shape.

    Raises:
        TypeError: The samples have another type.
    """
    if array.dtype.kind == "f":
        # a value that exceeds float32 becomes infinite, and `audio.load_audio` refuses infinite samples
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)
    if array.dtype.name not in FULL_SCALE:
        raise TypeError(
            f"samples must be floats, int8, uint8, int16 or int32, got {array.dtype}: convert them to floats in [-1, 1)"
        )
    full_scale = FULL_SCALE[array.dtype.name]
    zero_level = full_scale if array.dtype.kind == "u" else 0.0
    # exact, because every full scale is a power of two
    return (array.astype(np.float32) - np.float32(zero_level)) / np.float32(full_scale)


def average_channels(samples: FloatArray, axis: int) -> FloatArray:
    """Average the channels of (C, S) samples (axis 0) or (S, C) samples (axis 1) into mono samples (S,)."""
    # infinite samples give NaN here; `audio.load_audio` refuses both
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(samples.mean(axis=axis, dtype=np.float32), dtype=np.float32)


def import_package(name: str) -> ModuleType:
    """Import a package on first use.

    Args:
        name: of the package, in Python and in the package index.

    Raises:
        ImportError: The package or its shared library is missing; the message contains the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        # soundfile raises OSError if libsndfile is missing
        raise ImportError(f"{name} is needed to read this audio ({error}): pip install {name}") from error
