"""The modules of the FastConformer encoder: subsampling, feed-forward, convolution, and the block that joins them.

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

# transformers' class for the activation "silu"
SILU = type(ACT2FN["silu"])

Lengths = TypeVar("Lengths", int, Tensor)


def subsampled_lengths(lengths: Lengths, config: ParakeetEncoderConfig) -> Lengths:
    """Convert numbers of mel frames to numbers of encoder frames.

    Args:
        lengths: mel frames, an integer or an integer tensor of any shape.
        config: configuration of the encoder.

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
    """Compute the output lengths of one strided convolution of the subsampling from its input lengths, in frames."""
    padding, kernel_size = sum(subsampling_padding(config)), config.subsampling_conv_kernel_size
    return (lengths + padding - kernel_size) // config.subsampling_conv_stride + 1


def subsampling_padding(config: ParakeetEncoderConfig) -> tuple[int, int]:
    """Return the numbers of zeros before and after each axis of the input of a subsampling convolution."""
    kernel_size, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
    if config.causal_downsampling:
        return kernel_size - 1, stride - 1
    return (kernel_size - 1) // 2, (kernel_size - 1) // 2


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Return the (B, width) boolean mask of the positions before the end of each sequence.

    Args:
        lengths: (B,) length of each sequence.
        width: padded length.
    """
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def frame_mask(lengths: Tensor, images: Tensor) -> Tensor:
    """Return the (B, 1, T, 1) mask of the valid frames; NeMo sets the others to zero before each strided convolution.

    Args:
        lengths: (B,) number of valid frames.
        images: (B, C, T, F) input of a convolution, for its number of frames.
    """
    return length_mask(lengths, images.shape[2])[:, None, :, None]


class ParakeetEncoderSubsamplingConv2D(nn.Module):
    """Depthwise-separable convolutions that shorten time and frequency by `subsampling_factor` (arXiv 2305.05084).

    Args:
        config: configuration of the encoder.
    """

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        self.config = config
        channels, kernel_size = config.subsampling_conv_channels, config.subsampling_conv_kernel_size
        before, after = subsampling_padding(config)
        # `nn.Conv2d` can only add the same number of zeros before and after an axis
        self.uneven_padding = None if before == after else (before, after)
        strided: dict[str, Any] = {
            "stride": config.subsampling_conv_stride,
            "padding": before if before == after else 0,
        }
        num_stages = int(math.log2(config.subsampling_factor))
        layers: list[nn.Module] = [nn.Conv2d(1, channels, kernel_size, **strided), nn.ReLU()]
        # kind of each layer, because the type of a layer is another one if an adapter has replaced it
        self.layer_kinds = ["strided", "activation", *["strided", "pointwise", "activation"] * (num_stages - 1)]
        for _ in range(num_stages - 1):
            layers.append(nn.Conv2d(channels, channels, kernel_size, groups=channels, **strided))
            layers.append(nn.Conv2d(channels, channels, kernel_size=1))
            layers.append(nn.ReLU())
        self.layers = nn.ModuleList(layers)
        mel_bins = subsampled_lengths(config.num_mel_bins, config)
        self.linear = nn.Linear(channels * mel_bins, config.hidden_size)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Shorten a batch of features and project it to the width of the encoder.

        Args:
            features: (B, T, F) mel features.
            lengths: (B,) number of valid mel frames; `None` if all are valid.

        Returns:
            (B, N, H) frames; padding frames hold the bias of the projection.
        """
        hidden = features[:, None]
        if lengths is not None:
            hidden = hidden * frame_mask(lengths, hidden)
        # an activation may overwrite the output of a plain convolution, because nothing else holds it
        may_overwrite = False
        for layer, kind in zip(self.layers, self.layer_kinds, strict=True):
            if kind == "activation":
                hidden = self._mask_and_activate(layer, hidden, lengths, may_overwrite)
                continue
            if kind == "strided" and self.uneven_padding:
                hidden = F.pad(hidden, self.uneven_padding * 2)
            may_overwrite = is_plain(layer, nn.Conv2d)
            hidden = channels_last_conv(layer, hidden) if may_overwrite else layer(hidden)
            if lengths is not None and kind == "strided":
                lengths = strided_lengths(lengths, self.config)
        # (B, C, N, F') -> (B, N, C * F'), channel-major as in NeMo
        return self.linear(hidden.transpose(1, 2).flatten(2))

    def _mask_and_activate(
        self, activation: nn.Module, hidden: Tensor, lengths: Tensor | None, may_overwrite: bool
    ) -> Tensor:
        """Set the padding frames to zero and apply the activation.

        Args:
            activation: an `nn.ReLU`, or a module that replaces it.
            hidden: (B, C, T, F) output of a convolution.
            lengths: (B,) number of valid frames; `None` if all are valid.
            may_overwrite: compute in place. Autograd permits it, because a convolution does not save its output.

        Returns:
            (B, C, T, F).
        """
        mask = None if lengths is None else frame_mask(lengths, hidden)
        if may_overwrite and is_plain(activation, nn.ReLU):
            return hidden.relu_() if mask is None else hidden.mul_(mask).relu_()
        result: Tensor = activation(hidden if mask is None else hidden * mask)
        return result


