"""Self-attention of the encoder: relative positions, and limited, chunked or local contexts in memory linear in length.

Works on frames and masks; the blocks around the attention are in `conformer.py`.
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

# wavelength base of the sinusoidal positions, "Attention Is All You Need" section 3.5
POSITION_BASE = 10000.0

# fewest queries of a block: shorter blocks copy the keys too often
MIN_BLOCK = 64


@dataclass(frozen=True)
class BlockLayout:
    """How N queries are cut into blocks, and which keys the queries of one block read.

    Attention without a limit is one block of all frames.

    Args:
        frames: number of frames N.
        block: queries of a block, c.
        before: keys before the first query of a block that it reads.
        after: keys after its last query.
    """

    frames: int
    block: int
    before: int = 0
    after: int = 0

    @property
    def is_whole(self) -> bool:
        """Tell whether all frames are one block."""
        return self.block == self.frames

    @property
    def keys(self) -> int:
        """Keys K that a block reads."""
        return self.before + self.block + self.after

    @property
    def padding(self) -> int:
        """Frames that fill the last block."""
        return -self.frames % self.block

    def relative_positions(self, device: torch.device) -> Tensor:
        """Return the (K + c - 1,) positions query - key that occur in a block, from the largest to the smallest."""
        return torch.arange(self.before + self.block - 1, -self.block - self.after, -1, device=device)

    def split_queries(self, query: Tensor) -> Tensor:
        """Cut (B, N, ...) into blocks (B * blocks, c, ...)."""
        if self.is_whole:
            return query
        tail = [0, 0] * (query.ndim - 2)
        return F.pad(query, (*tail, 0, self.padding)).unflatten(1, (-1, self.block)).flatten(0, 1)

    def split_keys(self, key: Tensor) -> Tensor:
        """Return the keys of each block (B * blocks, K, ...) for (B, N, ...); zeros fill what is outside the frames."""
        if self.is_whole:
            return key
        tail = [0, 0] * (key.ndim - 2)
        padded = F.pad(key, (*tail, self.before, self.padding + self.after))
        # (B, blocks, ..., K) view: neighbouring blocks share keys
        windows = padded.unfold(1, self.keys, self.block)
        return windows.movedim(-1, 2).flatten(0, 1)

    def join(self, blocks: Tensor) -> Tensor:
        """Return (B, N, ...) for blocks (B * blocks, c, ...); the reverse of `split_queries`."""
        if self.is_whole:
            return blocks
        return blocks.unflatten(0, (-1, (self.frames + self.padding) // self.block)).flatten(1, 2)[:, : self.frames]


def block_layout(config: ParakeetEncoderConfig, frames: int) -> BlockLayout:
    """Choose the blocks for the context of a configuration.

    Args:
        config: the encoder's configuration.
        frames: number of frames N.

    Returns:
        Blocks as long as half the context, or one block where the context is unlimited or about as long as the clip.
    """
    left, right = config.attention_context_size[0], config.attention_context_size[-1]
    chunk = 1
    if config.attention_context_style == "chunked_limited":
        # nothing after the own chunk is seen
        chunk, right = right + 1, min(right, 0)
    elif config.attention_context_style == "chunked_limited_with_rc":
        chunk = config.attention_context_size[1]
    if min(left, right) < 0 or chunk < 1:
        return BlockLayout(frames, frames)
    block = chunk * -(-max((left + right) // 2, MIN_BLOCK) // chunk)
    layout = BlockLayout(frames, block, left, right)
    return layout if layout.keys < frames else BlockLayout(frames, frames)


def visible_keys(config: ParakeetEncoderConfig, layout: BlockLayout, device: torch.device) -> Tensor | None:
    """Tell which keys the queries of a block may attend to.

    All blocks have the same answer, because a block begins where a chunk begins.

    Args:
        config: the encoder's configuration.
        layout: its blocks.
        device: of the result.

    Returns:
        (c, K) boolean mask, or `None` where every key is visible.
    """
    context = config.attention_context_size
    if max(context) < 0:
        return None
    query = torch.arange(layout.block, device=device)[:, None]
    key = torch.arange(-layout.before, layout.block + layout.after, device=device)[None]
    left, right = context[0], context[-1]
    first, last = query, query
    if config.attention_context_style == "chunked_limited" and right >= 0:
        # the own chunk, and whole chunks before it
        first = query // (right + 1) * (right + 1)
        last, right = first + right, 0
    elif config.attention_context_style == "chunked_limited_with_rc" and context[1] > 0:
        first = query // context[1] * context[1]
        last = first + context[1] - 1
    visible = torch.ones(layout.block, layout.keys, dtype=torch.bool, device=device)
    if left >= 0:
        visible &= key >= first - left
    if right >= 0:
        visible &= key <= last + right
    return visible


class ParakeetEncoderRelPositionalEncoding(nn.Module):
    """Sinusoids of the relative positions query - key, sine on even and cosine on odd channels."""

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
        """Return the embeddings of the relative positions of a block, one table for every clip of the batch.

        Args:
            hidden: (B, N, H) frames.

        Returns:
            (K + c - 1, H) in the dtype of the frames; (2N - 1, H) for attention without a limit.
        """
        positions = block_layout(self.config, hidden.shape[1]).relative_positions(hidden.device)
        has_embedding = None
        left, right = self.config.attention_context_size[0], self.config.attention_context_size[-1]
        if self.config.self_attention_model == "rel_pos_local_attn" and left != right:
            positions, has_embedding = nemo_local_positions(positions, left, right)
        angles = positions[:, None].float() * self.inv_freq.float()
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        if has_embedding is not None:
            table = table * has_embedding[:, None]
        return table.to(hidden.dtype)


def nemo_local_positions(positions: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Return the position whose embedding NeMo's local attention uses in place of each relative position.

    NeMo has a table of the positions left .. -right, and a score column for each position w .. -w, where w is
    max(left, right). It adds row n < left of the table to column n, and row left + m to column 2w - right + m. With
    `left == right` each position keeps its own embedding (RelPositionMultiHeadAttentionLongformer in NeMo's
    multi_head_attention.py).

    Args:
        positions: (R,) relative positions query - key.
        left: frames before a query that it attends to.
        right: frames after it.

    Returns:
        (R,) positions, and a (R,) boolean mask of those that have an embedding.
    """
    width = max(left, right)
    column = width - positions
    in_past, in_future = column < left, column >= 2 * width - right
    row = torch.where(in_past, column, column - 2 * width + right + left)
    return left - row, in_past | in_future


