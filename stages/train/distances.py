"""The element-wise part of the objective: logits to cross-entropy, L1 and gradients.

`measure_distances` is the plain form, which torch.compile fuses on CUDA. `Blocks.measure` is the same on a CPU: in
place, and some rows at a time, so that what it works on stays in the processor's cache.

With z the draft's logits, p = softmax(z), q the target's distribution and s = sign(p - q):
    ∂CE/∂z = p - onehot(label)        ∂‖p - q‖₁/∂z = p·(s - Σ_v s·p)

Shape suffixes: C slots of a chunk, U positions of a chunk, T slots or positions of a tile, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import torch

from stages.train.compiled import compiled
from stages.train.model import at_least_float32

# On a CPU, what a chunk's element-wise part works on at a time: three such tiles stay in the cache (measured at
# vocabularies of 4 k to 131 k: 0.55 to 0.8 of the time that whole chunks take).
TILE_BYTES = 1 << 21


class Asked(NamedTuple):
    """Of each slot: its row in the target's logits, its label and weight, all [C]; and what holds for all slots."""

    picked: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    ce_alpha: float
    l1_alpha: float
    logit_scale: float | None
    softcap: float | None
    with_top1: bool

    def cap_(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """Scale and soft-cap logits, in place."""
        if self.logit_scale is not None:
            logits_CV.mul_(self.logit_scale)
        return logits_CV if self.softcap is None else logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, capped_CV: torch.Tensor) -> torch.Tensor | float | None:
        """How much `cap_` raises the logit that it made; None for 1."""
        if self.softcap is None:
            return self.logit_scale
        return (1 - (capped_CV / self.softcap).square()) * (1.0 if self.logit_scale is None else self.logit_scale)


class Measured(NamedTuple):
    """Of each slot cross-entropy, L1, top-1 agreement and p_target of the draft's most likely token (`greedy`) [C]; of
    Σ w·(ce_alpha·CE + l1_alpha·L1) the gradients [C, V].

    `grad` is with respect to the draft's logits, `grad_base` to those of the head alone before scale and soft-cap; both
    in the dtype of the logits that were given.
    """

    cross_entropy: torch.Tensor
    l1: torch.Tensor | None
    top1: torch.Tensor | None
    greedy: torch.Tensor | None
    grad: Any = None
    grad_base: Any = None


def measure_distances(
    base_CV: torch.Tensor,
    bias_CV: torch.Tensor | None,
    target_UV: torch.Tensor | None,
    asked: Asked,
    with_gradients: bool,
) -> Measured:
    """The plain form, from the head's logits of the draft and of the target, and the Markov head's `bias_CV`."""
    wide = at_least_float32(base_CV[:0]).dtype
    capped_CV = asked.cap_(base_CV.to(wide, copy=True))
    logits_CV = capped_CV if bias_CV is None else capped_CV + bias_CV
    draft_CV = logits_CV.softmax(dim=-1)
    cross_entropy_C = logits_CV.logsumexp(dim=-1) - logits_CV.gather(1, asked.label[:, None]).squeeze(1)
    l1_C = top1_C = greedy_C = None
    factor_CV = torch.full_like(draft_CV, asked.ce_alpha)
    if target_UV is not None:
        target_UV = asked.cap_(target_UV.to(wide, copy=True))
        chances_UV = target_UV.softmax(dim=-1)
        if asked.with_top1:
            likeliest_C = logits_CV.argmax(dim=-1)
            top1_C = likeliest_C == target_UV.argmax(dim=-1)[asked.picked]
            greedy_C = chances_UV[asked.picked, likeliest_C]
        difference_CV = draft_CV - chances_UV[asked.picked]
        l1_C, sign_CV = difference_CV.abs().sum(dim=-1), difference_CV.sign()
        factor_CV = factor_CV + asked.l1_alpha * (sign_CV - (sign_CV * draft_CV).sum(dim=-1, keepdim=True))
    if not with_gradients:
        return Measured(cross_entropy_C, l1_C, top1_C, greedy_C)
    weight_C1, label_C1 = asked.weight[:, None], asked.label[:, None]
    grad_CV = (weight_C1 * factor_CV * draft_CV).scatter_add(1, label_C1, -asked.ce_alpha * weight_C1)
    slope = asked.slope(capped_CV)
    narrow_CV = grad_CV.to(base_CV.dtype)
    grad_base_CV = narrow_CV if slope is None else (grad_CV * slope).to(base_CV.dtype)
    return Measured(cross_entropy_C, l1_C, top1_C, greedy_C, narrow_CV, grad_base_CV)


@cache
def compiled_measure() -> Callable[..., Measured]:
    return compiled(measure_distances)


