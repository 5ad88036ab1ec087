"""Counts requests, batches and seconds of audio for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# upper limits of the classes of the histograms
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class ServerMetrics:
    """The measurements of one server, with a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "parakeet_requests", "Transcription requests by HTTP status.", ["status"], registry=self.registry
        )
        self.audio_seconds = Counter(
            "parakeet_audio_seconds", "Seconds of audio that were transcribed.", registry=self.registry
        )
        self.request_seconds = Histogram(
            "parakeet_request_seconds", "Time of a request.", buckets=SECONDS, registry=self.registry
        )
        self.batch_size = Histogram(
            "parakeet_batch_windows", "Windows per batch.", buckets=BATCH_SIZES, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "parakeet_batch_seconds", "Time of a batch.", buckets=SECONDS, registry=self.registry
        )
        self.waiting = Gauge("parakeet_waiting_requests", "Requests that wait for the model.", registry=self.registry)
        self.streams = Gauge("parakeet_live_streams", "Open live streams.", registry=self.registry)

    def add_batch(self, num_windows: int, seconds: float) -> None:
        """Add a batch.

        Args:
            num_windows: number of windows.
            seconds: time of the batch.
        """
        self.batch_size.observe(num_windows)
        self.batch_seconds.observe(seconds)

    def to_text(self) -> bytes:
        """Return all measurements in the text format of Prometheus."""
        return generate_latest(self.registry)


__all__ = ["ServerMetrics"]
