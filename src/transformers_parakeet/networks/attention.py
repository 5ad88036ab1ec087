"""Self-attention of the encoder with relative positions and full, limited, chunked or local context.

A context that is limited on both sides needs memory linear in the number of frames. The blocks of the encoder are in
`conformer.py`.
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

# fewest queries of a block: with shorter blocks the same keys are copied too often
MIN_BLOCK_SIZE = 64


def pad_frames(frames: Tensor, before: int, after: int) -> Tensor:
    """Add frames of zeros before the first and after the last frame of (B, N, ...)."""
    return F.pad(frames, (*[0, 0] * (frames.ndim - 2), before, after))


@dataclass(frozen=True)
class BlockLayout:
    """How the N queries are cut into blocks, and which keys the queries of a block read.

    Attention without a limit is a single block of all frames. All blocks of a layout have the same shape.

    Args:
        num_frames: number of frames N.
        block_size: number of queries of a block, c.
        keys_before: number of keys that a block reads before its first query.
        keys_after: number of keys that a block reads after its last query.
    """

    num_frames: int
    block_size: int
    keys_before: int = 0
    keys_after: int = 0

    @property
    def is_single_block(self) -> bool:
        """Tell whether one block holds all frames."""
        return self.block_size == self.num_frames

    @property
    def num_keys(self) -> int:
        """Number of keys K that a block reads."""
        return self.keys_before + self.block_size + self.keys_after

    @property
    def padding(self) -> int:
        """Number of frames that must be added to fill the last block."""
        return -self.num_frames % self.block_size

    def relative_positions(self, device: torch.device) -> Tensor:
        """Return the (K + c - 1,) relative positions query - key of a block, from the largest to the smallest."""
        largest, smallest = self.keys_before + self.block_size - 1, 1 - self.block_size - self.keys_after
        return torch.arange(largest, smallest - 1, -1, device=device)

    def split_queries(self, queries: Tensor) -> Tensor:
        """Cut the frames of (B, N, ...) into blocks and return (B * blocks, c, ...); zeros fill the last block."""
        if self.is_single_block:
            return queries
        padded = pad_frames(queries, 0, self.padding)
        return padded.unflatten(1, (-1, self.block_size)).flatten(0, 1)

    def split_keys(self, keys: Tensor) -> Tensor:
        """Return the keys (B * blocks, K, ...) that each block reads from (B, N, ...), zeros outside the clip."""
        if self.is_single_block:
            return keys
        padded = pad_frames(keys, self.keys_before, self.padding + self.keys_after)
        # (B, blocks, ..., K) view: neighbouring blocks share keys
        overlapping = padded.unfold(1, self.num_keys, self.block_size)
        return overlapping.movedim(-1, 2).flatten(0, 1)

    def join_blocks(self, blocks: Tensor) -> Tensor:
        """Return the frames (B, N, ...) of blocks (B * blocks, c, ...), the inverse of `split_queries`."""
        if self.is_single_block:
            return blocks
        num_blocks = (self.num_frames + self.padding) // self.block_size
        return blocks.unflatten(0, (-1, num_blocks)).flatten(1, 2)[:, : self.num_frames]


def block_layout(config: ParakeetEncoderConfig, num_frames: int) -> BlockLayout:
    """Choose the blocks for the attention context of a configuration.

    Returns:
        Blocks about half as long as the context. If the context is unlimited on one side or about as long as the clip,
        a single block.
    """
    left, right = config.attention_context_size[0], config.attention_context_size[-1]
    chunk_size = 1
    if config.attention_context_style == "chunked_limited":
        # frames after the chunk of a query are not visible
        chunk_size, right = right + 1, min(right, 0)
    elif config.attention_context_style == "chunked_limited_with_rc":
        chunk_size = config.attention_context_size[1]
    single_block = BlockLayout(num_frames, num_frames)
    if min(left, right) < 0 or chunk_size < 1:
        return single_block
    # a block is a whole number of chunks
    chunks_per_block = -(-max((left + right) // 2, MIN_BLOCK_SIZE) // chunk_size)
    layout = BlockLayout(num_frames, chunk_size * chunks_per_block, left, right)
    return layout if layout.num_keys < num_frames else single_block


def visible_keys(config: ParakeetEncoderConfig, layout: BlockLayout, device: torch.device) -> Tensor | None:
    """Build the mask of the K keys that are in the attention context of each of the c queries of a block.

    The mask is the same for all blocks, because each block begins with a chunk.

    Returns:
        (c, K) boolean mask, true where the query may attend to the key; `None` if every key is visible.
    """
    # [left, right] or [left, chunk, right] frames, -1 for no limit
    context = config.attention_context_size
    if max(context) < 0:
        return None
    query = torch.arange(layout.block_size, device=device)[:, None]
    key = torch.arange(-layout.keys_before, layout.block_size + layout.keys_after, device=device)[None]
    left, right = context[0], context[-1]
    # the context extends from `left` frames before `first` to `right` frames after `last`
    first, last = query, query
    if config.attention_context_style == "chunked_limited" and right >= 0:
        chunk_size = right + 1
        first = query // chunk_size * chunk_size
        last, right = first + chunk_size - 1, 0
    elif config.attention_context_style == "chunked_limited_with_rc" and context[1] > 0:
        chunk_size = context[1]
        first = query // chunk_size * chunk_size
        last = first + chunk_size - 1
    visible = torch.ones(layout.block_size, layout.num_keys, dtype=torch.bool, device=device)
    if left >= 0:
        visible &= key >= first - left
    if right >= 0:
        visible &= key <= last + right
    return visible


class ParakeetEncoderRelPositionalEncoding(nn.Module):
    """Sinusoidal embeddings of the relative positions query - key, sines on even and cosines on odd channels."""

    inv_freq: Tensor

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self.frequencies(config), persistent=False)

    @staticmethod
    def frequencies(config: ParakeetEncoderConfig) -> Tensor:
        """Return the (H/2,) angular frequencies of the sinusoids, in radians per frame."""
        exponents = torch.arange(0, config.hidden_size, 2, dtype=torch.float32) / config.hidden_size
        return 1.0 / POSITION_BASE**exponents

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """Return the embeddings of the relative positions of a block, which are the same for all blocks and clips.

        Args:
            hidden: (B, N, H) frames, for their number, dtype and device.

        Returns:
            (K + c - 1, H) in the dtype of the frames; (2N - 1, H) for attention without a limit.
        """
        positions = block_layout(self.config, hidden.shape[1]).relative_positions(hidden.device)
        has_embedding = None
        left, right = self.config.attention_context_size[0], self.config.attention_context_size[-1]
        if self.config.self_attention_model == "rel_pos_local_attn" and left != right:
            positions, has_embedding = nemo_local_positions(positions, left, right)
        angles = positions[:, None].float() * self.inv_freq.float()
        embeddings = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        if has_embedding is not None:
            embeddings = embeddings * has_embedding[:, None]
        return embeddings.to(hidden.dtype)


def nemo_local_positions(positions: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Return the position whose embedding NeMo's local attention uses in place of each relative position.

    NeMo has an embedding for each position from left to -right, and a column of scores for each position from w to -w,
    where w is max(left, right). It adds row n of the embeddings to column n if n < left, and row left + m to column
    2w - right + m for m >= 0. With `left == right` each position keeps its own embedding
    (RelPositionMultiHeadAttentionLongformer in NeMo's multi_head_attention.py).

    Args:
        positions: (R,) relative positions query - key.
        left: number of frames before a query that it attends to.
        right: number of frames after a query that it attends to.

    Returns:
        (R,) positions, and a (R,) boolean mask of the positions that have an embedding.
    """
    max_distance = max(left, right)
    column = max_distance - positions
    in_past, in_future = column < left, column >= 2 * max_distance - right
    row = torch.where(in_past, column, column - 2 * max_distance + right + left)
    return left - row, in_past | in_future


