"""Decodes audio files with libsndfile or FFmpeg, resamples the samples, and stores them.

Paths, URLs and arrays are in `audio.py`.
"""

import importlib
import io
import math
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from .audio_arrays import MAX_CHANNELS, FloatArray, average_channels, to_float32

# plausible sampling rates in Hz; a wrong rate in a damaged header could otherwise cause a huge resampling job
MIN_RATE, MAX_RATE = 1_000, 1_000_000
# maximum number of samples per file (12 hours at 48 kHz, 8 GiB), because a small compressed file can expand to any size
MAX_SAMPLES = 2**31
# values per call of libsndfile (1 MiB); memory is never allocated for the length in a header, which can be wrong
BLOCK_VALUES = 1 << 18
# minimum number of samples that are resampled and stored at a time (256 KiB); soxr is slower with 4 KiB or 100 MiB
PIECE_LENGTH = 1 << 16
# seconds (one week); a longer duration in a header is treated as a placeholder for an unknown length
MAX_HEADER_DURATION_S = 7 * 86_400.0
# a file is reported as truncated if less than this fraction of the duration in the header was decoded; the fraction is
# below 1 because some headers contain an estimate
MIN_DECODED_FRACTION = 0.9
# seconds that may be missing from any file: the duration in an Opus header includes 6.5 ms of decoder delay and a block
# of up to 20 ms
MAX_MISSING_S = 0.03
# bytes of the fixed part of an Ogg page header, and flag that marks the first page of a stream (RFC 3533)
OGG_HEADER_BYTES, OGG_FIRST_PAGE = 27, 2


class AudioError(ValueError):
    """Raised if audio cannot be read; the message contains the name of the file and the error of each decoder."""


class AudioTooLongError(AudioError):
    """Raised if audio is longer than the maximum duration."""


class DamagedAudioWarning(UserWarning):
    """Warns that only a part of a file could be read."""


