"""Knows how to turn a file, URL, bytes or array into mono float32 samples at one sampling rate.

It leaves features, padding and batching to the feature extractor, and cutting of long audio to `longform`.
"""

import http.client
import importlib
import io
import os
import sys
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]

# samples per second that the published Parakeet checkpoints were trained on
TARGET_RATE = 16_000
# samples per second; nothing that records speech lies outside, and a false header must not become a huge resampling job
MIN_RATE, MAX_RATE = 1_000, 1_000_000
# an array axis up to this length can hold channels (7.1 surround has 8)
MAX_CHANNELS = 8
# bytes that a URL, a file object or a pipe may deliver (3 hours of 16-bit stereo at 48 kHz are 1.9 GiB)
MAX_STREAM_BYTES = 2 * 1024**3
# seconds without an answer after which a download is given up
URL_TIMEOUT_S = 30.0
# values that libsndfile decodes per call (4 MiB); the length in a header is never used to allocate memory
BLOCK_VALUES = 1 << 20
# bytes of an Ogg page before its list of segments, and the flag of the first page of a stream
OGG_HEADER_BYTES, OGG_BEGINS = 27, 2
# bytes per read of a stream
READ_BYTES = 1 << 20
# share of the length stated in the header below which a decoded file counts as cut; some statements are estimates
CUT_SHARE = 0.9
# seconds that a short file may lack of its statement: Opus counts 6.5 ms of its decoder's delay, and a block of 20 ms
CUT_LEAST_S = 0.03
# samples that a file may hold (12 hours at 48 kHz, 8 GiB): a small file of silence can hold any number
MAX_SAMPLES = 2**31
# seconds (one week); a longer statement is a placeholder for a length that the writer of the file did not know
MAX_STATED_S = 7 * 86_400.0
# distance from zero to full scale of the integer sample formats; uint8 is centred on 128
FULL_SCALE = {"int8": 128.0, "uint8": 128.0, "int16": 32768.0, "int32": 2147483648.0}


class AudioError(ValueError):
    """Encoded audio that cannot be read; the message names the source and what each decoder said."""


class _TooLongError(Exception):
    """A file that holds more than `MAX_SAMPLES`; no `ValueError`, which decoders report as damage."""


@dataclass(frozen=True)
class _Decoded:
    """What one decoder made of a file: mono samples (S,), their rate in Hz (0: not opened), what went wrong."""

    samples: FloatArray
    rate: int
    problem: str | None

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate if self.rate else 0.0


class _Blocks:
    """Mono blocks (S,) of a file, together at most `MAX_SAMPLES` samples."""

    def __init__(self) -> None:
        self.blocks: list[FloatArray] = []
        self.samples = 0

    def append(self, block: FloatArray) -> None:
        """Add a block.

        Raises:
            _TooLongError: it exceeds the limit.
        """
        self.blocks.append(block)
        self.samples += len(block)
        if self.samples > MAX_SAMPLES:
            raise _TooLongError

    def joined(self) -> FloatArray:
        """Return all samples (S,)."""
        return np.concatenate(self.blocks) if self.blocks else np.zeros(0, dtype=np.float32)