def lowest_score(dtype: torch.dtype) -> float:
    """Return the score of a masked key; finite in float32, so that a query without visible keys gives no NaN."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def relative_shift(scores: Tensor, keys: int) -> Tensor:
    """Turn scores by relative position into scores by key (Transformer-XL, arXiv 1901.02860, appendix B).

    Args:
        scores: (..., c, K + c - 1), contiguous; column j of query i belongs to key j + i - (c - 1) of the block.
        keys: keys K of a block.

    Returns:
        (..., c, K) view of the same memory: entry (i, k) lies at i * (K + c - 1) + k - i + c - 1.
    """
    queries, columns = scores.shape[-2:]
    if queries == 1:
        return scores
    flat = scores.flatten(-2)[..., queries - 1 : queries - 1 + queries * (columns - 1)]
    return flat.unflatten(-1, (queries, columns - 1))[..., :keys]


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
        query: (B, heads, N, head width).
        key, value: (B, heads, K, head width).
        attention_mask: (B, heads, N, K) additive bias.
        scaling: factor of the dot products.
        dropout: probability on the weights.

    Returns:
        (B, N, heads, head width) and the (B, heads, N, K) weights.
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
        if config.global_tokens and config.global_attn_separate:
            self.global_q_proj = nn.Linear(width, width, bias=bias)
            self.global_k_proj = nn.Linear(width, width, bias=bias)
            self.global_v_proj = nn.Linear(width, width, bias=bias)

    def forward(
        self, hidden: Tensor, position_embeddings: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over the valid frames of the context.

        Args:
            hidden: (B, N, H) frames.
            position_embeddings: (K + c - 1, H) relative positions of a block.
            attention_mask: (B, N) boolean mask of the frames inside the clips.

        Returns:
            (B, N, H); and the (B, heads, N, N) weights, if the implementation gives them and all frames are one block.
        """
        layout = block_layout(self.config, hidden.shape[1])
        query, key, value = (self._split(project(hidden)) for project in (self.q_proj, self.k_proj, self.v_proj))
        queries, keys, values = layout.split_queries(query), layout.split_keys(key), layout.split_keys(value)
        bias = self._position_bias(queries, position_embeddings, layout)
        visible = self._visible(hidden, attention_mask, layout)
        if visible is not None:
            bias = bias.masked_fill(~visible, lowest_score(bias.dtype))
        global_frames = self._global_frames(hidden.shape[1])
        projected = [query, key, value]
        if global_frames:
            projected = self._global_projections(hidden, projected)
            scores = torch.einsum("bnhd,bghd->bnhg", projected[0], projected[1][:, global_frames]) * self.scaling
            keys, values, bias = with_global_keys(
                layout.split_queries(scores), value[:, global_frames], keys, values, bias
            )
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        flex = self.config._attn_implementation == "flex_attention"
        output, weights = attend(
            self,
            query=(queries + self.bias_u).transpose(1, 2),
            key=keys.transpose(1, 2),
            value=values.transpose(1, 2),
            # flex attention applies a mask of the first head to all heads; its position bias is per head
            **({"attention_mask": None, "position_bias": bias} if flex else {"attention_mask": bias}),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = layout.join(output)
        if global_frames:
            output = replace_global_rows(output, projected, global_frames, attention_mask)
        return self.o_proj(output.flatten(2)), weights if layout.is_whole else None

    def _split(self, hidden: Tensor) -> Tensor:
        """(B, N, H) -> (B, N, heads, head width)."""
        return hidden.unflatten(-1, (self.heads, self.head_dim))

    def _position_bias(self, queries: Tensor, position_embeddings: Tensor, layout: BlockLayout) -> Tensor:
        """Return the (B * blocks, heads, c, K) scaled scores of each query with the relative positions."""
        blocks, block = queries.shape[:2]
        positions = self._split(self.relative_k_proj(position_embeddings)).permute(1, 2, 0)
        # one product per head for all clips: (heads, B N, head width) x (heads, head width, K + c - 1)
        rows = ((queries + self.bias_v) * self.scaling).flatten(0, 1).transpose(0, 1)
        scores = torch.bmm(rows, positions).unflatten(1, (blocks, block)).transpose(0, 1)
        return relative_shift(scores, layout.keys)

    def _visible(self, hidden: Tensor, attention_mask: Tensor | None, layout: BlockLayout) -> Tensor | None:
        """Return the mask of the keys of each query, which broadcasts to (B * blocks, heads, c, K)."""
        in_context = visible_keys(self.config, layout, hidden.device)
        if attention_mask is None and not layout.is_whole:
            attention_mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if attention_mask is None:
            return in_context
        valid = layout.split_keys(attention_mask)[:, None, None]
        return valid if in_context is None else valid & in_context

    def _global_frames(self, frames: int) -> list[int]:
        """Return the frames that are global tokens."""
        config = self.config
        if config.self_attention_model != "rel_pos_local_attn" or max(config.attention_context_size) < 0:
            return []
        step = config.global_tokens_spacing
        return list(range(0, min(config.global_tokens * step, frames), step))

    def _global_projections(self, hidden: Tensor, projected: list[Tensor]) -> list[Tensor]:
        """Return query, key and value (B, N, heads, head width) of the attention to and from the global tokens."""
        if not self.config.global_attn_separate:
            return projected
        return [
            self._split(project(hidden)) for project in (self.global_q_proj, self.global_k_proj, self.global_v_proj)
        ]


def with_global_keys(
    scores: Tensor, global_values: Tensor, keys: Tensor, values: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the global tokens before the keys of every block.

    The same frames stay among the local keys and count twice there, as in NeMo.

    Args:
        scores: (B * blocks, c, heads, G) scaled scores of the queries with the global tokens.
        global_values: (B, G, heads, head width).
        keys, values: (B * blocks, K, heads, head width).
        bias: (B * blocks, heads, c, K).

    Returns:
        Keys and values (B * blocks, G + K, heads, head width), and the bias (B * blocks, heads, c, G + K).
    """
    global_values = global_values.repeat_interleave(len(keys) // len(global_values), 0)
    # a key of zeros: the bias is the whole score, because it has neither a position nor the bias u
    global_keys = torch.zeros_like(global_values)
    return (
        torch.cat([global_keys, keys], 1),
        torch.cat([global_values, values], 1),
        torch.cat([scores.transpose(1, 2), bias], -1),
    )


def replace_global_rows(
    output: Tensor, projected: list[Tensor], global_frames: list[int], attention_mask: Tensor | None
) -> Tensor:
    """Replace the output of the global tokens, which attend to all valid frames without positions.

    With more than one global token NeMo reads its (token, clip, head) array of queries as (clip, head, token), which
    mixes heads and the clips of a batch. This does the same, because trained weights expect it.

    Args:
        output: (B, N, heads, head width) of the local attention.
        projected: query, key and value, each (B, N, heads, head width).
        global_frames: the frames that are global tokens, G of them.
        attention_mask: (B, N) boolean mask of the valid frames.

    Returns:
        (B, N, heads, head width).
    """
    query, key, value = projected
    batch, _, heads, width = query.shape
    rows = query[:, global_frames].transpose(0, 1).reshape(batch, heads, len(global_frames), width)
    bias = None
    if attention_mask is not None:
        bias = torch.zeros_like(attention_mask, dtype=query.dtype)
        bias = bias.masked_fill(~attention_mask, lowest_score(query.dtype))[:, None, None]
        # a global token beyond the end of a clip is visible to the clip, so its state must be NeMo's
        output = output * attention_mask[..., None, None]
    attended = F.scaled_dot_product_attention(rows, key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias)
    frames = torch.tensor(global_frames, device=output.device)
    return output.index_copy(1, frames, attended.transpose(1, 2).to(output.dtype))
