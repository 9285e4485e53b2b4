"""Attention of draft blocks to their context and to themselves.

Three forms of one thing: `DenseAttention`, one mask over everything, which the others are held against;
`GroupedAttention`, some blocks at a time and only the context that they see; `FlexAttention`, torch's compiled kernel
with a mask of tiles, for CUDA.

The last two take one row: what lies in several rows is laid end to end.

Shape suffixes: B rows, S context tokens, A anchors, K slots, M blocks, Q queries, T tiles of queries, X context tokens
and slots, H heads, G key-value heads, E head size.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch.nn import functional
from torch.nn.attention import flex_attention as flex

from stages.train.compiled import compiled

KeyValue = tuple[torch.Tensor, torch.Tensor]

GROUP_QUERIES = 112  # measured on two cores: 64 to 256 queries a call are within a tenth of each other
FLEX_TILE = 128  # queries and keys of a tile: the kernel's own default


class Attend(Protocol):
    """`query` [B, H, Q, E] over keys and values [B, G, S, E] of the context and [B, G, slots, E] of the blocks."""

    def __call__(self, query: torch.Tensor, context: KeyValue, block: KeyValue) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class BlockRanges:
    """What the slots of each block see: long [M] each, ascending, over rows laid end to end.

    Context tokens `start` up to, but not including, `anchor`, and all slots of the block itself.
    """

    start: torch.Tensor
    anchor: torch.Tensor
    block_size: int

    def __len__(self) -> int:
        return len(self.anchor)


def block_mask(
    anchor_positions_BA: torch.Tensor, context_start_BA: torch.Tensor, *, num_context: int, block_size: int
) -> torch.Tensor:
    """What each query may see: bool [B, 1, A*K, S + A*K], context first, then the blocks' own slots.

    A slot sees the context from its document's first token, `context_start_BA`, to just before its anchor, and all K
    slots of its own block. An anchor of -1 has no context; its slots see each other, so no row is empty and no softmax
    is NaN.
    """
    device = anchor_positions_BA.device
    context_S = torch.arange(num_context, device=device)
    anchor_BQ = anchor_positions_BA.repeat_interleave(block_size, dim=1)
    start_BQ = context_start_BA.repeat_interleave(block_size, dim=1)
    sees_context_BQS = (context_S >= start_BQ[..., None]) & (context_S < anchor_BQ[..., None])
    block_Q = torch.arange(anchor_BQ.shape[1], device=device) // block_size
    same_block_QQ = block_Q[:, None] == block_Q[None, :]
    sees_BQX = torch.cat([sees_context_BQS, same_block_QQ.expand(len(anchor_BQ), -1, -1)], dim=-1)
    return sees_BQX[:, None]


@dataclass(frozen=True, kw_only=True)
class DenseAttention:
    """One call of torch's SDPA. `mask` is `block_mask`'s; None: all see everything, as when one block is decoded."""

    mask: torch.Tensor | None

    def __call__(self, query: torch.Tensor, context: KeyValue, block: KeyValue) -> torch.Tensor:
        query, key, value = _join(query, context, block)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, enable_gqa=True)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Neighbouring blocks of one document."""

    document: int  # of `_Plan.context_sizes`
    num_context: int  # of the document's tokens, from its first on
    mask: torch.Tensor  # [queries, context + slots]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Groups, and the sizes of the pieces into which the queries, the blocks' own keys and the context are split."""

    groups: list[_Group]
    query_sizes: list[int]  # of each group
    slot_sizes: list[int]  # of each group
    context_sizes: list[int]  # of what no block sees, then of each document


class GroupedAttention:
    """Some blocks at a time, each group over the context up to its last anchor: nothing of size A*K x (S + A*K).

    `query_slots`: which slots ask, ascending (default: all); all of them are seen.
    """

    def __init__(self, ranges: BlockRanges, query_slots: torch.Tensor | None = None, *, num_context: int) -> None:
        self._plan = _plan_groups(ranges, query_slots, num_context=num_context)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # its groups are of one batch
    def __call__(self, query: torch.Tensor, context: KeyValue, block: KeyValue) -> torch.Tensor:
        # On a CPU the kernel takes 0.85 of the time in float32 (measured), and is more exact.
        dtype, wide = block[1].dtype, torch.promote_types(block[1].dtype, torch.float32)
        plan = self._plan
        # Pieces of a split, unlike slices, give their gradients back at once and not each as large as the whole.
        contexts = [torch.split(part.to(wide), plan.context_sizes, dim=2) for part in context]
        blocks = [torch.split(part.to(wide), plan.slot_sizes, dim=2) for part in block]
        queries = torch.split(query.to(wide), plan.query_sizes, dim=2)
        outputs = []
        for group, asked, *own in zip(plan.groups, queries, *blocks, strict=True):
            seen = (parts[group.document][:, :, : group.num_context] for parts in contexts)
            key, value = (torch.cat(pair, dim=2) for pair in zip(seen, own, strict=True))
            output = functional.scaled_dot_product_attention(asked, key, value, attn_mask=group.mask, enable_gqa=True)
            outputs.append(output)
        return torch.cat(outputs, dim=2).to(dtype)


