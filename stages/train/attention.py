"""Attention of draft blocks to their context and to themselves, dense: one mask, one call of torch's SDPA.

Shape suffixes: B rows, S context tokens, A anchors, K slots, Q = A*K queries, H heads, G key-value heads, E head size.
"""

import torch
from torch.nn import functional

KeyValue = tuple[torch.Tensor, torch.Tensor]


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


def attend_dense(
    query_BHQE: torch.Tensor, context: KeyValue, block: KeyValue, mask: torch.Tensor | None, *, scale: float
) -> torch.Tensor:
    """Attention output [B, H, Q, E].

    `context` is keys and values [B, G, S, E] of the context, `block` those [B, G, Q, E] of the slots. `mask` is
    `block_mask`'s; None lets every query see everything, as when one block is decoded.
    """
    key = torch.cat([context[0], block[0]], dim=2)
    value = torch.cat([context[1], block[1]], dim=2)
    repeats = query_BHQE.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if query_BHQE.dtype != value.dtype:  # under autocast the norms give float32 and the value projection does not
        query_BHQE, key = query_BHQE.to(value.dtype), key.to(value.dtype)
    return functional.scaled_dot_product_attention(query_BHQE, key, value, attn_mask=mask, scale=scale)
