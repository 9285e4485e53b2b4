"""Acceptance of a draft measured from the cache alone, without the target.

The draft is scored by a function that the caller passes in, since stages do not import each other: for each supervised
slot of each block it gives the accept rate, whether both argmaxes agree, the cross-entropy and the confidence.
Shape suffixes: N supervised slots of all samples, K slots of a block.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from stages.errors import SettingError

CALIBRATION_BINS = 15
BOOTSTRAP_ROUNDS = 1000
BOOTSTRAP_SEED = 0


class SlotScores(Protocol):
    """Scores of one batch; every property is [N], ordered by block, and within a block by slot."""

    @property
    def anchor(self) -> Any: ...
    @property
    def slot(self) -> Any: ...
    @property
    def accept_rate(self) -> Any: ...
    @property
    def top1_agree(self) -> Any: ...
    @property
    def cross_entropy(self) -> Any: ...
    @property
    def confidence(self) -> Any | None: ...


@dataclass(frozen=True, kw_only=True)
class CacheEvaluation:
    """What the held-out split says of a draft.

    accept_rate_per_pos  mean over blocks of 1 - ½·‖p_draft - p_target‖₁ at each slot, previous tokens given
    tau                  mean over blocks of 1 + Σ_k Π_{i<=k} accept rate i: expected tokens a verify round, with bonus
    tau_low, tau_high    95 % interval of tau, bootstrap over samples
    top1_agreement       share of slots at which draft and target have the same most likely token
    cross_entropy        mean of -log p_draft(token of the data), in nats
    confidence_ece       Σ_bins share·|mean confidence - mean accept rate|, 15 bins of equal width; None without head
    """

    num_samples: int
    num_blocks: int
    num_slots: int
    tau: float
    tau_low: float
    tau_high: float
    accept_rate_per_pos: tuple[float, ...]
    top1_agreement: float
    cross_entropy: float
    confidence_ece: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_scores(batches: Iterable[tuple[int, SlotScores]], *, block_size: int) -> CacheEvaluation:
    """Metrics over (sample id, scores of that sample alone) pairs. Raises SettingError when no slot is supervised."""
    samples, scores = [], []
    for sample_id, batch in batches:
        samples.append(sample_id)
        scores.append(batch)
    columns = {name: _concat(scores, name) for name in ("slot", "anchor", "accept_rate", "top1_agree", "cross_entropy")}
    if not len(columns["slot"]):
        raise SettingError("nothing to evaluate: the split has no supervised slot; raise data.validation_fraction")
    sample_N = np.repeat(np.arange(len(scores)), [len(np.asarray(batch.slot)) for batch in scores])
    tau_blocks, block_samples = block_taus(sample_N, columns["anchor"], columns["slot"], columns["accept_rate"])
    low, high = bootstrap_mean(tau_blocks, groups=block_samples)
    has_confidence = all(batch.confidence is not None for batch in scores)
    return CacheEvaluation(
        num_samples=len(samples),
        num_blocks=len(tau_blocks),
        num_slots=len(columns["slot"]),
        tau=float(tau_blocks.mean()),
        tau_low=low,
        tau_high=high,
        accept_rate_per_pos=tuple(mean_per_slot(columns["accept_rate"], columns["slot"], block_size=block_size)),
        top1_agreement=float(columns["top1_agree"].mean()),
        cross_entropy=float(columns["cross_entropy"].mean()),
        confidence_ece=calibration_error(_concat(scores, "confidence"), columns["accept_rate"])
        if has_confidence
        else None,
    )


def block_taus(
    sample_N: np.ndarray, anchor_N: np.ndarray, slot_N: np.ndarray, accept_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """tau of each block and the sample that it lies in. A block's slots are neighbours and start at slot 0."""
    starts = np.flatnonzero(slot_N == 0)
    taus = np.empty(len(starts))
    for block, (start, end) in enumerate(zip(starts, [*starts[1:], len(slot_N)], strict=True)):
        if not (slot_N[start:end] == np.arange(end - start)).all() or len(set(anchor_N[start:end])) != 1:
            raise AssertionError("scores are not ordered by block and slot")
        taus[block] = 1.0 + np.cumprod(accept_N[start:end]).sum()
    return taus, sample_N[starts]


def mean_per_slot(values_N: np.ndarray, slot_N: np.ndarray, *, block_size: int) -> list[float]:
    """Mean of the values at each slot 0..K-1; 0 where no block reaches the slot."""
    counts = np.bincount(slot_N, minlength=block_size)
    sums = np.bincount(slot_N, weights=values_N, minlength=block_size)
    return [float(value) for value in sums / np.maximum(counts, 1)]


def calibration_error(confidence_N: np.ndarray, accept_N: np.ndarray) -> float:
    """Expected calibration error: Σ_bins share of slots · |mean confidence - mean accept rate|."""
    bins = np.minimum((confidence_N * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=confidence_N - accept_N, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence_N))


def bootstrap_mean(values: np.ndarray, *, groups: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `values`, resampling whole groups (the blocks of a sample are not independent)."""
    _, positions = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(positions, weights=values), np.bincount(positions)
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(len(sums), size=(BOOTSTRAP_ROUNDS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _concat(scores: list[SlotScores], name: str) -> np.ndarray:
    parts = [np.asarray(getattr(batch, name)) for batch in scores]
    return np.concatenate(parts) if parts else np.empty(0)
