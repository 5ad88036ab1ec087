"""Self-attention of the encoder with relative positions and full, limited, chunked or local context.

If the context is limited on both sides, memory grows linearly with the number of frames. The blocks that make this
possible are in `attention_layout.py`, the other modules of the encoder in `conformer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..configuration_parakeet import ParakeetEncoderConfig
from .attention_layout import (
    BlockLayout,
    build_context_mask,
    choose_block_layout,
    map_to_nemo_local_positions,
    relative_shift,
)

# base of the wavelengths of the sinusoidal embeddings, "Attention Is All You Need" section 3.5
WAVELENGTH_BASE = 10000.0


class ParakeetEncoderRelPositionalEncoding(nn.Module):
    """Sinusoidal embeddings of relative positions (query index - key index): sines on even, cosines on odd channels.

    Args:
        config: configuration of the encoder; `hidden_size` is the width H of the embeddings.
    """

    inv_freq: Tensor

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self.compute_frequencies(config), persistent=False)

    @staticmethod
    def compute_frequencies(config: ParakeetEncoderConfig) -> Tensor:
        """Compute the (H/2,) angular frequencies of the sinusoids, in radians per frame.

        Args:
            config: configuration of the encoder.
        """
        exponents = torch.arange(0, config.hidden_size, 2, dtype=torch.float32) / config.hidden_size
        return 1.0 / WAVELENGTH_BASE**exponents

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
        angles = positions[:, None].float() * self.inv_freq.float()
        # interleave sines and cosines: (positions, H/2, 2) -> (positions, H)
        embeddings = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        if has_embedding is not None:
            embeddings = embeddings * has_embedding[:, None]
        return embeddings.to(hidden.dtype)


def get_masked_score(dtype: torch.dtype) -> float:
    """Return the attention score of a masked key: the lowest number that is finite in both `dtype` and float32.

    A finite score avoids NaN for a query without visible keys, even if the softmax is computed in float32.

    Args:
        dtype: dtype of the attention scores.
    """
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


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
    """Compute attention with plain PyTorch operations, the only implementation that returns attention weights.

    Args:
        module: the attention module; dropout is applied if `module.training` is true.
        query: (B, heads, N, head_dim) queries.
        key: (B, heads, K, head_dim) keys, K per clip or block.
        value: (B, heads, K, head_dim) values.
        attention_mask: (B, heads, N, K) bias to add to the scores; `None` for no bias.
        scaling: factor of the dot products.
        dropout: dropout probability of the attention weights.
        **kwargs: arguments of other attention implementations, ignored here.

    Returns:
        (B, N, heads, head_dim) output and (B, heads, N, K) attention weights.
    """
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


@dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys, values and score bias of M attention blocks: the blocks of all clips of a batch.

    Args:
        queries: (M, c, heads, head_dim), c queries per block.
        keys: (M, K, heads, head_dim), K keys per block.
        values: (M, K, heads, head_dim), the values of the keys.
        bias: (M, heads, c, K), to be added to the scaled dot products. It contains the position scores, and the lowest
            score for masked keys.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor


@dataclass(frozen=True)
class GlobalTokens:
    """Global tokens of NeMo's local attention: frames that attend to all frames, and to which all frames attend.

    Args:
        frame_indices: indices of the G global tokens among the N frames.
        query: (B, N, heads, head_dim) queries of all frames, for attention from and to global tokens.
        key: (B, N, heads, head_dim) keys of all frames, for attention from and to global tokens.
        value: (B, N, heads, head_dim) values of all frames, for attention from and to global tokens.
    """

    frame_indices: list[int]
    query: Tensor
    key: Tensor
    value: Tensor


class ParakeetEncoderAttention(nn.Module):
    """Multi-head attention with relative positions (Transformer-XL, arXiv 1901.02860, section 3.3).

    Args:
        config: configuration of the encoder.
        layer_idx: index of the encoder block that contains this module.
    """

    def __init__(self, config: ParakeetEncoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        # transformers' attention functions read the next three attributes
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.attention_dropout = config.attention_dropout
        width, has_bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, width, bias=has_bias)
        self.k_proj = nn.Linear(width, width, bias=has_bias)
        self.v_proj = nn.Linear(width, width, bias=has_bias)
        self.o_proj = nn.Linear(width, width, bias=has_bias)
        self.relative_k_proj = nn.Linear(width, width, bias=False)
        self.bias_u = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        self.bias_v = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        if config.global_tokens and config.global_attn_separate:
            self.global_q_proj = nn.Linear(width, width, bias=has_bias)
            self.global_k_proj = nn.Linear(width, width, bias=has_bias)
            self.global_v_proj = nn.Linear(width, width, bias=has_bias)

    def forward(
        self, hidden: Tensor, position_embeddings: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Apply block-wise self-attention with relative positions and optional global tokens.

        Args:
            hidden: (B, N, H) frames.
            position_embeddings: (K + c - 1, H) embeddings of the relative positions, for blocks of c queries that read
                K keys each.
            attention_mask: (B, N) boolean mask, True on non-padding frames; `None` if there is no padding.
            **kwargs: further arguments of transformers' attention functions.

        Returns:
            (B, N, H) output, and the (B, heads, N, N) attention weights. The weights are `None` if there are several
            blocks or if the attention function does not return weights.
        """
        config = self.config
        layout = choose_block_layout(config.attention_context_style, config.attention_context_size, hidden.shape[1])
        query, key, value = (self._split_heads(project(hidden)) for project in (self.q_proj, self.k_proj, self.v_proj))
        queries = layout.split_queries(query)
        attention_bias = self._compute_position_scores(queries, position_embeddings, layout)
        visible_mask = self._build_visible_mask(hidden, attention_mask, layout)
        if visible_mask is not None:
            attention_bias = attention_bias.masked_fill(~visible_mask, get_masked_score(attention_bias.dtype))
        inputs = AttentionInputs(queries, layout.split_keys(key), layout.split_keys(value), attention_bias)
        global_tokens = self._get_global_tokens(hidden, query, key, value)
        if global_tokens is not None:
            global_scores = layout.split_queries(self._compute_global_key_scores(global_tokens))
            inputs = prepend_global_keys(inputs, global_scores, value[:, global_tokens.frame_indices])
        block_output, weights = self._attend(inputs, kwargs)
        output = layout.join_blocks(block_output)
        if global_tokens is not None:
            output = replace_global_token_output(output, global_tokens, attention_mask)
        return self.o_proj(output.flatten(2)), weights if layout.is_single_block else None

    def _split_heads(self, hidden: Tensor) -> Tensor:
        """Reshape (..., H) to (..., heads, head_dim)."""
        return hidden.unflatten(-1, (self.num_heads, self.head_dim))

    def _compute_position_scores(self, queries: Tensor, position_embeddings: Tensor, layout: BlockLayout) -> Tensor:
        """Compute the part of the attention scores that depends on the relative position of query and key.

        Args:
            queries: (B * num_blocks, c, heads, head_dim), c queries per block.
            position_embeddings: (K + c - 1, H) embeddings of the relative positions, for K keys per block.
            layout: block layout of the queries and keys.

        Returns:
            (B * num_blocks, heads, c, K) scaled scores.
        """
        total_blocks, block_size = queries.shape[:2]
        position_keys = self._split_heads(self.relative_k_proj(position_embeddings)).permute(1, 2, 0)
        # one matrix product per head for all clips: (heads, all queries, head_dim) x (heads, head_dim, K + c - 1)
        flat_queries = ((queries + self.bias_v) * self.scaling).flatten(0, 1).transpose(0, 1)
        scores = torch.bmm(flat_queries, position_keys).unflatten(1, (total_blocks, block_size)).transpose(0, 1)
        return relative_shift(scores, layout.num_keys)

    def _build_visible_mask(self, hidden: Tensor, attention_mask: Tensor | None, layout: BlockLayout) -> Tensor | None:
        """Build the mask of the keys that a query may attend to: non-padding frames in the context of the query.

        Args:
            hidden: (B, N, H) frames; only their number and device are used.
            attention_mask: (B, N) boolean mask, True on non-padding frames; `None` if there is no padding.
            layout: block layout, with c queries and K keys per block.

        Returns:
            Boolean mask that broadcasts to (B * num_blocks, heads, c, K); `None` if every key is visible.
        """
        config = self.config
        context_mask = build_context_mask(
            config.attention_context_style, config.attention_context_size, layout, hidden.device
        )
        if attention_mask is None and not layout.is_single_block:
            # the first and last blocks read zeros outside the N frames; `split_keys` gives them the mask value False
            attention_mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if attention_mask is None:
            return context_mask
        clip_mask = layout.split_keys(attention_mask)[:, None, None]
        return clip_mask if context_mask is None else clip_mask & context_mask

    def _attend(self, inputs: AttentionInputs, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Call the attention function that the configuration selects, such as eager or SDPA.

        Args:
            inputs: queries, keys, values and bias of M blocks, with c queries and K keys per block.
            kwargs: further arguments of the attention function.

        Returns:
            (M, c, heads, head_dim) output, and the (M, heads, c, K) attention weights or `None`.
        """
        implementation = self.config._attn_implementation
        attention_function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation, eager_attention_forward
        )
        bias_arguments: dict[str, Tensor | None] = {"attention_mask": inputs.bias}
        if implementation == "flex_attention":
            # flex attention would apply the mask of the first head to all heads, but position scores differ by head
            bias_arguments = {"attention_mask": None, "position_bias": inputs.bias}
        output, weights = attention_function(
            self,
            query=(inputs.queries + self.bias_u).transpose(1, 2),
            key=inputs.keys.transpose(1, 2),
            value=inputs.values.transpose(1, 2),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **bias_arguments,
            **kwargs,
        )
        return output, weights

    def _get_global_tokens(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor) -> GlobalTokens | None:
        """Select the global tokens of local attention and their projections.

        Args:
            hidden: (B, N, H) frames.
            query: (B, N, heads, head_dim) queries of the local attention.
            key: (B, N, heads, head_dim) keys of the local attention.
            value: (B, N, heads, head_dim) values of the local attention.

        Returns:
            The global tokens, with separate projections of `hidden` if `global_attn_separate` is set, or else with
            the projections of the local attention; `None` if the model has no global tokens.
        """
        config = self.config
        is_local = config.self_attention_model == "rel_pos_local_attn" and max(config.attention_context_size) >= 0
        if not (is_local and config.global_tokens):
            return None
        spacing = config.global_tokens_spacing
        frame_indices = list(range(0, min(config.global_tokens * spacing, hidden.shape[1]), spacing))
        if config.global_attn_separate:
            projections = (self.global_q_proj, self.global_k_proj, self.global_v_proj)
            query, key, value = (self._split_heads(project(hidden)) for project in projections)
        return GlobalTokens(frame_indices, query, key, value)

    def _compute_global_key_scores(self, global_tokens: GlobalTokens) -> Tensor:
        """Compute the (B, N, heads, G) scaled scores of all queries for the keys of the G global tokens."""
        global_keys = global_tokens.key[:, global_tokens.frame_indices]
        return torch.einsum("bnhd,bghd->bnhg", global_tokens.query, global_keys) * self.scaling


def prepend_global_keys(inputs: AttentionInputs, global_scores: Tensor, global_values: Tensor) -> AttentionInputs:
    """Insert the global tokens before the local keys of every attention block.

    A global token that is also in the local context of a query is counted twice, as in NeMo.

    Args:
        inputs: local queries, keys, values and bias of M = B * num_blocks blocks, with c queries and K keys per block.
        global_scores: (M, c, heads, G) scaled scores of the queries for the keys of the G global tokens.
        global_values: (B, G, heads, head_dim) values of the global tokens.

    Returns:
        Attention inputs with G + K keys per block.
    """
    num_blocks = len(inputs.keys) // len(global_values)
    global_values = global_values.repeat_interleave(num_blocks, 0)
    # scores of global keys contain no position score and no bias u, unlike those that the attention function computes
    # from keys; keys of zeros make its dot products 0, so `global_scores` can be passed as the bias
    global_keys = torch.zeros_like(global_values)
    return AttentionInputs(
        inputs.queries,
        torch.cat([global_keys, inputs.keys], 1),
        torch.cat([global_values, inputs.values], 1),
        torch.cat([global_scores.transpose(1, 2), inputs.bias], -1),
    )


def replace_global_token_output(output: Tensor, global_tokens: GlobalTokens, attention_mask: Tensor | None) -> Tensor:
    """Replace the local attention output of the global tokens by attention to all non-padding frames.

    This attention has no position scores. If there are several global tokens, NeMo reads its queries of shape (token,
    clip, head) as (clip, head, token), which mixes heads and clips. The same is done here, because NeMo's models were
    trained with it.

    Args:
        output: (B, N, heads, head_dim) output of the local attention.
        global_tokens: indices and projections of the global tokens.
        attention_mask: (B, N) boolean mask, True on non-padding frames; `None` if there is no padding.

    Returns:
        (B, N, heads, head_dim) output of all frames.
    """
    query, key, value = global_tokens.query, global_tokens.key, global_tokens.value
    batch_size, _, num_heads, head_dim = query.shape
    # (token, clip, head) order in memory, read as (clip, head, token) as in NeMo
    queries = query[:, global_tokens.frame_indices].transpose(0, 1)
    queries = queries.reshape(batch_size, num_heads, len(global_tokens.frame_indices), head_dim)
    attention_bias = None
    if attention_mask is not None:
        attention_bias = torch.zeros_like(attention_mask, dtype=query.dtype)
        attention_bias = attention_bias.masked_fill(~attention_mask, get_masked_score(query.dtype))[:, None, None]
        # NeMo sets the output of padding frames to zero; this matters for a global token after the end of a clip,
        # because the frames of the clip attend to it in the next block
        output = output * attention_mask[..., None, None]
    global_output = F.scaled_dot_product_attention(
        queries, key.transpose(1, 2), value.transpose(1, 2), attn_mask=attention_bias
    )
    frame_indices = torch.tensor(global_tokens.frame_indices, device=output.device)
    return output.index_copy(1, frame_indices, global_output.transpose(1, 2).to(output.dtype))
