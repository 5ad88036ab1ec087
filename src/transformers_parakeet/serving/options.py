"""Defines the options of the server and checks them."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field

from ..transcription import TranscriptionOptions

# seconds of audio per window: a long recording delays other requests by at most one batch of windows
DEFAULT_WINDOW_S = 30.0


@dataclass(frozen=True)
class ServerOptions:
    """Options of the server.

    Args:
        transcription: decoder, windows, batches and search of all requests.
        api_keys: keys of which a request must have one in the header `Authorization: Bearer KEY`; empty for a server
            that is open to everyone who reaches it.
        allowed_origins: origins of web pages of other servers that may call this server (CORS), such as
            `https://example.org`.
        max_upload_bytes: maximum size of a request in bytes.
        max_duration_s: maximum duration of a recording in seconds.
        max_waiting: maximum number of requests that are received, decoded or wait for the model; further requests get
            the status 429.
        max_waiting_audio_s: maximum number of seconds of audio that wait for the model; further requests get the status
            429. One recording is always accepted.
        max_streams: maximum number of live streams at a time.
        batch_wait_s: seconds for which the first request of a batch waits for other requests.
        upload_grace_s: seconds after which an upload must have sent `min_upload_rate` bytes per second on average.
        min_upload_rate: bytes per second.
        decoding_timeout_s: maximum number of seconds for decoding the file of one request.
        request_timeout_s: maximum number of seconds for which a request waits for its text.
        num_decoders: number of processes that decode audio files.

    Raises:
        ValueError: an option is out of range, or an API key is empty.
    """

    transcription: TranscriptionOptions = field(
        default_factory=lambda: TranscriptionOptions(chunk_length_s=DEFAULT_WINDOW_S)
    )
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_upload_bytes: int = 100 * 1024**2
    max_duration_s: float = 2 * 3600.0
    max_waiting: int = 256
    # 1.8 GB of samples
    max_waiting_audio_s: float = 8 * 3600.0
    max_streams: int = 32
    batch_wait_s: float = 0.008
    upload_grace_s: float = 4.0
    min_upload_rate: float = 10_000.0
    decoding_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    num_decoders: int = field(default_factory=lambda: max(1, min(4, os.cpu_count() or 1)))

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("max_upload_bytes", "max_waiting", "max_streams", "num_decoders"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}: raise it")
        positive = ("max_duration_s", "max_waiting_audio_s", "upload_grace_s", "min_upload_rate", "decoding_timeout_s")
        for name in (*positive, "request_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be greater than 0, got {getattr(self, name)}: raise it")
        if not 0 <= self.batch_wait_s <= 1:
            raise ValueError(f"`batch_wait_s` must be from 0 to 1 s, got {self.batch_wait_s}: correct it")
        if any(not key.strip() for key in self.api_keys):
            raise ValueError("an API key must not be empty: pass a random text, or no key")


def is_local_host(host: str) -> bool:
    """Return whether a server that binds to a host can be reached only from this machine.

    Args:
        host: host name or address.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


__all__ = ["DEFAULT_WINDOW_S", "ServerOptions", "is_local_host"]
