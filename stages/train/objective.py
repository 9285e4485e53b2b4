"""The DSpark objective in its plain form: full logits of the supervised slots, then each term as it is written down.

This is what faster forms are held against, so it stays plain. Only supervised slots have logits: [N, V], never
[B*A*K, V]. Softmax and losses are float32 whatever the module computes in (DSpark, arXiv 2607.05147).

Shape suffixes: B rows, S tokens, A anchors, K slots, N supervised slots, D hidden, R rank, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from stages.train.anchors import supervised_slots
from stages.train.model import Qwen3DSparkModel, at_least_float32


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Where the N supervised slots lie, in order of row, anchor and slot; all long [N].

    `position` a+k is the token that the slot continues: its successor is predicted, and the target's last state there
    gives the target's distribution.
    """

    row: torch.Tensor
    anchor: torch.Tensor
    slot: torch.Tensor
    position: torch.Tensor
    num_anchors: int
    block_size: int

    def __len__(self) -> int:
        return len(self.row)

    @property
    def block(self) -> torch.Tensor:
        """The slot's block, counted over the batch: row * A + anchor."""
        return self.row * self.num_anchors + self.anchor


@dataclass(frozen=True, kw_only=True)
class SlotTerms:
    """Per supervised slot, all [N]. Those that need the target's last state are None without it."""

    cross_entropy: torch.Tensor
    """-log p_draft of the token in the data."""
    l1: torch.Tensor | None
    """‖p_draft - p_target‖₁, between 0 and 2."""
    accept_rate: torch.Tensor | None
    """1 - ½·l1, detached: the probability that rejection sampling keeps the draft's token."""
    top1_agree: torch.Tensor | None
    """Whether draft and target have the same most likely token."""
    confidence_logit: torch.Tensor | None
    """The confidence head's logit of the accept rate."""


def find_slots(
    loss_mask_BS: torch.Tensor, anchor_positions_BA: torch.Tensor, seq_lens: torch.Tensor | None, *, block_size: int
) -> Slots:
    """The supervised slots of a batch."""
    supervised_BAK = supervised_slots(loss_mask_BS, anchor_positions_BA, seq_lens, block_size)
    row, anchor, slot = supervised_BAK.nonzero(as_tuple=True)
    position = anchor_positions_BA[row, anchor] + slot
    num_anchors = anchor_positions_BA.shape[1]
    return Slots(row=row, anchor=anchor, slot=slot, position=position, num_anchors=num_anchors, block_size=block_size)


def slot_weights(slot_N: torch.Tensor, loss_decay_gamma: float | None) -> torch.Tensor:
    """w_k = exp(-k/gamma), or 1 without gamma: float32 [N]."""
    if loss_decay_gamma is None:
        return torch.ones_like(slot_N, dtype=torch.float32)
    return torch.exp(-slot_N.float() / loss_decay_gamma)


def slot_terms(
    model: Qwen3DSparkModel,
    h_BAKD: torch.Tensor,
    *,
    input_ids_BS: torch.Tensor,
    target_last_BSD: torch.Tensor | None,
    anchor_positions_BA: torch.Tensor,
    slots: Slots,
) -> SlotTerms:
    """Every term of every supervised slot. Gradients reach h and the heads; target and accept rate are detached."""
    h_ND = h_BAKD[slots.row, slots.anchor, slots.slot]
    draft_NV = model.base_logits(h_ND)
    embedded_NR = None
    if model.markov_head is not None:
        prev_BAK = _previous_tokens(input_ids_BS, anchor_positions_BA, slots.block_size)
        latent_BAKR = model.markov_head.latent(h_BAKD, prev_BAK)
        latent_NR = latent_BAKR[slots.row, slots.anchor, slots.slot]
        draft_NV = draft_NV + at_least_float32(model.markov_head.bias(latent_NR))
        embedded_NR = model.markov_head.embed(input_ids_BS[slots.row, slots.position])
    confidence_N = None
    if model.confidence_head is not None:
        seen_NR = embedded_NR if model.confidence_head.with_markov else None
        confidence_N = at_least_float32(model.confidence_head(h_ND, seen_NR))
    log_draft_NV = draft_NV.log_softmax(dim=-1)
    label_N = input_ids_BS[slots.row, slots.position + 1]
    cross_entropy_N = -log_draft_NV.gather(1, label_N[:, None]).squeeze(1)
    if target_last_BSD is None:
        return SlotTerms(
            cross_entropy=cross_entropy_N, l1=None, accept_rate=None, top1_agree=None, confidence_logit=confidence_N
        )
    with torch.no_grad():
        target_NV = model.base_logits(target_last_BSD[slots.row, slots.position]).softmax(dim=-1)
    l1_N = (log_draft_NV.exp() - target_NV).abs().sum(dim=-1)
    return SlotTerms(
        cross_entropy=cross_entropy_N,
        l1=l1_N,
        accept_rate=(1 - 0.5 * l1_N.detach()).clamp(0, 1),
        top1_agree=draft_NV.argmax(dim=-1) == target_NV.argmax(dim=-1),
        confidence_logit=confidence_N,
    )


def confidence_loss(terms: SlotTerms) -> torch.Tensor | None:
    """Binary cross-entropy [N] of the confidence logit against the accept rate; None without either."""
    if terms.confidence_logit is None or terms.accept_rate is None:
        return None
    return functional.binary_cross_entropy_with_logits(terms.confidence_logit, terms.accept_rate, reduction="none")


def expected_tokens(accept_rate_N: torch.Tensor, slots: Slots, *, num_rows: int) -> torch.Tensor:
    """tau of each block, 1 + Σ_k Π_{i<=k} accept_i over its supervised slots: [B*A], 1 for a block without any."""
    accept_XK = accept_rate_N.new_zeros(num_rows * slots.num_anchors, slots.block_size)
    accept_XK[slots.block, slots.slot] = accept_rate_N
    return 1 + accept_XK.cumprod(dim=1).sum(dim=1)


def _previous_tokens(input_ids_BS: torch.Tensor, anchor_positions_BA: torch.Tensor, block_size: int) -> torch.Tensor:
    """The true token before each predicted one, [B, A, K]: the anchor token at slot 0. Clamped at the row's end."""
    num_rows, num_tokens = input_ids_BS.shape
    offsets_K = torch.arange(block_size, device=input_ids_BS.device)
    positions_BAK = (anchor_positions_BA.clamp_min(0)[..., None] + offsets_K).clamp_max(num_tokens - 1)
    return input_ids_BS.gather(1, positions_BAK.view(num_rows, -1)).view_as(positions_BAK)
