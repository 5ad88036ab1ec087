"""The samples of a stream, and which of them each step encodes and decodes.

Pure arithmetic on sample numbers; the networks run in `stream_engine.py`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .stream_settings import StreamSettings

# feature frames before the first new frame of a cache-aware step, so that no sample that the pre-emphasis filter
# computed without its predecessor is in the window of a new frame
NUM_MARGIN_FRAMES = 3


# Largest number of samples in a block of `SampleBuffer`, 1 s at 16 kHz. Whole blocks are removed without a copy, so the
# time of a stream is proportional to its length, also if it receives a whole recording in one call.
MAX_BLOCK_SAMPLES = 16_000


class SampleBuffer:
    """The samples of a stream that are still needed, addressed by their number in the stream.

    Attributes:
        blocks: consecutive samples, in blocks of at most `MAX_BLOCK_SAMPLES`.
        start: number of the first stored sample.
        stop: number of the sample after the last stored one.
    """

    def __init__(self) -> None:
        self.blocks: deque[Tensor] = deque()
        self.start = self.stop = 0

    def append(self, samples: Tensor) -> None:
        """Append samples to the end.

        Args:
            samples: (S,) float32 samples.
        """
        if len(samples):
            # copies, because views would keep the memory of all blocks
            self.blocks += [block.clone() for block in samples.split(MAX_BLOCK_SAMPLES)]
            self.stop += len(samples)

    def get(self, start: int, stop: int) -> Tensor:
        """Return the (stop - start,) samples of a range.

        Args:
            start: first sample; it must be stored.
            stop: end of the range, exclusive.
        """
        pieces = [torch.zeros(0)]
        block_start = self.start
        for block in self.blocks:
            if block_start >= stop:
                break
            pieces.append(block[max(0, start - block_start) : stop - block_start])
            block_start += len(block)
        return torch.cat(pieces)

    def drop_before(self, start: int) -> None:
        """Remove the blocks that contain only samples before a sample.

        Args:
            start: first sample that is still needed.
        """
        while self.blocks and self.start + len(self.blocks[0]) <= start:
            self.start += len(self.blocks.popleft())


def convert_samples(samples: Any) -> Tensor:
    """Convert samples to a tensor and check them.

    Args:
        samples: (S,) floating-point samples: an array, a tensor or a list. An array can be read-only, and can have any
            strides and any byte order.

    Returns:
        (S,) float32 samples on the CPU, a copy.

    Raises:
        ValueError: the samples do not have one dimension, are not floating-point numbers, or are not finite.
    """
    if isinstance(samples, Tensor):
        tensor = samples.detach()
    else:
        array = np.asarray(samples)
        # a copy with the byte order and the strides that PyTorch supports
        tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    if tensor.ndim != 1:
        raise ValueError(f"samples must have one dimension, got the shape {tuple(tensor.shape)}: mix the channels")
    if len(tensor) and not tensor.is_floating_point():
        raise ValueError(
            f"samples must be floating-point numbers from -1 to 1, got {tensor.dtype}: divide 16-bit samples by 32768"
        )
    # the caller can overwrite its buffer after the call
    tensor = tensor.to("cpu", torch.float32, copy=True)
    if not tensor.isfinite().all():
        raise ValueError("samples must be finite, got NaN or infinity: correct the recording")
    return tensor


@dataclass(frozen=True)
class Part:
    """What one step of a stream encodes and decodes; all fields are sample numbers in the stream.

    Args:
        start: first sample that the step reads.
        chunk_start: first sample of the chunk that the step decodes.
        chunk_stop: end of the chunk, exclusive.
        stop: end of the samples that the step reads, exclusive.
        is_last: whether no samples follow the chunk.
    """

    start: int
    chunk_start: int
    chunk_stop: int
    stop: int
    is_last: bool = False


def plan_part(num_decoded: int, num_received: int, settings: StreamSettings, is_last: bool) -> Part | None:
    """Plan the next step with left and right context.

    The last chunk of a stream contains all remaining samples, and its left context is longer by the missing right
    context. Source: the class `StreamingBatchedAudioBuffer` of NeMo's streaming_utils.py.

    Args:
        num_decoded: number of samples that were decoded so far.
        num_received: number of samples of the stream so far.
        settings: settings of the stream.
        is_last: whether the stream has ended.

    Returns:
        The step; `None` if it needs more samples.
    """
    left, chunk, right = (
        count * settings.samples_per_frame for count in (settings.left, settings.chunk, settings.right)
    )
    chunk_stop = num_decoded + chunk
    if chunk_stop + right <= num_received:
        return Part(max(0, num_decoded - left), num_decoded, chunk_stop, chunk_stop + right)
    start = max(0, num_received - (left + chunk + right))
    if not is_last or num_received == num_decoded or num_received - start < settings.hop_length:
        return None
    return Part(start, num_decoded, num_received, num_received, is_last=True)


def plan_cached_part(
    num_decoded: int, num_received: int, settings: StreamSettings, is_last: bool, num_context_frames: int
) -> Part | None:
    """Plan the next step of cache-aware streaming.

    The first chunk has fewer feature frames than the later ones, see `stream_step` of the encoder. The last chunk
    contains all remaining feature frames. NeMo does not decode the last 1 to 7 feature frames of a stream.

    Args:
        num_decoded: number of samples that were decoded so far, a multiple of the hop length.
        num_received: number of samples of the stream so far.
        settings: settings of the stream.
        is_last: whether the stream has ended.
        num_context_frames: number of feature frames before the chunk that the step reads in addition.

    Returns:
        The step, whose chunk starts at the first sample of its first feature frame; `None` if it needs more samples.
    """
    hop, samples_per_frame = settings.hop_length, settings.samples_per_frame
    num_new = settings.chunk * samples_per_frame
    if num_decoded == 0:
        num_new -= samples_per_frame - hop
    start = max(0, num_decoded - (NUM_MARGIN_FRAMES + num_context_frames) * hop)
    chunk_stop = num_decoded + num_new
    # the window of the last feature frame of the chunk ends here
    stop = chunk_stop - hop + settings.window_length // 2
    if stop <= num_received:
        return Part(start, num_decoded, chunk_stop, stop)
    # a recording of S samples has S // hop_length valid feature frames
    chunk_stop = num_received // hop * hop
    if not is_last or chunk_stop <= num_decoded:
        return None
    return Part(start, num_decoded, chunk_stop, num_received, is_last=True)


def get_first_needed_sample(num_decoded: int, settings: StreamSettings, num_context_frames: int = 0) -> int:
    """Return the first sample that a later step can read.

    Args:
        num_decoded: number of samples that were decoded so far.
        settings: settings of the stream.
        num_context_frames: see `plan_cached_part`.
    """
    if settings.is_cache_aware:
        return max(0, num_decoded - (NUM_MARGIN_FRAMES + num_context_frames) * settings.hop_length)
    # the last step has no right context, and up to `chunk` frames more left context
    return max(0, num_decoded - (settings.left + settings.chunk) * settings.samples_per_frame)
