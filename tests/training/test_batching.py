"""Batches of clips of similar duration."""

import numpy as np

from transformers_parakeet.training import DurationBatchSampler


def test_every_epoch_has_each_clip_once_in_batches_within_the_limit():
    durations = np.random.default_rng(0).uniform(0.3, 12, size=301)
    sampler = DurationBatchSampler(durations, 40.0, seed=3)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(index for batch in batches for index in batch) == list(range(301))
        assert max(len(batch) * durations[batch].max() for batch in batches) <= 40.0
        epochs.append(batches)
    assert epochs[0] != epochs[1] != epochs[2]
    # clips are shuffled as well as batches
    assert {tuple(sorted(batch)) for batch in epochs[0]} != {tuple(sorted(batch)) for batch in epochs[1]}
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]
    # clips of a batch differ by up to half a second, and by the range of durations that the batch covers
    speech_shares = [durations[batch].sum() / (len(batch) * durations[batch].max()) for batch in epochs[0]]
    assert np.mean(speech_shares) > 0.85


def test_processes_share_the_batches_and_get_the_same_number():
    durations = [1.0] * 10 + [30.0]
    all_batches = list(DurationBatchSampler(durations, 2.0))
    assert sorted(map(len, all_batches)) == [1] + [2] * 5
    samplers = [DurationBatchSampler(durations, 2.0, process_index=rank, num_processes=4) for rank in range(4)]
    batches_of_processes = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in batches_of_processes] == [2] * 4
    in_order = [batch for turn in zip(*batches_of_processes, strict=True) for batch in turn]
    assert in_order[:6] == all_batches
    assert in_order[6:] == in_order[:2]