def _plan_groups(ranges: BlockRanges, query_slots: torch.Tensor | None, *, num_context: int) -> _Plan:
    size = ranges.block_size
    starts, anchors = ranges.start.tolist(), ranges.anchor.tolist()
    device = ranges.anchor.device
    if query_slots is None:
        query_slots = torch.arange(len(ranges) * size, device=device)
    block_Q = query_slots // size
    bounds = torch.searchsorted(block_Q, torch.arange(len(ranges) + 1, device=device)).tolist()
    plan = _Plan(groups=[], query_sizes=[], slot_sizes=[], context_sizes=[starts[0]])
    first, document = 0, 1
    for last in range(1, len(ranges) + 1):
        is_document_over = last == len(ranges) or starts[last] != starts[first]
        if not is_document_over and bounds[last] - bounds[first] < GROUP_QUERIES:
            continue
        context_S = torch.arange(starts[first], anchors[last - 1], device=device)
        slots_X = torch.arange(first * size, last * size, device=device)
        asking_Q = block_Q[bounds[first] : bounds[last]]
        sees_context_QS = context_S < ranges.anchor[asking_Q][:, None]
        sees_slot_QX = slots_X // size == asking_Q[:, None]
        mask = torch.cat([sees_context_QS, sees_slot_QX], dim=1)
        plan.groups.append(_Group(document=document, num_context=len(context_S), mask=mask))
        plan.query_sizes.append(len(asking_Q))
        plan.slot_sizes.append(len(slots_X))
        if is_document_over:
            end = starts[last] if last < len(ranges) else num_context
            plan.context_sizes.append(end - starts[first])
            document += 1
        first = last
    return plan


class FlexAttention:
    """torch's flex attention, compiled, over the tiles that some query sees. Arguments as of `GroupedAttention`.

    Tests hold its mask and the eager operator against the dense form; compiled for a CPU, with fixed sizes, it gave the
    same (by hand); the CUDA kernel has not been run.
    """

    def __init__(self, ranges: BlockRanges, query_slots: torch.Tensor | None = None, *, num_context: int) -> None:
        self.mask = plan_tiles(ranges, query_slots, num_context=num_context)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it is compiled by itself
    def __call__(self, query: torch.Tensor, context: KeyValue, block: KeyValue) -> torch.Tensor:
        query, key, value = _join(query, context, block)
        attend = _compiled_flex() if query.is_cuda else cast(Any, flex.flex_attention)
        output: torch.Tensor = attend(query, key, value, block_mask=self.mask, enable_gqa=True)
        return output


def plan_tiles(ranges: BlockRanges, query_slots: torch.Tensor | None, *, num_context: int) -> flex.BlockMask:
    """Which tiles of queries and keys meet, from the ranges alone: the mask itself, queries x keys, is never made."""
    size, device = ranges.block_size, ranges.anchor.device
    num_slots = len(ranges) * size
    if query_slots is None:
        query_slots = torch.arange(num_slots, device=device)
    block_Q = query_slots // size
    start_Q, anchor_Q = ranges.start[block_Q], ranges.anchor[block_Q]

    def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        in_context = (key >= start_Q[query]) & (key < anchor_Q[query])
        return torch.where(key < num_context, in_context, (key - num_context) // size == block_Q[query])

    low_T, high_T = _tile_extremes(start_Q), _tile_extremes(anchor_Q)
    block_T = _tile_extremes(block_Q)
    num_keys = num_context + num_slots
    first_key = torch.arange(0, num_keys, FLEX_TILE, device=device)
    end_key = (first_key + FLEX_TILE).clamp_max(num_keys)
    touches = (first_key < high_T[1][:, None]) & (end_key > low_T[0][:, None]) & (first_key < num_context)
    own_first, own_end = num_context + block_T[0][:, None] * size, num_context + (block_T[1][:, None] + 1) * size
    touches = touches | ((end_key > own_first) & (first_key < own_end))
    is_full = (first_key >= low_T[1][:, None]) & (first_key + FLEX_TILE <= high_T[0][:, None])
    partial_count, partial_tiles = _listed(touches & ~is_full)
    full_count, full_tiles = _listed(touches & is_full)
    return flex.BlockMask.from_kv_blocks(
        partial_count, partial_tiles, full_count, full_tiles,
        BLOCK_SIZE=FLEX_TILE, mask_mod=sees, seq_lengths=(len(query_slots), num_keys),
    )  # fmt: skip


def _tile_extremes(values_Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of each tile of queries."""
    missing = -len(values_Q) % FLEX_TILE
    tiles = torch.cat([values_Q, values_Q[-1:].expand(missing)]).view(-1, FLEX_TILE)
    return tiles.amin(dim=1), tiles.amax(dim=1)


def _listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number and indices, the valid ones first, of the True tiles of each row, as `BlockMask` wants them."""
    count = tiles.sum(dim=1, dtype=torch.int32)
    indices = tiles.int().argsort(dim=1, descending=True, stable=True).int()
    return count[None, None], indices[None, None].contiguous()


@cache
def _compiled_flex() -> Any:
    return compiled(flex.flex_attention)


def _join(query: torch.Tensor, context: KeyValue, block: KeyValue) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values end to end, and all three in one dtype."""
    key, value = torch.cat([context[0], block[0]], dim=2), torch.cat([context[1], block[1]], dim=2)
    # Under autocast the norms give float32 and the value projection does not.
    return query.to(value.dtype), key.to(value.dtype), value
