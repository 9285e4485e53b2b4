"""Acceptance of a draft measured from the cache alone, without the target.

The draft is scored by a function that the caller passes in, since stages do not import each other: for each supervised
slot of each block it gives the accept rate, whether both argmaxes agree, the cross-entropy and the confidence.
Shape suffixes: M blocks, K slots of a block.
"""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from pydantic import model_validator

from stages.evaluate.blocks import Blocks, SlotScores, gather_blocks
from stages.evaluate.bootstrap import bootstrap_mean, bootstrap_ratio, widen
from stages.evaluate.reliability import calibration_error, weighted_auc
from storage.sealed import Record

PerPos = tuple[float, ...]
ROUNDING = 1e-6  # of sums of float32


class CacheEvaluation(Record):
    """What the held-out split says of a draft. `_low` and `_high`: 95 % interval, bootstrap over samples."""

    num_samples: int
    num_blocks: int
    num_slots: int
    tau: float
    """Mean over blocks of 1 + Σ_k Π_{i<=k} accept rate i: expected tokens a verify round, with bonus."""
    tau_low: float
    tau_high: float
    tau_greedy: float | None
    """The same of a draft that takes its most likely token: mean over blocks of 1 + Σ_k Π_{i<=k} p_target of slot i's
    argmax p_draft, the data's tokens before it given. None in files that did not measure it."""
    tau_greedy_low: float | None
    tau_greedy_high: float | None
    accept_rate_per_pos: PerPos
    """Mean of 1 - ½·‖p_draft - p_target‖₁ over the blocks that have slot k, the data's tokens before it given."""
    greedy_accept_rate_per_pos: PerPos | None
    """Mean of p_target(argmax p_draft) over the same: the accept rate of a draft that takes its most likely token."""
    accept_rate_low_per_pos: PerPos
    accept_rate_high_per_pos: PerPos
    conditional_accept_per_pos: PerPos
    """Σ Π_{i<=k} accept rate i / Σ Π_{i<k} accept rate i over the blocks that have slot k: of the rounds whose slots
    before k were all accepted, the share that accepts k too, as decoding counts it."""
    conditional_accept_low_per_pos: PerPos
    conditional_accept_high_per_pos: PerPos
    survival_per_pos: PerPos
    """Mean of Π_{i<=k} accept rate i over the blocks that have slot k."""
    num_blocks_per_pos: tuple[int, ...]
    """Blocks that have slot k supervised; where it is 0, so are the values above."""
    top1_agreement: float
    """Share of slots at which draft and target have the same most likely token."""
    cross_entropy: float
    """Mean of -log p_draft(token of the data), in nats."""
    confidence_ece: float | None
    """Σ_bins share of slots · |mean confidence - mean accept rate|, 15 bins of equal width; None without head."""
    confidence_auc: float | None
    """Probability that an accepted token has a higher confidence than a rejected one, ties half: each slot counts as
    accepted with weight accept rate and as rejected with the rest. None without head, or without one of the two."""

    @model_validator(mode="after")
    def _check_plausible(self) -> Self:
        check_taus(self)
        for name in (name for name in type(self).model_fields if name.endswith("_per_pos") and "num" not in name):
            if not all(-ROUNDING <= rate <= 1 + ROUNDING for rate in getattr(self, name) or ()):
                raise ValueError(f"{name}: expected rates from 0 to 1")
        return self

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def check_taus(numbers: Any) -> None:
    """See that `tau` and `tau_greedy` lie inside their intervals. Raises ValueError."""
    for name in ("tau", "tau_greedy"):
        tau, low, high = (getattr(numbers, name + end) for end in ("", "_low", "_high"))
        if tau is not None and not (low is not None and high is not None and low - ROUNDING <= tau <= high + ROUNDING):
            raise ValueError(f"{name}: is {tau}, outside its interval from {low} to {high}")
        if tau is not None and tau < 1 - ROUNDING:
            raise ValueError(f"{name}: expected at least 1, the bonus token, got {tau}")


