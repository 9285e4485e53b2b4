"""Anchors: which positions of a sample start a block, and which slots of a block are trained.

Shape suffixes: B rows, S or T tokens, A anchors, K slots.
"""

import numpy as np
import torch

from stages.train.documents import document_bounds


def anchor_candidates(loss_mask: torch.Tensor) -> torch.Tensor:
    """Ascending positions a of one document, `loss_mask [T]`, where tokens a and a+1 are both supervised."""
    if loss_mask.ndim != 1:
        raise ValueError(f"loss_mask: expected one document [T], got {list(loss_mask.shape)}")
    supervised_T = loss_mask != 0
    return torch.nonzero(supervised_T[:-1] & supervised_T[1:]).squeeze(1)


def choose_anchors(loss_mask: torch.Tensor, num_anchors: int, *, seed: int, epoch: int, sample_id: int) -> torch.Tensor:
    """At most `num_anchors` of the candidates of one document, uniform without replacement, ascending (long, CPU).

    A pure function of its arguments: the candidates with the smallest keys of a Philox stream are taken. Raw Philox
    words and SeedSequence are fixed by numpy's stability promise, where `Generator.choice` is not.
    """
    candidates = anchor_candidates(loss_mask).cpu()
    if num_anchors < 0:
        raise ValueError(f"num_anchors: expected at least 0, got {num_anchors}")
    if len(candidates) <= num_anchors:
        return candidates
    words = np.random.Philox(np.random.SeedSequence([seed, epoch, sample_id])).random_raw(len(candidates))
    chosen = np.sort(np.argsort(words, kind="stable")[:num_anchors])
    return candidates[torch.from_numpy(chosen)]


def candidate_mask(loss_mask_BS: torch.Tensor, seq_lens: torch.Tensor | None) -> torch.Tensor:
    """Anchor candidates of packed rows: bool [B, S]."""
    _, end_BS = document_bounds(seq_lens, loss_mask_BS)
    supervised_BS = loss_mask_BS != 0
    next_BS = torch.nn.functional.pad(supervised_BS[:, 1:], (0, 1))
    positions_S = torch.arange(loss_mask_BS.shape[1], device=loss_mask_BS.device)
    return supervised_BS & next_BS & (positions_S + 1 < end_BS)


def sample_anchors(loss_mask_BS: torch.Tensor, num_anchors: int, *, seq_lens: torch.Tensor | None) -> torch.Tensor:
    """Anchors of each row by torch's generator: [B, A], uniform without replacement, ascending, -1 behind the last.

    A is `num_anchors`, or the row's length where that is smaller.
    """
    candidate_BS = candidate_mask(loss_mask_BS, seq_lens)
    num_tokens = loss_mask_BS.shape[1]
    keys_BS = torch.rand(candidate_BS.shape, device=candidate_BS.device).masked_fill(~candidate_BS, 2.0)
    picked_BA = keys_BS.topk(min(num_anchors, num_tokens), dim=1, largest=False).indices
    picked_BA = picked_BA.masked_fill(~candidate_BS.gather(1, picked_BA), num_tokens).sort(dim=1).values
    return picked_BA.masked_fill(picked_BA == num_tokens, -1)


def supervised_slots(
    loss_mask_BS: torch.Tensor, anchor_positions_BA: torch.Tensor, seq_lens: torch.Tensor | None, block_size: int
) -> torch.Tensor:
    """Which slots are trained: bool [B, A, K].

    Slot k of the block at anchor a predicts token a+k+1. It is supervised if that token lies in a's document, its loss
    mask is 1, and all earlier slots are supervised. Blocks at -1, or at no candidate, have none.
    """
    _, end_BS = document_bounds(seq_lens, loss_mask_BS)
    anchor_BA = anchor_positions_BA.clamp_min(0)
    supervised_BS = loss_mask_BS != 0
    trained_BA = (anchor_positions_BA >= 0) & supervised_BS.gather(1, anchor_BA)
    predicted_BAK = anchor_BA[..., None] + torch.arange(1, block_size + 1, device=anchor_BA.device)
    inside_BAK = predicted_BAK < end_BS.gather(1, anchor_BA)[..., None]
    num_rows, num_tokens = loss_mask_BS.shape
    flat = predicted_BAK.clamp_max(num_tokens - 1).view(num_rows, -1)
    mask_BAK = supervised_BS.gather(1, flat).view_as(predicted_BAK)
    return (mask_BAK & inside_BAK & trained_BA[..., None]).long().cumprod(dim=-1).bool()
