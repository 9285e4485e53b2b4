"""`DSparkTrainerModule`: a batch in, losses and metrics out; and `score`, the same per slot, for evaluation.

Shape suffixes: B rows, S tokens, L target layers, D hidden, A anchors, K slots, N supervised slots.
"""

import logging
from dataclasses import dataclass

import torch
from torch import nn

from stages.train.anchors import sample_anchors
from stages.train.fused import fused_terms
from stages.train.model import Qwen3DSparkModel
from stages.train.objective import LossWeights, SlotTerms, Supervision, confidence_loss, plain_terms
from stages.train.slots import Slots, expected_tokens, find_slots, slot_weights, survival

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DSparkStepMetrics:
    """Losses of a batch, and the unreduced sums that make those of a step: sums add up over micro-batches and ranks.

    Tensors; scalars unless a shape is given. Only `loss` and `loss_num` carry gradients.
    """

    loss: torch.Tensor
    """loss_num / loss_den: differentiable, right where this batch is the whole step."""
    ce_loss: torch.Tensor
    l1_loss: torch.Tensor
    confidence_loss: torch.Tensor
    loss_num: torch.Tensor
    """Σ w·(ce_alpha·CE + l1_alpha·L1 + confidence_alpha·BCE), differentiable. Divide by the step's loss_den."""
    loss_den: torch.Tensor
    """Σ w over supervised slots, the denominator of every term."""
    ce_num: torch.Tensor
    """Σ w·CE, without its alpha; so for L1 and confidence."""
    l1_num: torch.Tensor
    confidence_num: torch.Tensor
    accept_rate_per_pos_num: torch.Tensor
    """[K] Σ accept rate of slot k, unweighted."""
    accept_rate_per_pos_den: torch.Tensor
    """[K] supervised slots k that have an accept rate."""
    tau_num: torch.Tensor
    """Σ tau over blocks with a supervised slot, tau = 1 + Σ_k Π_{i<=k} accept_i."""
    tau_den: torch.Tensor
    """Number of those blocks."""
    confidence_abs_error_num: torch.Tensor
    """Σ w·|confidence - accept rate|."""
    confidence_bias_num: torch.Tensor
    """Σ w·(confidence - accept rate)."""
    confidence_cumprod_bias_num: torch.Tensor
    """Σ w·(Π_{i<=k} confidence_i - Π_{i<=k} accept_i): of the chance that a block is accepted up to slot k."""
    confidence_diag_den: torch.Tensor
    """Σ w over slots with a confidence and an accept rate, the denominator of the three."""
    num_supervised: int
    num_blocks: int
    """Blocks with at least one supervised slot."""


@dataclass(frozen=True, kw_only=True)
class SlotScores:
    """Per supervised slot, all [N], in order of row, anchor position and slot; those of a block lie side by side."""

    row: torch.Tensor
    anchor: torch.Tensor
    """Index in the row's `anchor_positions`, not a position."""
    slot: torch.Tensor
    accept_rate: torch.Tensor
    top1_agree: torch.Tensor
    """bool: draft and target have the same most likely token."""
    greedy_accept_rate: torch.Tensor
    """p_target of the draft's most likely token: the accept rate of a draft that does not sample."""
    cross_entropy: torch.Tensor
    """Nats, against the data's token."""
    confidence: torch.Tensor | None
    """Predicted accept rate, None without a confidence head."""


