"""The modules of the FastConformer encoder: subsampling, convolution, feed-forward, and the block that joins them.

Attention is in `attention.py`; saving, loading and the outputs of a model are in `modeling_parakeet.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import ParakeetEncoderAttention
from .configuration_parakeet import ParakeetEncoderConfig

Lengths = TypeVar("Lengths", int, Tensor)


def subsampled_lengths(lengths: Lengths, config: ParakeetEncoderConfig) -> Lengths:
    """Count the encoder frames that remain of so many mel frames.

    Args:
        lengths: mel frames, a number or an integer tensor of any shape.
        config: the encoder's configuration.

    Returns:
        Encoder frames, same type and shape; 0 stays 0.
    """
    kernel, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
    padding = sum(subsampling_padding(config))
    is_empty = lengths == 0
    for _ in range(int(math.log2(config.subsampling_factor))):
        lengths = (lengths + padding - kernel) // stride + 1
    if isinstance(lengths, Tensor):
        return lengths.masked_fill(is_empty, 0)
    return 0 if is_empty else lengths


def subsampling_padding(config: ParakeetEncoderConfig) -> tuple[int, int]:
    """Return the zeros before and after each axis of a subsampling convolution."""
    kernel, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
    return (kernel - 1, stride - 1) if config.causal_downsampling else ((kernel - 1) // 2, (kernel - 1) // 2)


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Return the (B, width) boolean mask of the positions below each length."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def frame_mask(lengths: Tensor, images: Tensor) -> Tensor:
    """(B, 1, T, 1) mask of the frames of (B, C, T, F) below each length; NeMo zeroes the others before convolutions."""
    return length_mask(lengths, images.shape[2])[:, None, :, None]


class ParakeetEncoderSubsamplingConv2D(nn.Module):
    """Depthwise-separable convolutions that shorten time and frequency by `subsampling_factor` (arXiv 2305.05084)."""

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        channels, kernel = config.subsampling_conv_channels, config.subsampling_conv_kernel_size
        before, after = subsampling_padding(config)
        # zeros that a convolution cannot add itself: before and after each axis
        self.causal_padding = None if before == after else (before, after)
        strided: dict[str, Any] = {
            "stride": config.subsampling_conv_stride,
            "padding": before if before == after else 0,
        }
        halvings = int(math.log2(config.subsampling_factor))
        layers: list[nn.Module] = [nn.Conv2d(1, channels, kernel, **strided), nn.ReLU()]
        for _ in range(halvings - 1):
            layers.append(nn.Conv2d(channels, channels, kernel, groups=channels, **strided))
            layers.append(nn.Conv2d(channels, channels, kernel_size=1))
            layers.append(nn.ReLU())
        self.layers = nn.ModuleList(layers)
        bins = subsampled_lengths(config.num_mel_bins, config)
        self.linear = nn.Linear(channels * bins, config.hidden_size)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Shorten a batch of features.

        Args:
            features: (B, T, F) mel features.
            lengths: (B,) valid mel frames; `None` when all are valid.

        Returns:
            (B, N, H) frames; rows past a clip's end hold the bias of the last projection.
        """
        hidden = features[:, None]
        if lengths is not None:
            hidden = hidden * frame_mask(lengths, hidden)
        for layer in self.layers:
            if not isinstance(layer, nn.Conv2d):
                # no layer keeps its output for the gradient, so it may always be overwritten
                hidden = hidden.relu_() if lengths is None else hidden.mul_(frame_mask(lengths, hidden)).relu_()
                continue
            if self.causal_padding and layer.stride[0] > 1:
                hidden = F.pad(hidden, self.causal_padding * 2)
                lengths = None if lengths is None else lengths + sum(self.causal_padding)
            # weights in channels-last memory make the result so, and depthwise and 1 x 1 convolutions several times
            # faster; `clone` says it even where one input channel leaves the layout open
            weight = layer.weight.clone(memory_format=torch.channels_last)
            hidden = F.conv2d(hidden, weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)
            if lengths is not None:
                lengths = (lengths + 2 * int(layer.padding[0]) - layer.kernel_size[0]) // layer.stride[0] + 1
        # (B, C, N, F') -> (B, N, C * F'), channel-major as in NeMo
        return self.linear(hidden.transpose(1, 2).flatten(2))


