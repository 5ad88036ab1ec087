"""Loads a file, URL, bytes or array as mono float32 samples at one sampling rate, as a whole or in blocks.

Decoding of files is in `audio_decoding.py`, features and padding are in `feature_extraction_parakeet.py`.
"""

import http.client
import math
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .audio_arrays import MAX_CHANNELS, FloatArray, average_channels, to_array, to_float32, to_mono, to_numpy
from .audio_decoding import (
    MAX_RATE,
    MIN_RATE,
    PIECE_LENGTH,
    AudioError,
    AudioTooLongError,
    DamagedAudioWarning,
    StoredSamples,
    decode_audio,
)

# samples per second of the audio that the published Parakeet checkpoints were trained on
TARGET_RATE = 16_000
# maximum size of a download, file object or pipe (3 hours of 16-bit stereo at 48 kHz are 1.9 GiB)
MAX_STREAM_BYTES = 2 * 1024**3
# seconds without a response after which a download fails
URL_TIMEOUT_S = 30.0
# bytes that are read from a stream at a time
READ_CHUNK_BYTES = 1 << 20
# seconds of a block of samples
BLOCK_S = 30.0
# seconds up to which the samples of a file stay in memory (4 MB at 16 kHz)
IN_MEMORY_S = 60.0


@dataclass(frozen=True)
class _Samples:
    """Mono audio in memory, at the sampling rate of the source.

    Args:
        samples: (S,) float32 samples.
        rate: sampling rate in Hz.
        name: name of the source, used in error messages.
    """

    samples: FloatArray
    rate: int
    name: str


@dataclass(frozen=True)
class _EncodedAudio:
    """An audio file that is not yet decoded.

    Args:
        content: path of the file as a str, or content of the file as bytes.
        name: name of the source, used in error messages.
    """

    content: str | bytes
    name: str


class AudioSource:
    """Reads a file, URL, bytes, array or dict in blocks of mono float32 samples, as often as needed.

    The constructor decodes and resamples a file completely, to find damage and to choose the decoder. The samples of a
    file of up to `in_memory_s` seconds stay in memory. Those of a longer file are written to an unnamed temporary file
    (230 MB per hour at 16 kHz) in the folder that the environment variable TMPDIR names, or else in the system's folder
    for temporary files. The file is deleted together with the `AudioSource`. An array is not copied if no conversion is
    needed.

    Attributes:
        name: name of the source, used in error messages.
        sampling_rate: sampling rate in Hz of the samples that `blocks` and `load` return.
        num_samples: number of these samples.

    Args:
        source: any source that `load_audio` accepts.
        sampling_rate: sampling rate in Hz of an array; None means `target_rate`. See `load_audio`.
        target_rate: sampling rate in Hz of the result.
        in_memory_s: duration in seconds up to which the samples of a file stay in memory.
        max_duration_s: maximum duration of a file in seconds. Decoding stops as soon as the header or the decoded
            samples exceed it.

    Raises:
        AudioTooLongError: The file is longer than `max_duration_s`.
        FileNotFoundError: The path does not exist.
        AudioError: The file or URL cannot be read as audio, or the temporary file cannot be written.
        ValueError: A sampling rate, a shape or a dict is invalid, or a sample is NaN or infinite.
        TypeError: The type of the source or of the samples is not supported.
        ImportError: soundfile, av or soxr is needed, but not installed.
    """

    def __init__(
        self,
        source: Any,
        sampling_rate: int | None = None,
        *,
        target_rate: int = TARGET_RATE,
        in_memory_s: float = IN_MEMORY_S,
        max_duration_s: float = math.inf,
    ) -> None:
        self.sampling_rate = _check_rate(target_rate, "target_rate")
        default_rate = self.sampling_rate if sampling_rate is None else _check_rate(sampling_rate, "sampling_rate")
        audio = _read_source(source, default_rate)
        if isinstance(audio, _EncodedAudio):
            self._samples = decode_audio(audio.content, audio.name, self.sampling_rate, in_memory_s, max_duration_s)
        else:
            self._samples = StoredSamples(audio.name, self.sampling_rate, math.inf)
            # samples that are not resampled are stored as one piece, so that they are not copied
            piece_length = PIECE_LENGTH if audio.rate != self.sampling_rate else max(1, len(audio.samples))
            for start in range(0, len(audio.samples), piece_length):
                self._samples.add(audio.samples[start : start + piece_length], audio.rate)
            self._samples.finish()
        _check_finite(self._samples, audio.name)
        self.name = audio.name
        self.num_samples = self._samples.num_samples

    def blocks(self, block_s: float = BLOCK_S) -> Iterator[FloatArray]:
        """Read all samples in blocks of equal duration.

        Args:
            block_s: duration of a block in seconds.

        Returns:
            Blocks of (S,) float32 samples. Every block contains `round(block_s * sampling_rate)` samples, except the
            last one, which can be shorter and is not empty. Blocks must not be modified, because they can share
            memory with the source.

        Raises:
            ValueError: `block_s` is shorter than one sample.
        """
        block_length = round(block_s * self.sampling_rate)
        if block_length < 1:
            raise ValueError(f"block_s must be at least one sample (1 / {self.sampling_rate} s), got {block_s}")
        starts = range(0, self.num_samples, block_length)
        return (self._samples.read(start, start + block_length) for start in starts)

    def load(self) -> FloatArray:
        """Read all samples into memory.

        Returns:
            (S,) float32 samples. The array may share memory with the source.
        """
        return self._samples.read(0, self.num_samples)


