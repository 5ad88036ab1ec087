"""Decodes uploaded audio files in other processes, so that a hostile file cannot stop the server."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from pebble import ProcessExpired, ProcessPool

from ..audio import AudioSource, AudioTooLongError, FloatArray
from .errors import ApiError

# memory in bytes that a process may allocate in addition to what it has after its start
MAX_DECODER_MEMORY = 4 * 1024**3
# number of files that one process decodes before it is replaced, so that a leak in a decoder cannot fill the memory
MAX_FILES_PER_PROCESS = 1000
# bytes before the first chunk of a WAV file, and of the head of a chunk
RIFF_HEADER_BYTES, CHUNK_HEADER_BYTES = 12, 8
# programs that write a WAV file to a pipe state a length from this number of bytes on, because they do not know it
MIN_PLACEHOLDER_BYTES = 0x7FFFF000
# fraction of the bytes in the header that a WAV file must have; the length in the header can be a bit too large
MIN_PRESENT_FRACTION = 0.9


def limit_memory() -> None:
    """Limit the memory of this process, on systems that support it; used at the start of a decoder process."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm", "rb") as statistics:
        num_pages = int(statistics.read().split()[0])
    limit = num_pages * os.sysconf("SC_PAGE_SIZE") + MAX_DECODER_MEMORY
    hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))


def check_wav_length(content: bytes, name: str) -> None:
    """Check that a WAV file has the samples that its header states.

    The decoders read a truncated WAV file without an error.

    Args:
        content: the content of a file.
        name: name of the file, used in the error message.

    Raises:
        ValueError: the file is a WAV file with fewer samples.
    """
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return
    position = RIFF_HEADER_BYTES
    while position + CHUNK_HEADER_BYTES <= len(content):
        num_bytes = int.from_bytes(content[position + 4 : position + CHUNK_HEADER_BYTES], "little")
        if content[position : position + 4] == b"data":
            num_present = len(content) - position - CHUNK_HEADER_BYTES
            if num_bytes < MIN_PLACEHOLDER_BYTES and num_present < MIN_PRESENT_FRACTION * num_bytes:
                raise ValueError(
                    f"{name} must have {num_bytes} bytes of samples, as its header states, got {num_present}: send the "
                    "complete file"
                )
            return
        # chunks start at even positions
        position += CHUNK_HEADER_BYTES + num_bytes + num_bytes % 2


def decode_upload(content: bytes, name: str, sampling_rate: int, max_duration_s: float) -> FloatArray:
    """Decode the content of an audio file; runs in a decoder process.

    Args:
        content: the content of the file.
        name: name of the file, used in error messages.
        sampling_rate: sampling rate in Hz of the result.
        max_duration_s: maximum duration in seconds.

    Returns:
        (S,) float32 samples.

    Raises:
        AudioTooLongError: the recording is longer than `max_duration_s`.
        ValueError: the file cannot be read as audio, is damaged, or has samples that are not finite.
    """
    check_wav_length(content, name)
    with warnings.catch_warnings():
        # a damaged file is a warning; a request must not get the text of half of its recording
        warnings.simplefilter("error", UserWarning)
        try:
            source = {"bytes": content, "path": name}
            return AudioSource(source, target_rate=sampling_rate, max_duration_s=max_duration_s).load()
        except UserWarning as warning:
            raise ValueError(str(warning)) from None


class UploadDecoder:
    """A pool of processes that decode audio files.

    Args:
        num_processes: number of processes.
        sampling_rate: sampling rate in Hz of the samples.
        max_duration_s: maximum duration of a recording in seconds.
        timeout_s: maximum number of seconds for one file; its process is then ended.
    """

    def __init__(self, num_processes: int, sampling_rate: int, max_duration_s: float, timeout_s: float) -> None:
        self.sampling_rate, self.max_duration_s, self.timeout_s = sampling_rate, max_duration_s, timeout_s
        # a fork of this process would copy the locks of its threads; a fork of the fork server shares its imports
        has_fork_server = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if has_fork_server else "spawn")
        if has_fork_server:
            context.set_forkserver_preload([__name__])
        self._pool = ProcessPool(num_processes, MAX_FILES_PER_PROCESS, initializer=limit_memory, context=context)

    async def decode(self, content: bytes, name: str) -> FloatArray:
        """Decode a file.

        Args:
            content: the content of the file.
            name: name of the file, used in error messages.

        Returns:
            (S,) float32 samples.

        Raises:
            ApiError: 413 if the recording is too long, 400 if the file cannot be decoded.
        """
        arguments = (content, name, self.sampling_rate, self.max_duration_s)
        try:
            return await asyncio.wrap_future(self._pool.schedule(decode_upload, args=arguments, timeout=self.timeout_s))
        except AudioTooLongError as error:
            raise ApiError(413, str(error), "audio_too_long", "file") from error
        except (FutureTimeoutError, asyncio.TimeoutError) as error:
            message = f"{name} must be decoded within {self.timeout_s:g} s: send a shorter or simpler file"
            raise ApiError(400, message, "decoding_timeout", "file") from error
        except (ProcessExpired, MemoryError) as error:
            message = f"{name} cannot be decoded: the decoder ended on it; convert it to WAV or FLAC"
            raise ApiError(400, message, "decoding_failed", "file") from error
        except (ValueError, TypeError, OSError) as error:
            raise ApiError(400, str(error), "invalid_audio", "file") from error
        except CancelledError as error:
            raise ApiError(503, "the server is stopping: send the request again later", "stopping") from error

    def close(self) -> None:
        """End the processes."""
        self._pool.stop()
        self._pool.join()


__all__ = ["UploadDecoder", "decode_upload"]