def load_audio(source: Any, sampling_rate: int | None = None, *, target_rate: int = TARGET_RATE) -> FloatArray:
    """Load audio from nearly anything as mono float32 samples at `target_rate`.

    WAV, FLAC, AIFF, AU and the like are read by libsndfile, everything else (MP3, Ogg, M4A, MP4, WebM) by FFmpeg; each
    reads what the other cannot. Channels are averaged. Integer samples are scaled to [-1, 1); floating-point samples
    are taken as they are.

    Args:
        source: One of
            - a path, or an http(s) URL, of an audio file or of a video with an audio track;
            - an encoded file as bytes, bytearray, memoryview or binary file object (read from its position on);
            - a NumPy array or torch tensor (S,), (S, C) or (C, S) of int8, uint8, int16, int32 or floats. In two
              dimensions an axis of length 1 is dropped; else the shorter axis holds the channels if it has at most
              8 entries and the longer one has more than 8. Any other shape is refused;
            - a list or tuple of numbers, or of such channels;
            - a dict with "array" or "raw" and usually "sampling_rate", or with "bytes" or "path" (`datasets`);
            - a torchcodec `AudioDecoder`.
        sampling_rate: Rate in Hz of an array that does not carry its own rate; `target_rate` if None. Files, decoders
            and dicts with "sampling_rate" state theirs, which is then used.
        target_rate: Rate in Hz of the result.

    Returns:
        Samples (S,), float32. They may share memory with `source` when nothing had to be converted.

    Raises:
        FileNotFoundError: The path does not exist.
        AudioError: The file or URL cannot be read as audio (a ValueError).
        ValueError: A rate, shape or dict is not as described above, or a sample is NaN or infinite.
        TypeError: The type of the source, or of its samples, is not one of the above.
        ImportError: soundfile, av or soxr is needed and not installed.
    """
    target_rate = _checked_rate(target_rate, "target_rate")
    default_rate = target_rate if sampling_rate is None else _checked_rate(sampling_rate, "sampling_rate")
    samples, rate, name = _read(source, default_rate)
    _check_finite(samples, name)
    return _resample(samples, rate, target_rate)


