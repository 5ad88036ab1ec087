"""Cache-aware streaming of the encoder (arXiv 2312.17279): a step encodes one chunk and reads a cache of the past.

With a right context of at least one frame, the steps give the same encoder frames as the whole clip at once. The
encoder without a cache is in `modeling_parakeet.py`; feature frames and their order are in the sub-package
`long_audio`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import ClipProjections, ParakeetEncoderAttention
from .attention_layout import BlockLayout
from .fast_linear import apply_pointwise_conv

# largest number of cached encoder frames for an unlimited left context, as in NeMo; 800 s
MAX_CACHED_FRAMES = 10_000


@dataclass(frozen=True)
class EncoderCache:
    """What a cache-aware encoder needs of the past of B streams to encode their next chunk.

    Args:
        attention_inputs: (layers, B, C, H) inputs of the attention of each block, oldest first, zeros before the start
            of a stream. C is the left attention context in frames; without a limit, C grows to `MAX_CACHED_FRAMES`.
        num_cached: (B,) number of valid frames in `attention_inputs`.
        conv_inputs: (layers, B, kernel size - 1, H) inputs of the depthwise convolution of each block, oldest first.
        history: (B, subsampling factor + 1, F) last feature frames of each stream, zeros before the start; `None`
            before the first chunk.
    """

    attention_inputs: Tensor
    num_cached: Tensor
    conv_inputs: Tensor
    history: Tensor | None

    def select(self, stream_index: int) -> EncoderCache:
        """Return the cache of one stream as a batch of size 1.

        Args:
            stream_index: index of the stream in the batch.
        """
        rows = slice(stream_index, stream_index + 1)
        # copies, because views would keep the memory of the whole batch
        return EncoderCache(
            self.attention_inputs[:, rows].clone(),
            self.num_cached[rows].clone(),
            self.conv_inputs[:, rows].clone(),
            None if self.history is None else self.history[rows].clone(),
        )


def stack_caches(caches: Sequence[EncoderCache]) -> EncoderCache:
    """Combine the caches of several streams to the cache of one batch.

    Args:
        caches: caches of streams that are all before, or all after, their first chunk.
    """
    histories = [cache.history for cache in caches if cache.history is not None]
    longest = max(cache.attention_inputs.shape[2] for cache in caches)
    # an unlimited left context gives caches of different lengths; the empty entries are the oldest ones
    padded = [F.pad(inputs, (0, 0, longest - inputs.shape[2], 0)) for inputs in (c.attention_inputs for c in caches)]
    return EncoderCache(
        torch.cat(padded, dim=1),
        torch.cat([cache.num_cached for cache in caches]),
        torch.cat([cache.conv_inputs for cache in caches], dim=1),
        torch.cat(histories) if histories else None,
    )


def check_cache_support(encoder_config: Any) -> bool:
    """Return whether no frame of an encoder depends on frames after its chunk, so that a stream can use a cache.

    This requires chunked attention and causal convolutions.

    Args:
        encoder_config: configuration of the encoder.
    """
    return bool(
        encoder_config.attention_context_style == "chunked_limited"
        and encoder_config.attention_context_size[1] >= 0
        and encoder_config.self_attention_model == "rel_pos"
        and encoder_config.causal_downsampling
        and list(encoder_config.conv_context_size or []) == [encoder_config.conv_kernel_size - 1, 0]
    )


class CacheAwareEncoderMixin:
    """Adds cache-aware streaming to the encoder. The state of a stream is in its `EncoderCache`, not in the encoder."""

    # attributes of the encoder
    config: Any
    layers: Any
    subsampling: Any
    encode_positions: Any
    input_scale: float

    @property
    def supports_cache(self) -> bool:
        """Whether the encoder can encode a stream with a cache; see `check_cache_support`."""
        return check_cache_support(self.config)

    def start_cache(self, num_streams: int) -> EncoderCache:
        """Create the cache of streams before their first chunk.

        Args:
            num_streams: number of streams B.

        Raises:
            ValueError: frames of this encoder depend on frames after their chunk.
        """
        config = self.config
        if not self.supports_cache:
            raise ValueError(
                "cache-aware streaming needs an encoder with attention in chunks (`chunked_limited`) and causal "
                f"convolutions, got the context {config.attention_context_size} of style "
                f"{config.attention_context_style!r}, `causal_downsampling` {config.causal_downsampling} and "
                f"`conv_context_size` {config.conv_context_size}: stream this model with left and right context"
            )
        weight = self.layers[0].norm_out.weight
        shape = (config.num_hidden_layers, num_streams)
        return EncoderCache(
            attention_inputs=weight.new_zeros(*shape, max(0, config.attention_context_size[0]), config.hidden_size),
            num_cached=torch.zeros(num_streams, dtype=torch.long, device=weight.device),
            conv_inputs=weight.new_zeros(*shape, config.conv_kernel_size - 1, config.hidden_size),
            history=None,
        )

    @torch.no_grad()
    def stream_step(self, features: Tensor, cache: EncoderCache) -> tuple[Tensor, EncoderCache]:
        """Encode the next chunk of B streams.

        With r = `attention_context_size[1]` and 8 feature frames per encoder frame, the first chunk of a stream has
        1 + 8 r feature frames and each later chunk has 8 + 8 r, so that each chunk gives r + 1 encoder frames. Only the
        last chunk of a stream may be shorter. Source: `cache_aware_stream_step` in NeMo's asr_mixins.py.

        Args:
            features: (B, T, F) feature frames of the chunk, without padding.
            cache: the cache after the chunk before, for these B streams.

        Returns:
            (B, N, H) encoder frames of the chunk, and the new cache.
        """
        factor = self.config.subsampling_factor
        features = features.to(cache.attention_inputs.dtype)
        inputs, num_dropped = features, 0
        if cache.history is not None:
            inputs = torch.cat([cache.history, features], dim=1)
            # the first two subsampled frames contain the zero padding before the history
            num_dropped = 1 + cache.history.shape[1] // factor
        hidden = self.subsampling(inputs)[:, num_dropped:] * self.input_scale
        history = F.pad(inputs, (0, 0, max(0, factor + 1 - inputs.shape[1]), 0))[:, -(factor + 1) :].clone()
        context = self._build_step_context(hidden, cache)
        attention_inputs, conv_inputs = [], []
        for index, block in enumerate(self.layers):
            hidden, new_attention_input, new_conv_input = step_block(
                block, hidden, cache.attention_inputs[index], cache.conv_inputs[index], context
            )
            attention_inputs.append(new_attention_input)
            conv_inputs.append(new_conv_input)
        num_cached = (cache.num_cached + hidden.shape[1]).clamp(max=context.new_cache_length)
        return hidden, EncoderCache(torch.stack(attention_inputs), num_cached, torch.stack(conv_inputs), history)

    def _build_step_context(self, hidden: Tensor, cache: EncoderCache) -> StepContext:
        """Build the block layout, the position embeddings and the mask that all blocks of one step share.

        Args:
            hidden: (B, N, H) frames of the chunk.
            cache: the cache before the chunk, with C frames.
        """
        config, cache_length = self.config, cache.attention_inputs.shape[2]
        left = config.attention_context_size[0]
        new_cache_length = left if left >= 0 else min(cache_length + hidden.shape[1], MAX_CACHED_FRAMES)
        layout = BlockLayout(hidden.shape[1], hidden.shape[1], keys_before=cache_length)
        key_indices = torch.arange(layout.num_keys, device=hidden.device)
        # the oldest C - `num_cached` frames of the cache are empty
        is_valid = key_indices >= cache_length - cache.num_cached[:, None]
        embeddings = self.encode_positions.embed(layout.compute_relative_positions(hidden.device))
        return StepContext(layout, embeddings.to(hidden.dtype), is_valid, new_cache_length)


@dataclass(frozen=True)
class StepContext:
    """What the attention of all blocks needs in one step, with N queries and K = C + N keys.

    Args:
        layout: one block of N queries that reads C keys before its first query.
        position_embeddings: (K + N - 1, H) embeddings of the relative positions, in decreasing order of the position.
        is_valid: (B, K) boolean mask, False on empty frames of the cache.
        new_cache_length: number of frames in the cache after the step, with empty ones.
    """

    layout: BlockLayout
    position_embeddings: Tensor
    is_valid: Tensor
    new_cache_length: int


def step_block(
    block: Any, hidden: Tensor, attention_cache: Tensor, conv_cache: Tensor, context: StepContext
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply an encoder block to the frames of a chunk, with the past frames from the cache.

    Args:
        block: the `ParakeetEncoderBlock`, in evaluation mode.
        hidden: (B, N, H) frames of the chunk.
        attention_cache: (B, C, H) inputs of the attention before the chunk.
        conv_cache: (B, kernel size - 1, H) inputs of the depthwise convolution before the chunk.
        context: what all blocks of the step share.

    Returns:
        (B, N, H) output of the block, and the new values of `attention_cache` and `conv_cache`.
    """
    hidden = torch.add(hidden, block.feed_forward1(block.norm_feed_forward1(hidden)), alpha=0.5)
    attention_input = torch.cat([attention_cache, block.norm_self_att(hidden)], dim=1)
    hidden = hidden + attend_to_cache(block.self_attn, attention_input, context)
    conv_output, new_conv_cache = convolve_with_cache(block.conv, block.norm_conv(hidden), conv_cache)
    hidden = hidden + conv_output
    hidden = torch.add(hidden, block.feed_forward2(block.norm_feed_forward2(hidden)), alpha=0.5)
    new_attention_cache = attention_input[:, attention_input.shape[1] - context.new_cache_length :]
    return block.norm_out(hidden), new_attention_cache, new_conv_cache


