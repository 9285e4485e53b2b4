"""The DSpark objective as one operation: from states to loss sums and gradients, a chunk of slots at a time.

The vocabulary is the memory: one logits tensor of all slots is larger than the draft. Here at most one chunk's
vocabulary-wide temporaries are alive. `lm_head` is frozen, so the gradients to h, to the Markov latent and to W2 are
all that is needed; they are computed together with the loss, and the backward pass only scales them.

Slots of several blocks often continue the same token. They are taken in order of position, so that the target's
distribution is computed once for each position, not for each slot.

Shape suffixes: N supervised slots, C slots of a chunk, U positions of a chunk, D hidden, R rank, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch.autograd.function import once_differentiable

from stages.train.distances import Asked, Blocks, Measured, compiled_measure
from stages.train.model import Qwen3DSparkModel, at_least_float32
from stages.train.objective import LossWeights, SlotTerms, Supervision, confidence_logits

# Bytes of a chunk's vocabulary-wide tensors. On a CPU larger chunks gain little (measured on two cores: a tenth from 64
# to 448 slots); on a GPU a chunk should keep its matrix products busy (assumption: some 400 slots of 150 k tokens).
CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
MIN_CHUNK = 16  # slots; fewer would only make more matrix products


def fused_terms(
    model: Qwen3DSparkModel, h_ND: torch.Tensor, supervision: Supervision, *, with_top1: bool = False
) -> SlotTerms:
    """`plain_terms` from h of the supervised slots alone. Gradients reach h and the heads."""
    slots, flat_ids, target = supervision.slots, supervision.input_ids.flatten(), supervision.target_last
    prev_N = flat_ids[slots.flat_position]
    order_N = slots.flat_position.argsort(stable=True)
    latent_NR = w2_VR = None
    if model.markov_head is not None:
        latent_NR = model.markov_head.latent_of_slots(h_ND, prev_N, slots)[order_N]
        w2_VR = model.markov_head.markov_w2.weight
    position_N = slots.flat_position[order_N]
    device = h_ND.device.type
    is_autocast = torch.is_autocast_enabled(device)
    work = _Work(
        head=model.lm_head.weight.to(torch.get_autocast_dtype(device) if is_autocast else model.lm_head.weight.dtype),
        logit_scale=getattr(model.config, "logit_scale", None),
        softcap=getattr(model.config, "final_logit_softcapping", None),
        target=None if target is None else target.flatten(0, 1),
        position=position_N,
        label=flat_ids[position_N + 1],
        weight=supervision.slot_weights[order_N],
        loss_weights=supervision.loss_weights,
        with_top1=with_top1,
        with_gradients=torch.is_grad_enabled(),
    )
    total, *columns = cast(Any, _Fused.apply)(h_ND[order_N], latent_NR, w2_VR, work)
    cross_entropy, l1, top1, greedy = (
        None if column is None else torch.empty_like(column).index_copy_(0, order_N, column) for column in columns
    )
    return SlotTerms(
        distance_num=total,
        cross_entropy=cast(torch.Tensor, cross_entropy),
        l1=l1,
        top1_agree=top1,
        greedy_accept_rate=greedy,
        confidence_logit=confidence_logits(model, h_ND, prev_N),
    )


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Some slots, the distinct positions that they continue, and which of these each slot has."""

    slots: slice
    positions: torch.Tensor  # [U]
    picked: torch.Tensor  # [C], index in `positions`