class Blocks:
    """The vocabulary-wide tensors of a chunk, which the next reuses: on a CPU fresh memory costs more than arithmetic.

    On CUDA, whose allocator keeps memory, they are fresh.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, torch.Tensor] = {}

    def product(self, left_CX: torch.Tensor, right_XV: torch.Tensor, name: str) -> torch.Tensor:
        """left @ right in the block of that name."""
        if left_CX.is_cuda:
            return left_CX @ right_XV
        shape = (len(left_CX), right_XV.shape[1])
        return torch.mm(left_CX, right_XV, out=self._block(name, shape, left_CX.dtype))

    def measure(
        self,
        base_CV: torch.Tensor,
        bias_CV: torch.Tensor | None,
        target_UV: torch.Tensor | None,
        asked: Asked,
        with_gradients: bool,
    ) -> Measured:
        """`measure_distances`, some rows at a time; gradients take the place of the logits."""
        wide = at_least_float32(base_CV[:0]).dtype
        grad_base_CV = base_CV
        if asked.softcap is not None or asked.logit_scale is not None:
            grad_base_CV = self._block("before the cap", tuple(base_CV.shape), base_CV.dtype)
        num_rows = max(1, TILE_BYTES // (base_CV.shape[1] * wide.itemsize))
        picked = asked.picked.tolist()
        parts: list[tuple[Any, ...]] = []
        for start in range(0, len(base_CV), num_rows):
            rows = slice(start, min(start + num_rows, len(base_CV)))
            tile = asked._replace(label=asked.label[rows], weight=asked.weight[rows])
            probabilities_TV = target_top1_C = None
            if target_UV is not None:
                first, last = picked[rows.start], picked[rows.stop - 1]
                tile = tile._replace(picked=asked.picked[rows] - first)
                target_TV = tile.cap_(self._widened("draft", target_UV[first : last + 1], wide))
                target_top1_C = target_TV.argmax(dim=-1)[tile.picked] if asked.with_top1 else None
                out = self._block("target", tuple(target_TV.shape), wide)
                probabilities_TV = torch.softmax(target_TV, dim=-1, out=out)
            base_TV = base_CV[rows]
            logits_TV = tile.cap_(base_TV if base_TV.dtype == wide else self._widened("wide", base_TV, wide))
            slope = tile.slope(logits_TV) if with_gradients else None
            if bias_CV is not None:
                logits_TV += bias_CV[rows]
            top1_C = greedy_C = None
            if target_top1_C is not None and probabilities_TV is not None:
                likeliest_C = logits_TV.argmax(dim=-1)
                top1_C, greedy_C = likeliest_C == target_top1_C, probabilities_TV[tile.picked, likeliest_C]
            cross_entropy_C, l1_C, grad_TV = self._measure_tile(logits_TV, probabilities_TV, tile, with_gradients)
            parts.append((cross_entropy_C, l1_C, top1_C, greedy_C))
            if grad_TV is None:
                continue
            if slope is not None:
                grad_base_CV[rows] = grad_TV * slope
            base_TV.copy_(grad_TV)
        columns = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
        cross_entropy, l1, top1, greedy = columns
        return Measured(cast(torch.Tensor, cross_entropy), l1, top1, greedy, base_CV, grad_base_CV)

    def _measure_tile(
        self, logits_CV: torch.Tensor, target_UV: torch.Tensor | None, tile: Asked, with_gradients: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Cross-entropy, L1 and gradient of a tile, which is written over the logits. `target_UV`: probabilities."""
        label_C1, shape, wide = tile.label[:, None], tuple(logits_CV.shape), logits_CV.dtype
        greatest_C, own_C = logits_CV.amax(dim=-1), logits_CV.gather(1, label_C1).squeeze(1)
        draft_CV = torch.softmax(logits_CV, dim=-1, out=self._block("draft", shape, wide))
        # log Σ exp from the greatest logit and its probability, which is never tiny.
        cross_entropy_C = greatest_C - draft_CV.amax(dim=-1).log_() - own_C
        on_label_C1 = (-tile.ce_alpha * tile.weight)[:, None]
        if target_UV is None:
            if not with_gradients:
                return cross_entropy_C, None, None
            grad_CV = torch.mul(draft_CV, -on_label_C1, out=logits_CV)
            return cross_entropy_C, None, grad_CV.scatter_add_(1, label_C1, on_label_C1)
        difference_CV = torch.index_select(target_UV, 0, tile.picked, out=logits_CV)
        torch.sub(draft_CV, difference_CV, out=difference_CV)
        if not with_gradients:
            return cross_entropy_C, difference_CV.abs_().sum(dim=-1), None
        scratch_CV = self._block("target", shape, wide)  # the target's probabilities are not needed any more
        l1_C = torch.abs(difference_CV, out=scratch_CV).sum(dim=-1)
        signed_CV = torch.mul(difference_CV.sign_(), draft_CV, out=difference_CV)
        slope_C = tile.l1_alpha * tile.weight
        base_C = tile.ce_alpha * tile.weight - slope_C * signed_CV.sum(dim=-1)
        draft_CV *= base_C[:, None]
        grad_CV = torch.addcmul(draft_CV, signed_CV, slope_C[:, None], out=signed_CV)
        return cross_entropy_C, l1_C, grad_CV.scatter_add_(1, label_C1, on_label_C1)

    def _widened(self, name: str, narrow_CV: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._block(name, tuple(narrow_CV.shape), dtype).copy_(narrow_CV)

    def _block(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_elements = shape[0] * shape[1]
        block = self._blocks.get(name)
        if block is None or len(block) < num_elements:
            block = self._blocks[name] = torch.empty(num_elements, dtype=dtype)
        return block[:num_elements].view(shape)