def lowest_score(dtype: torch.dtype) -> float:
    """Return the score of a masked key; it is finite in float32, so that a query without visible keys gives no NaN."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def relative_shift(scores: Tensor, num_keys: int) -> Tensor:
    """Turn scores by relative position into scores by key (Transformer-XL, arXiv 1901.02860, appendix B).

    Args:
        scores: (..., c, K + c - 1), contiguous. Column j of query i is the score of key j + i - (c - 1) of the block.
        num_keys: number of keys K of a block.

    Returns:
        (..., c, K) view of the same memory. Entry (i, k) is number i * (K + c - 1) + k - i + c - 1 of the input.
    """
    num_queries, num_columns = scores.shape[-2:]
    if num_queries == 1:
        return scores
    # each row is read with an offset that is one smaller than for the row before
    first = num_queries - 1
    flat = scores.flatten(-2)[..., first : first + num_queries * (num_columns - 1)]
    return flat.unflatten(-1, (num_queries, num_columns - 1))[..., :num_keys]


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
    """Compute attention in plain PyTorch; this is the only implementation that returns the attention weights.

    Args:
        module: the attention module; its training flag switches dropout on.
        query: (B, heads, N, head_dim).
        key, value: (B, heads, K, head_dim).
        attention_mask: (B, heads, N, K) bias that is added to the scores.
        scaling: factor of the dot products.
        dropout: dropout probability of the attention weights.
        **kwargs: ignored; other implementations read them.

    Returns:
        (B, N, heads, head_dim) output and (B, heads, N, K) weights.
    """
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


@dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys, values and score bias of an attention call; M is the number of blocks of all clips together.

    Args:
        queries: (M, c, heads, head_dim).
        keys, values: (M, K, heads, head_dim).
        bias: (M, heads, c, K), added to the scaled dot products: position scores, and the lowest score for masked keys.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor


@dataclass(frozen=True)
class GlobalTokens:
    """The frames of NeMo's local attention that attend to all frames and to which all frames attend.

    Args:
        frames: indices of the G frames.
        query, key, value: (B, N, heads, head_dim) projections for the attention from and to these frames.
    """

    frames: list[int]
    query: Tensor
    key: Tensor
    value: Tensor


class ParakeetEncoderAttention(nn.Module):
    """Multi-head attention with relative positions (Transformer-XL, arXiv 1901.02860, section 3.3)."""

    def __init__(self, config: ParakeetEncoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        # transformers' attention functions read these three
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.attention_dropout = config.attention_dropout
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)
        self.relative_k_proj = nn.Linear(width, width, bias=False)
        self.bias_u = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        self.bias_v = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        if config.global_tokens and config.global_attn_separate:
            self.global_q_proj = nn.Linear(width, width, bias=bias)
            self.global_k_proj = nn.Linear(width, width, bias=bias)
            self.global_v_proj = nn.Linear(width, width, bias=bias)

    def forward(
        self, hidden: Tensor, position_embeddings: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the valid frames of the context.

        Args:
            hidden: (B, N, H) frames.
            position_embeddings: (K + c - 1, H) embeddings of the relative positions of a block.
            attention_mask: (B, N) boolean mask of the frames inside the clips; `None` if all are.
            **kwargs: further arguments of transformers' attention functions.

        Returns:
            (B, N, H) output, and the (B, heads, N, N) attention weights if the attention function returns weights and
            there is a single block, else `None`.
        """
        layout = block_layout(self.config, hidden.shape[1])
        query, key, value = (self._split_heads(project(hidden)) for project in (self.q_proj, self.k_proj, self.v_proj))
        queries = layout.split_queries(query)
        bias = self._position_scores(queries, position_embeddings, layout)
        visible = self._visible_keys(hidden, attention_mask, layout)
        if visible is not None:
            bias = bias.masked_fill(~visible, lowest_score(bias.dtype))
        inputs = AttentionInputs(queries, layout.split_keys(key), layout.split_keys(value), bias)
        global_tokens = self._global_tokens(hidden, query, key, value)
        if global_tokens is not None:
            global_scores = self._scores_of_global_tokens(global_tokens)
            inputs = with_global_keys(inputs, layout.split_queries(global_scores), value[:, global_tokens.frames])
        output, weights = self._attend(inputs, kwargs)
        output = layout.join_blocks(output)
        if global_tokens is not None:
            output = replace_global_rows(output, global_tokens, attention_mask)
        return self.o_proj(output.flatten(2)), weights if layout.is_single_block else None

    def _split_heads(self, hidden: Tensor) -> Tensor:
        """Reshape (..., H) to (..., heads, head_dim)."""
        return hidden.unflatten(-1, (self.num_heads, self.head_dim))

    def _position_scores(self, queries: Tensor, position_embeddings: Tensor, layout: BlockLayout) -> Tensor:
        """Return the (B * blocks, heads, c, K) scaled scores of each query with the relative position of each key.

        Args:
            queries: (B * blocks, c, heads, head_dim).
            position_embeddings: (K + c - 1, H).
            layout: blocks of the attention.
        """
        num_blocks, block_size = queries.shape[:2]
        position_keys = self._split_heads(self.relative_k_proj(position_embeddings)).permute(1, 2, 0)
        # one product per head for all clips: (heads, B N, head_dim) x (heads, head_dim, K + c - 1)
        rows = ((queries + self.bias_v) * self.scaling).flatten(0, 1).transpose(0, 1)
        scores = torch.bmm(rows, position_keys).unflatten(1, (num_blocks, block_size)).transpose(0, 1)
        return relative_shift(scores, layout.num_keys)

    def _visible_keys(self, hidden: Tensor, attention_mask: Tensor | None, layout: BlockLayout) -> Tensor | None:
        """Build the mask of the keys that are inside the clip and in the context of the query.

        Args:
            hidden: (B, N, H) frames, for their number and device.
            attention_mask: (B, N) boolean mask of the frames inside the clips; `None` if all are.
            layout: blocks of the attention.

        Returns:
            Boolean mask that broadcasts to (B * blocks, heads, c, K); `None` if every key is visible.
        """
        in_context = visible_keys(self.config, layout, hidden.device)
        if attention_mask is None and not layout.is_single_block:
            # the first and the last blocks read zeros outside the frames, which must be masked
            attention_mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if attention_mask is None:
            return in_context
        in_clip = layout.split_keys(attention_mask)[:, None, None]
        return in_clip if in_context is None else in_clip & in_context

    def _attend(self, inputs: AttentionInputs, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Call the attention function that the configuration selects.

        Args:
            inputs: queries, keys, values and bias of M blocks.
            kwargs: further arguments of the attention function.

        Returns:
            (M, c, heads, head_dim) output, and (M, heads, c, K) weights or `None`.
        """
        name = self.config._attn_implementation
        attention_function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        bias_arguments: dict[str, Tensor | None] = {"attention_mask": inputs.bias}
        if name == "flex_attention":
            # flex attention reads the first head of a mask only, and the position scores differ between heads
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

    def _global_tokens(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor) -> GlobalTokens | None:
        """Return the global tokens of local attention, `None` if there are none.

        Args:
            hidden: (B, N, H) frames.
            query, key, value: (B, N, heads, head_dim) of the local attention, which global tokens share by default.
        """
        config = self.config
        is_local = config.self_attention_model == "rel_pos_local_attn" and max(config.attention_context_size) >= 0
        if not (is_local and config.global_tokens):
            return None
        spacing = config.global_tokens_spacing
        frames = list(range(0, min(config.global_tokens * spacing, hidden.shape[1]), spacing))
        if config.global_attn_separate:
            projections = (self.global_q_proj, self.global_k_proj, self.global_v_proj)
            query, key, value = (self._split_heads(project(hidden)) for project in projections)
        return GlobalTokens(frames, query, key, value)

    def _scores_of_global_tokens(self, global_tokens: GlobalTokens) -> Tensor:
        """Return the (B, N, heads, G) scaled scores of all queries with the keys of the global tokens."""
        global_keys = global_tokens.key[:, global_tokens.frames]
        return torch.einsum("bnhd,bghd->bnhg", global_tokens.query, global_keys) * self.scaling


def with_global_keys(inputs: AttentionInputs, global_scores: Tensor, global_values: Tensor) -> AttentionInputs:
    """Insert the global tokens before the keys of every block.

    A global token inside the local context counts twice, as in NeMo.

    Args:
        inputs: queries, keys, values and bias of M = B * blocks blocks.
        global_scores: (M, c, heads, G) scaled scores of the queries with the global tokens.
        global_values: (B, G, heads, head_dim).

    Returns:
        The inputs with G + K keys per block.
    """
    global_values = global_values.repeat_interleave(len(inputs.keys) // len(global_values), 0)
    # keys of zeros: these scores contain neither a position nor the bias u, so that the bias is the complete score
    global_keys = torch.zeros_like(global_values)
    return AttentionInputs(
        inputs.queries,
        torch.cat([global_keys, inputs.keys], 1),
        torch.cat([global_values, inputs.values], 1),
        torch.cat([global_scores.transpose(1, 2), inputs.bias], -1),
    )


def replace_global_rows(output: Tensor, global_tokens: GlobalTokens, attention_mask: Tensor | None) -> Tensor:
    """Replace the output of the global tokens, which attend to all valid frames without positions.

    If there is more than one global token, NeMo reads its (token, clip, head) array of queries as (clip, head, token).
    This mixes heads and the clips of a batch. It is repeated here, because weights were trained with it.

    Args:
        output: (B, N, heads, head_dim) output of the local attention.
        global_tokens: frames and projections of the global tokens.
        attention_mask: (B, N) boolean mask of the valid frames; `None` if all are.

    Returns:
        (B, N, heads, head_dim).
    """
    query, key, value = global_tokens.query, global_tokens.key, global_tokens.value
    batch_size, _, num_heads, head_dim = query.shape
    queries = query[:, global_tokens.frames].transpose(0, 1)
    queries = queries.reshape(batch_size, num_heads, len(global_tokens.frames), head_dim)
    bias = None
    if attention_mask is not None:
        bias = torch.zeros_like(attention_mask, dtype=query.dtype)
        bias = bias.masked_fill(~attention_mask, lowest_score(query.dtype))[:, None, None]
        # a global token past the end of a clip is visible to the clip, so that its state must be NeMo's
        output = output * attention_mask[..., None, None]
    attended = F.scaled_dot_product_attention(queries, key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias)
    frames = torch.tensor(global_tokens.frames, device=output.device)
    return output.index_copy(1, frames, attended.transpose(1, 2).to(output.dtype))
