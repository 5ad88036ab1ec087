"""Group clips of similar duration into training batches.

Batches are padded in `collator.py`, and the data loader is created in `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

# seconds; durations are rounded up to a multiple of this, and clips with equal rounded durations are shuffled
DURATION_STEP_S = 0.5


class DurationBatchSampler:
    """Samples batches of clips of similar duration, with a limit on the total seconds per batch.

    Every epoch shuffles the clips with equal rounded durations, and the order of the batches. The number of batches is
    constant. A clip that exceeds the limit forms a batch alone. In distributed training every process gets the same
    number of batches: some batches are repeated if the number of batches is not divisible by the number of processes.

    Args:
        durations: duration of each clip in seconds.
        batch_duration_s: maximum duration of a batch in seconds, padding included: the number of clips times the
            duration of the longest clip.
        seed: random seed of the shuffling.
        process_index: rank of this process in distributed training.
        num_processes: number of processes in distributed training.
    """

    def __init__(
        self,
        durations: Sequence[float],
        batch_duration_s: float,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        # durations are rounded up, so shuffling clips with equal rounded durations cannot exceed the limit
        self.durations_in_steps = np.ceil(np.asarray(durations, dtype=np.float64) / DURATION_STEP_S).clip(min=1)
        self.seed, self.epoch = seed, 0
        self.process_index, self.num_processes = process_index, num_processes
        sorted_durations = np.sort(self.durations_in_steps) * DURATION_STEP_S
        self.batch_sizes = list(compute_batch_sizes(sorted_durations, batch_duration_s))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch number, which is part of the random seed; `Trainer` calls this method before every epoch.

        Args:
            epoch: number of the epoch, from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of this process."""
        return -(-len(self.batch_sizes) // self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of the clips of each batch of this process."""
        rng = np.random.default_rng((self.seed, self.epoch))
        shuffled_clips = rng.permutation(len(self.durations_in_steps))
        # a stable sort keeps the shuffled order of clips with equal rounded durations
        sorted_clips = shuffled_clips[np.argsort(self.durations_in_steps[shuffled_clips], kind="stable")]
        batches = np.split(sorted_clips, np.cumsum(self.batch_sizes)[:-1])
        batch_order = rng.permutation(len(batches))
        # `np.resize` repeats the order from its start, until the length is divisible by the number of processes
        batch_order = np.resize(batch_order, len(self) * self.num_processes)
        for batch_index in batch_order[self.process_index :: self.num_processes]:
            yield batches[batch_index].tolist()


def compute_batch_sizes(sorted_durations: npt.NDArray[np.float64], batch_duration_s: float) -> Iterator[int]:
    """Split clips, sorted by duration, into consecutive batches of limited total duration.

    Args:
        sorted_durations: durations of the clips in seconds, ascending.
        batch_duration_s: maximum duration of a batch in seconds, padding included. A longer clip forms a batch alone.

    Yields:
        The number of clips in each batch.
    """
    batch_size = 0
    for duration in sorted_durations:
        # durations ascend, so all clips of the batch would be padded to the duration of this clip
        if batch_size and (batch_size + 1) * duration > batch_duration_s:
            yield batch_size
            batch_size = 0
        batch_size += 1
    if batch_size:
        yield batch_size


__all__ = ["DurationBatchSampler"]
