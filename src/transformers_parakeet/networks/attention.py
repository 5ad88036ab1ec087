"""Self-attention of the encoder with relative positions and full, limited, chunked or local context.

Memory grows linearly with the number of frames. If the context is limited on both sides, time grows linearly too. The
blocks and query groups that make this possible are in `attention_layout.py`, the other modules of the encoder in
`conformer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..configuration_parakeet import ParakeetEncoderConfig
from .attention_layout import (
    ATTENTION_WORKSPACE_BYTES,
    MAX_GROUP_QUERIES,
    POSITION_MULTIPLE,
    SCORE_TENSORS,
    STORED_SCORE_BYTES,
    BlockLayout,
    QueryGroup,
    build_context_mask,
    choose_block_layout,
    choose_query_groups,
    get_masked_score,
    mask_scores,
    relative_shift,
)
from .fast_linear import is_unmodified


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


@dataclass(frozen=True)
class ClipProjections:
    """Projections of the frames and positions of a batch, from which the attention inputs of every block are taken.

    Args:
        query: (B, N, heads, head_dim) queries.
        key: (B, N, heads, head_dim) keys.
        value: (B, N, heads, head_dim) values.
        position_keys: (heads, K + c - 1, head_dim) keys of the relative positions in a block of c queries and K keys,
            in decreasing order of the position.
        attention_mask: (B, N) boolean mask, True on non-padding frames; `None` if there is no padding.
        global_tokens: the global tokens; `None` if the model has none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    position_keys: Tensor
    attention_mask: Tensor | None
    global_tokens: GlobalTokens | None


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

        If the scores of all queries do not fit into `ATTENTION_WORKSPACE_BYTES` (in training, `STORED_SCORE_BYTES`),
        the attention of one group of queries after another is computed.

        Args:
            hidden: (B, N, H) frames.
            position_embeddings: (K + c - 1, H) embeddings of the relative positions, for blocks of c queries that read
                K keys each.
            attention_mask: (B, N) boolean mask, True on non-padding frames; `None` if there is no padding.
            **kwargs: further arguments of transformers' attention functions.

        Returns:
            (B, N, H) output, and the (B, heads, N, N) attention weights. The weights are `None` if there are several
            blocks or several groups of queries, or if the attention function does not return weights. With
            `output_attentions`, the queries of a single block are not divided into groups.
        """
        config = self.config
        layout = choose_block_layout(config.attention_context_style, config.attention_context_size, hidden.shape[1])
        query, key, value = (self._split_heads(project(hidden)) for project in (self.q_proj, self.k_proj, self.v_proj))
        # (K + c - 1, H) -> (heads, K + c - 1, head_dim)
        position_keys = self._split_heads(self.relative_k_proj(position_embeddings)).transpose(0, 1)
        global_tokens = self._get_global_tokens(hidden, query, key, value)
        projections = ClipProjections(query, key, value, position_keys, attention_mask, global_tokens)
        groups = self._choose_query_groups(query, layout, kwargs)
        if groups is None:
            output, weights = self.attend(projections, layout, None, kwargs)
        else:
            output, weights = self._attend_in_groups(projections, layout, groups, kwargs), None
        if global_tokens is not None:
            output = replace_global_token_output(output, global_tokens, attention_mask)
        return self.o_proj(output.flatten(2)), weights if layout.is_single_block else None

    def _split_heads(self, hidden: Tensor) -> Tensor:
        """Reshape (..., H) to (..., heads, head_dim)."""
        return hidden.unflatten(-1, (self.num_heads, self.head_dim))

    def _choose_query_groups(
        self, query: Tensor, layout: BlockLayout, kwargs: dict[str, Any]
    ) -> list[QueryGroup] | None:
        """Divide the queries into groups whose scores fit into the workspace.

        Args:
            query: (B, N, heads, head_dim) queries.
            layout: block layout of the clips.
            kwargs: further arguments of the attention function.

        Returns:
            The groups. `None` if all queries fit into one group, if the attention weights are requested, or in a
            compiled or exported model, whose graph should not depend on the number of frames.
        """
        returns_weights = kwargs.get("output_attentions", getattr(self.config, "output_attentions", False))
        if torch.compiler.is_compiling() or (returns_weights and layout.is_single_block):
            return None
        # in training mode, a forward pass without gradients can precede its recomputation with gradients (reentrant
        # gradient checkpointing); the same groups are necessary for the same dropout
        stores_scores = self.training or torch.is_grad_enabled()
        bytes_per_query = SCORE_TENSORS * self.num_heads * layout.num_keys * query.element_size()
        max_queries = max(1, (STORED_SCORE_BYTES if stores_scores else ATTENTION_WORKSPACE_BYTES) // bytes_per_query)
        if query.device.type == "cpu" and not stores_scores:
            max_queries = min(max_queries, MAX_GROUP_QUERIES)
        return choose_query_groups(layout, len(query), max_queries)

    def _attend_in_groups(
        self,
        projections: ClipProjections,
        layout: BlockLayout,
        groups: list[QueryGroup],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Compute the attention of one group of queries after another.

        The backward pass computes the scores of each group again, because all scores together would need memory that
        grows quadratically with the length of a clip.

        Args:
            projections: queries, keys and values of all frames; without gradients, `query` can be overwritten.
            layout: block layout of the clips.
            groups: groups of queries, ordered by clip and then by frame.
            kwargs: further arguments of the attention function.

        Returns:
            (B, N, heads, head_dim) output.
        """
        query = projections.query

        def attend(query: Tensor, group: QueryGroup) -> Tensor:
            """Compute the (clips, frames, heads, head_dim) output of a group."""
            return self.attend(replace(projections, query=query), layout, group, kwargs)[0]

        if torch.is_grad_enabled():
            # `checkpoint` finds the device whose random numbers it has to restore from the argument `query`
            outputs = [checkpoint(attend, query, group, use_reentrant=False).flatten(0, 1) for group in groups]
            return torch.cat(outputs).unflatten(0, query.shape[:2])
        # an unmodified layer has no hook that stores its output, and no other group needs the queries of a group
        may_overwrite = projections.global_tokens is None and is_unmodified(self.q_proj, nn.Linear)
        output = query if may_overwrite else torch.empty_like(query)
        for group in groups:
            clips = slice(group.clips.start, group.clips.stop)
            output[clips, layout.get_query_frames(group)] = attend(query, group)
        return output

    def attend(
        self, projections: ClipProjections, layout: BlockLayout, group: QueryGroup | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of a group of queries at once.

        Args:
            projections: queries, keys and values of all frames.
            layout: block layout of the clips.
            group: the group of queries; `None` for all queries.
            kwargs: further arguments of the attention function.

        Returns:
            (B, N, heads, head_dim) output, or the output of the clips and frames of the group; and the attention
            weights (M, heads, c, K) of M blocks, or `None`.
        """
        queries = layout.split_queries(projections.query, group)
        keys, values = layout.split_keys(projections.key, group), layout.split_keys(projections.value, group)
        bias = self._compute_position_scores(queries, projections.position_keys, layout, group)
        visible_mask = self._build_visible_mask(projections, layout, group)
        if visible_mask is not None:
            bias = mask_scores(bias, visible_mask)
        inputs = AttentionInputs(queries, keys, values, bias)
        tokens = projections.global_tokens
        if tokens is not None:
            global_scores = layout.split_queries(self._compute_global_key_scores(tokens), group)
            global_values = projections.value[:, tokens.frame_indices]
            if group is not None:
                global_values = global_values[group.clips.start : group.clips.stop]
            inputs = prepend_global_keys(inputs, global_scores, global_values)
        output, weights = self._call_attention_function(inputs, kwargs)
        return layout.join_blocks(output, group), weights

    def _compute_position_scores(
        self, queries: Tensor, position_keys: Tensor, layout: BlockLayout, group: QueryGroup | None
    ) -> Tensor:
        """Compute the part of the attention scores that depends on the relative position of query and key.

        Args:
            queries: (M, c, heads, head_dim) queries of M blocks.
            position_keys: (heads, K + c - 1, head_dim) keys of the relative positions, in decreasing order of the
                position, for K keys per block.
            layout: block layout of the queries and keys.
            group: the group of queries that `queries` contains; `None` for all queries.

        Returns:
            (M, heads, c, K) scaled scores.
        """
        if group is not None:
            # query i and key j have the position key c - 1 - i + j
            first_position = layout.block_size - group.queries.stop
            position_keys = position_keys[:, first_position:][:, : layout.num_keys + len(group.queries) - 1]
        # at least one position is added: the shift is then the same for a single query as for several ones, and a
        # compiled graph does not depend on whether a clip has one frame
        num_added = POSITION_MULTIPLE - position_keys.shape[1] % POSITION_MULTIPLE
        if torch.compiler.is_compiling():
            # one position, because the graph should not depend on a remainder
            num_added = 1
        # (heads, head_dim, positions)
        padded_keys = F.pad(position_keys, (0, 0, 0, num_added)).transpose(1, 2)
        # one matrix product per head for all clips: (heads, all queries, head_dim) x (heads, head_dim, positions)
        flat_queries = ((queries + self.bias_v) * self.scaling).flatten(0, 1).transpose(0, 1).contiguous()
        scores = torch.bmm(flat_queries, padded_keys).unflatten(1, queries.shape[:2]).transpose(0, 1)
        return relative_shift(scores, layout.num_keys)

    def _build_visible_mask(
        self, projections: ClipProjections, layout: BlockLayout, group: QueryGroup | None
    ) -> Tensor | None:
        """Build the mask of the keys that a query may attend to: non-padding frames in the context of the query.

        Args:
            projections: attention mask of the batch, and queries, of which only shape and device are used.
            layout: block layout, with c queries and K keys per block.
            group: the group of queries; `None` for all queries.

        Returns:
            Boolean mask that broadcasts to (M, heads, c, K) for M blocks; `None` if every key is visible.
        """
        config, query, attention_mask = self.config, projections.query, projections.attention_mask
        context_mask = build_context_mask(
            config.attention_context_style,
            config.attention_context_size,
            layout,
            query.device,
            None if group is None else group.queries,
        )
        if attention_mask is None and not layout.is_single_block:
            # the first and last blocks read zeros outside the N frames; `split_keys` gives them the mask value False
            attention_mask = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
        if attention_mask is None:
            return context_mask
        clip_mask = layout.split_keys(attention_mask, group)[:, None, None]
        return clip_mask if context_mask is None else clip_mask & context_mask

    def _call_attention_function(self, inputs: AttentionInputs, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
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
            # contiguous, because its compiled code is wrong for a memory layout that varies
            bias_arguments = {"attention_mask": None, "position_bias": inputs.bias.contiguous()}
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