class ParakeetEncoderFeedForward(nn.Module):
    """Two projections with an activation between them."""

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.attention_bias)
        self.activation = activation(config.hidden_act)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.attention_bias)
        self.dropout = config.activation_dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, N, H) to (B, N, H)."""
        hidden = self.activation(self.linear1(hidden))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return self.linear2(hidden)


class ParakeetEncoderConvolutionModule(nn.Module):
    """Gated pointwise convolution, depthwise convolution over time, norm, pointwise convolution."""

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        width, kernel, bias = config.hidden_size, config.conv_kernel_size, config.convolution_bias
        self.activation = activation(config.hidden_act)
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1, bias=bias)
        left, right = config.conv_context_size or ((kernel - 1) // 2, (kernel - 1) // 2)
        # zeros that the convolution cannot add itself: before and after the frames
        self.uneven_padding = None if left == right else (left, right)
        padding = left if left == right else 0
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=padding, groups=width, bias=bias)
        self.norm = nn.LayerNorm(width) if config.conv_norm_type == "layer_norm" else nn.BatchNorm1d(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1, bias=bias)

    def forward(self, hidden: Tensor, valid: Tensor | None = None, is_repeated: bool = False) -> Tensor:
        """Map (B, N, H) to (B, N, H).

        Args:
            hidden: (B, N, H) frames.
            valid: (B, N) boolean mask of the frames inside the clips; the others must not leak into them.
            is_repeated: gradient checkpointing repeats a pass, which must not move the running statistics again.
        """
        # the deviation of a single frame is undefined: it is normalised as outside training
        of_batch = self.training and hidden.shape[:2].numel() > 1
        hidden = F.glu(pointwise(self.pointwise_conv1, hidden), dim=-1)
        if valid is not None:
            hidden = hidden.mul_(valid[..., None])
        if self.uneven_padding:
            hidden = F.pad(hidden, (0, 0, *self.uneven_padding))
        hidden = depthwise(hidden, *self._filter(of_batch), padding=int(self.depthwise_conv.padding[0]))
        if isinstance(self.norm, nn.LayerNorm):
            hidden = self.norm(hidden)
        elif of_batch:
            hidden = batch_norm(self.norm, hidden.transpose(1, 2), is_repeated).transpose(1, 2)
        return pointwise(self.pointwise_conv2, self.activation(hidden))

    def _filter(self, of_batch: bool) -> tuple[Tensor, Tensor | None]:
        """Return weight (H, 1, k) and bias of the depthwise convolution.

        Batch norm is part of them unless it uses the statistics of the batch.
        """
        weight, bias = self.depthwise_conv.weight, self.depthwise_conv.bias
        norm: Any = self.norm
        if of_batch or isinstance(norm, nn.LayerNorm):
            return weight, bias
        scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
        shift = (0.0 if bias is None else bias.float()) - norm.running_mean.float()
        folded = weight.float() * scale[:, None, None]
        return folded.to(weight.dtype), torch.addcmul(norm.bias.float(), shift, scale).to(weight.dtype)


def batch_norm(norm: nn.BatchNorm1d, hidden: Tensor, is_repeated: bool) -> Tensor:
    """Normalise (B, H, N); a repeated pass moves copies of the running statistics."""
    if not is_repeated:
        return norm(hidden)
    copies = {name: value.clone() for name, value in norm.named_buffers()}
    normalised: Tensor = torch.func.functional_call(norm, copies, (hidden,))
    return normalised


def silu(hidden: Tensor) -> Tensor:
    """SiLU that overwrites its input when no gradient is wanted."""
    return F.silu(hidden, inplace=not torch.is_grad_enabled())


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation of that name."""
    return silu if name == "silu" else ACT2FN[name]