class StoredSamples:
    """Mono samples of a recording, in memory or, if they are too long, in an unnamed temporary file.

    `add` resamples and stores the samples piece by piece. `finish` must be called after the last piece. Then `read`
    returns any range of samples, in any order and from any thread. The temporary file is deleted together with this
    object.

    Attributes:
        num_samples: number of samples that are stored, at `sampling_rate` Hz.
        num_added: number of samples that were added, before resampling.
        num_not_finite: number of added samples that are NaN or infinite.
        first_not_finite: position and value of the first added sample that is NaN or infinite; None if all are finite.

    Args:
        name: name of the recording, used in error messages.
        sampling_rate: sampling rate in Hz of the stored samples.
        in_memory_s: duration in seconds up to which the samples stay in memory.
    """

    def __init__(self, name: str, sampling_rate: int, in_memory_s: float) -> None:
        self.num_samples = self.num_added = self.num_not_finite = 0
        self.first_not_finite: tuple[int, float] | None = None
        self.name, self._sampling_rate, self._in_memory_s = name, sampling_rate, in_memory_s
        self._blocks: list[FloatArray] = []
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        self._resampler: Any = None

    def add(self, samples: FloatArray, rate: int) -> None:
        """Resample and store the next samples of the recording.

        soxr resamples with quality HQ. The result is bit for bit that of `soxr.resample` on all samples at once.

        Args:
            samples: (S,) samples that follow the samples of the previous call.
            rate: sampling rate in Hz of `samples`, which must be equal in all calls.

        Raises:
            AudioError: The temporary file cannot be written.
            ImportError: soxr is needed, but not installed.
        """
        positions = np.flatnonzero(~np.isfinite(samples))
        if len(positions) and self.first_not_finite is None:
            self.first_not_finite = (self.num_added + int(positions[0]), float(samples[positions[0]]))
        self.num_not_finite += len(positions)
        self.num_added += len(samples)
        if rate != self._sampling_rate:
            if self._resampler is None:
                soxr = _import_package("soxr")
                self._resampler = soxr.ResampleStream(rate, self._sampling_rate, 1, dtype="float32", quality="HQ")
            samples = self._resampler.resample_chunk(samples)
        self._store(samples)

    def finish(self) -> None:
        """Store the last samples of the resampler, and join the samples in memory.

        Raises:
            AudioError: The temporary file cannot be written.
        """
        if self._resampler is not None:
            self._store(self._resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
            self._resampler = None
        if len(self._blocks) != 1:
            self._blocks = [np.concatenate([np.zeros(0, dtype=np.float32), *self._blocks])]

    def read(self, start: int, stop: int) -> FloatArray:
        """Return the stored samples from position `start` to position `stop`, without `stop`.

        Args:
            start: position of the first sample.
            stop: position after the last sample. A position after the end means the end.

        Returns:
            (S,) samples. They share memory with this object if they are in memory.

        Raises:
            AudioError: The temporary file ends before `stop`.
        """
        if self._file is None:
            return self._blocks[0][start:stop]
        # the position of a file is the same for all threads
        with self._lock:
            self._file.seek(start * np.dtype(np.float32).itemsize)
            samples = np.fromfile(self._file, dtype=np.float32, count=min(stop, self.num_samples) - start)
        if start + len(samples) < min(stop, self.num_samples):
            raise AudioError(
                f"the temporary file of {self.name} must have {self.num_samples} samples, got fewer: check the disk"
            )
        return samples

    def _store(self, block: FloatArray) -> None:
        """Store (S,) resampled samples in memory, or write all samples to the temporary file if they are too long.

        Raises:
            AudioError: The temporary file cannot be written.
        """
        self.num_samples += len(block)
        self._blocks.append(block)
        if self.num_samples <= self._in_memory_s * self._sampling_rate:
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            for stored in self._blocks:
                content = stored.tobytes()
                # an unbuffered file can write a part of the content
                while content:
                    content = content[self._file.write(content) :]
        except OSError as error:
            hour_mb = 3600 * self._sampling_rate * block.itemsize / 1e6
            raise AudioError(
                f"the samples of {self.name} must fit into a temporary file ({hour_mb:.0f} MB per hour of audio), but "
                f"writing failed ({error}): set the environment variable TMPDIR to a folder with enough space"
            ) from error
        self._blocks.clear()


@dataclass
class _DecoderState:
    """Progress of one decoder, which updates these values before it yields a block and when it stops.

    Args:
        samples: the decoded samples.
        rate: sampling rate in Hz of the file; 0 until the decoder has opened it.
        num_samples: number of samples in the blocks that were yielded.
        header_duration_s: duration in seconds that the header states; 0 until the decoder has opened the file, and if
            the header states none.
        problem: description of the error that stopped decoding; None if there was none.
    """

    samples: StoredSamples
    rate: int = 0
    num_samples: int = 0
    header_duration_s: float = 0.0
    problem: str | None = None

    @property
    def duration_s(self) -> float:
        """Duration of the decoded samples in seconds."""
        return self.num_samples / self.rate if self.rate else 0.0


# a function that takes a file (path as a str or content as bytes) and a new state, and yields blocks of (S,) samples
_Decoder: TypeAlias = Callable[[str | bytes, _DecoderState], Iterator[FloatArray]]


def decode_audio(
    source: str | bytes, name: str, target_rate: int, in_memory_s: float, max_duration_s: float = math.inf
) -> StoredSamples:
    """Decode an audio file completely, resample it, and store its samples.

    If the preferred decoder fails, the other decoder also decodes the file. A damaged file is decoded as far as
    possible, with a warning.

    Args:
        source: path of the file as a str, or content of the file as bytes.
        name: name of the file, used in messages.
        target_rate: sampling rate in Hz of the stored samples.
        in_memory_s: duration in seconds up to which the samples stay in memory. Longer samples are written to a
            temporary file.
        max_duration_s: maximum duration in seconds. Decoding stops as soon as the header or the decoded samples exceed
            it.

    Returns:
        The samples of the decoder that reads most of the file.

    Raises:
        AudioTooLongError: The file is longer than `max_duration_s`.
        AudioError: The file is empty or too long, no decoder can read it, the sampling rate is implausible, or the
            temporary file cannot be written.
    """
    with _open_binary(source) as file:
        first_bytes = file.read(4)
    if not first_bytes:
        raise AudioError(f"{name} is empty (0 bytes): pass a file that contains audio")
    results: list[_DecoderState] = []
    for decoder in _order_decoders(source, first_bytes):
        results.append(_run_decoder(decoder, source, StoredSamples(name, target_rate, in_memory_s), max_duration_s))
        # zero samples also count as a failure, because the WAV header of an interrupted recording can state 0 samples
        if results[-1].problem is None and results[-1].num_samples:
            break
    # prefer the longest result; at equal durations, prefer a result without a problem
    best = max(results, key=lambda result: (result.duration_s, result.problem is None))
    problems = "; ".join(result.problem for result in results if result.problem is not None)
    # FFmpeg opens any file with the ending `.flac`, and then reads no samples at 0 Hz
    if best.num_samples == 0 and (best.problem is not None or (problems and best.rate == 0)):
        raise AudioError(f"{name} cannot be read as audio ({problems}): check that it is a complete audio file")
    if not MIN_RATE <= best.rate <= MAX_RATE:
        raise AudioError(
            f"the sampling rate of {name} must be in [{MIN_RATE}, {MAX_RATE}] Hz, got {best.rate} Hz in the "
            "header: check that the file is not damaged"
        )
    if any(result.rate and result.problem for result in results):
        message = f"{name} is damaged: only {best.duration_s:.2f} s were read ({problems})"
        warnings.warn(message, DamagedAudioWarning, stacklevel=4)
    return best.samples


def _run_decoder(
    decoder: _Decoder, source: str | bytes, samples: StoredSamples, max_duration_s: float
) -> _DecoderState:
    """Decode a file (path as a str or content as bytes) with one decoder, and add its samples to `samples`.

    Returns:
        The final state of the decoder. Decoding stops early if the sampling rate of the file is implausible.

    Raises:
        AudioTooLongError: The file is longer than `max_duration_s`.
        AudioError: The file contains more than `MAX_SAMPLES` samples, or the temporary file cannot be written.
    """
    state = _DecoderState(samples)
    # FFmpeg yields frames of about 1000 samples, and longer blocks are resampled faster
    for block in _join_blocks(decoder(source, state)):
        if not MIN_RATE <= state.rate <= MAX_RATE:
            break
        if max(state.duration_s, state.header_duration_s) > max_duration_s:
            raise AudioTooLongError(
                f"{samples.name} must have a duration of at most {max_duration_s:g} s, got more: split the file"
            )
        samples.add(block, state.rate)
        if samples.num_added > MAX_SAMPLES:
            raise AudioError(f"{samples.name} must have at most {MAX_SAMPLES} samples, got more: split the file")
    samples.finish()
    return state


def _join_blocks(blocks: Iterable[FloatArray]) -> Iterator[FloatArray]:
    """Join blocks of (S,) samples to blocks of at least `PIECE_LENGTH` samples; the last block can be shorter."""
    pending: list[FloatArray] = []
    for block in blocks:
        pending.append(block)
        if sum(map(len, pending)) >= PIECE_LENGTH:
            yield pending[0] if len(pending) == 1 else np.concatenate(pending)
            pending = []
    if pending:
        yield np.concatenate(pending)


def _order_decoders(source: str | bytes, first_bytes: bytes) -> list[_Decoder]:
    """Choose the order in which the decoders are tried, based on the format of a file.

    FFmpeg is tried first for MP3, AAC and Ogg: libsndfile 1.2.2 stops without an error after the first of several
    concatenated MP3 or Ogg streams, and truncates an MP3 file without a Xing header because it estimates the length.
    libsndfile is tried first for all other formats, and for an Ogg file with a single Vorbis stream: libsndfile returns
    exactly the encoded samples of Vorbis, while FFmpeg returns a few samples more or fewer at the end.

    Args:
        source: path of the file as a str, or content of the file as bytes.
        first_bytes: the first four bytes of the file.

    Returns:
        Both decoding functions, the preferred one first.
    """
    # MP3 and AAC frames start with a sync word of 11 one bits
    has_frame_sync = len(first_bytes) > 1 and first_bytes[0] == 0xFF and first_bytes[1] & 0xE0 == 0xE0
    is_tagged_or_ogg = first_bytes.startswith((b"ID3", b"OggS"))
    if has_frame_sync or (is_tagged_or_ogg and not _is_single_vorbis_stream(source)):
        return [_decode_with_ffmpeg, _decode_with_libsndfile]
    return [_decode_with_libsndfile, _decode_with_ffmpeg]


def _is_single_vorbis_stream(source: str | bytes) -> bool:
    """Return whether a file consists only of complete Ogg pages of one Vorbis stream (RFC 3533, section 6)."""
    is_first_page = True
    with _open_binary(source) as file:
        while header := file.read(OGG_HEADER_BYTES):
            if len(header) < OGG_HEADER_BYTES or not header.startswith(b"OggS"):
                return False
            # the last byte of the header is the number of segments; the size of each segment follows in one byte
            page_size = sum(file.read(header[-1]))
            page = file.read(page_size)
            # byte 5 of the header contains the flags of the page
            if len(page) < page_size or bool(header[5] & OGG_FIRST_PAGE) != is_first_page:
                return False
            if is_first_page and not page.startswith(b"\x01vorbis"):
                return False
            is_first_page = False
    return True


def _open_binary(source: str | bytes) -> BinaryIO:
    """Open a file for reading bytes, given the path (str) or the content (bytes) of the file."""
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _decode_with_libsndfile(source: str | bytes, state: _DecoderState) -> Iterator[FloatArray]:
    """Decode a file with libsndfile, block by block.

    Args:
        source: path of the file as a str, or content of the file as bytes.
        state: new state, which is updated before each block and at the end.

    Returns:
        Blocks of (S,) mono samples, as far as the file can be decoded.
    """
    soundfile = _import_package("soundfile")
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            if file.frames > MAX_HEADER_DURATION_S * file.samplerate:
                # libsndfile cannot decode a FLAC file without a length in the header, such as a file written to a pipe
                raise ValueError("the header contains no length")
            state.rate, state.header_duration_s = int(file.samplerate), file.frames / file.samplerate
            block_length = max(1, BLOCK_VALUES // file.channels)
            while len(block := file.read(block_length, dtype="float32", always_2d=True)):
                state.num_samples += len(block)
                yield average_channels(block, axis=1)
            state.problem = _describe_missing_audio(state.duration_s, state.header_duration_s)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        # errors of libsndfile are RuntimeErrors; soundfile raises a TypeError for a file name that ends in .raw
        state.problem = str(getattr(error, "error_string", error))
    state.problem = state.problem and f"libsndfile: {state.problem}"


def _decode_with_ffmpeg(source: str | bytes, state: _DecoderState) -> Iterator[FloatArray]:
    """Decode the first audio track of a file with FFmpeg, through PyAV, packet by packet.

    Args:
        source: path of the file as a str, or content of the file as bytes.
        state: new state, which is updated before each block and at the end.

    Returns:
        Blocks of (S,) mono samples, as far as the file can be decoded.
    """
    av = _import_package("av")
    # a playlist (HLS, ffconcat) could make FFmpeg open other files and URLs, so no protocol is allowed
    options = {"protocol_whitelist": "none"}
    try:
        with _open_binary(source) as file, av.open(file, metadata_errors="ignore", options=options) as container:
            yield from _decode_track(av, container, state)
    except (av.error.FFmpegError, RuntimeError, ValueError, OSError) as error:
        state.problem = str(getattr(error, "strerror", None) or error)
    state.problem = state.problem and f"FFmpeg: {state.problem}"


def _decode_track(av: ModuleType, container: Any, state: _DecoderState) -> Iterator[FloatArray]:
    """Decode the packets of the first audio track of an opened file. Damaged packets are skipped.

    Args:
        av: the imported PyAV module.
        container: file opened with `av.open`.
        state: new state, which is updated before each block and at the end.

    Returns:
        Blocks of (S,) mono samples, one block per decoded frame of the codec.
    """
    if not container.streams.audio:
        state.problem = "the file has no audio track"
        return
    track = container.streams.audio[0]
    if track.codec_context is None:
        state.problem = "the codec of the audio track is not supported"
        return
    state.rate, num_damaged_packets = int(track.rate or 0), 0
    state.header_duration_s = float(track.duration * track.time_base) if track.duration and track.time_base else 0.0
    for packet in container.demux(track):
        try:
            audio_frames = packet.decode()
        except av.error.InvalidDataError:
            # usually the next packets can be decoded
            num_damaged_packets += 1
            continue
        for audio_frame in audio_frames:
            if not state.num_samples:
                # use the rate of the first decoded frame, because an AAC header can contain half of the actual rate
                state.rate = int(audio_frame.sample_rate)
            if audio_frame.sample_rate != state.rate:
                state.problem = f"the sampling rate changes to {audio_frame.sample_rate} Hz within the file"
                return
            block = _frame_to_mono(av, audio_frame)
            state.num_samples += len(block)
            yield block
    if num_damaged_packets:
        state.problem = f"{num_damaged_packets} damaged packets were skipped"
        return
    state.problem = _describe_missing_audio(state.duration_s, state.header_duration_s)


def _frame_to_mono(av: ModuleType, audio_frame: Any) -> FloatArray:
    """Convert a decoded PyAV frame to (S,) mono samples.

    Args:
        av: the imported PyAV module.
        audio_frame: an `av.AudioFrame` with any sample format and channel layout.

    Raises:
        ValueError: The frame has more than `MAX_CHANNELS` channels.
    """
    num_channels = audio_frame.layout.nb_channels
    if num_channels > MAX_CHANNELS:
        raise ValueError(f"the audio must have at most {MAX_CHANNELS} channels, got {num_channels}")
    if num_channels == MAX_CHANNELS and audio_frame.format.is_planar:
        # convert to interleaved samples, because PyAV 18.1 reads beyond the end of a planar frame with eight channels
        resampler = av.AudioResampler(format="flt", layout=audio_frame.layout, rate=audio_frame.sample_rate)
        (audio_frame,) = resampler.resample(audio_frame)
    values = to_float32(audio_frame.to_ndarray())
    if not audio_frame.format.is_planar:
        # interleaved (1, S * C) -> (C, S)
        values = values.reshape(-1, num_channels).T
    return average_channels(values, axis=0)


def _describe_missing_audio(decoded_duration_s: float, header_duration_s: float) -> str | None:
    """Describe how much audio is missing, compared with the duration in the header of a file.

    Args:
        decoded_duration_s: duration of the decoded audio in seconds.
        header_duration_s: duration in the header in seconds; 0 if unknown.

    Returns:
        A description of the missing audio; None if no audio is missing, within the tolerances.
    """
    min_duration_s = min(MIN_DECODED_FRACTION * header_duration_s, header_duration_s - MAX_MISSING_S)
    if decoded_duration_s >= min_duration_s:
        return None
    return f"only {decoded_duration_s:.2f} s of the {header_duration_s:.2f} s stated in the header"


def _import_package(name: str) -> ModuleType:
    """Import the package `name` when it is needed; the ImportError contains the installation command."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        # soundfile raises OSError if libsndfile is missing
        raise ImportError(f"{name} is needed to read this audio ({error}): pip install {name}") from error
