"""The DSpark objective as one operation: from states to loss sums and gradients, a chunk of slots at a time.

The vocabulary is the memory: one logits tensor of all slots is larger than the draft. Here at most one chunk's
vocabulary-wide temporaries are alive. `lm_head` is frozen, so the gradients to h, to the Markov latent and to W2 are
all that is needed; they are computed together with the loss, and the backward pass only scales them.

Slots of several blocks often continue the same token. They are taken in order of position, so that the target's
distribution is computed once for each position, not for each slot.

Per slot, with z = softcap(scale·W·h) + W2·latent, p = softmax(z), q the target's distribution, s = sign(p - q):
    ∂CE/∂z = p - onehot(label)        ∂‖p - q‖₁/∂z = p·(s - Σ_v s·p)

Shape suffixes: N supervised slots, C slots of a chunk, U positions of a chunk, D hidden, R rank, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Self, cast

import torch
from torch.autograd.function import once_differentiable

from stages.train.model import Qwen3DSparkModel, at_least_float32
from stages.train.objective import LossWeights, SlotTerms, Supervision, confidence_logits

# Bytes of a chunk's vocabulary-wide temporaries. On a CPU larger chunks gain little (measured, 2 cores: 40 to 170 MB
# within 5 %); on a GPU a chunk should keep its matrix products busy (assumption: some 400 slots of 150 k tokens).
CHUNK_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
VOCABULARY_TENSORS = 4  # of a chunk in float32 that are alive at once, gradient in the compute dtype included
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
        chunk_bytes=CHUNK_BYTES[device],
    )
    total, *columns = cast(Any, _Fused.apply)(h_ND[order_N], latent_NR, w2_VR, work)
    cross_entropy, l1, top1 = (
        None if column is None else torch.empty_like(column).index_copy_(0, order_N, column) for column in columns
    )
    return SlotTerms(
        distance_num=total,
        cross_entropy=cast(torch.Tensor, cross_entropy),
        l1=l1,
        top1_agree=top1,
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
    chunk_bytes: int

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and losses."""
        return at_least_float32(self.head[:0]).dtype

    def chunks(self) -> Iterator[_Chunk]:
        """Chunks of nearly equal size within the bound of bytes."""
        num_slots = len(self.position)
        if num_slots == 0:
            return
        row_bytes = VOCABULARY_TENSORS * 4 * len(self.head)
        num_chunks = max(1, min(-(-num_slots * row_bytes // self.chunk_bytes), num_slots // MIN_CHUNK))
        starts = [num_slots * chunk // num_chunks for chunk in range(num_chunks)]
        ends = [*starts[1:], num_slots]
        distinct, place_N = cast(Any, torch.unique_consecutive)(self.position, return_inverse=True)
        firsts, lasts = place_N[starts].tolist(), place_N[[end - 1 for end in ends]].tolist()
        for start, end, first, last in zip(starts, ends, firsts, lasts, strict=True):
            yield _Chunk(
                slots=slice(start, end), positions=distinct[first : last + 1], picked=place_N[start:end] - first
            )

    def logits(self, states_CD: torch.Tensor) -> torch.Tensor:
        """The head's logits, as `Qwen3DSparkModel.base_logits`: [C, V]."""
        logits_CV = (states_CD.to(self.head.dtype) @ self.head.t()).to(self.wide)
        if self.logit_scale is not None:
            logits_CV *= self.logit_scale
        return logits_CV if self.softcap is None else logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits_CV: torch.Tensor) -> torch.Tensor | None:
        """How much `logits` rises with head times state: [C, V], None for 1."""
        if self.softcap is None:
            return None if self.logit_scale is None else logits_CV.new_full((1, 1), self.logit_scale)
        return (1 - (logits_CV / self.softcap).square()).mul_(1.0 if self.logit_scale is None else self.logit_scale)


class _Fused(torch.autograd.Function):
    """h, latents and W2 to Σ w·(ce_alpha·CE + l1_alpha·L1), and to CE, L1 and top-1 of each slot without gradients."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: torch.Tensor, latent_NR: torch.Tensor | None, w2_VR: torch.Tensor | None, work: _Work
    ) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(h_ND.device.type, enabled=False):
            columns = _Columns.empty(work)
            gradients = _Gradients.empty(h_ND, latent_NR, w2_VR, work) if any(ctx.needs_input_grad) else None
            _run_chunks(h_ND, latent_NR, w2_VR, work=work, columns=columns, gradients=gradients)
            if gradients is not None:
                ctx.save_for_backward(gradients.h, gradients.latent, gradients.w2)
            parts = (columns.cross_entropy, columns.l1, columns.top1)
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

    @classmethod
    def empty(cls, work: _Work) -> Self:
        like = work.position
        has_target = work.target is not None
        return cls(
            cross_entropy=torch.empty_like(like, dtype=work.wide),
            l1=torch.empty_like(like, dtype=work.wide) if has_target else None,
            top1=torch.empty_like(like, dtype=torch.bool) if has_target and work.with_top1 else None,
        )

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
    dtype = work.head.dtype
    w2_VR = None if w2_VR is None else w2_VR.to(dtype)
    measure: Callable[..., _Measured] = _compiled_measure() if h_ND.is_cuda else _Workspace()
    for chunk in work.chunks():
        here = chunk.slots
        target_UV = None if work.target is None else work.logits(work.target[chunk.positions])
        logits_CV = work.logits(h_ND[here])
        slope_CV = work.slope(logits_CV) if gradients is not None else None
        latent_CR = None if latent_NR is None else latent_NR[here].to(dtype)
        if latent_CR is not None and w2_VR is not None:
            _add_product_(logits_CV, latent_CR, w2_VR.t())
        if columns.top1 is not None and target_UV is not None:
            columns.top1[here] = logits_CV.argmax(dim=-1) == target_UV.argmax(dim=-1)[chunk.picked]
        cross_entropy_C, l1_C, grad_CV = measure(
            logits_CV, target_UV, chunk.picked, work.label[here], work.weight[here].to(work.wide),
            work.loss_weights.ce_alpha, work.loss_weights.l1_alpha, gradients is not None,
        )  # fmt: skip
        columns.cross_entropy[here] = cross_entropy_C
        if columns.l1 is not None:
            columns.l1[here] = l1_C
        if gradients is None:
            continue
        narrow_CV = grad_CV.to(dtype)
        if gradients.latent is not None and gradients.w2 is not None and latent_CR is not None:
            gradients.latent[here] = narrow_CV @ w2_VR
            _add_product_(gradients.w2, narrow_CV.t(), latent_CR)
        if slope_CV is not None:
            narrow_CV = grad_CV.mul_(slope_CV).to(dtype)
        gradients.h[here] = narrow_CV @ work.head


def _add_product_(sum_XY: torch.Tensor, left_XZ: torch.Tensor, right_ZY: torch.Tensor) -> None:
    """sum += left @ right, in the sum's dtype."""
    if left_XZ.dtype == sum_XY.dtype:
        sum_XY.addmm_(left_XZ, right_ZY)
    else:
        sum_XY += left_XZ @ right_ZY


_Measured = tuple[torch.Tensor, Any, Any]  # cross-entropy [C], L1 [C] or None, gradient [C, V] or None


def measure_distances(
    logits_CV: torch.Tensor,
    target_UV: torch.Tensor | None,
    picked_C: torch.Tensor,
    label_C: torch.Tensor,
    weight_C: torch.Tensor,
    ce_alpha: float,
    l1_alpha: float,
    with_gradients: bool,
) -> _Measured:
    """Cross-entropy [C], L1 [C] and the gradient [C, V] of their weighted sum to the logits, in the plainest form.

    `picked_C` says which row of `target_UV` is a slot's. This is what torch.compile fuses on CUDA.
    """
    draft_CV = logits_CV.softmax(dim=-1)
    cross_entropy_C = logits_CV.logsumexp(dim=-1) - logits_CV.gather(1, label_C[:, None]).squeeze(1)
    if target_UV is None:
        sign_CV, l1_C, mean_C = draft_CV.new_zeros(()), None, draft_CV.new_zeros(len(draft_CV))
    else:
        difference_CV = draft_CV - target_UV.softmax(dim=-1)[picked_C]
        l1_C, sign_CV = difference_CV.abs().sum(dim=-1), difference_CV.sign()
        mean_C = (sign_CV * draft_CV).sum(dim=-1)
    if not with_gradients:
        return cross_entropy_C, l1_C, None
    factor_CV = ce_alpha + l1_alpha * (sign_CV - mean_C[:, None])
    grad_CV = weight_C[:, None] * factor_CV * draft_CV
    grad_CV = grad_CV.scatter_add(1, label_C[:, None], -ce_alpha * weight_C[:, None])
    return cross_entropy_C, l1_C, grad_CV


class _Workspace:
    """`measure_distances` in place, for devices without a compiler: three reused blocks of memory, and the logits'."""

    def __init__(self) -> None:
        self._blocks: dict[str, torch.Tensor] = {}

    def __call__(
        self,
        logits_CV: torch.Tensor,
        target_UV: torch.Tensor | None,
        picked_C: torch.Tensor,
        label_C: torch.Tensor,
        weight_C: torch.Tensor,
        ce_alpha: float,
        l1_alpha: float,
        with_gradients: bool,
    ) -> _Measured:
        label_C1 = label_C[:, None]
        greatest_C, own_C = logits_CV.amax(dim=-1), logits_CV.gather(1, label_C1).squeeze(1)
        draft_CV = torch.softmax(logits_CV, dim=-1, out=self._block("draft", logits_CV))
        # log Σ exp from the greatest logit and its probability, which is never tiny.
        cross_entropy_C = greatest_C - draft_CV.amax(dim=-1).log_() - own_C
        if target_UV is None:
            if not with_gradients:
                return cross_entropy_C, None, None
            grad_CV = torch.mul(draft_CV, (ce_alpha * weight_C)[:, None], out=logits_CV)
            return cross_entropy_C, None, grad_CV.scatter_add_(1, label_C1, -ce_alpha * weight_C[:, None])
        target_UV = torch.softmax(target_UV, dim=-1, out=self._block("target", target_UV))
        difference_CV = torch.index_select(target_UV, 0, picked_C, out=logits_CV)
        torch.sub(draft_CV, difference_CV, out=difference_CV)
        l1_C = torch.linalg.vector_norm(difference_CV, ord=1, dim=-1)
        if not with_gradients:
            return cross_entropy_C, l1_C, None
        sign_CV = difference_CV.sign_()
        mean_C = torch.bmm(sign_CV[:, None, :], draft_CV[:, :, None]).view(-1)
        slope_C = l1_alpha * weight_C
        base_C = ce_alpha * weight_C - slope_C * mean_C
        grad_CV = torch.addcmul(base_C[:, None], sign_CV, slope_C[:, None], out=sign_CV).mul_(draft_CV)
        return cross_entropy_C, l1_C, grad_CV.scatter_add_(1, label_C1, -ce_alpha * weight_C[:, None])

    def _block(self, name: str, like: torch.Tensor) -> torch.Tensor:
        block = self._blocks.get(name)
        if block is None or len(block) < len(like):
            block = self._blocks[name] = torch.empty_like(like)
        return block[: len(like)]


@cache
def _compiled_measure() -> Callable[..., _Measured]:
    return torch.compile(measure_distances, dynamic=True)