def evaluate_scores(batches: Iterable[tuple[int, SlotScores]], *, block_size: int) -> CacheEvaluation:
    """Metrics over (sample id, scores of that sample alone) pairs. Raises SettingError when no slot is supervised."""
    return measure_blocks(gather_blocks(batches, block_size=block_size))


def measure_blocks(blocks: Blocks) -> CacheEvaluation:
    """Metrics of at least one block."""
    tau_M = block_taus(blocks)
    tau = float(tau_M.mean())
    tau_low, tau_high = widen(bootstrap_mean(tau_M, groups=blocks.sample), tau)
    greedy_M = 1.0 + np.cumprod(blocks.greedy_accept, axis=1).sum(axis=1)
    greedy = float(greedy_M.mean())
    greedy_low, greedy_high = widen(bootstrap_mean(greedy_M, groups=blocks.sample), greedy)
    supervised_MK, survival_MK = blocks.supervised, blocks.survival
    before_MK = np.concatenate([np.ones((len(blocks), 1)), survival_MK[:, :-1]], axis=1) * supervised_MK
    rate, rate_low, rate_high = _ratio_per_pos(blocks.accept, supervised_MK, blocks)
    conditional, conditional_low, conditional_high = _ratio_per_pos(survival_MK, before_MK, blocks)
    ece = auc = None
    if blocks.confidence is not None:
        confidence_N, accept_N = blocks.confidence[supervised_MK], blocks.accept[supervised_MK]
        ece, auc = calibration_error(confidence_N, accept_N), weighted_auc(confidence_N, accept_N)
    return CacheEvaluation(
        num_samples=blocks.num_samples,
        num_blocks=len(blocks),
        num_slots=int(blocks.length.sum()),
        tau=tau,
        tau_low=tau_low,
        tau_high=tau_high,
        tau_greedy=greedy,
        tau_greedy_low=greedy_low,
        tau_greedy_high=greedy_high,
        accept_rate_per_pos=rate,
        greedy_accept_rate_per_pos=_divide(blocks.greedy_accept, supervised_MK),
        accept_rate_low_per_pos=rate_low,
        accept_rate_high_per_pos=rate_high,
        conditional_accept_per_pos=conditional,
        conditional_accept_low_per_pos=conditional_low,
        conditional_accept_high_per_pos=conditional_high,
        survival_per_pos=_divide(survival_MK, supervised_MK),
        num_blocks_per_pos=tuple(supervised_MK.sum(axis=0).tolist()),
        top1_agreement=float(blocks.top1[supervised_MK].mean()),
        cross_entropy=float(blocks.cross_entropy[supervised_MK].mean()),
        confidence_ece=ece,
        confidence_auc=auc,
    )


def block_taus(blocks: Blocks) -> np.ndarray:
    """tau of each block, [M]."""
    taus: np.ndarray = 1.0 + blocks.survival.sum(axis=1)
    return taus


def _ratio_per_pos(top_MK: np.ndarray, bottom_MK: np.ndarray, blocks: Blocks) -> tuple[PerPos, PerPos, PerPos]:
    """Σ top / Σ bottom at each slot, and the ends of its interval."""
    ratios = _divide(top_MK, bottom_MK)
    intervals = [
        widen(bootstrap_ratio(top_M, bottom_M, groups=blocks.sample), ratio)
        for top_M, bottom_M, ratio in zip(top_MK.T, bottom_MK.T, ratios, strict=True)
    ]
    low, high = zip(*intervals, strict=True)
    return ratios, low, high


def _divide(top_MK: np.ndarray, bottom_MK: np.ndarray) -> PerPos:
    """Σ top / Σ bottom at each slot; 0 where the latter is 0."""
    top_K, bottom_K = top_MK.sum(axis=0), bottom_MK.sum(axis=0)
    return tuple(np.divide(top_K, bottom_K, out=np.zeros(len(top_K)), where=bottom_K > 0).tolist())