class DSparkTrainerModule(nn.Module):
    """The training objective around a draft model (DSpark, arXiv 2607.05147; signature as in NeMo AutoModel).

    `loss_decay_gamma` None weighs all slots alike. An alpha of 0 leaves its term out of the loss, not out of the
    metrics. `is_plain` computes everything in its plain form, dense attention and full logits: slow, the reference of
    the tests. `num_empty_batches` counts the batches that had no supervised slot; their loss is 0, with zero gradients.
    """

    def __init__(
        self,
        draft_model: Qwen3DSparkModel,
        *,
        loss_decay_gamma: float | None = None,
        ce_loss_alpha: float = 0.1,
        l1_loss_alpha: float = 0.9,
        confidence_head_alpha: float = 1.0,
        is_plain: bool = False,
    ) -> None:
        super().__init__()
        if loss_decay_gamma is not None and not loss_decay_gamma > 0:
            raise ValueError(f"loss_decay_gamma: expected a positive number or None, got {loss_decay_gamma}")
        self.draft_model = draft_model
        alphas = {"ce_loss": ce_loss_alpha, "l1_loss": l1_loss_alpha, "confidence_head": confidence_head_alpha}
        for name, alpha in alphas.items():
            if not alpha >= 0:
                raise ValueError(f"{name}_alpha: expected a number of at least 0, got {alpha}")
        self.loss_weights = LossWeights(
            ce_alpha=ce_loss_alpha, l1_alpha=l1_loss_alpha, confidence_alpha=confidence_head_alpha
        )
        self.loss_decay_gamma = loss_decay_gamma
        self.is_plain = is_plain
        self.num_empty_batches = 0

    def forward(
        self,
        input_ids: torch.Tensor,
        target_hidden_states: torch.Tensor,
        loss_mask: torch.Tensor,
        target_last_hidden_states: torch.Tensor | None = None,
        *,
        seq_lens: torch.Tensor | None = None,
        anchor_positions: torch.Tensor | None = None,
    ) -> DSparkStepMetrics:
        """Losses and sums of a batch.

        `input_ids [B, S]`; `target_hidden_states [B, S, L*D]`, layers in ascending id order; `loss_mask [B, S]`;
        `target_last_hidden_states [B, S, D]`, after the target's final norm, needed unless `l1_loss_alpha` is 0 and no
        confidence is trained; `seq_lens [B, documents]`, 0 = none; `anchor_positions [B, A]` in any order, -1 = none,
        drawn here if not given. Raises ValueError for shapes that do not belong together.
        """
        supervision, terms = self._run(
            input_ids, target_hidden_states, loss_mask, target_last_hidden_states,
            seq_lens=seq_lens, anchor_positions=anchor_positions,
        )  # fmt: skip
        if len(supervision.slots) == 0 and input_ids.shape[1] > 1:  # one token stands in for a missing row
            self._count_empty_batch()
        return self._reduce(supervision, terms)

    @torch.no_grad()
    def score(
        self,
        input_ids: torch.Tensor,
        target_hidden_states: torch.Tensor,
        loss_mask: torch.Tensor,
        target_last_hidden_states: torch.Tensor | None = None,
        *,
        seq_lens: torch.Tensor | None = None,
        anchor_positions: torch.Tensor | None = None,
    ) -> SlotScores:
        """The supervised slots one by one, without gradients; arguments as in `forward`, the last states required."""
        supervision, terms = self._run(
            input_ids, target_hidden_states, loss_mask, target_last_hidden_states,
            seq_lens=seq_lens, anchor_positions=anchor_positions, with_top1=True,
        )  # fmt: skip
        slots = supervision.slots
        if terms.accept_rate is None or terms.top1_agree is None or terms.greedy_accept_rate is None:
            raise ValueError("score: target_last_hidden_states is needed for the accept rate, got None")
        return SlotScores(
            row=slots.row,
            anchor=slots.anchor,
            slot=slots.slot,
            accept_rate=terms.accept_rate,
            top1_agree=terms.top1_agree,
            greedy_accept_rate=terms.greedy_accept_rate,
            cross_entropy=terms.cross_entropy,
            confidence=None if terms.confidence_logit is None else terms.confidence_logit.sigmoid(),
        )

    def _run(
        self,
        input_ids: torch.Tensor,
        target_hidden_states: torch.Tensor,
        loss_mask: torch.Tensor,
        target_last_hidden_states: torch.Tensor | None,
        *,
        seq_lens: torch.Tensor | None,
        anchor_positions: torch.Tensor | None,
        with_top1: bool = False,
    ) -> tuple[Supervision, SlotTerms]:
        self._check_shapes(input_ids, target_hidden_states, loss_mask, target_last_hidden_states)
        model = self.draft_model
        if anchor_positions is None:
            anchor_positions = sample_anchors(loss_mask, int(model.config.num_anchors), seq_lens=seq_lens)
        _check_anchors(anchor_positions, input_ids)
        if anchor_positions.shape[1] == 0:  # the graph must still reach every weight, or DDP waits for its gradients
            anchor_positions = anchor_positions.new_full((len(input_ids), 1), -1)
        input_ids, anchor_positions = input_ids.long(), anchor_positions.long()
        slots = find_slots(loss_mask, anchor_positions, seq_lens, block_size=model.block_size)
        supervision = Supervision(
            slots=slots,
            slot_weights=slot_weights(slots.slot, self.loss_decay_gamma),
            loss_weights=self.loss_weights,
            input_ids=input_ids,
            target_last=target_last_hidden_states,
        )
        if self.is_plain:
            h_BAKD = model(input_ids, target_hidden_states, anchor_positions, seq_lens=seq_lens)
            return supervision, plain_terms(model, h_BAKD, supervision, anchor_positions_BA=anchor_positions)
        h_ND = model.forward_slots(input_ids, target_hidden_states, slots, seq_lens=seq_lens)
        return supervision, fused_terms(model, h_ND, supervision, with_top1=with_top1)

    def _reduce(self, supervision: Supervision, terms: SlotTerms) -> DSparkStepMetrics:
        slots, weight_N = supervision.slots, supervision.slot_weights
        zero = weight_N.new_zeros(())
        bce_N = confidence_loss(terms)
        ce_num = (weight_N * terms.cross_entropy).sum()
        l1_num = zero if terms.l1 is None else (weight_N * terms.l1).sum()
        confidence_num = zero if bce_N is None else (weight_N * bce_N).sum()
        loss_num = terms.distance_num + self.loss_weights.confidence_alpha * confidence_num
        loss_den = weight_N.sum()
        divisor = loss_den if len(slots) else torch.ones_like(loss_den)
        with torch.no_grad():
            diagnostics = _diagnose(slots, terms, weight_N)
        return DSparkStepMetrics(
            loss=loss_num / divisor,
            ce_loss=ce_num.detach() / divisor,
            l1_loss=l1_num.detach() / divisor,
            confidence_loss=confidence_num.detach() / divisor,
            loss_num=loss_num,
            loss_den=loss_den,
            ce_num=ce_num.detach(),
            l1_num=l1_num.detach(),
            confidence_num=confidence_num.detach(),
            num_supervised=len(slots),
            num_blocks=slots.num_blocks,
            **diagnostics,
        )

    def _count_empty_batch(self) -> None:
        self.num_empty_batches += 1
        if self.num_empty_batches == 1:
            logger.warning(
                "a batch has no supervised slot: no anchor with loss mask 1 at itself and at the next token. "
                "It trains nothing. Later ones are only counted (num_empty_batches); if there are many, check the mask"
            )

    def _check_shapes(
        self,
        input_ids: torch.Tensor,
        target_hidden_states: torch.Tensor,
        loss_mask: torch.Tensor,
        target_last_hidden_states: torch.Tensor | None,
    ) -> None:
        if input_ids.ndim != 2 or input_ids.shape[1] < 1:
            raise ValueError(f"input_ids: expected [rows, tokens], got {list(input_ids.shape)}")
        shape, config = list(input_ids.shape), self.draft_model.config
        if list(loss_mask.shape) != shape:
            raise ValueError(f"loss_mask: expected {shape} as input_ids, got {list(loss_mask.shape)}")
        width = len(config.target_layer_ids) * config.hidden_size
        if list(target_hidden_states.shape) != [*shape, width]:
            raise ValueError(
                f"target_hidden_states: expected {[*shape, width]}, {len(config.target_layer_ids)} layers of "
                f"{config.hidden_size} side by side, got {list(target_hidden_states.shape)}"
            )
        if target_last_hidden_states is None:
            if self.loss_weights.l1_alpha > 0 or (
                self.draft_model.confidence_head is not None and self.loss_weights.confidence_alpha > 0
            ):
                raise ValueError(
                    "target_last_hidden_states: needed for the L1 and confidence losses, got None; give it, or set "
                    "l1_loss_alpha and confidence_head_alpha to 0"
                )
        elif list(target_last_hidden_states.shape) != [*shape, config.hidden_size]:
            raise ValueError(
                f"target_last_hidden_states: expected {[*shape, config.hidden_size]}, "
                f"got {list(target_last_hidden_states.shape)}"
            )