def _read(source: Any, default_rate: int) -> tuple[FloatArray, int, str]:
    """Read any source into mono samples (S,), their rate in Hz and a name for messages."""
    if isinstance(source, (str, os.PathLike)):
        return _read_path_or_url(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return _decode(data, f"<{len(data)} bytes>")
    if isinstance(source, Mapping):
        return _read_mapping(source, default_rate)
    if hasattr(source, "get_all_samples"):
        decoded = source.get_all_samples()
        rate = _checked_rate(decoded.sample_rate, "the decoder's sample_rate")
        # torchcodec says (C, S), so the axis need not be guessed
        return _mean_of_channels(_to_float32(_to_numpy(decoded.data)), axis=0), rate, "the decoder"
    if hasattr(source, "read"):
        name = str(getattr(source, "name", "<file object>"))
        return _decode(_read_stream(source, name), name)
    return _mono(_to_array(source)), default_rate, "the array"


def _read_mapping(source: Mapping[str, Any], default_rate: int) -> tuple[FloatArray, int, str]:
    """Read a dict as `datasets` and the transformers pipeline write it."""
    for key in ("array", "raw"):
        if source.get(key) is not None:
            rate = source.get("sampling_rate")
            rate = default_rate if rate is None else _checked_rate(rate, 'the dict\'s "sampling_rate"')
            return _mono(_to_array(source[key])), rate, f'the dict\'s "{key}"'
    if source.get("bytes") is not None:
        data = bytes(source["bytes"])
        return _decode(data, str(source.get("path") or f"<{len(data)} bytes>"))
    if source.get("path") is not None:
        return _read_path_or_url(os.fspath(source["path"]))
    raise ValueError(
        'an audio dict must hold one of "array", "raw", "bytes" and "path" that is not None, '
        f"got the keys {sorted(map(str, source))}"
    )


def _read_path_or_url(path: str | bytes) -> tuple[FloatArray, int, str]:
    path = os.fsdecode(path)
    if path.lower().startswith(("http://", "https://")):
        return _decode(_download(path), path)
    if os.path.isdir(path):
        raise AudioError(f"an audio source must be a file, got the directory {path!r}; pass one of the files in it")
    if os.path.isfile(path):
        return _decode(path, path)
    # pipes such as /dev/stdin cannot be rewound for a second decoder; a missing file raises FileNotFoundError here
    with open(path, "rb") as stream:
        return _decode(_read_stream(stream, path), path)


def _download(url: str) -> bytes:
    """Fetch an http(s) URL into memory, within `URL_TIMEOUT_S` per answer and `MAX_STREAM_BYTES`."""
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    try:
        request = urllib.request.Request(quoted, headers={"User-Agent": "transformers-parakeet"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_S) as response:
            stated = response.headers.get("Content-Length")
            data = _read_stream(response, url)
    except AudioError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise AudioError(f"could not download {url!r}: {error}") from error
    # http.client does not complain when a connection closes early
    if stated is not None and stated.isdigit() and int(stated) != len(data):
        raise AudioError(f"could not download {url!r}: got {len(data)} of {stated} bytes; try again")
    return data


def _read_stream(stream: Any, name: str) -> bytes:
    """Read a binary stream to its end, within `MAX_STREAM_BYTES`."""
    data = bytearray()
    while chunk := stream.read(READ_BYTES):
        if not isinstance(chunk, (bytes, bytearray, memoryview)):
            raise TypeError(f'a file object must be binary, {name} gave {type(chunk).__name__}; open it with mode "rb"')
        data += chunk
        if len(data) > MAX_STREAM_BYTES:
            raise AudioError(f"{name} delivers more than {MAX_STREAM_BYTES} bytes; save it as a file and pass the path")
    return bytes(data)


def _decode(source: str | bytes, name: str) -> tuple[FloatArray, int, str]:
    """Decode a path or an encoded file; a second decoder is asked only where the first one has trouble.

    Returns:
        Mono samples (S,), their rate in Hz, and `name`.

    Raises:
        AudioError: No decoder gets a single sample from it.
    """
    head = _head(source)
    if not head:
        raise AudioError(f"{name} is empty (0 bytes)")
    results: list[_Decoded] = []
    for decoder in _decoders_for(source, head):
        try:
            results.append(decoder(source))
        except _TooLongError as error:
            raise AudioError(f"{name} must hold at most {MAX_SAMPLES} samples, and holds more: cut it up") from error
        # a recorder that was cut off leaves a WAV header that says 0 samples: a second opinion costs nothing there
        if results[-1].problem is None and len(results[-1].samples):
            break
    # at equal length, a decoder that finds the file sound (if empty) is believed
    best = max(results, key=lambda result: (result.seconds, result.problem is None))
    problems = "; ".join(result.problem for result in results if result.problem is not None)
    if len(best.samples) == 0 and best.problem is not None:
        raise AudioError(f"{name} cannot be read as audio ({problems}); check that it is an audio file and complete")
    if not MIN_RATE <= best.rate <= MAX_RATE:
        raise AudioError(f"{name} states a rate of {best.rate} Hz, it must lie in [{MIN_RATE}, {MAX_RATE}] Hz")
    if any(result.rate and result.problem for result in results):
        warnings.warn(f"{name} is damaged, {best.seconds:.2f} s of it were read ({problems})", stacklevel=5)
    return best.samples, best.rate, name


def _head(source: str | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:4]
    with open(source, "rb") as file:
        return file.read(4)


def _decoders_for(source: str | bytes, head: bytes) -> list[Callable[[str | bytes], _Decoded]]:
    """Order the decoders by the start of a file: FFmpeg first for MP3, AAC and most Ogg, else libsndfile first.

    libsndfile 1.2.2 ends without an error after the first of several joined MP3 or Ogg streams, and estimates (and so
    cuts) the length of an MP3 without a Xing header; FFmpeg reads both to the end. Of Vorbis, libsndfile gives exactly
    the samples that were encoded, FFmpeg some fewer or more at the end.
    """
    frame_sync = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    if frame_sync or (head.startswith((b"ID3", b"OggS")) and not _is_one_vorbis_stream(source)):
        return [_decode_with_ffmpeg, _decode_with_libsndfile]
    return [_decode_with_libsndfile, _decode_with_ffmpeg]


def _is_one_vorbis_stream(source: str | bytes) -> bool:
    """Tell whether a file consists of whole Ogg pages of a single Vorbis stream (RFC 3533, section 6)."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        is_first = True
        while header := file.read(OGG_HEADER_BYTES):
            if len(header) < OGG_HEADER_BYTES or not header.startswith(b"OggS"):
                return False
            # the sizes of the segments, whose number is the last byte of the header
            size = sum(file.read(header[-1]))
            content = file.read(size)
            begins = bool(header[5] & OGG_BEGINS)
            if len(content) < size or begins != is_first or (is_first and not content.startswith(b"\x01vorbis")):
                return False
            is_first = False
    return True


def _decode_with_libsndfile(source: str | bytes) -> _Decoded:
    soundfile = _require("soundfile")
    blocks = _Blocks()
    rate, problem = 0, None
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            if file.frames > MAX_STATED_S * file.samplerate:
                # libsndfile cannot read a FLAC that was written to a pipe
                return _Decoded(_Blocks().joined(), 0, "libsndfile: no length is stated")
            rate = int(file.samplerate)
            frames = max(1, BLOCK_VALUES // file.channels)
            while len(block := file.read(frames, dtype="float32", always_2d=True)):
                blocks.append(_mean_of_channels(block, axis=1))
            problem = _cut(blocks.samples / rate, file.frames / rate)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        # soundfile's own errors are RuntimeErrors; a name that ends in .raw makes it ask for a format with a TypeError
        problem = str(getattr(error, "error_string", error))
    return _Decoded(blocks.joined(), rate, problem and f"libsndfile: {problem}")


def _decode_with_ffmpeg(source: str | bytes) -> _Decoded:
    av = _require("av")
    blocks = _Blocks()
    rate, problem = 0, None
    try:
        with (
            io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file,
            # a playlist (HLS, ffconcat) could make FFmpeg open other files and addresses: allow it no protocol at all
            av.open(file, metadata_errors="ignore", options={"protocol_whitelist": "none"}) as container,
        ):
            if not container.streams.audio:
                return _Decoded(_Blocks().joined(), 0, "FFmpeg: it has no audio track")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                return _Decoded(_Blocks().joined(), 0, "FFmpeg: it has no decoder for the audio track")
            rate, problem = _ffmpeg_blocks(av, container, stream, blocks)
            stated_s = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
            problem = problem or _cut(blocks.samples / max(1, rate), stated_s)
    except (av.error.FFmpegError, RuntimeError, ValueError, OSError) as error:
        problem = str(getattr(error, "strerror", None) or error)
    return _Decoded(blocks.joined(), rate, problem and f"FFmpeg: {problem}")


def _ffmpeg_blocks(av: ModuleType, container: Any, stream: Any, blocks: _Blocks) -> tuple[int, str | None]:
    """Append the mono blocks (S,) of an audio stream to `blocks`; return its rate in Hz and what went wrong."""
    rate, bad_packets = int(stream.rate or 0), 0
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                # the packets after a damaged one are usually sound
                bad_packets += 1
                continue
            for frame in frames:
                # the header of AAC may state half the rate that its decoder finds
                rate = rate if blocks.samples else int(frame.sample_rate)
                if frame.sample_rate != rate:
                    return rate, f"the rate changes to {frame.sample_rate} Hz midway"
                blocks.append(_ffmpeg_block(av, frame))
    except (av.error.FFmpegError, ValueError) as error:
        return rate, str(getattr(error, "strerror", None) or error)
    return rate, f"{bad_packets} damaged packets left out" if bad_packets else None


def _ffmpeg_block(av: ModuleType, frame: Any) -> FloatArray:
    channels = frame.layout.nb_channels
    if channels > MAX_CHANNELS:
        raise ValueError(f"{channels} channels, at most {MAX_CHANNELS} can be read")
    if channels == MAX_CHANNELS and frame.format.is_planar:
        # PyAV 18.1 counts planes up to a null pointer, and FFmpeg puts none after eight: it would read wild memory
        (frame,) = av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate).resample(frame)
    # planar formats come as (C, S), packed ones as (1, S * C)
    values = _to_float32(frame.to_ndarray())
    return _mean_of_channels(values if frame.format.is_planar else values.reshape(-1, channels).T, axis=0)


def _cut(decoded_s: float, stated_s: float) -> str | None:
    """Say that less was decoded than the header states, None if not."""
    is_cut = decoded_s < min(CUT_SHARE * stated_s, stated_s - CUT_LEAST_S)
    return f"only {decoded_s:.2f} s of the stated {stated_s:.2f} s" if is_cut else None


def _to_array(source: Any) -> npt.NDArray[Any]:
    """Bring an array, tensor, or (nested) list of numbers to a NumPy array of the same values."""
    if hasattr(source, "__array__"):
        return _to_numpy(source)
    if not isinstance(source, Sequence):
        raise TypeError(
            "audio must be a path, URL, bytes, binary file, array, tensor, list of numbers, dict or torchcodec "
            f"decoder, got {type(source).__name__}"
        )
    items = [_to_numpy(item) if hasattr(item, "__array__") else item for item in source]
    try:
        array = np.asarray(items)
    except ValueError as error:
        raise ValueError(f"the channels in a list must have the same length ({error})") from error
    # numbers written in a list, such as [0, 0, 1], mean amplitudes; only arrays have an integer sample format
    typed = bool(items) and isinstance(items[0], (np.ndarray, np.generic))
    return array if typed or array.dtype.kind not in "iu" else array.astype(np.float64)


def _to_numpy(array: Any) -> npt.NDArray[Any]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        # NumPy has no bfloat16
        return np.asarray((array.float() if array.dtype == torch.bfloat16 else array).numpy())
    return np.asarray(array)


def _to_float32(array: npt.NDArray[Any]) -> FloatArray:
    """Convert samples of any shape to float32; scale integer formats to [-1, 1)."""
    if array.dtype.kind == "f":
        # a value beyond float32 becomes infinite, which the caller reports
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)
    if array.dtype.name not in FULL_SCALE:
        raise TypeError(
            f"samples must be floats, int8, uint8, int16 or int32, got {array.dtype}; convert them to floats in [-1, 1)"
        )
    scale = FULL_SCALE[array.dtype.name]
    offset = scale if array.dtype.kind == "u" else 0.0
    # exact, as every scale is a power of two
    return (array.astype(np.float32) - np.float32(offset)) / np.float32(scale)


def _mono(array: npt.NDArray[Any]) -> FloatArray:
    """Average the channels of (S,), (S, C) or (C, S) samples into (S,)."""
    if array.size == 0:
        return np.zeros(0, dtype=np.float32)
    samples = _to_float32(array)
    if samples.ndim == 1:
        return np.ascontiguousarray(samples)
    if samples.ndim != 2:
        raise ValueError(
            f"audio must have the shape (S,), (S, C) or (C, S), got {array.shape}; pass one clip at a time"
        )
    short, long = sorted(array.shape)
    if short == 1:
        return np.ascontiguousarray(samples.reshape(-1))
    if short > MAX_CHANNELS or long <= MAX_CHANNELS:
        raise ValueError(
            f"two-dimensional audio must have one axis of at most {MAX_CHANNELS} channels and one of more samples "
            f"than that, got {array.shape}; average the channels first, or pass one clip at a time"
        )
    return _mean_of_channels(samples, axis=int(array.shape[1] == short))


def _mean_of_channels(samples: FloatArray, axis: int) -> FloatArray:
    # (C, S) for axis 0, (S, C) for axis 1 -> (S,); a sum of infinities is reported by `_check_finite`
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(samples.mean(axis=axis, dtype=np.float32), dtype=np.float32)


def _check_finite(samples: FloatArray, name: str) -> None:
    finite = np.isfinite(samples)
    if not finite.all():
        first = int(np.argmin(finite))
        raise ValueError(
            f"samples must be finite, but {int((~finite).sum())} of {len(samples)} in {name} are NaN or infinite, "
            f"the first at position {first} ({samples[first]}); repair the audio, or replace them with np.nan_to_num"
        )


def _resample(samples: FloatArray, rate: int, target_rate: int) -> FloatArray:
    """Resample (S,) to (round(S * target_rate / rate),) with soxr at its high quality."""
    if rate == target_rate or len(samples) == 0:
        return samples
    return np.asarray(_require("soxr").resample(samples, rate, target_rate, quality="HQ"), dtype=np.float32)


def _checked_rate(rate: Any, name: str) -> int:
    whole = isinstance(rate, (int, np.integer)) and not isinstance(rate, bool)
    if not whole or not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"{name} must be a whole number of Hz in [{MIN_RATE}, {MAX_RATE}], got {rate!r}")
    return int(rate)


def _require(package: str) -> ModuleType:
    """Import a package when it is needed; soundfile raises OSError where its shared library is missing."""
    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:
        raise ImportError(f"{package} is needed to read this audio ({error}): pip install {package}") from error