def channels_last_conv(conv: Any, images: Tensor) -> Tensor:
    """Compute `conv(images)` in channels-last memory.

    PyTorch's depthwise and 1 x 1 convolutions are several times faster in this layout.

    Args:
        conv: a plain `nn.Conv2d`.
        images: (B, C, T, F).

    Returns:
        (B, C', T', F') in channels-last memory.
    """
    # `clone` chooses the layout even for one input channel, where `contiguous` leaves the tensor as it is
    weight = conv.weight.clone(memory_format=torch.channels_last)
    return F.conv2d(images, weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)


class ParakeetEncoderFeedForward(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        config: configuration of the encoder.
    """

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.attention_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.attention_bias)
        self.dropout = config.activation_dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform (B, N, H) frames; the result has the same shape."""
        hidden = activate(self.activation, self.linear1(hidden), self.linear1)
        hidden = F.dropout(hidden, self.dropout, self.training)
        return self.linear2(hidden)


class ParakeetEncoderConvolutionModule(nn.Module):
    """Pointwise convolution with GLU, depthwise convolution over time, norm, activation, pointwise convolution.

    Args:
        config: configuration of the encoder.
    """

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        width, kernel_size, bias = config.hidden_size, config.conv_kernel_size, config.convolution_bias
        self.activation = ACT2FN[config.hidden_act]
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1, bias=bias)
        before, after = config.conv_context_size or ((kernel_size - 1) // 2, (kernel_size - 1) // 2)
        # `nn.Conv1d` can only add the same number of zeros before and after the frames
        self.uneven_padding = None if before == after else (before, after)
        padding = before if before == after else 0
        self.depthwise_conv = nn.Conv1d(width, width, kernel_size, padding=padding, groups=width, bias=bias)
        # stored, because the type of the module is another one if an adapter has replaced it
        self.norm_type = config.conv_norm_type
        self.norm: nn.Module = nn.LayerNorm(width) if config.conv_norm_type == "layer_norm" else nn.BatchNorm1d(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1, bias=bias)

    def forward(self, hidden: Tensor, valid: Tensor | None = None, is_repeated: bool = False) -> Tensor:
        """Transform (B, N, H) frames; the result has the same shape.

        Outside training the batch norm is folded into the depthwise filter.

        Args:
            hidden: (B, N, H) frames.
            valid: (B, N) boolean mask of the frames inside the clips; `None` if all are. The others are set to zero
                before the convolution over time.
            is_repeated: gradient checkpointing repeats this pass, so that the running statistics must not change.
        """
        # the variance of a single frame is undefined, so that it is normalised by the running statistics
        uses_batch_statistics = self.training and hidden.shape[:2].numel() > 1
        hidden = F.glu(pointwise(self.pointwise_conv1, hidden), dim=-1)
        if valid is not None:
            hidden = hidden.mul_(valid[..., None])
        if self.uneven_padding:
            hidden = F.pad(hidden, (0, 0, *self.uneven_padding))
        conv, norm = self.depthwise_conv, self.norm
        if not uses_batch_statistics and is_plain(conv, nn.Conv1d) and is_plain(norm, nn.BatchNorm1d):
            weight, bias = fold_batch_norm(conv, norm)
            hidden = depthwise(hidden, weight, bias, int(conv.padding[0]))
        else:
            hidden = self._normalise(self._convolve_over_time(hidden), is_repeated)
        return pointwise(self.pointwise_conv2, activate(self.activation, hidden, norm))

    def _convolve_over_time(self, hidden: Tensor) -> Tensor:
        """Apply the depthwise convolution, or the module that replaces it, to (B, N, H) frames."""
        conv = self.depthwise_conv
        if is_plain(conv, nn.Conv1d):
            return depthwise(hidden, conv.weight, conv.bias, int(conv.padding[0]))
        return conv(hidden.transpose(1, 2)).transpose(1, 2)

    def _normalise(self, hidden: Tensor, is_repeated: bool) -> Tensor:
        """Apply the layer norm or batch norm to (B, N, H) frames.

        Args:
            hidden: (B, N, H) frames.
            is_repeated: leave the running statistics of a batch norm unchanged by updating copies of them.

        Returns:
            (B, N, H).
        """
        if self.norm_type == "layer_norm":
            return self.norm(hidden)
        if not is_repeated:
            return self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        statistics = {name: buffer.clone() for name, buffer in self.norm.named_buffers()}
        normalised: Tensor = torch.func.functional_call(self.norm, statistics, (hidden.transpose(1, 2),))
        return normalised.transpose(1, 2)


def fold_batch_norm(conv: nn.Conv1d, norm: Any) -> tuple[Tensor, Tensor]:
    """Combine a depthwise convolution and the batch norm after it to one filter, with the running statistics.

    Args:
        conv: depthwise convolution of H channels with kernel size k.
        norm: the `nn.BatchNorm1d` after it.

    Returns:
        (H, 1, k) weight and (H,) bias in the dtype of the convolution.
    """
    weight, conv_bias = conv.weight, conv.bias
    scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
    shift = (0.0 if conv_bias is None else conv_bias.float()) - norm.running_mean.float()
    bias = torch.addcmul(norm.bias.float(), shift, scale)
    return (weight.float() * scale[:, None, None]).to(weight.dtype), bias.to(weight.dtype)


def activate(activation: nn.Module, hidden: Tensor, source: nn.Module) -> Tensor:
    """Compute `activation(hidden)`; a plain SiLU overwrites its input if nothing else needs it.

    Args:
        activation: the activation module.
        hidden: input of the activation, of any shape.
        source: the module that computed the input. If it is not plain, a hook may have stored the input. If gradients
            are computed, autograd needs the input.

    Returns:
        A tensor of the shape of `hidden`.
    """
    is_source_plain = type(source) in (nn.Linear, nn.BatchNorm1d, nn.LayerNorm) and is_plain(source, type(source))
    if is_source_plain and is_plain(activation, SILU) and not torch.is_grad_enabled():
        return F.silu(hidden, inplace=True)
    result: Tensor = activation(hidden)
    return result


def depthwise(hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Convolve each channel over time, as `F.conv1d` on (B, H, N) with H groups does.

    (B, N, H) is a channels-last image of height 1, and PyTorch's 2-D kernels for this layout are several times faster.

    Args:
        hidden: (B, N, H) frames.
        weight: (H, 1, k) filters.
        bias: (H,), or `None`.
        padding: number of zeros before the first and after the last frame.

    Returns:
        (B, N + 2 * padding - k + 1, H).
    """
    image = hidden[:, None].permute(0, 3, 1, 2)
    filters = weight[:, :, None].clone(memory_format=torch.channels_last)
    convolved = F.conv2d(image, filters, bias, padding=(0, padding), groups=len(weight))
    return convolved[:, :, 0].transpose(1, 2)


class ParakeetEncoderBlock(GradientCheckpointingLayer):
    """Conformer block: half feed-forward, attention, convolution, half feed-forward, norm (arXiv 2005.08100).

    Args:
        config: configuration of the encoder.
        layer_idx: index of the block.
    """

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
        pass_counter: Iterator[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Transform (B, N, H) frames; the result has the same shape.

        Args:
            hidden_states: (B, N, H) frames.
            attention_mask: (B, N) boolean mask of the frames inside the clips; `None` if all are.
            position_embeddings: embeddings of the relative positions, see `ParakeetEncoderAttention`.
            pass_counter: `itertools.count()` of this call under gradient checkpointing, which runs this method again in
                the backward pass; `None` otherwise.
            **kwargs: further arguments of the attention.
        """
        is_repeated = pass_counter is not None and next(pass_counter) > 0
        hidden = hidden_states
        hidden = torch.add(hidden, self._dropout(self.feed_forward1(self.norm_feed_forward1(hidden))), alpha=0.5)
        attended, _ = self.self_attn(self.norm_self_att(hidden), position_embeddings, attention_mask, **kwargs)
        hidden = hidden + self._dropout(attended)
        hidden = hidden + self._dropout(self.conv(self.norm_conv(hidden), attention_mask, is_repeated))
        hidden = torch.add(hidden, self._dropout(self.feed_forward2(self.norm_feed_forward2(hidden))), alpha=0.5)
        return self.norm_out(hidden)

    def _dropout(self, branch: Tensor) -> Tensor:
        """Apply dropout, in training only, to the (B, N, H) output of a residual branch."""
        return F.dropout(branch, self.dropout, self.training)


def drop_probabilities(config: ParakeetEncoderConfig) -> list[float]:
    """Return the probability of dropping each block in training.

    The modes of stochastic depth are NeMo's: collections/asr/parts/utils/regularization_utils.py

    Args:
        config: configuration of the encoder.

    Returns:
        One probability per block: `layerdrop` without a mode; with a mode 0 for the first blocks, then `layerdrop`
        (`"uniform"`) or a linear increase up to it (`"linear"`).
    """
    num_blocks, num_protected = config.num_hidden_layers, config.stochastic_depth_start_layer
    if config.stochastic_depth_mode is None:
        return [float(config.layerdrop)] * num_blocks
    num_droppable = num_blocks - num_protected
    if config.stochastic_depth_mode == "uniform":
        probabilities = [float(config.layerdrop)] * num_droppable
    else:
        probabilities = [config.layerdrop * ((index + 1) / num_droppable) for index in range(num_droppable)]
    return [0.0] * num_protected + probabilities


def drop_block(block_input: Tensor, block_output: Tensor, probability: float, rescale: bool) -> Tensor:
    """Drop the residual of an encoder block at random, in training (LayerDrop, arXiv 1909.11556).

    A dropped block has been computed, and its parameters get gradients of 0. Processes that train together may draw
    differently, but must use the same parameters in every step.

    Args:
        block_input: (B, N, H).
        block_output: (B, N, H).
        probability: probability of dropping the residual.
        rescale: divide a residual that is not dropped by the probability of not dropping it, as NeMo does.

    Returns:
        (B, N, H) input of the next block.
    """
    if probability == 0:
        return block_output
    if torch.rand([]) < probability:
        # `where` keeps the block in the graph of autograd, with gradients of 0
        is_dropped = torch.ones((), dtype=torch.bool, device=block_input.device)
        return torch.where(is_dropped, block_input, block_output)
    if rescale:
        return block_input + (block_output - block_input) / (1.0 - probability)
    return block_output
