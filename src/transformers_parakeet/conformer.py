"""The FastConformer encoder's modules: subsampling, relative positions, attention, convolution and feed-forward.

Knows tensors and their masks only; what a model is, how it is saved and which outputs it collects is for
`modeling_parakeet.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_parakeet import ParakeetEncoderConfig

# wavelength base of the sinusoidal positions, "Attention Is All You Need" section 3.5
POSITION_BASE = 10000.0


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
    padding = 2 * ((kernel - 1) // 2)
    for _ in range(int(math.log2(config.subsampling_factor))):
        lengths = (lengths + padding - kernel) // stride + 1
    return lengths


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
        strided: dict[str, Any] = {"stride": config.subsampling_conv_stride, "padding": (kernel - 1) // 2}
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
            # weights in channels-last memory make the result so, and depthwise and 1 x 1 convolutions several times
            # faster; `clone` says it even where one input channel leaves the layout open
            weight = layer.weight.clone(memory_format=torch.channels_last)
            hidden = F.conv2d(hidden, weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)
            if lengths is not None:
                lengths = (lengths + 2 * int(layer.padding[0]) - layer.kernel_size[0]) // layer.stride[0] + 1
        # (B, C, N, F') -> (B, N, C * F'), channel-major as in NeMo
        return self.linear(hidden.transpose(1, 2).flatten(2))


class ParakeetEncoderRelPositionalEncoding(nn.Module):
    """Sinusoids of the relative positions N-1 .. -(N-1), sine on even and cosine on odd channels."""

    inv_freq: Tensor

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self.frequencies(config), persistent=False)

    @staticmethod
    def frequencies(config: ParakeetEncoderConfig) -> Tensor:
        """Return the (H/2,) angular frequencies."""
        exponents = torch.arange(0, config.hidden_size, 2, dtype=torch.float32) / config.hidden_size
        return 1.0 / POSITION_BASE**exponents

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """Return (2N-1, H) embeddings for (B, N, H) frames, in their dtype: one table for every clip of the batch."""
        frames = hidden.shape[1]
        positions = torch.arange(frames - 1, -frames, -1, device=hidden.device, dtype=torch.float32)
        angles = positions[:, None] * self.inv_freq.float()
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(hidden.dtype)


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
    """Gated pointwise convolution, depthwise convolution over time, batch norm, pointwise convolution."""

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        width, kernel, bias = config.hidden_size, config.conv_kernel_size, config.convolution_bias
        self.activation = activation(config.hidden_act)
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1, bias=bias)
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=(kernel - 1) // 2, groups=width, bias=bias)
        self.norm = nn.BatchNorm1d(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1, bias=bias)

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """Map (B, N, H) to (B, N, H).

        Args:
            hidden: (B, N, H) frames.
            valid: (B, N) boolean mask of the frames inside the clips; the others must not leak into them.
        """
        hidden = F.glu(pointwise(self.pointwise_conv1, hidden), dim=-1)
        if valid is not None:
            hidden = hidden.mul_(valid[..., None])
        hidden = depthwise(hidden, *self._filter())
        if self.training:
            hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        return pointwise(self.pointwise_conv2, self.activation(hidden))

    def _filter(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (H, 1, k) and bias of the depthwise convolution; outside training the norm is part of them."""
        weight, bias = self.depthwise_conv.weight, self.depthwise_conv.bias
        norm: Any = self.norm
        if self.training:
            return weight, bias
        scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
        shift = (0.0 if bias is None else bias.float()) - norm.running_mean.float()
        folded = weight.float() * scale[:, None, None]
        return folded.to(weight.dtype), torch.addcmul(norm.bias.float(), shift, scale).to(weight.dtype)


