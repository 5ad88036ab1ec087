"""Choose which clips form a training batch, by their durations.

The batches are padded in `collator.py` and loaded by `ParakeetTrainer` in `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

# seconds: durations are rounded up to a multiple of this, and clips with the same rounded duration are shuffled
DURATION_STEP_S = 0.5


class DurationBatchSampler:
    """Samples batches of clips of similar duration, with as many clips as fit into a number of seconds.

    Every epoch shuffles the clips with the same rounded duration, and the order of the batches. The number of batches
    is the same in every epoch. A clip that is longer than the limit is a batch of its own. Every process gets the same
    number of batches; the first batches are repeated if the number of batches is not divisible by the number of
    processes.

    Args:
        durations: duration of each clip in seconds.
        batch_duration_s: most seconds of a batch, padding included: number of clips times duration of the longest one.
        seed: seed of the order.
        process_index: index of this process among those that train together.
        num_processes: number of processes that train together.
    """

    def __init__(
        self,
        durations: Sequence[float],
        batch_duration_s: float,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        # rounded up, so that clips of one step can be exchanged without exceeding the limit
        self.duration_steps = np.ceil(np.asarray(durations, dtype=np.float64) / DURATION_STEP_S).clip(min=1)
        self.seed, self.epoch = seed, 0
        self.process_index, self.num_processes = process_index, num_processes
        sorted_durations = np.sort(self.duration_steps) * DURATION_STEP_S
        self.batch_sizes = list(compute_batch_sizes(sorted_durations, batch_duration_s))

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch, which determines the order; `Trainer` calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of this process."""
        return -(-len(self.batch_sizes) // self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of the clips of each batch of this process."""
        rng = np.random.default_rng((self.seed, self.epoch))
        shuffled_clips = rng.permutation(len(self.duration_steps))
        # a stable sort keeps the shuffled order of clips with the same rounded duration
        sorted_clips = shuffled_clips[np.argsort(self.duration_steps[shuffled_clips], kind="stable")]
        batches = np.split(sorted_clips, np.cumsum(self.batch_sizes)[:-1])
        batch_order = rng.permutation(len(batches))
        # repeats the first batches until every process has the same number
        batch_order = np.resize(batch_order, len(self) * self.num_processes)
        for index in batch_order[self.process_index :: self.num_processes]:
            yield batches[index].tolist()


def compute_batch_sizes(sorted_durations: npt.NDArray[np.float64], batch_duration_s: float) -> Iterator[int]:
    """Divide clips into consecutive batches of limited duration.

    Args:
        sorted_durations: durations of the clips in seconds, ascending.
        batch_duration_s: most seconds of a batch, padding included.

    Yields:
        The number of clips of each batch.
    """
    batch_size = 0
    for duration in sorted_durations:
        # this clip is the longest so far: the others would be padded to its duration
        if batch_size and (batch_size + 1) * duration > batch_duration_s:
            yield batch_size
            batch_size = 0
        batch_size += 1
    if batch_size:
        yield batch_size


__all__ = ["DurationBatchSampler"]