def _check_anchors(anchor_positions: torch.Tensor, input_ids: torch.Tensor) -> None:
    num_rows, num_tokens = input_ids.shape
    if anchor_positions.ndim != 2 or len(anchor_positions) != num_rows:
        raise ValueError(f"anchor_positions: expected [{num_rows}, anchors], got {list(anchor_positions.shape)}")
    if anchor_positions.numel() and not -1 <= int(anchor_positions.min()) <= int(anchor_positions.max()) < num_tokens:
        raise ValueError(
            f"anchor_positions: expected -1 (none) to {num_tokens - 1}, "
            f"got {int(anchor_positions.min())} to {int(anchor_positions.max())}"
        )


def _diagnose(slots: Slots, terms: SlotTerms, weight_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """The metrics' sums, by their names in `DSparkStepMetrics`; zeros for what the batch cannot tell."""
    per_slot = weight_N.new_zeros(slots.block_size)
    zero = weight_N.new_zeros(())
    sums = {
        "accept_rate_per_pos_num": per_slot,
        "accept_rate_per_pos_den": per_slot,
        "tau_num": zero,
        "tau_den": zero,
        "confidence_abs_error_num": zero,
        "confidence_bias_num": zero,
        "confidence_cumprod_bias_num": zero,
        "confidence_diag_den": zero,
    }
    if terms.accept_rate is None:
        return sums
    accept_N = terms.accept_rate
    sums["accept_rate_per_pos_num"] = per_slot.index_add(0, slots.slot, accept_N.to(per_slot.dtype))
    sums["accept_rate_per_pos_den"] = per_slot.index_add(0, slots.slot, torch.ones_like(weight_N))
    sums["tau_num"] = expected_tokens(accept_N, slots).sum()
    sums["tau_den"] = weight_N.new_tensor(slots.num_blocks)
    if terms.confidence_logit is not None:
        confidence_N = terms.confidence_logit.sigmoid()
        error_N = confidence_N - accept_N
        survival_error_N = survival(confidence_N, slots) - survival(accept_N, slots)
        sums["confidence_abs_error_num"] = (weight_N * error_N.abs()).sum()
        sums["confidence_bias_num"] = (weight_N * error_N).sum()
        sums["confidence_cumprod_bias_num"] = (weight_N * survival_error_N).sum()
        sums["confidence_diag_den"] = weight_N.sum()
    return sums