def silu(hidden: Tensor) -> Tensor:
    """SiLU that overwrites its input when no gradient is wanted."""
    return F.silu(hidden, inplace=not torch.is_grad_enabled())


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation of that name."""
    return silu if name == "silu" else ACT2FN[name]


def depthwise(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve every channel of (B, N, H) over time with its own filter (H, 1, k), N kept.

    As a channels-last image of height 1: (B, N, H) is that already, and the 2-D kernels are several times faster.
    """
    image = hidden[:, None].permute(0, 3, 1, 2)
    filters = weight[:, :, None].clone(memory_format=torch.channels_last)
    out = F.conv2d(image, filters, bias, padding=(0, weight.shape[-1] // 2), groups=len(weight))
    return out[:, :, 0].transpose(1, 2)


def pointwise(conv: nn.Conv1d, hidden: Tensor) -> Tensor:
    """Apply a convolution of kernel 1 to (B, N, H) as the matrix product that it is."""
    return F.linear(hidden, conv.weight[..., 0], conv.bias)


def relative_shift(scores: Tensor) -> Tensor:
    """Turn scores by relative position into scores by key (Transformer-XL, arXiv 1901.02860, appendix B).

    Args:
        scores: (..., N, 2N-1), contiguous; column j of query i belongs to key i + j - (N-1).

    Returns:
        (..., N, N) view of the same memory: entry (i, k) lies at i * (2N-1) + k - i + N-1.
    """
    frames = scores.shape[-2]
    flat = scores.flatten(-2)[..., frames - 1 : frames - 1 + frames * (2 * frames - 2)]
    if frames == 1:
        return scores
    return flat.unflatten(-1, (frames, 2 * frames - 2))[..., :frames]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend in plain PyTorch; the only implementation that returns the weights.

    Args:
        module: the attention module, for its training flag.
        query, key, value: (B, heads, N, head width).
        attention_mask: (B, heads, N, N) additive bias.
        scaling: factor of the dot products.
        dropout: probability on the weights.

    Returns:
        (B, N, heads, head width) and the (B, heads, N, N) weights.
    """
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ParakeetEncoderAttention(nn.Module):
    """Multi-head attention with relative positions (Transformer-XL, arXiv 1901.02860, section 3.3)."""

    def __init__(self, config: ParakeetEncoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)
        self.relative_k_proj = nn.Linear(width, width, bias=False)
        self.bias_u = nn.Parameter(torch.zeros(self.heads, self.head_dim))
        self.bias_v = nn.Parameter(torch.zeros(self.heads, self.head_dim))

    def forward(
        self, hidden: Tensor, position_embeddings: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over all valid frames.

        Args:
            hidden: (B, N, H) frames.
            position_embeddings: (2N-1, H) relative positions.
            attention_mask: (B, N) boolean mask of the frames inside the clips.

        Returns:
            (B, N, H), and the (B, heads, N, N) weights where the implementation gives them.
        """
        query = self._split(self.q_proj(hidden))
        key = self._split(self.k_proj(hidden)).transpose(1, 2)
        value = self._split(self.v_proj(hidden)).transpose(1, 2)
        bias = self._position_bias(query, position_embeddings)
        if attention_mask is not None:
            bias = bias.masked_fill(~attention_mask[:, None, None], torch.finfo(bias.dtype).min)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        flex = self.config._attn_implementation == "flex_attention"
        output, weights = attend(
            self,
            query=(query + self.bias_u).transpose(1, 2),
            key=key,
            value=value,
            # flex attention applies a mask of the first head to all heads; its position bias is per head
            **({"attention_mask": None, "position_bias": bias} if flex else {"attention_mask": bias}),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights

    def _split(self, hidden: Tensor) -> Tensor:
        """(B, N, H) -> (B, N, heads, head width)."""
        return hidden.unflatten(-1, (self.heads, self.head_dim))

    def _position_bias(self, query: Tensor, position_embeddings: Tensor) -> Tensor:
        """Return the (B, heads, N, N) scaled scores of each query with the relative positions."""
        batch, frames = query.shape[:2]
        positions = self._split(self.relative_k_proj(position_embeddings)).permute(1, 2, 0)
        # one product per head for all clips: (heads, B N, head width) x (heads, head width, 2N-1)
        queries = ((query + self.bias_v) * self.scaling).flatten(0, 1).transpose(0, 1)
        scores = torch.bmm(queries, positions).unflatten(1, (batch, frames)).transpose(0, 1)
        return relative_shift(scores)


class ParakeetEncoderBlock(GradientCheckpointingLayer):
    """One conformer block: half feed-forward, attention, convolution, half feed-forward, norm (arXiv 2005.08100)."""

    def __init__(self, config: ParakeetEncoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.gradient_checkpointing = False
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
        **kwargs: Any,
    ) -> Tensor:
        """Map (B, N, H) to (B, N, H); `attention_mask` is the (B, N) boolean mask of valid frames."""
        hidden = hidden_states
        hidden = torch.add(hidden, self.feed_forward1(self.norm_feed_forward1(hidden)), alpha=0.5)
        attended, _ = self.self_attn(self.norm_self_att(hidden), position_embeddings, attention_mask, **kwargs)
        hidden = hidden + attended
        hidden = hidden + self.conv(self.norm_conv(hidden), attention_mask)
        hidden = torch.add(hidden, self.feed_forward2(self.norm_feed_forward2(hidden)), alpha=0.5)
        return self.norm_out(hidden)
