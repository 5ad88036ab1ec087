"""Which samples the steps of a stream read: every sample is decoded once, and only needed samples are stored."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from transformers_parakeet.long_audio.stream_input import (
    SampleBuffer,
    convert_samples,
    get_first_needed_sample,
    plan_cached_part,
    plan_part,
)
from transformers_parakeet.long_audio.stream_settings import StreamSettings

SETTINGS = StreamSettings(False, hop_length=160, window_length=400, samples_per_frame=1280, chunk=2, left=5, right=1)


@pytest.mark.parametrize("num_samples", [0, 100, 159, 160, 2559, 3840, 3841, 50000, 51200])
def test_chunks_cover_the_stream_once(num_samples):
    num_decoded, parts = 0, []
    while (part := plan_part(num_decoded, num_samples, SETTINGS, is_last=True)) is not None:
        assert part.chunk_start == num_decoded
        assert part.start >= get_first_needed_sample(num_decoded, SETTINGS)
        assert part.stop - part.start <= 8 * 1280
        parts.append(part)
        num_decoded = part.chunk_stop
    # less than one feature frame has no frame
    assert num_decoded == (num_samples if num_samples >= 160 else 0)
    assert [part.is_last for part in parts] == [*[False] * (len(parts) - 1), True][: len(parts)]
    for part in parts[:-1]:
        assert (part.chunk_stop - part.chunk_start, part.stop - part.chunk_stop) == (2560, 1280)
        assert part.chunk_start - part.start == min(part.chunk_start, 5 * 1280)


def test_a_step_waits_for_the_right_context():
    assert plan_part(0, 3839, SETTINGS, is_last=False) is None
    assert plan_part(0, 3840, SETTINGS, is_last=False).chunk_stop == 2560
    assert plan_part(2560, 3840, SETTINGS, is_last=False) is None


@pytest.mark.parametrize("chunk", [1, 2, 14])
@pytest.mark.parametrize("num_samples", [0, 159, 160, 200, 16000, 20481, 54032])
def test_cached_chunks_cover_the_feature_frames_once(chunk, num_samples):
    settings = replace(SETTINGS, is_cache_aware=True, chunk=chunk, left=70, right=0)
    num_decoded, counts = 0, []
    while (part := plan_cached_part(num_decoded, num_samples, settings, True, 0)) is not None:
        assert part.chunk_start == num_decoded
        assert part.start >= get_first_needed_sample(num_decoded, settings)
        # the windows of all frames are complete, or end with the recording
        assert part.stop == (num_samples if part.is_last else part.chunk_stop + 40)
        counts.append((part.chunk_stop - part.chunk_start) // 160)
        num_decoded = part.chunk_stop
    assert sum(counts) == num_samples // 160
    assert counts[:1] in ([], [min(num_samples // 160, 8 * chunk - 7)])
    assert all(count == 8 * chunk for count in counts[1:-1])


def test_a_buffer_stores_only_the_samples_that_are_needed():
    samples, buffer, rng = torch.arange(10000.0), SampleBuffer(), random.Random(0)
    for start in range(0, 10000, 100):
        buffer.append(samples[start : start + 100].clone())
        first = rng.randint(buffer.start, buffer.stop - 1)
        stop = rng.randint(first, buffer.stop)
        assert torch.equal(buffer.get(first, stop), samples[first:stop])
        buffer.drop_before(max(buffer.start, buffer.stop - 150))
        assert sum(block.untyped_storage().nbytes() for block in buffer.blocks) <= 4 * 250
    # only whole blocks are removed
    assert (buffer.start, buffer.stop) == (9800, 10000)


def test_removing_samples_of_a_long_block_copies_nothing():
    """A copy per step would make the time of a stream quadratic: 119 s for 10 minutes with chunks of 80 ms."""
    samples, buffer = torch.arange(100_000.0), SampleBuffer()
    buffer.append(samples)
    addresses = [block.data_ptr() for block in buffer.blocks]
    for start in range(0, 100_000, 1280):
        assert torch.equal(buffer.get(start, start + 3000), samples[start : start + 3000])
        buffer.drop_before(start)
        assert start - 16_000 < buffer.start <= start
        assert sum(block.untyped_storage().nbytes() for block in buffer.blocks) == 4 * (buffer.stop - buffer.start)
        num_blocks = len(buffer.blocks)
        assert [block.data_ptr() for block in buffer.blocks] == addresses[-num_blocks:]
    buffer.append(torch.zeros(0))
    assert buffer.get(buffer.stop, buffer.stop).tolist() == []


@pytest.mark.filterwarnings("error")
def test_samples_are_accepted_in_any_memory_layout():
    values = np.linspace(-1, 1, 7, dtype=np.float32)
    read_only = np.frombuffer(values.tobytes(), np.float32)
    every_second = np.repeat(values, 2)[::2]
    arrays = [read_only, every_second, values.astype(">f4"), values.astype(np.float64)]
    for samples in [*arrays, values.tolist(), torch.from_numpy(values.repeat(2))[::2]]:
        assert torch.equal(convert_samples(samples), torch.from_numpy(values))
    assert convert_samples(values[::-1]).tolist() == values[::-1].tolist()
    assert convert_samples([]).shape == (0,)
