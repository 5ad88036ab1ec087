"""Modules of the FastConformer encoder: subsampling, feed-forward module, convolution module and encoder block.

Attention is in `attention.py`. The encoder model, which stacks the blocks, is in `modeling_parakeet.py`.
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
from .fast_linear import apply_pointwise_conv, is_unmodified

# transformers' class of the activation "silu"
SILU_CLASS = type(ACT2FN["silu"])

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

        Args:
            features: (B, T, F) mel features.
            frame_lengths: (B,) number of non-padding mel frames; `None` if there is no padding.

        Returns:
            (B, N, H) frames; every padding frame is the bias of the projection.
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
        return self.linear(hidden.transpose(1, 2).flatten(2))

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
        mask = None if frame_lengths is None else build_frame_mask(frame_lengths, hidden)
        if may_overwrite and is_unmodified(activation, nn.ReLU):
            return hidden.relu_() if mask is None else hidden.mul_(mask).relu_()
        activated: Tensor = activation(hidden if mask is None else hidden * mask)
        return activated


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
        """Apply linear layer, activation, dropout and linear layer to (B, N, H) frames, and keep their shape.

        Args:
            hidden: (B, N, H) frames.
        """
        hidden = activate(self.activation, self.linear1(hidden), self.linear1)
        hidden = F.dropout(hidden, self.dropout, self.training)
        return self.linear2(hidden)


class ParakeetEncoderConvolutionModule(nn.Module):
    """Convolution module of a Conformer block (arXiv 2005.08100, section 2.2).

    The order is pointwise convolution, GLU, depthwise convolution over time, norm, activation, pointwise convolution.

    Args:
        config: configuration of the encoder.
    """

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        width, kernel_size, bias = config.hidden_size, config.conv_kernel_size, config.convolution_bias
        self.activation = ACT2FN[config.hidden_act]
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1, bias=bias)
        before, after = config.conv_context_size or ((kernel_size - 1) // 2, (kernel_size - 1) // 2)
        # `nn.Conv1d` pads both ends equally, so `forward` applies unequal padding itself
        self.asymmetric_padding = None if before == after else (before, after)
        padding = before if before == after else 0
        self.depthwise_conv = nn.Conv1d(width, width, kernel_size, padding=padding, groups=width, bias=bias)
        # `forward` cannot recognise the norm by its class, because an adapter may have replaced the module
        self.norm_type = config.conv_norm_type
        self.norm: nn.Module = nn.LayerNorm(width) if config.conv_norm_type == "layer_norm" else nn.BatchNorm1d(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1, bias=bias)

    def forward(self, hidden: Tensor, valid_mask: Tensor | None = None, is_recomputation: bool = False) -> Tensor:
        """Apply the convolution module of a Conformer block.

        In eval mode, the batch norm is folded into the depthwise convolution.

        Args:
            hidden: (B, N, H) frames.
            valid_mask: (B, N) boolean mask, True on non-padding frames; `None` if there is no padding. Padding frames
                are set to zero before the depthwise convolution.
            is_recomputation: whether gradient checkpointing is recomputing this pass; the running statistics of the
                batch norm are then left unchanged.

        Returns:
            (B, N, H) output.
        """
        # the variance of a single frame is undefined, so it is normalised with the running statistics
        uses_batch_statistics = self.training and hidden.shape[:2].numel() > 1
        hidden = F.glu(apply_pointwise_conv(self.pointwise_conv1, hidden), dim=-1)
        if valid_mask is not None:
            # in place, because the backward pass of GLU does not need the output of GLU
            hidden = hidden.mul_(valid_mask[..., None])
        if self.asymmetric_padding:
            # pad the frame axis of (B, N, H) only
            hidden = F.pad(hidden, (0, 0, *self.asymmetric_padding))
        conv, norm = self.depthwise_conv, self.norm
        # batch statistics are known only after the convolution; a module with hooks or its own `forward` must be called
        can_fold = not uses_batch_statistics and is_unmodified(conv, nn.Conv1d) and is_unmodified(norm, nn.BatchNorm1d)
        if can_fold:
            weight, bias = fold_batch_norm(conv, norm)
            hidden = apply_depthwise_conv(hidden, weight, bias, int(conv.padding[0]))
        else:
            hidden = self._apply_norm(self._convolve_over_time(hidden), is_recomputation)
        # `norm` computed `hidden`
        return apply_pointwise_conv(self.pointwise_conv2, activate(self.activation, hidden, norm))

    def _convolve_over_time(self, hidden: Tensor) -> Tensor:
        """Apply the depthwise convolution (or the module that replaces it) to (B, N, H) frames."""
        conv = self.depthwise_conv
        if is_unmodified(conv, nn.Conv1d):
            return apply_depthwise_conv(hidden, conv.weight, conv.bias, int(conv.padding[0]))
        return conv(hidden.transpose(1, 2)).transpose(1, 2)

    def _apply_norm(self, hidden: Tensor, is_recomputation: bool) -> Tensor:
        """Apply the layer norm or batch norm `self.norm`.

        Args:
            hidden: (B, N, H) frames.
            is_recomputation: whether gradient checkpointing is recomputing this pass; the running statistics of a
                batch norm are then left unchanged.

        Returns:
            (B, N, H) normalised frames.
        """
        if self.norm_type == "layer_norm":
            return self.norm(hidden)
        if not is_recomputation:
            return self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        # the batch norm updates copies of its running statistics
        buffer_copies = {name: buffer.clone() for name, buffer in self.norm.named_buffers()}
        normalised: Tensor = torch.func.functional_call(self.norm, buffer_copies, (hidden.transpose(1, 2),))
        return normalised.transpose(1, 2)


def fold_batch_norm(conv: nn.Conv1d, norm: Any) -> tuple[Tensor, Tensor]:
    """Fold a batch norm in eval mode into the depthwise convolution before the batch norm.

    Args:
        conv: depthwise convolution of H channels.
        norm: `nn.BatchNorm1d` that is applied to the output of `conv`; its running statistics are used.

    Returns:
        (H, 1, kernel_size) weight and (H,) bias of a convolution that equals `norm(conv(...))`, in the dtype of `conv`.
    """
    # norm(conv(x)) = scale * (weight * x + conv_bias - running_mean) + norm.bias
    weight, conv_bias = conv.weight, conv.bias
    scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
    shift = (0.0 if conv_bias is None else conv_bias.float()) - norm.running_mean.float()
    bias = torch.addcmul(norm.bias.float(), shift, scale)
    return (weight.float() * scale[:, None, None]).to(weight.dtype), bias.to(weight.dtype)


def activate(activation: nn.Module, hidden: Tensor, previous_module: nn.Module) -> Tensor:
    """Compute `activation(hidden)`; overwrite `hidden` if this is safe.

    Overwriting is safe only if both modules are unmodified (no hook can have stored the tensor) and gradients are
    disabled (autograd saves the input of SiLU).

    Args:
        activation: activation module, such as a SiLU.
        hidden: input of the activation, of any shape.
        previous_module: module that computed `hidden`.

    Returns:
        Output of the activation, in the shape of `hidden`.
    """
    # a module of any other class may store its output, or return its input
    previous_class = type(previous_module)
    is_previous_unmodified = previous_class in (nn.Linear, nn.BatchNorm1d, nn.LayerNorm) and is_unmodified(
        previous_module, previous_class
    )
    if is_previous_unmodified and is_unmodified(activation, SILU_CLASS) and not torch.is_grad_enabled():
        return F.silu(hidden, inplace=True)
    activated: Tensor = activation(hidden)
    return activated


def apply_depthwise_conv(hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Convolve each channel over time.

    The result equals `F.conv1d` with H groups on the transposed frames. The frames are passed to `F.conv2d` as a
    channels-last image of height 1, because PyTorch's 2-D kernels for this format are several times faster.

    Args:
        hidden: (B, N, H) frames.
        weight: (H, 1, kernel_size) filters.
        bias: (H,) bias, or `None`.
        padding: number of zeros to add before the first and after the last frame.

    Returns:
        (B, N + 2 * padding - kernel_size + 1, H) convolved frames.
    """
    # (B, N, H) -> (B, H, 1, N)
    image = hidden[:, None].permute(0, 3, 1, 2)
    filters = weight[:, :, None].clone(memory_format=torch.channels_last)
    convolved = F.conv2d(image, filters, bias, padding=(0, padding), groups=len(weight))
    return convolved[:, :, 0].transpose(1, 2)


