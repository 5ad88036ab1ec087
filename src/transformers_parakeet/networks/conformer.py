"""The modules of the FastConformer encoder: subsampling, convolution, feed-forward, and the block that joins them.

Attention is in `attention.py`; saving, loading and the outputs of a model are in `modeling_parakeet.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration_parakeet import ParakeetEncoderConfig
from .attention import ParakeetEncoderAttention
from .fast_linear import is_plain, pointwise

# the class that transformers has for the activation "silu"
SILU = type(ACT2FN["silu"])

Lengths = TypeVar("Lengths", int, Tensor)


def subsampled_lengths(lengths: Lengths, config: ParakeetEncoderConfig) -> Lengths:
    """Count the encoder frames that remain of so many mel frames.

    Args:
        lengths: mel frames, a number or an integer tensor of any shape.
        config: the encoder's configuration.

    Returns:
        Encoder frames, same type and shape; 0 stays 0.
    """
    is_empty = lengths == 0
    for _ in range(int(math.log2(config.subsampling_factor))):
        lengths = strided_lengths(lengths, config)
    if isinstance(lengths, Tensor):
        return lengths.masked_fill(is_empty, 0)
    return 0 if is_empty else lengths


def strided_lengths(lengths: Lengths, config: ParakeetEncoderConfig) -> Lengths:
    """Count the frames that one strided convolution makes of so many."""
    padding, kernel = sum(subsampling_padding(config)), config.subsampling_conv_kernel_size
    return (lengths + padding - kernel) // config.subsampling_conv_stride + 1


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
        self.config = config
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
        # of each layer: whether a convolution is strided, None for an activation; an adapter may stand in its place
        self.strided: list[bool | None] = [True, None, *[True, False, None] * (halvings - 1)]
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
        owned = True
        for layer, strided in zip(self.layers, self.strided, strict=True):
            if strided is None:
                hidden = self._rectified(layer, hidden, lengths, owned)
                continue
            if strided and self.causal_padding:
                hidden = F.pad(hidden, self.causal_padding * 2)
            owned = is_plain(layer, nn.Conv2d)
            hidden = channels_last_conv(layer, hidden) if owned else layer(hidden)
            if lengths is not None and strided:
                lengths = strided_lengths(lengths, self.config)
        # (B, C, N, F') -> (B, N, C * F'), channel-major as in NeMo
        return self.linear(hidden.transpose(1, 2).flatten(2))

    def _rectified(self, layer: nn.Module, hidden: Tensor, lengths: Tensor | None, owned: bool) -> Tensor:
        """Mask the frames past the clips' ends and apply the activation, in place where nobody else holds the input."""
        mask = None if lengths is None else frame_mask(lengths, hidden)
        if not (owned and is_plain(layer, nn.ReLU)):
            result: Tensor = layer(hidden if mask is None else hidden * mask)
            return result
        # no convolution keeps its output for the gradient
        return hidden.relu_() if mask is None else hidden.mul_(mask).relu_()


def channels_last_conv(layer: Any, hidden: Tensor) -> Tensor:
    """Apply an `nn.Conv2d` with its weight in channels-last memory.

    The result is in that layout, too, in which depthwise and 1 x 1 convolutions are several times faster. `clone` asks
    for it even where one input channel leaves the layout open.
    """
    weight = layer.weight.clone(memory_format=torch.channels_last)
    return F.conv2d(hidden, weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)


class ParakeetEncoderFeedForward(nn.Module):
    """Two projections with an activation between them."""

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.attention_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.attention_bias)
        self.dropout = config.activation_dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, N, H) to (B, N, H)."""
        hidden = activate(self.activation, self.linear1(hidden), self.linear1)
        hidden = F.dropout(hidden, self.dropout, self.training)
        return self.linear2(hidden)


class ParakeetEncoderConvolutionModule(nn.Module):
    """Gated pointwise convolution, depthwise convolution over time, norm, pointwise convolution."""

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        width, kernel, bias = config.hidden_size, config.conv_kernel_size, config.convolution_bias
        self.activation = ACT2FN[config.hidden_act]
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1, bias=bias)
        left, right = config.conv_context_size or ((kernel - 1) // 2, (kernel - 1) // 2)
        # zeros that the convolution cannot add itself: before and after the frames
        self.uneven_padding = None if left == right else (left, right)
        padding = left if left == right else 0
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=padding, groups=width, bias=bias)
        # an adapter may stand in place of the module, so its type does not tell
        self.norm_type = config.conv_norm_type
        self.norm: nn.Module = nn.LayerNorm(width) if config.conv_norm_type == "layer_norm" else nn.BatchNorm1d(width)
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
        conv, norm = self.depthwise_conv, self.norm
        if not of_batch and is_plain(conv, nn.Conv1d) and is_plain(norm, nn.BatchNorm1d):
            hidden = depthwise(hidden, *folded_filter(conv, norm), padding=int(conv.padding[0]))
        else:
            hidden = self._normed(self._convolved(hidden), is_repeated)
        return pointwise(self.pointwise_conv2, activate(self.activation, hidden, norm))

    def _convolved(self, hidden: Tensor) -> Tensor:
        """Apply the depthwise convolution to (B, N, H)."""
        conv = self.depthwise_conv
        if is_plain(conv, nn.Conv1d):
            return depthwise(hidden, conv.weight, conv.bias, padding=int(conv.padding[0]))
        return conv(hidden.transpose(1, 2)).transpose(1, 2)

    def _normed(self, hidden: Tensor, is_repeated: bool) -> Tensor:
        """Apply the norm to (B, N, H); a repeated pass moves copies of the running statistics."""
        if self.norm_type == "layer_norm":
            return self.norm(hidden)
        if not is_repeated:
            return self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        copies = {name: value.clone() for name, value in self.norm.named_buffers()}
        normalised: Tensor = torch.func.functional_call(self.norm, copies, (hidden.transpose(1, 2),))
        return normalised.transpose(1, 2)


def folded_filter(conv: nn.Conv1d, norm: Any) -> tuple[Tensor, Tensor]:
    """Return weight (H, 1, k) and bias (H,) of a depthwise convolution and the batch norm after it, as one filter."""
    weight, bias = conv.weight, conv.bias
    scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
    shift = (0.0 if bias is None else bias.float()) - norm.running_mean.float()
    folded = weight.float() * scale[:, None, None]
    return folded.to(weight.dtype), torch.addcmul(norm.bias.float(), shift, scale).to(weight.dtype)


def activate(activation: nn.Module, hidden: Tensor, source: nn.Module) -> Tensor:
    """Apply an activation; a plain SiLU overwrites its input when nobody else can hold it and no gradient is wanted.

    Args:
        activation: the module.
        hidden: its input.
        source: the module that computed the input; hooks may have kept the output of one that is not plain.
    """
    owned = type(source) in (nn.Linear, nn.BatchNorm1d, nn.LayerNorm) and is_plain(source, type(source))
    if owned and is_plain(activation, SILU) and not torch.is_grad_enabled():
        return F.silu(hidden, inplace=True)
    result: Tensor = activation(hidden)
    return result


def depthwise(hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Convolve every channel of (B, N, H) over time with its own filter (H, 1, k), with so many zeros on both sides.

    As a channels-last image of height 1: (B, N, H) is that already, and the 2-D kernels are several times faster.
    """
    image = hidden[:, None].permute(0, 3, 1, 2)
    filters = weight[:, :, None].clone(memory_format=torch.channels_last)
    out = F.conv2d(image, filters, bias, padding=(0, padding), groups=len(weight))
    return out[:, :, 0].transpose(1, 2)


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
