"""Subsampling of the FastConformer encoder: strided convolutions that reduce feature frames to encoder frames.

The other modules of the encoder are in `conformer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configuration_parakeet import ParakeetEncoderConfig
from .fast_linear import is_unmodified

# number of feature frames, of all clips of a batch together, whose convolutions are computed at once without gradients.
# For 512 frames the output of the first convolution takes 8 MiB with 256 channels and 128 mel bins in bfloat16; larger
# outputs do not stay in the cache. Measured with one thread in bfloat16, with the projection in the same chunks: 60 s
# took 244 ms in chunks of 6000 frames, 111 ms in chunks of 512 and 132 ms in chunks of 256.
FRAMES_PER_CHUNK = 512

# number of feature frames, of all clips of a batch together, whose output of the convolutions is projected at once
# without gradients; 12000 frames are 1500 encoder frames. Each product reads the whole weight.
FRAMES_PER_PROJECTION = 12000

# a number of frames, or an integer tensor with one number of frames per clip
Lengths = TypeVar("Lengths", int, Tensor)


def compute_subsampled_lengths(lengths: Lengths, config: ParakeetEncoderConfig) -> Lengths:
    """Compute the number of encoder frames from the number of mel frames.

    Args:
        lengths: number of mel frames: an integer, or an integer tensor of any shape.
        config: configuration of the encoder.

    Returns:
        Number of encoder frames, as an integer or a tensor of the shape of `lengths`; 0 mel frames give 0 encoder
        frames.
    """
    is_empty = lengths == 0
    for _ in range(int(math.log2(config.subsampling_factor))):
        lengths = compute_strided_lengths(lengths, config)
    if isinstance(lengths, Tensor):
        return lengths.masked_fill(is_empty, 0)
    return 0 if is_empty else lengths


def compute_strided_lengths(lengths: Lengths, config: ParakeetEncoderConfig) -> Lengths:
    """Compute the number of output frames of one strided subsampling convolution.

    Args:
        lengths: number of input frames: an integer, or an integer tensor of any shape.
        config: configuration of the encoder.

    Returns:
        Number of output frames, as an integer or a tensor of the shape of `lengths`.
    """
    total_padding, kernel_size = sum(get_subsampling_padding(config)), config.subsampling_conv_kernel_size
    return (lengths + total_padding - kernel_size) // config.subsampling_conv_stride + 1


def get_subsampling_padding(config: ParakeetEncoderConfig) -> tuple[int, int]:
    """Return the zero padding of a strided subsampling convolution, the same for time and frequency.

    Args:
        config: configuration of the encoder.

    Returns:
        Number of zeros before the first and number of zeros after the last position.
    """
    kernel_size, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
    if config.causal_downsampling:
        # as in NeMo's CausalConv2D
        return kernel_size - 1, stride - 1
    return (kernel_size - 1) // 2, (kernel_size - 1) // 2


def compute_chunk_margins(config: ParakeetEncoderConfig) -> tuple[int, int]:
    """Compute how many encoder frames at each end of a chunk of features differ from those of the whole clip.

    The convolutions add zeros at the ends of a chunk, where the whole clip has frames. The zeros change the first and
    last frames. A chunk starts and ends at a multiple of `subsampling_factor` feature frames.

    Args:
        config: configuration of the encoder.

    Returns:
        Number of encoder frames at the start and at the end of a chunk.
    """
    before, _ = get_subsampling_padding(config)
    kernel_size, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
    left, right = 0, 0
    for _ in range(int(math.log2(config.subsampling_factor))):
        # output frame i reads the input frames i * stride - before to i * stride - before + kernel_size - 1; divisions
        # are rounded up
        left = -(-(left + before) // stride)
        right = max(0, -(-(right + kernel_size - before - stride) // stride))
    return left, right


def build_length_mask(lengths: Tensor, padded_length: int) -> Tensor:
    """Build the padding mask of a batch of sequences from their lengths.

    Args:
        lengths: (B,) length of each sequence.
        padded_length: length of the padded sequences.

    Returns:
        (B, padded_length) boolean mask, True on non-padding positions.
    """
    return torch.arange(padded_length, device=lengths.device) < lengths[:, None]


def build_frame_mask(lengths: Tensor, images: Tensor) -> Tensor:
    """Build the padding mask for an input of the subsampling convolutions.

    Args:
        lengths: (B,) number of non-padding frames.
        images: (B, channels, frames, frequencies) input of a convolution; only its number of frames is used.

    Returns:
        (B, 1, frames, 1) boolean mask, True on non-padding frames.
    """
    return build_length_mask(lengths, images.shape[2])[:, None, :, None]


class ParakeetEncoderSubsamplingConv2D(nn.Module):
    """Depthwise-separable convolutions that downsample time and frequency by `subsampling_factor` (arXiv 2305.05084).

    Args:
        config: configuration of the encoder.
    """

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        self.config = config
        channels, kernel_size = config.subsampling_conv_channels, config.subsampling_conv_kernel_size
        before, after = get_subsampling_padding(config)
        # `nn.Conv2d` pads both ends of an axis equally, so `forward` applies unequal padding itself
        self.asymmetric_padding = None if before == after else (before, after)
        conv_options: dict[str, Any] = {
            "stride": config.subsampling_conv_stride,
            "padding": before if before == after else 0,
        }
        num_stages = int(math.log2(config.subsampling_factor))
        layers: list[nn.Module] = [nn.Conv2d(1, channels, kernel_size, **conv_options), nn.ReLU()]
        # `forward` cannot recognise a layer by its class, because an adapter may have replaced the layer
        self.layer_roles = ["strided", "activation", *["strided", "pointwise", "activation"] * (num_stages - 1)]
        for _ in range(num_stages - 1):
            layers.append(nn.Conv2d(channels, channels, kernel_size, groups=channels, **conv_options))
            layers.append(nn.Conv2d(channels, channels, kernel_size=1))
            layers.append(nn.ReLU())
        self.layers = nn.ModuleList(layers)
        num_frequencies = compute_subsampled_lengths(config.num_mel_bins, config)
        self.linear = nn.Linear(channels * num_frequencies, config.hidden_size)

    def forward(self, features: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """Downsample a batch of mel features and project the result to the width of the encoder.

        Without gradients, long clips are downsampled in chunks, because the output of the first convolution is about 60
        times as large as the features. A compiled or exported model is not divided into chunks, because its graph
        should not depend on the number of frames.

        Args:
            features: (B, T, F) mel features.
            frame_lengths: (B,) number of non-padding mel frames; `None` if there is no padding.

        Returns:
            (B, N, H) frames; every padding frame is the bias of the projection.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self.linear(self._convolve(features, frame_lengths))

        def project_chunk(features: Tensor, frame_lengths: Tensor | None) -> Tensor:
            """Downsample a chunk; its convolutions are computed in smaller chunks."""
            return self.linear(self._map_chunks(self._convolve, FRAMES_PER_CHUNK, features, frame_lengths))

        return self._map_chunks(project_chunk, FRAMES_PER_PROJECTION, features, frame_lengths)

    def _map_chunks(
        self,
        function: Callable[[Tensor, Tensor | None], Tensor],
        frames_per_chunk: int,
        features: Tensor,
        frame_lengths: Tensor | None,
    ) -> Tensor:
        """Apply a function to chunks of a few clips or of a part of a clip, and join the results.

        Args:
            function: function of features and frame lengths that returns one vector per encoder frame.
            frames_per_chunk: number of feature frames in a chunk, without its margins.
            features: (B, T, F) mel features.
            frame_lengths: (B,) number of non-padding mel frames; `None` if there is no padding.

        Returns:
            (B, N, ...) results.
        """
        num_clips, num_frames = features.shape[:2]
        if num_clips * num_frames <= frames_per_chunk:
            return function(features, frame_lengths)
        clips_per_chunk = max(1, frames_per_chunk // num_frames)
        outputs = []
        for first_clip in range(0, num_clips, clips_per_chunk):
            clips = slice(first_clip, first_clip + clips_per_chunk)
            lengths = None if frame_lengths is None else frame_lengths[clips]
            outputs.append(self._map_time_chunks(function, frames_per_chunk, features[clips], lengths))
        return torch.cat(outputs)

    def _map_time_chunks(
        self,
        function: Callable[[Tensor, Tensor | None], Tensor],
        frames_per_chunk: int,
        features: Tensor,
        frame_lengths: Tensor | None,
    ) -> Tensor:
        """Apply a function to ranges of frames of a few clips, and join the results; see `_map_chunks`."""
        num_frames, factor = features.shape[1], self.config.subsampling_factor
        num_outputs = compute_subsampled_lengths(num_frames, self.config)
        left_margin, right_margin = compute_chunk_margins(self.config)
        outputs_per_chunk = max(1, frames_per_chunk // factor)
        chunks = []
        for first_output in range(0, num_outputs, outputs_per_chunk):
            last_output = min(first_output + outputs_per_chunk, num_outputs)
            # neighbouring chunks overlap, and the encoder frames in the margins are removed
            start = max(0, first_output - left_margin) * factor
            stop = num_frames if last_output == num_outputs else (last_output + right_margin) * factor
            # negative lengths are allowed; they mask all frames of the chunk
            lengths = None if frame_lengths is None else frame_lengths - start
            outputs = function(features[:, start:stop], lengths)
            chunks.append(outputs[:, first_output - start // factor : last_output - start // factor])
        return torch.cat(chunks, 1)

    def _convolve(self, features: Tensor, frame_lengths: Tensor | None) -> Tensor:
        """Apply the convolutions to all frames of a batch at once.

        Args:
            features: (B, T, F) mel features.
            frame_lengths: (B,) number of non-padding mel frames; `None` if there is no padding.

        Returns:
            (B, N, channels * frequencies) input of the projection.
        """
        # one input channel: (B, 1, T, F)
        hidden = features[:, None]
        if frame_lengths is not None:
            hidden = hidden * build_frame_mask(frame_lengths, hidden)
        # an activation may overwrite the output of an unmodified convolution, because no hook can have stored it
        may_overwrite = False
        for layer, role in zip(self.layers, self.layer_roles, strict=True):
            if role == "activation":
                hidden = self._mask_and_activate(layer, hidden, frame_lengths, may_overwrite)
                continue
            if role == "strided" and self.asymmetric_padding:
                # the same padding for frequency and time
                hidden = F.pad(hidden, self.asymmetric_padding * 2)
            may_overwrite = is_unmodified(layer, nn.Conv2d)
            hidden = apply_channels_last_conv(layer, hidden) if may_overwrite else layer(hidden)
            if frame_lengths is not None and role == "strided":
                frame_lengths = compute_strided_lengths(frame_lengths, self.config)
        # (B, channels, N, frequencies) -> (B, N, channels * frequencies), channel-major as in NeMo
        return hidden.transpose(1, 2).flatten(2)

    def _mask_and_activate(
        self, activation: nn.Module, hidden: Tensor, frame_lengths: Tensor | None, may_overwrite: bool
    ) -> Tensor:
        """Set the padding frames to zero and apply the activation.

        Args:
            activation: an `nn.ReLU`, or a module that replaces it.
            hidden: (B, channels, frames, frequencies) output of a convolution.
            frame_lengths: (B,) number of non-padding frames; `None` if there is no padding.
            may_overwrite: whether the result may overwrite `hidden`. Autograd permits this, because a convolution does
                not save its output for the backward pass.

        Returns:
            Output of the activation, in the shape of `hidden`.
        """
        may_overwrite = may_overwrite and is_unmodified(activation, nn.ReLU)
        if frame_lengths is not None:
            hidden = mask_frames(hidden, frame_lengths, may_overwrite)
        if may_overwrite:
            return hidden.relu_()
        activated: Tensor = activation(hidden)
        return activated


def mask_frames(images: Tensor, frame_lengths: Tensor, may_overwrite: bool) -> Tensor:
    """Set the padding frames to zero.

    Without gradients on a CPU, only the padding frames are written, because a batch has few of them.

    Args:
        images: (B, channels, frames, frequencies) output of a convolution.
        frame_lengths: (B,) number of non-padding frames.
        may_overwrite: whether the result may overwrite `images`.

    Returns:
        (B, channels, frames, frequencies) images without padding frames.
    """
    if not may_overwrite:
        return images * build_frame_mask(frame_lengths, images)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or images.device.type != "cpu":
        return images.mul_(build_frame_mask(frame_lengths, images))
    for image, length in zip(images, frame_lengths.tolist(), strict=True):
        image[:, max(0, int(length)) :].zero_()
    return images


def apply_channels_last_conv(conv: Any, images: Tensor) -> Tensor:
    """Compute `conv(images)` in channels-last memory format.

    PyTorch's depthwise and 1 x 1 convolutions are several times faster in this format.

    Args:
        conv: an unmodified `nn.Conv2d` (not quantised or wrapped).
        images: (B, channels, frames, frequencies) input of the convolution.

    Returns:
        Output of the convolution, (B, channels, frames, frequencies), in channels-last memory format.
    """
    # `contiguous` would not change the format of a weight with one input channel; `clone` does
    weight = conv.weight.clone(memory_format=torch.channels_last)
    return F.conv2d(images, weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
