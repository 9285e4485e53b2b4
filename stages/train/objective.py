"""The DSpark objective in its plain form: full logits of the supervised slots, then each term as it is written down.

This is what the fused form is held against, so it stays plain. Softmax and losses are float32 whatever the module
computes in (DSpark, arXiv 2607.05147).

Shape suffixes: B rows, S tokens, A anchors, K slots, N supervised slots, D hidden, R rank, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from stages.train.model import Qwen3DSparkModel, at_least_float32
from stages.train.slots import Slots


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """What the terms of the loss are multiplied by."""

    ce_alpha: float
    l1_alpha: float
    confidence_alpha: float


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What the draft's states are measured against."""

    slots: Slots
    slot_weights: torch.Tensor  # [N], w of each slot
    loss_weights: LossWeights
    input_ids: torch.Tensor  # [B, S]
    target_last: torch.Tensor | None  # [B, S, D], the target's states after its final norm


@dataclass(frozen=True, kw_only=True)
class SlotTerms:
    """Per supervised slot, all [N]. Those that need the target's last state are None without it."""

    distance_num: torch.Tensor
    """Σ w·(ce_alpha·cross_entropy + l1_alpha·l1), a scalar: what is differentiated."""
    cross_entropy: torch.Tensor
    """-log p_draft of the token in the data, detached like those below but for the confidence."""
    l1: torch.Tensor | None
    """‖p_draft - p_target‖₁, between 0 and 2."""
    top1_agree: torch.Tensor | None
    """Whether draft and target have the same most likely token; None where nobody asked."""
    greedy_accept_rate: torch.Tensor | None
    """p_target of the draft's most likely token: how often the target takes it where the draft does not sample; None
    where nobody asked."""
    confidence_logit: torch.Tensor | None
    """The confidence head's logit of the accept rate."""

    @property
    def accept_rate(self) -> torch.Tensor | None:
        """1 - ½·l1: the probability that rejection sampling keeps the draft's token."""
        return None if self.l1 is None else (1 - 0.5 * self.l1).clamp(0, 1)


def plain_terms(
    model: Qwen3DSparkModel, h_BAKD: torch.Tensor, supervision: Supervision, *, anchor_positions_BA: torch.Tensor
) -> SlotTerms:
    """Every term of every supervised slot, from h of every slot. Gradients reach h and the heads."""
    slots, input_ids_BS, target_last_BSD = supervision.slots, supervision.input_ids, supervision.target_last
    weight_N, loss_weights = supervision.slot_weights, supervision.loss_weights
    h_ND = h_BAKD[slots.row, slots.anchor, slots.slot]
    draft_NV = model.base_logits(h_ND)
    if model.markov_head is not None:
        prev_BAK = _previous_tokens(input_ids_BS, anchor_positions_BA, slots.block_size)
        latent_BAKR = model.markov_head.latent(h_BAKD, prev_BAK)
        latent_NR = latent_BAKR[slots.row, slots.anchor, slots.slot]
        draft_NV = draft_NV + at_least_float32(model.markov_head.bias(latent_NR))
    log_draft_NV = draft_NV.log_softmax(dim=-1)
    label_N = input_ids_BS[slots.row, slots.position + 1]
    cross_entropy_N = -log_draft_NV.gather(1, label_N[:, None]).squeeze(1)
    distance_num = loss_weights.ce_alpha * (weight_N * cross_entropy_N).sum()
    l1_N = top1_N = greedy_N = None
    if target_last_BSD is not None:
        with torch.no_grad():
            target_NV = model.base_logits(target_last_BSD[slots.row, slots.position]).softmax(dim=-1)
        l1_N = (log_draft_NV.exp() - target_NV).abs().sum(dim=-1)
        distance_num = distance_num + loss_weights.l1_alpha * (weight_N * l1_N).sum()
        likeliest_N = draft_NV.argmax(dim=-1)
        top1_N = likeliest_N == target_NV.argmax(dim=-1)
        greedy_N = target_NV.gather(1, likeliest_N[:, None]).squeeze(1)
    return SlotTerms(
        distance_num=distance_num,
        cross_entropy=cross_entropy_N.detach(),
        l1=None if l1_N is None else l1_N.detach(),
        top1_agree=top1_N,
        greedy_accept_rate=greedy_N,
        confidence_logit=confidence_logits(model, h_ND, input_ids_BS[slots.row, slots.position]),
    )


def confidence_logits(model: Qwen3DSparkModel, h_ND: torch.Tensor, prev_N: torch.Tensor) -> torch.Tensor | None:
    """The confidence head's logits [N]; None without the head."""
    head = model.confidence_head
    if head is None:
        return None
    embedded_NR = model.markov_head.embed(prev_N) if model.markov_head is not None and head.with_markov else None
    return at_least_float32(head(h_ND, embedded_NR))


def confidence_loss(terms: SlotTerms) -> torch.Tensor | None:
    """Binary cross-entropy [N] of the confidence logit against the accept rate; None without either."""
    if terms.confidence_logit is None or terms.accept_rate is None:
        return None
    return functional.binary_cross_entropy_with_logits(terms.confidence_logit, terms.accept_rate, reduction="none")


def _previous_tokens(input_ids_BS: torch.Tensor, anchor_positions_BA: torch.Tensor, block_size: int) -> torch.Tensor:
    """The true token before each predicted one, [B, A, K]: the anchor token at slot 0. Clamped at the row's end."""
    num_rows, num_tokens = input_ids_BS.shape
    offsets_K = torch.arange(block_size, device=input_ids_BS.device)
    positions_BAK = (anchor_positions_BA.clamp_min(0)[..., None] + offsets_K).clamp_max(num_tokens - 1)
    return input_ids_BS.gather(1, positions_BAK.view(num_rows, -1)).view_as(positions_BAK)