def load_audio(source: Any, sampling_rate: int | None = None, *, target_rate: int = TARGET_RATE) -> FloatArray:
    """Load audio from a file, URL, bytes, array or dict as mono float32 samples at `target_rate`.

    libsndfile decodes WAV, FLAC, AIFF and AU; FFmpeg decodes MP3, Ogg, M4A, MP4 and WebM. If one decoder fails, the
    other decoder is tried. Channels are averaged. Integer samples are scaled to [-1, 1); floating-point samples are not
    scaled.

    Args:
        source: One of

            - a path or http(s) URL of an audio file, or of a video with an audio track;
            - the content of an audio file as bytes, bytearray, memoryview or binary file object (read from the current
              position);
            - a NumPy array or torch tensor (S,), (S, C) or (C, S) of int8, uint8, int16, int32 or floats. In two
              dimensions an axis of length 1 is removed; otherwise the shorter axis contains the channels if it has at
              most 8 entries and the longer axis has more than 8. Any other shape is an error;
            - a list or tuple of numbers, or of channels that are lists, arrays or tensors;
            - a dict with "array" or "raw" and usually "sampling_rate", or with "bytes" or "path" (`datasets`);
            - a torchcodec `AudioDecoder`.
        sampling_rate: Sampling rate in Hz of an array; None means `target_rate`. Ignored for files, decoders and dicts
            with "sampling_rate", which contain the sampling rate.
        target_rate: Sampling rate in Hz of the result.

    Returns:
        (S,) float32 samples. The array may share memory with `source` if no conversion was needed.

    Raises:
        FileNotFoundError: The path does not exist.
        AudioError: The file or URL cannot be read as audio. (`AudioError` is a subclass of ValueError.)
        ValueError: A sampling rate, a shape or a dict is invalid, or a sample is NaN or infinite.
        TypeError: The type of the source or of the samples is not supported.
        ImportError: soundfile, av or soxr is needed, but not installed.
    """
    return AudioSource(source, sampling_rate, target_rate=target_rate, in_memory_s=math.inf).load()


