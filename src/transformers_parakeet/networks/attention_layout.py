"""Blocks, query groups, masks and relative positions of attention.

The attention module that uses them is in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# minimum number of queries in a block: neighbouring blocks read overlapping keys, and short blocks copy each key often
MIN_BLOCK_SIZE = 64

# bytes of the attention scores that are computed at once outside training. One clip of 30 s takes 17 MiB with 8 heads
# in float32. With 20 minutes of full attention, a group still has 35 queries, enough for efficient matrix products: on
# a CPU, 32 to 256 MiB take about the same time.
ATTENTION_WORKSPACE_BYTES = 64 * 2**20

# largest number of queries, of all clips of a group together, whose attention is computed at once outside training on a
# CPU. A group reads only the relative positions between its queries and the keys, and its scores stay in the cache.
# Fastest of 12 calls with one thread and 8 heads of width 128, all queries / groups of 384 queries: 57 / 43 ms for 751
# frames in float32, 199 / 157 ms for 1500 frames in float32, 85 / 52 ms for 1500 frames in bfloat16.
MAX_GROUP_QUERIES = 384

# the number of position keys in a product is rounded up to a multiple of this number, 64 bytes of 16-bit numbers.
# Measured with one thread in bfloat16, 8 heads and 751 queries: 15 ms with 1501 position keys that are not contiguous,
# 13 ms with 1504 that are not contiguous, 2 ms with 1504 that are contiguous.
POSITION_MULTIPLE = 32

# bytes of the attention scores of one encoder block, up to which training stores them for the backward pass. A batch of
# 32 clips of 15 s takes 138 MiB with 8 heads in float32. Larger scores are computed a second time in the backward pass.
STORED_SCORE_BYTES = 2**30

# number of tensors with one entry per score: position scores, the same with masked keys, and two tensors of eager
# attention
SCORE_TENSORS = 4


def pad_frames(frames: Tensor, before: int, after: int) -> Tensor:
    """Add frames of zeros before the first and after the last frame of (B, N, ...).

    Args:
        frames: (B, N, ...) frames.
        before: number of frames to add before the first frame.
        after: number of frames to add after the last frame.
    """
    # `F.pad` expects pairs (before, after) from the last dimension to the first one
    return F.pad(frames, (*[0, 0] * (frames.ndim - 2), before, after))


@dataclass(frozen=True)
class BlockLayout:
    """How the queries are split into blocks, and which keys each block reads.

    All blocks of a layout have the same shape. Without a context limit, one block holds all frames. In shapes, c is
    `block_size` and K is `num_keys`.

    Args:
        num_frames: number of frames N.
        block_size: number of queries in a block.
        keys_before: number of keys that a block reads before its first query.
        keys_after: number of keys that a block reads after its last query.
    """

    num_frames: int
    block_size: int
    keys_before: int = 0
    keys_after: int = 0

    @property
    def is_single_block(self) -> bool:
        """Whether one block holds all frames."""
        return self.block_size == self.num_frames

    @property
    def num_keys(self) -> int:
        """Number of keys that a block reads."""
        return self.keys_before + self.block_size + self.keys_after

    @property
    def num_blocks(self) -> int:
        """Number of blocks of a clip."""
        return 1 if self.is_single_block else -(-self.num_frames // self.block_size)

    @property
    def padding(self) -> int:
        """Number of frames to add at the end to fill the last block."""
        return -self.num_frames % self.block_size

    def compute_relative_positions(self, device: torch.device) -> Tensor:
        """List the relative positions (query index - key index) that occur in a block, in decreasing order.

        Args:
            device: device of the result.

        Returns:
            (K + c - 1,) integer positions, for K keys and c queries per block.
        """
        # the last query and the first key have the largest distance into the past
        largest = self.keys_before + self.block_size - 1
        smallest = 1 - self.block_size - self.keys_after
        return torch.arange(largest, smallest - 1, -1, device=device)

    def split_queries(self, queries: Tensor, group: QueryGroup | None = None) -> Tensor:
        """Split the queries of each clip into blocks of equal size, and fill the last block with zeros.

        Args:
            queries: (B, N, ...) one query per frame.
            group: the queries to return; `None` for all.

        Returns:
            (M, c, ...) M blocks of c queries; M = B * num_blocks for all queries. For a group that is a range of r
            queries of one block, (1, r, ...).
        """
        if group is not None:
            queries = queries[group.clips.start : group.clips.stop, self.get_query_frames(group)]
        if self.is_single_block or (group is not None and len(group.queries) < self.block_size):
            return queries
        padded = pad_frames(queries, 0, -queries.shape[1] % self.block_size)
        return padded.unflatten(1, (-1, self.block_size)).flatten(0, 1)

    def split_keys(self, keys: Tensor, group: QueryGroup | None = None) -> Tensor:
        """Gather the keys that the queries of each block attend to; a single block is returned unchanged.

        Keys before the first and after the last frame are zeros.

        Args:
            keys: (B, N, ...) one key per frame.
            group: the queries that attend to the keys; `None` for all.

        Returns:
            (M, K, ...) keys of M blocks, K per block; M = B * num_blocks for all queries.
        """
        if group is not None:
            keys = keys[group.clips.start : group.clips.stop]
        if self.is_single_block:
            return keys
        blocks = range(self.num_blocks) if group is None else group.blocks
        start = blocks.start * self.block_size - self.keys_before
        stop = blocks.stop * self.block_size + self.keys_after
        inside = keys[:, max(start, 0) : min(stop, self.num_frames)]
        padded = pad_frames(inside, max(-start, 0), max(stop - self.num_frames, 0))
        # (B, num_blocks, ..., K) view, in which the keys of neighbouring blocks overlap
        overlapping = padded.unfold(1, self.num_keys, self.block_size)
        return overlapping.movedim(-1, 2).flatten(0, 1)

    def join_blocks(self, blocks: Tensor, group: QueryGroup | None = None) -> Tensor:
        """Undo `split_queries`: concatenate the blocks of each clip and remove the padding frames of the last block.

        Args:
            blocks: (M, c, ...) blocks of c frames.
            group: the group of queries that the blocks belong to; `None` for all.

        Returns:
            (B, N, ...) frames, or the frames of the clips of the group.
        """
        if self.is_single_block or (group is not None and len(group.queries) < self.block_size):
            return blocks
        num_blocks, num_frames = self.num_blocks, self.num_frames
        if group is not None:
            frames = self.get_query_frames(group)
            num_blocks, num_frames = len(group.blocks), frames.stop - frames.start
        return blocks.unflatten(0, (-1, num_blocks)).flatten(1, 2)[:, :num_frames]

    def get_query_frames(self, group: QueryGroup) -> slice:
        """Return the frames of the queries of a group, the same for all its clips; padding frames are not included.

        Args:
            group: queries whose attention is computed at once.
        """
        start = group.blocks.start * self.block_size + group.queries.start
        stop = (group.blocks.stop - 1) * self.block_size + group.queries.stop
        return slice(start, min(stop, self.num_frames))


@dataclass(frozen=True)
class QueryGroup:
    """Queries whose attention is computed at once: whole blocks of several clips, or a range of queries of one block.

    Args:
        clips: indices of the clips in the batch.
        blocks: indices of the attention blocks of each clip.
        queries: indices of the queries in each block.
    """

    clips: range
    blocks: range
    queries: range


def choose_query_groups(layout: BlockLayout, batch_size: int, max_queries: int) -> list[QueryGroup] | None:
    """Divide the queries of a batch into groups of limited size.

    Args:
        layout: block layout of the clips.
        batch_size: number of clips B.
        max_queries: maximum number of queries in a group, at least 1.

    Returns:
        The groups, ordered by clip and then by frame; `None` if all queries fit into one group.
    """
    block_size, num_blocks = layout.block_size, layout.num_blocks
    if batch_size * num_blocks * block_size <= max_queries:
        return None
    max_blocks = max_queries // block_size
    groups = []
    for clips in split_range(batch_size, max_blocks // num_blocks):
        for blocks in split_range(num_blocks, max_blocks):
            # the last block of a clip can have fewer frames than queries
            num_queries = block_size if max_blocks else min(block_size, layout.num_frames - blocks.start * block_size)
            groups += [QueryGroup(clips, blocks, queries) for queries in split_range(num_queries, max_queries)]
    return groups


def split_range(length: int, max_length: int) -> list[range]:
    """Split the integers 0 to `length - 1` into consecutive ranges of at most `max_length` integers.

    The ranges have about the same length.

    Args:
        length: number of integers.
        max_length: maximum length of a range; 0 is treated as 1.
    """
    num_ranges = -(-length // max(1, max_length))
    step = -(-length // max(1, num_ranges))
    return [range(start, min(start + step, length)) for start in range(0, length, step)]


def choose_block_layout(context_style: str, context_size: Sequence[int], num_frames: int) -> BlockLayout:
    """Choose the size of the attention blocks for a context.

    Args:
        context_style: `attention_context_style` of the encoder configuration.
        context_size: `attention_context_size` of the encoder configuration, in encoder frames.
        num_frames: number of frames N in the padded batch.

    Returns:
        Blocks about half as long as the context. If the context is unlimited on one side, or if a block would read at
        least N keys, a single block with all frames.
    """
    left, right = context_size[0], context_size[-1]
    chunk_size = 1
    if context_style == "chunked_limited":
        # a query sees the rest of its chunk, but no frame after the chunk; a negative `right` means no limit
        chunk_size, right = right + 1, min(right, 0)
    elif context_style == "chunked_limited_with_rc":
        chunk_size = context_size[1]
    single_block = BlockLayout(num_frames, num_frames)
    if min(left, right) < 0 or chunk_size < 1:
        return single_block
    # round up to a whole number of chunks, because then all blocks have the same mask
    chunks_per_block = -(-max((left + right) // 2, MIN_BLOCK_SIZE) // chunk_size)
    layout = BlockLayout(num_frames, chunk_size * chunks_per_block, left, right)
    return layout if layout.num_keys < num_frames else single_block


def build_context_mask(
    context_style: str,
    context_size: Sequence[int],
    layout: BlockLayout,
    device: torch.device,
    queries: range | None = None,
) -> Tensor | None:
    """Build the mask of the keys in the attention context of each query in a block.

    All blocks have the same mask, because each block contains a whole number of chunks.

    Args:
        context_style: `attention_context_style` of the encoder configuration.
        context_size: `[left, right]` or `[left, chunk, right]` encoder frames, -1 for no limit.
        layout: block layout for this context, with c queries and K keys per block.
        device: device of the mask.
        queries: indices of the queries in the block; `None` for all c queries.

    Returns:
        (c, K) boolean mask, True if the query may attend to the key, with one row for each entry of `queries`; `None`
        if every key is visible to every query.
    """
    if max(context_size) < 0:
        return None
    # frame indices relative to the first query of the block: queries as a column, keys as a row
    first_query, end_query = (0, layout.block_size) if queries is None else (queries.start, queries.stop)
    query_frames = torch.arange(first_query, end_query, device=device)[:, None]
    key_frames = torch.arange(-layout.keys_before, layout.block_size + layout.keys_after, device=device)[None]
    left, right = context_size[0], context_size[-1]
    # visible keys: from `left` frames before `first_frame` to `right` frames after `last_frame`
    first_frame, last_frame = query_frames, query_frames
    if context_style == "chunked_limited" and right >= 0:
        chunk_size = right + 1
        first_frame = query_frames // chunk_size * chunk_size
        # in this style `right` reaches to the end of the chunk and not beyond it
        last_frame, right = first_frame + chunk_size - 1, 0
    elif context_style == "chunked_limited_with_rc" and context_size[1] > 0:
        # rc: right context, which begins after the chunk
        chunk_size = context_size[1]
        first_frame = query_frames // chunk_size * chunk_size
        last_frame = first_frame + chunk_size - 1
    is_visible = torch.ones(len(query_frames), layout.num_keys, dtype=torch.bool, device=device)
    if left >= 0:
        is_visible &= key_frames >= first_frame - left
    if right >= 0:
        is_visible &= key_frames <= last_frame + right
    return is_visible


def map_to_nemo_local_positions(positions: Tensor, left_context: int, right_context: int) -> tuple[Tensor, Tensor]:
    """Map each relative position to the position whose embedding NeMo's local attention uses instead.

    The two differ only if `left_context != right_context`. NeMo then has one score column per position from w to -w,
    where w = max(left_context, right_context), but one embedding per position from left_context to -right_context.
    NeMo adds the first left_context embeddings to the first columns and the other embeddings to the last columns, so
    some embeddings are added to the wrong column. Example for left_context = 2, right_context = 3:

        position of the column         3   2     1   0  -1  -2  -3
        position of the embedding      2   1  none   0  -1  -2  -3

    Source: RelPositionMultiHeadAttentionLongformer in NeMo's multi_head_attention.py.

    Args:
        positions: relative positions (query index - key index), of any shape.
        left_context: number of frames before a query that the query attends to.
        right_context: number of frames after a query that the query attends to.

    Returns:
        The mapped positions, and a boolean mask that is False if NeMo adds no embedding. Both have the shape of
        `positions`; where the mask is False, the mapped position is meaningless.
    """
    max_distance = max(left_context, right_context)
    score_column = max_distance - positions
    in_left_block = score_column < left_context
    in_right_block = score_column >= 2 * max_distance - right_context
    # the last right_context + 1 columns get the embeddings from index left_context on
    right_block_row = score_column - (2 * max_distance - right_context) + left_context
    embedding_row = torch.where(in_left_block, score_column, right_block_row)
    # row 0 of the embeddings belongs to position left_context
    return left_context - embedding_row, in_left_block | in_right_block


def relative_shift(scores: Tensor, num_keys: int) -> Tensor:
    """Reorder scores by relative position into scores by key, without a copy.

    Source: Transformer-XL (arXiv 1901.02860), appendix B. Example with c = 2 queries and K = 2 keys, where the columns
    of the input are the relative positions 1, 0, -1:

        query 0: [a b c]  ->  query 0: keys 0, 1 have positions 0, -1: [b c]
        query 1: [d e f]  ->  query 1: keys 0, 1 have positions 1,  0: [d e]

    Args:
        scores: (..., c, K + c - 1), contiguous: the score of each of c queries for each relative position of a block,
            in decreasing order of the position. Further columns are ignored.
        num_keys: number of keys K in a block.

    Returns:
        (..., c, K) view of the memory of `scores`.
    """
    num_queries, num_positions = scores.shape[-2:]
    if num_positions == num_keys:
        # a single query, whose scores are in the order of the keys
        return scores
    # query 0 starts at column c - 1, and each query starts one column earlier than the query before: in the flattened
    # scores, consecutive queries therefore start num_positions - 1 entries apart
    first_column, row_stride = num_queries - 1, num_positions - 1
    shifted = scores.flatten(-2)[..., first_column : first_column + num_queries * row_stride]
    return shifted.unflatten(-1, (num_queries, row_stride))[..., :num_keys]


def get_masked_score(dtype: torch.dtype) -> float:
    """Return the score bias of a masked key: half the lowest number that is finite in both `dtype` and float32.

    A finite score avoids NaN for a query without visible keys, even if the softmax is computed in float32. The other
    half is for the dot product of query and key, which is added to the bias; in float16 the sum could become infinite.

    Args:
        dtype: dtype of the attention scores.
    """
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) / 2


def mask_scores(scores: Tensor, visible_mask: Tensor) -> Tensor:
    """Set the scores of masked keys to the masked score.

    Without gradients on a CPU, a mask of padding frames is applied in place and only to the scores of the padding
    frames, because most keys are visible.

    Args:
        scores: (M, heads, c, K) scores; may be overwritten.
        visible_mask: boolean mask that broadcasts to the shape of `scores`, False for masked keys.

    Returns:
        (M, heads, c, K) scores.
    """
    masked_score = get_masked_score(scores.dtype)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or scores.device.type != "cpu":
        return scores.masked_fill(~visible_mask, masked_score)
    if visible_mask.ndim < 4 or visible_mask.shape[2] > 1:
        return scores.masked_fill_(~visible_mask, masked_score)
    for block_scores, block_mask in zip(scores, visible_mask[:, 0, 0], strict=True):
        block_scores.index_fill_(-1, (~block_mask).nonzero()[:, 0], masked_score)
    return scores