def depthwise(hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Convolve every channel of (B, N, H) over time with its own filter (H, 1, k), with so many zeros on both sides.

    As a channels-last image of height 1: (B, N, H) is that already, and the 2-D kernels are several times faster.
    """
    image = hidden[:, None].permute(0, 3, 1, 2)
    filters = weight[:, :, None].clone(memory_format=torch.channels_last)
    out = F.conv2d(image, filters, bias, padding=(0, padding), groups=len(weight))
    return out[:, :, 0].transpose(1, 2)


def pointwise(conv: nn.Conv1d, hidden: Tensor) -> Tensor:
    """Apply a convolution of kernel 1 to (B, N, H) as the matrix product that it is."""
    return F.linear(hidden, conv.weight[..., 0], conv.bias)


class ParakeetEncoderBlock(GradientCheckpointingLayer):
    """One conformer block: half feed-forward, attention, convolution, half feed-forward, norm (arXiv 2005.08100)."""

    def __init__(self, config: ParakeetEncoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.dropout = config.residual_dropout
        width = config.hidden_size
        self.feed_forward1 = ParakeetEncoderFeedForward(config)
        self.self_attn = ParakeetEncoderAttention(config, layer_idx)
        self.conv = ParakeetEncoderConvolutionModule(config)
        self.feed_forward2 = ParakeetEncoderFeedForward(config)
        self.norm_feed_forward1 = nn.LayerNorm(width)
        self.norm_self_att = nn.LayerNorm(width)
        self.norm_conv = nn.LayerNorm(width)
        self.norm_feed_forward2 = nn.LayerNorm(width)
        self.norm_out = nn.LayerNorm(width)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        runs: Iterator[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map (B, N, H) to (B, N, H).

        Args:
            hidden_states: (B, N, H) frames.
            attention_mask: (B, N) boolean mask of valid frames.
            position_embeddings: of the relative positions.
            runs: counts the runs of this block on these frames from 0, because gradient checkpointing repeats them.
            **kwargs: of the attention.
        """
        is_repeated = runs is not None and next(runs) > 0
        hidden = hidden_states
        hidden = torch.add(hidden, self._drop(self.feed_forward1(self.norm_feed_forward1(hidden))), alpha=0.5)
        attended, _ = self.self_attn(self.norm_self_att(hidden), position_embeddings, attention_mask, **kwargs)
        hidden = hidden + self._drop(attended)
        hidden = hidden + self._drop(self.conv(self.norm_conv(hidden), attention_mask, is_repeated))
        hidden = torch.add(hidden, self._drop(self.feed_forward2(self.norm_feed_forward2(hidden))), alpha=0.5)
        return self.norm_out(hidden)

    def _drop(self, branch: Tensor) -> Tensor:
        """Apply dropout to the output (B, N, H) of a residual branch."""
        return F.dropout(branch, self.dropout, self.training)


def drop_probabilities(config: ParakeetEncoderConfig) -> list[float]:
    """Return the probability of dropping each block in training.

    The modes are those of NeMo: collections/asr/parts/utils/regularization_utils.py
    """
    layers, start = config.num_hidden_layers, config.stochastic_depth_start_layer
    if config.stochastic_depth_mode is None:
        return [float(config.layerdrop)] * layers
    depths = range(1, layers - start + 1)
    is_linear = config.stochastic_depth_mode == "linear"
    return [0.0] * start + [config.layerdrop * (depth / len(depths) if is_linear else 1.0) for depth in depths]


def drop_block(before: Tensor, after: Tensor, probability: float, rescale: bool) -> Tensor:
    """Drop what a block adds to its input, or keep it (LayerDrop, arXiv 1909.11556).

    A dropped block has run and gets gradients of 0: processes that train together must use the same parameters in every
    step, and may draw differently.

    Args:
        before: (B, N, H) input of the block.
        after: (B, N, H) its output.
        probability: of dropping it.
        rescale: divide what is kept by its probability, as NeMo does.

    Returns:
        (B, N, H) input of the next block.
    """
    if probability == 0:
        return after
    if torch.rand([]) < probability:
        return torch.where(torch.ones((), dtype=torch.bool, device=before.device), before, after)
    return before + (after - before) / (1.0 - probability) if rescale else after