def iterate_audio(
    source: Any, sampling_rate: int | None = None, *, target_rate: int = TARGET_RATE, block_s: float = BLOCK_S
) -> Iterator[FloatArray]:
    """Read a file, URL, bytes, array or dict in blocks of mono float32 samples at `target_rate`.

    The blocks are together exactly the result of `load_audio`, but a long file is never in memory as a whole. To read a
    source several times, use `AudioSource`.

    Args:
        source: any source that `load_audio` accepts.
        sampling_rate: sampling rate in Hz of an array; None means `target_rate`. See `load_audio`.
        target_rate: sampling rate in Hz of the blocks.
        block_s: duration of a block in seconds. The last block can be shorter.

    Returns:
        Blocks of (S,) float32 samples.

    Raises:
        AudioError: The file or URL cannot be read as audio, or the temporary file cannot be written.
        ValueError: `block_s` is shorter than one sample, or an argument is invalid as in `load_audio`.
        FileNotFoundError, TypeError, ImportError: As in `load_audio`.
    """
    return AudioSource(source, sampling_rate, target_rate=target_rate).blocks(block_s)


def _read_source(source: Any, default_rate: int) -> _Samples | _EncodedAudio:
    """Read any source that `load_audio` accepts, without decoding files and without resampling.

    Args:
        source: a path or URL, the content of a file, a binary file object, an array, tensor or list of samples, a dict
            that contains one of these, or a torchcodec decoder.
        default_rate: sampling rate in Hz that is assumed for an array.

    Returns:
        Mono samples in memory, or an audio file that is not yet decoded.

    Raises:
        AudioError: A URL, pipe or file object cannot be read, or the path is a directory.
        ValueError: A sampling rate, a shape or a dict is invalid.
        TypeError: The type of the source or of the samples is not supported.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_path_or_url(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _EncodedAudio(bytes(source), f"<{memoryview(source).nbytes} bytes>")
    if isinstance(source, Mapping):
        return _read_mapping(source, default_rate)
    if hasattr(source, "get_all_samples"):
        return _read_torchcodec(source)
    if hasattr(source, "read"):
        name = str(getattr(source, "name", "<file object>"))
        return _EncodedAudio(_read_stream(source, name), name)
    return _Samples(to_mono(to_array(source)), default_rate, "the array")


def _read_mapping(source: Mapping[str, Any], default_rate: int) -> _Samples | _EncodedAudio:
    """Read an audio dict, as used by `datasets` and by the transformers pipeline.

    Args:
        source: dict with "array" or "raw" (samples) and optionally "sampling_rate" in Hz; or with "bytes" (the content
            of an audio file); or with "path".
        default_rate: sampling rate in Hz that is assumed for samples without "sampling_rate".

    Returns:
        Mono samples in memory, or an audio file that is not yet decoded.

    Raises:
        ValueError: None of these keys has a value, or the sampling rate is invalid.
    """
    for key in ("array", "raw"):
        if source.get(key) is not None:
            rate = source.get("sampling_rate")
            rate = default_rate if rate is None else _check_rate(rate, 'the dict\'s "sampling_rate"')
            return _Samples(to_mono(to_array(source[key])), rate, f'the dict\'s "{key}"')
    if source.get("bytes") is not None:
        encoded = bytes(source["bytes"])
        return _EncodedAudio(encoded, str(source.get("path") or f"<{len(encoded)} bytes>"))
    if source.get("path") is not None:
        return _read_path_or_url(os.fspath(source["path"]))
    raise ValueError(
        'an audio dict must have a value for one of "array", "raw", "bytes" and "path", '
        f"got the keys {sorted(map(str, source))}"
    )


def _read_torchcodec(decoder: Any) -> _Samples:
    """Read all samples of a torchcodec `AudioDecoder`."""
    decoded = decoder.get_all_samples()
    rate = _check_rate(decoded.sample_rate, "the decoder's sample_rate")
    # torchcodec always returns the shape (C, S)
    samples = average_channels(to_float32(to_numpy(decoded.data)), axis=0)
    return _Samples(samples, rate, "the decoder")


def _read_path_or_url(path: str | bytes) -> _EncodedAudio:
    """Read a pipe or an http(s) URL into memory, or check the path of a file.

    Raises:
        FileNotFoundError: The path does not exist.
        AudioError: The path is a directory, or the download fails.
    """
    path = os.fsdecode(path)
    if path.lower().startswith(("http://", "https://")):
        return _EncodedAudio(_download(path), path)
    if os.path.isdir(path):
        raise AudioError(f"an audio source must be a file, got the directory {path!r}: pass one of the files in it")
    if os.path.isfile(path):
        return _EncodedAudio(path, path)
    # a pipe such as /dev/stdin can be read only once, so it is read into memory; `open` raises if the path is missing
    with open(path, "rb") as stream:
        return _EncodedAudio(_read_stream(stream, path), path)


def _download(url: str) -> bytes:
    """Download an http(s) URL into memory.

    Raises:
        AudioError: The download fails, times out, is incomplete, or is larger than `MAX_STREAM_BYTES`.
    """
    # percent-encode spaces and non-ASCII characters; all characters with a meaning in URLs are kept
    quoted_url = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    try:
        request = urllib.request.Request(quoted_url, headers={"User-Agent": "transformers-parakeet"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_S) as response:
            content_length = response.headers.get("Content-Length")
            content = _read_stream(response, url)
    except AudioError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        # the text of a `URLError` contains its reason in angle brackets; that of an `HTTPError` also has the status
        reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        raise AudioError(f"could not download {url!r}: {reason}: check the address and the connection") from error
    # check the size, because http.client raises no error if the connection is closed early
    if content_length is not None and content_length.isdigit() and int(content_length) != len(content):
        raise AudioError(f"could not download {url!r}: got {len(content)} of {content_length} bytes, try again")
    return content


def _read_stream(stream: Any, name: str) -> bytes:
    """Read a binary stream to its end.

    Args:
        stream: object with a method `read(size)` that returns bytes.
        name: name of the stream, used in error messages.

    Raises:
        TypeError: The stream returns text instead of bytes.
        AudioError: The stream is longer than `MAX_STREAM_BYTES`.
    """
    content = bytearray()
    while chunk := stream.read(READ_CHUNK_BYTES):
        if not isinstance(chunk, (bytes, bytearray, memoryview)):
            raise TypeError(
                f'a file object must be binary, but {name} returned {type(chunk).__name__}: open it with mode "rb"'
            )
        content += chunk
        if len(content) > MAX_STREAM_BYTES:
            raise AudioError(f"{name} is larger than {MAX_STREAM_BYTES} bytes: save it as a file and pass the path")
    return bytes(content)


def _check_finite(samples: StoredSamples, name: str) -> None:
    """Check that no sample is NaN or infinite.

    Args:
        samples: all samples of the source.
        name: name of the source, used in the error message.

    Raises:
        ValueError: A sample is not finite. The message contains the number of such samples, and the position and value
            of the first one.
    """
    if samples.first_not_finite is not None:
        position, value = samples.first_not_finite
        raise ValueError(
            f"samples must be finite, but {samples.num_not_finite} of {samples.num_added} in {name} are NaN or "
            f"infinite, the first at position {position} ({value}): repair the audio, or use np.nan_to_num"
        )


def _check_rate(rate: Any, name: str) -> int:
    """Check that a sampling rate is a plausible integer, and return it as an int.

    Args:
        rate: sampling rate in Hz.
        name: name of the argument, used in the error message.

    Raises:
        ValueError: `rate` is not an integer between `MIN_RATE` and `MAX_RATE`.
    """
    is_integer = isinstance(rate, (int, np.integer)) and not isinstance(rate, bool)
    if not is_integer or not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"{name} must be an integer number of Hz in [{MIN_RATE}, {MAX_RATE}], got {rate!r}")
    return int(rate)


__all__ = [
    "MAX_CHANNELS",
    "TARGET_RATE",
    "AudioError",
    "AudioSource",
    "AudioTooLongError",
    "DamagedAudioWarning",
    "FloatArray",
    "iterate_audio",
    "load_audio",
]