def attend_to_cache(attention: ParakeetEncoderAttention, inputs: Tensor, context: StepContext) -> Tensor:
    """Apply self-attention with relative positions to the last frames, with all frames as keys.

    Args:
        attention: the attention module of a block.
        inputs: (B, K, H) cached frames, then the frames of the chunk.
        context: what all blocks of the step share.

    Returns:
        (B, N, H) output for the frames of the chunk.
    """

    def split_heads(frames: Tensor) -> Tensor:
        """Reshape (..., H) to (..., heads, head_dim)."""
        return frames.unflatten(-1, (attention.num_heads, attention.head_dim))

    projections = ClipProjections(
        query=split_heads(attention.q_proj(inputs[:, context.layout.keys_before :])),
        key=split_heads(attention.k_proj(inputs)),
        value=split_heads(attention.v_proj(inputs)),
        # (K + N - 1, H) -> (heads, K + N - 1, head_dim)
        position_keys=split_heads(attention.relative_k_proj(context.position_embeddings)).transpose(0, 1),
        attention_mask=context.is_valid,
        global_tokens=None,
    )
    output, _ = attention.attend(projections, context.layout, None, {})
    return attention.o_proj(output.flatten(2))


def convolve_with_cache(module: Any, hidden: Tensor, conv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a causal convolution module to the frames of a chunk.

    Args:
        module: the `ParakeetEncoderConvolutionModule` of a block.
        hidden: (B, N, H) frames of the chunk.
        conv_cache: (B, kernel size - 1, H) inputs of the depthwise convolution before the chunk.

    Returns:
        (B, N, H) output, and the new value of `conv_cache`.
    """
    gated = F.glu(apply_pointwise_conv(module.pointwise_conv1, hidden), dim=-1)
    inputs = torch.cat([conv_cache, gated], dim=1)
    return module.convolve(inputs), inputs[:, inputs.shape[1] - conv_cache.shape[1] :]
