"""Modules of the FastConformer encoder: position embeddings, feed-forward module, convolution module, encoder block.

Attention is in `attention.py`, subsampling in `subsampling.py`. The encoder model, which stacks the blocks, is in
`modeling_parakeet.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration_parakeet import ParakeetEncoderConfig
from .attention import ParakeetEncoderAttention
from .attention_layout import choose_block_layout, map_to_nemo_local_positions
from .fast_linear import apply_pointwise_conv, is_unmodified

# base of the wavelengths of the sinusoidal embeddings, "Attention Is All You Need" section 3.5
WAVELENGTH_BASE = 10000.0

# transformers' class of the activation "silu"
SILU_CLASS = type(ACT2FN["silu"])

# bytes of the inner activations of a feed-forward module that are computed at once outside training. They are 4 times
# as wide as the frames: 128 MiB are 22 minutes of audio with 512 channels in float32.
FEED_FORWARD_WORKSPACE_BYTES = 128 * 2**20


class ParakeetEncoderRelPositionalEncoding(nn.Module):
    """Sinusoidal embeddings of relative positions (query index - key index): sines on even, cosines on odd channels.

    Args:
        config: configuration of the encoder; `hidden_size` is the width H of the embeddings.
    """

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """Compute the embeddings of all relative positions in an attention block.

        The result is the same for all blocks and clips.

        Args:
            hidden: (B, N, H) frames; only their number N, dtype and device are used.

        Returns:
            (K + c - 1, H) embeddings in the dtype of `hidden`, in decreasing order of the position, for K keys and c
            queries per block. Without a context limit K = c = N.
        """
        context_size = self.config.attention_context_size
        layout = choose_block_layout(self.config.attention_context_style, context_size, hidden.shape[1])
        positions = layout.compute_relative_positions(hidden.device)
        has_embedding = None
        left, right = context_size[0], context_size[-1]
        if self.config.self_attention_model == "rel_pos_local_attn" and left != right:
            positions, has_embedding = map_to_nemo_local_positions(positions, left, right)
        embeddings = self.embed(positions)
        if has_embedding is not None:
            embeddings = embeddings * has_embedding[:, None]
        return embeddings.to(hidden.dtype)

    def embed(self, positions: Tensor) -> Tensor:
        """Compute the sinusoidal embeddings of relative positions.

        Each call computes the frequencies in float32, because `model.to(torch.bfloat16)` would round a buffer.

        Args:
            positions: (P,) relative positions.

        Returns:
            (P, H) float32 embeddings.
        """
        width = self.config.hidden_size
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
        # (P, H/2) angles in radians
        angles = positions[:, None].float() * (1.0 / WAVELENGTH_BASE**exponents)
        # interleave sines and cosines: (P, H/2, 2) -> (P, H)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


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
        self.intermediate_size = config.intermediate_size

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply linear layer, activation, dropout and linear layer to (B, N, H) frames, and keep their shape.

        Outside training and without gradients, the frames of long clips are divided into ranges, because the
        activations between the linear layers are wider than the frames. A compiled or exported model is not divided,
        because its graph should not depend on the number of frames.

        Args:
            hidden: (B, N, H) frames.
        """
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            return self._apply_layers(hidden)
        bytes_per_frame = len(hidden) * self.intermediate_size * hidden.element_size()
        if hidden.shape[1] * bytes_per_frame <= FEED_FORWARD_WORKSPACE_BYTES:
            return self._apply_layers(hidden)
        ranges = hidden.split(max(1, FEED_FORWARD_WORKSPACE_BYTES // bytes_per_frame), 1)
        return torch.cat([self._apply_layers(frames) for frames in ranges], 1)

    def _apply_layers(self, hidden: Tensor) -> Tensor:
        """Apply the layers to (B, N, H) frames."""
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
        hidden = F.glu(apply_pointwise_conv(self.pointwise_conv1, hidden), dim=-1)
        if valid_mask is not None:
            # in place, because the backward pass of GLU does not need the output of GLU
            hidden = hidden.mul_(valid_mask[..., None])
        if self.asymmetric_padding:
            # pad the frame axis of (B, N, H) only
            hidden = F.pad(hidden, (0, 0, *self.asymmetric_padding))
        return self.convolve(hidden, is_recomputation)

    def convolve(self, hidden: Tensor, is_recomputation: bool = False) -> Tensor:
        """Apply the layers after the GLU: depthwise convolution over time, norm, activation, pointwise convolution.

        Args:
            hidden: (B, N, H) output of the GLU; with unequal padding (B, N + kernel_size - 1, H), padded.
            is_recomputation: see `forward`.

        Returns:
            (B, N, H) output.
        """
        # the variance of a single frame is undefined, so it is normalised with the running statistics
        num_frames = hidden.shape[1] - sum(self.asymmetric_padding or ())
        uses_batch_statistics = self.training and len(hidden) * num_frames > 1
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