class ParakeetEncoderBlock(GradientCheckpointingLayer):
    """Conformer block: half feed-forward, attention, convolution, half feed-forward, norm (arXiv 2005.08100).

    Args:
        config: configuration of the encoder.
        layer_idx: index of the block in the encoder.
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
        forward_counter: Iterator[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Apply the block: half-step feed-forward, attention, convolution, half-step feed-forward, layer norm.

        Args:
            hidden_states: (B, N, H) frames.
            attention_mask: (B, N) boolean mask, True on non-padding frames; `None` if there is no padding.
            position_embeddings: (positions, H) embeddings of the relative positions in an attention block, in
                decreasing order of the position.
            forward_counter: an `itertools.count()` that a forward pass shares with its recomputation under gradient
                checkpointing; `None` without gradient checkpointing.
            **kwargs: further arguments of transformers' attention functions.

        Returns:
            (B, N, H) output of the block.
        """
        # the forward pass gets 0 from the counter, its recomputation gets 1
        is_recomputation = forward_counter is not None and next(forward_counter) > 0
        hidden = hidden_states
        hidden = torch.add(hidden, self._dropout(self.feed_forward1(self.norm_feed_forward1(hidden))), alpha=0.5)
        attended, _ = self.self_attn(self.norm_self_att(hidden), position_embeddings, attention_mask, **kwargs)
        hidden = hidden + self._dropout(attended)
        hidden = hidden + self._dropout(self.conv(self.norm_conv(hidden), attention_mask, is_recomputation))
        hidden = torch.add(hidden, self._dropout(self.feed_forward2(self.norm_feed_forward2(hidden))), alpha=0.5)
        return self.norm_out(hidden)

    def _dropout(self, branch: Tensor) -> Tensor:
        """Apply dropout to the (B, N, H) output of a residual branch, in training mode only."""
        return F.dropout(branch, self.dropout, self.training)


