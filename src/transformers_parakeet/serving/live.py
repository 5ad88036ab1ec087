"""Live streams of many connections, decoded together in the thread of the model.

`realtime.py` has the connections, and `batching.py` calls `step`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..audio import FloatArray
from ..long_audio import StreamBatch, StreamUpdate

logger = logging.getLogger(__name__)

# maximum seconds of each stream that one step decodes, so that a fast client does not delay the others
MAX_STEP_S = 4.0

# function that receives the updates of a stream, in the thread of the model: the update or the exception that ended
# the stream, and whether it is the last update of the recording
OnUpdate = Callable[[StreamUpdate | Exception, bool], None]


class StreamsFullError(Exception):
    """Raised if the maximum number of streams is open."""


@dataclass
class _Slot:
    """One of the places for a stream.

    Args:
        on_update: receives the updates; `None` if the place is free, or if its connection is closed.
        blocks: samples that are not yet decoded; `None` is the end of a recording.
        is_closed: whether the connection is closed, so that the place becomes free.
    """

    on_update: OnUpdate | None = None
    blocks: deque[FloatArray | None] = field(default_factory=deque)
    is_closed: bool = False

    @property
    def has_work(self) -> bool:
        """Whether the next step has something to do for this place."""
        return bool(self.blocks) or self.is_closed

    @property
    def num_samples(self) -> int:
        """Number of samples that are not yet decoded."""
        return sum(len(block) for block in self.blocks if block is not None)

    def take(self, max_samples: int) -> tuple[FloatArray | None, bool]:
        """Remove the first samples, at most to the end of the recording.

        Args:
            max_samples: maximum number of samples.

        Returns:
            (S,) samples, `None` if there are none; and whether the recording ends after them.
        """
        taken: list[FloatArray] = []
        num_missing = max_samples
        while self.blocks and num_missing > 0:
            block = self.blocks.popleft()
            if block is None:
                return (np.concatenate(taken) if taken else None), True
            taken.append(block[:num_missing])
            if len(block) > num_missing:
                self.blocks.appendleft(block[num_missing:])
            num_missing -= len(taken[-1])
        return (np.concatenate(taken) if taken else None), False


class LiveStreams:
    """The live streams of a server. All methods except `step` may be called in any thread.

    Args:
        pipeline: pipeline with a model of this package.
        max_streams: maximum number of streams.

    Attributes:
        notify: called when there is work for `step`; the owner sets it.
    """

    def __init__(self, pipeline: Any, max_streams: int) -> None:
        self._batch = StreamBatch(pipeline.model, pipeline.processor, max_streams)
        self.sampling_rate = pipeline.processor.feature_extractor.sampling_rate
        self._slots = [_Slot() for _ in range(max_streams)]
        self._free = list(reversed(range(max_streams)))
        self._lock = threading.Lock()
        self.notify: Callable[[], None] = lambda: None

    @property
    def num_open(self) -> int:
        """Number of open streams."""
        return len(self._slots) - len(self._free)

    def open(self, on_update: OnUpdate) -> int:
        """Open a stream.

        Args:
            on_update: receives the updates.

        Returns:
            The index of the stream.

        Raises:
            StreamsFullError: the maximum number of streams is open.
        """
        with self._lock:
            if not self._free:
                raise StreamsFullError(f"at most {len(self._slots)} live streams can be open: try again later")
            index = self._free.pop()
            self._slots[index] = _Slot(on_update)
        return index

    def feed(self, index: int, samples: FloatArray) -> None:
        """Add samples to a stream.

        Args:
            index: index of the stream.
            samples: (S,) float32 samples at the sampling rate of the model.
        """
        if len(samples):
            with self._lock:
                self._slots[index].blocks.append(samples)
            self.notify()

    def get_waiting_s(self, index: int) -> float:
        """Return the number of seconds of a stream that are not yet decoded.

        Args:
            index: index of the stream.
        """
        with self._lock:
            return self._slots[index].num_samples / self.sampling_rate

    def finish(self, index: int) -> None:
        """End the recording of a stream. After its last update, the stream starts a new recording.

        Args:
            index: index of the stream.
        """
        with self._lock:
            self._slots[index].blocks.append(None)
        self.notify()

    def close(self, index: int) -> None:
        """Close a stream and forget its samples, for example because its client has disconnected.

        Args:
            index: index of the stream.
        """
        with self._lock:
            slot = self._slots[index]
            slot.on_update, slot.blocks, slot.is_closed = None, deque(), True
        self.notify()

    def has_input(self) -> bool:
        """Return whether there is work for `step`."""
        return any(slot.has_work for slot in self._slots)

    def step(self) -> None:
        """Decode the new samples of all streams; called in the thread of the model."""
        max_samples = round(MAX_STEP_S * self.sampling_rate)
        with self._lock:
            callbacks = [slot.on_update for slot in self._slots]
            closed = [index for index, slot in enumerate(self._slots) if slot.is_closed]
            taken = [slot.take(max_samples) for slot in self._slots]
        samples = [block for block, _ in taken]
        ending = [index for index, (_, is_end) in enumerate(taken) if is_end]
        # for each stream with an update: the update or an exception, and whether it is the last one
        updates: list[tuple[int, StreamUpdate | Exception, bool]] = []
        try:
            fed = self._batch.feed(samples)
            updates += [(index, fed[index], False) for index, block in enumerate(samples) if block is not None]
            finished = self._batch.finish(ending)
            updates += [(index, update, True) for index, update in zip(ending, finished, strict=True)]
            restarted = {*ending, *closed}
        # no error in one stream may end the thread
        except Exception as error:
            logger.exception("a step of the live streams failed")
            restarted = {index for index, block in enumerate(samples) if block is not None} | {*ending, *closed}
            updates = [(index, error, True) for index in restarted]
        for index in restarted:
            self._batch.restart(index)
        for index, update, is_last in updates:
            callback = callbacks[index]
            if callback is not None:
                callback(update, is_last)
        with self._lock:
            for index in closed:
                self._slots[index] = _Slot()
                self._free.append(index)


__all__ = ["LiveStreams", "StreamsFullError"]