@dataclass(frozen=True, kw_only=True)
class _Work:
    """All that is needed beside what is differentiated. Slots are in order of position."""

    head: torch.Tensor  # [V, D], in the dtype that is computed in
    logit_scale: float | None
    softcap: float | None
    target: torch.Tensor | None  # [positions, D], the target's last states, rows end to end
    position: torch.Tensor  # [N], ascending
    label: torch.Tensor  # [N]
    weight: torch.Tensor  # [N]
    loss_weights: LossWeights
    with_top1: bool
    with_gradients: bool  # of what needs them: that is not asked of an operation's own context, nor known within it

    @property
    def wide(self) -> torch.dtype:
        """The dtype of softmax and losses."""
        return at_least_float32(self.head[:0]).dtype

    def chunks(self) -> Iterator[_Chunk]:
        """Chunks of nearly equal size within the bound of bytes."""
        num_slots = len(self.position)
        if num_slots == 0:
            return
        # Logits that become gradients, those of the target, the bias; on CUDA some of them once more in float32.
        slot_bytes = len(self.head) * (self.head.element_size() * 3 + (8 if self.head.is_cuda else 0))
        num_chunks = -(-num_slots * slot_bytes // CHUNK_BYTES[self.head.device.type])
        num_chunks = max(1, min(num_chunks, num_slots // MIN_CHUNK))
        starts = [num_slots * chunk // num_chunks for chunk in range(num_chunks)]
        ends = [*starts[1:], num_slots]
        distinct, place_N = cast(Any, torch.unique_consecutive)(self.position, return_inverse=True)
        firsts, lasts = place_N[starts].tolist(), place_N[[end - 1 for end in ends]].tolist()
        for start, end, first, last in zip(starts, ends, firsts, lasts, strict=True):
            yield _Chunk(
                slots=slice(start, end), positions=distinct[first : last + 1], picked=place_N[start:end] - first
            )

    def asked_of(self, chunk: _Chunk) -> Asked:
        """What `measure` is asked about a chunk, beside its logits."""
        return Asked(
            picked=chunk.picked,
            label=self.label[chunk.slots],
            weight=self.weight[chunk.slots].to(self.wide),
            ce_alpha=self.loss_weights.ce_alpha,
            l1_alpha=self.loss_weights.l1_alpha,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            with_top1=self.with_top1,
        )


class _Fused(torch.autograd.Function):
    """h, latents and W2 to Σ w·(ce_alpha·CE + l1_alpha·L1), and to `_Columns` of each slot without gradients."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: torch.Tensor, latent_NR: torch.Tensor | None, w2_VR: torch.Tensor | None, work: _Work
    ) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(h_ND.device.type, enabled=False):
            columns = _Columns.empty(work)
            is_wanted = work.with_gradients and any(ctx.needs_input_grad)
            gradients = _Gradients.empty(h_ND, latent_NR, w2_VR, work) if is_wanted else None
            _run_chunks(h_ND, latent_NR, w2_VR, work=work, columns=columns, gradients=gradients)
            if gradients is not None:
                ctx.save_for_backward(gradients.h, gradients.latent, gradients.w2)
            parts = (columns.cross_entropy, columns.l1, columns.top1, columns.greedy)
            ctx.mark_non_differentiable(*(part for part in parts if part is not None))
            return columns.total(work), *parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return *(None if saved is None else saved * grad_total for saved in ctx.saved_tensors), None


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """What is told of each slot, [N]."""

    cross_entropy: torch.Tensor
    l1: torch.Tensor | None
    top1: torch.Tensor | None
    greedy: torch.Tensor | None

    @classmethod
    def empty(cls, work: _Work) -> Self:
        like = work.position
        has_target = work.target is not None
        has_top1 = has_target and work.with_top1
        return cls(
            cross_entropy=torch.empty_like(like, dtype=work.wide),
            l1=torch.empty_like(like, dtype=work.wide) if has_target else None,
            top1=torch.empty_like(like, dtype=torch.bool) if has_top1 else None,
            greedy=torch.empty_like(like, dtype=work.wide) if has_top1 else None,
        )

    def put(self, slots: slice, measured: Measured) -> None:
        self.cross_entropy[slots] = measured.cross_entropy
        pairs = ((self.l1, measured.l1), (self.top1, measured.top1), (self.greedy, measured.greedy))
        for column, part in pairs:
            if column is not None and part is not None:
                column[slots] = part

    def total(self, work: _Work) -> torch.Tensor:
        total = work.loss_weights.ce_alpha * (work.weight * self.cross_entropy).sum()
        return total if self.l1 is None else total + work.loss_weights.l1_alpha * (work.weight * self.l1).sum()


@dataclass(frozen=True, kw_only=True)
class _Gradients:
    """Gradients of the total, filled chunk by chunk; that to W2 is summed up in float32."""

    h: torch.Tensor
    latent: torch.Tensor | None
    w2: torch.Tensor | None

    @classmethod
    def empty(cls, h_ND: torch.Tensor, latent_NR: torch.Tensor | None, w2_VR: torch.Tensor | None, work: _Work) -> Self:
        return cls(
            h=torch.empty_like(h_ND),
            latent=None if latent_NR is None else torch.empty_like(latent_NR),
            w2=None if w2_VR is None else torch.zeros_like(w2_VR, dtype=work.wide),
        )


def _run_chunks(
    h_ND: torch.Tensor,
    latent_NR: torch.Tensor | None,
    w2_VR: torch.Tensor | None,
    *,
    work: _Work,
    columns: _Columns,
    gradients: _Gradients | None,
) -> None:
    """Fill the columns and, where they are wanted, the gradients."""
    head_VD, dtype = work.head, work.head.dtype
    w2_VR = None if w2_VR is None else w2_VR.to(dtype)
    blocks = Blocks()
    measure = compiled_measure() if h_ND.is_cuda else blocks.measure
    for chunk in work.chunks():
        here = chunk.slots
        target_UV = None
        if work.target is not None:
            target_UV = blocks.product(work.target[chunk.positions].to(dtype), head_VD.t(), "target logits")
        base_CV = blocks.product(h_ND[here].to(dtype), head_VD.t(), "logits")
        latent_CR = bias_CV = None
        if latent_NR is not None and w2_VR is not None:
            latent_CR = latent_NR[here].to(dtype)
            if dtype == work.wide and work.softcap is None and work.logit_scale is None:
                base_CV.addmm_(latent_CR, w2_VR.t())
            else:
                bias_CV = blocks.product(latent_CR, w2_VR.t(), "bias")
        measured = measure(base_CV, bias_CV, target_UV, work.asked_of(chunk), gradients is not None)
        columns.put(here, measured)
        if gradients is None:
            continue
        if gradients.latent is not None and gradients.w2 is not None and w2_VR is not None and latent_CR is not None:
            gradients.latent[here] = measured.grad @ w2_VR
            _add_product_(gradients.w2, measured.grad.t(), latent_CR)
        gradients.h[here] = measured.grad_base @ head_VD


def _add_product_(sum_XY: torch.Tensor, left_XZ: torch.Tensor, right_ZY: torch.Tensor) -> None:
    """sum += left @ right, in the sum's dtype."""
    if left_XZ.dtype == sum_XY.dtype:
        sum_XY.addmm_(left_XZ, right_ZY)
    else:
        sum_XY += left_XZ @ right_ZY