def compute_drop_probabilities(config: ParakeetEncoderConfig) -> list[float]:
    """Compute the probability of dropping each encoder block in training.

    Source of the stochastic-depth modes: NeMo's collections/asr/parts/utils/regularization_utils.py.

    Args:
        config: configuration of the encoder.

    Returns:
        One probability per block. Without a stochastic-depth mode, it is `layerdrop` for every block. With a mode, it
        is 0 for the first `stochastic_depth_start_layer` blocks. For the remaining blocks it is `layerdrop` if the mode
        is `"uniform"`, or increases linearly to `layerdrop` if the mode is `"linear"`.
    """
    num_blocks, num_never_dropped = config.num_hidden_layers, config.stochastic_depth_start_layer
    if config.stochastic_depth_mode is None:
        return [float(config.layerdrop)] * num_blocks
    num_droppable = num_blocks - num_never_dropped
    if config.stochastic_depth_mode == "uniform":
        probabilities = [float(config.layerdrop)] * num_droppable
    else:
        probabilities = [config.layerdrop * ((index + 1) / num_droppable) for index in range(num_droppable)]
    return [0.0] * num_never_dropped + probabilities


def drop_block(block_input: Tensor, block_output: Tensor, probability: float, rescale: bool) -> Tensor:
    """Drop an encoder block at random in training (LayerDrop, arXiv 1909.11556).

    The parameters of a dropped block get zero gradients instead of no gradients. The processes of distributed training
    can drop different blocks, and every process needs a gradient of every parameter.

    Args:
        block_input: (B, N, H) input of the block.
        block_output: (B, N, H) output of the block.
        probability: probability of dropping the block.
        rescale: whether to divide the residual (output minus input) of a block that is not dropped by
            (1 - probability), as NeMo does.

    Returns:
        (B, N, H) input of the next block.
    """
    if probability == 0:
        return block_output
    if torch.rand([]) < probability:
        # `where` keeps the block in the autograd graph, with zero gradients
        is_dropped = torch.ones((), dtype=torch.bool, device=block_input.device)
        return torch.where(is_dropped, block_input, block_output)
    if rescale:
        return block_input + (block_output - block_input) / (1.0 - probability)
    return block_output
