"""How far a confidence can be believed: reliability bins, calibration error, and how well it tells good from bad.

A slot's confidence predicts its accept rate; the product of a block's confidences up to a slot predicts the slot's
survival. Both are probabilities held against probabilities, since the accept rate itself is known.
Shape suffixes: N slots, M blocks, K slots of a block.
"""

import numpy as np

from stages.evaluate.blocks import Blocks
from storage.sealed import Record

CALIBRATION_BINS = 15


class Bins(Record):
    """Slots by predicted probability, 15 bins of equal width from 0 to 1; a mean over no slots is 0."""

    count: tuple[int, ...]
    mean_predicted: tuple[float, ...]
    mean_observed: tuple[float, ...]


class Reliability(Record):
    """The data of reliability diagrams."""

    confidence: Bins
    """Confidence against accept rate, all slots."""
    confidence_per_pos: tuple[Bins, ...]
    survival: Bins
    """Product of confidences up to the slot against survival, all slots."""
    survival_per_pos: tuple[Bins, ...]


class ConfidenceQuality(Record):
    """Calibration errors and AUCs; an AUC is None where nothing is rejected, or nothing accepted."""

    ece: float
    """Σ_bins share of slots · |mean confidence - mean accept rate|."""
    auc: float | None
    """Probability that an accepted token has a higher confidence than a rejected one."""
    survival_ece: float
    """As `ece`, for the product of confidences up to a slot against the slot's survival."""
    survival_auc: float | None
    survival_ece_per_pos: tuple[float, ...]
    """The same at each slot alone, 0 where no block has it: what temperature scaling makes small."""


def measure_reliability(confidence_MK: np.ndarray, blocks: Blocks) -> Reliability:
    """The bins of these confidences of the blocks."""
    supervised_MK = blocks.supervised
    pairs = ((confidence_MK, blocks.accept), (np.cumprod(confidence_MK, axis=1), blocks.survival))
    overall = [bin_slots(predicted[supervised_MK], observed[supervised_MK]) for predicted, observed in pairs]
    per_pos = [
        tuple(bin_slots(predicted[own_M, k], observed[own_M, k]) for k, own_M in enumerate(supervised_MK.T))
        for predicted, observed in pairs
    ]
    return Reliability(
        confidence=overall[0], confidence_per_pos=per_pos[0], survival=overall[1], survival_per_pos=per_pos[1]
    )


def measure_quality(confidence_MK: np.ndarray, blocks: Blocks) -> ConfidenceQuality:
    """Errors and AUCs of these confidences of the blocks."""
    supervised_MK, survival_MK = blocks.supervised, blocks.survival
    predicted_MK = np.cumprod(confidence_MK, axis=1)
    confidence_N, accept_N = confidence_MK[supervised_MK], blocks.accept[supervised_MK]
    predicted_N, survival_N = predicted_MK[supervised_MK], survival_MK[supervised_MK]
    return ConfidenceQuality(
        ece=calibration_error(confidence_N, accept_N),
        auc=weighted_auc(confidence_N, accept_N),
        survival_ece=calibration_error(predicted_N, survival_N),
        survival_auc=weighted_auc(predicted_N, survival_N),
        survival_ece_per_pos=tuple(
            calibration_error(predicted_MK[own_M, k], survival_MK[own_M, k]) for k, own_M in enumerate(supervised_MK.T)
        ),
    )


def bin_slots(predicted_N: np.ndarray, observed_N: np.ndarray) -> Bins:
    """Count and means of each bin."""
    bin_N = bins_of(predicted_N)
    count = np.bincount(bin_N, minlength=CALIBRATION_BINS)
    predicted, observed = (
        np.bincount(bin_N, weights=values_N, minlength=CALIBRATION_BINS) / np.maximum(count, 1)
        for values_N in (predicted_N, observed_N)
    )
    return Bins(
        count=tuple(count.tolist()), mean_predicted=tuple(predicted.tolist()), mean_observed=tuple(observed.tolist())
    )


def calibration_error(predicted_N: np.ndarray, observed_N: np.ndarray) -> float:
    """Expected calibration error: Σ_bins share of slots · |mean predicted - mean observed|; 0 without slots."""
    gaps = np.bincount(bins_of(predicted_N), weights=predicted_N - observed_N, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / max(len(predicted_N), 1))


def weighted_auc(predicted_N: np.ndarray, observed_N: np.ndarray) -> float | None:
    """Area under the ROC curve of `predicted` for an event that happened with probability `observed`.

    Σ_ij o_i·(1 - o_j)·([p_i > p_j] + ½·[p_i = p_j]) / Σ_ij o_i·(1 - o_j); None where the denominator is 0.
    """
    _, rank_N = np.unique(predicted_N, return_inverse=True)
    happened, failed = np.bincount(rank_N, weights=observed_N), np.bincount(rank_N, weights=1 - observed_N)
    total = happened.sum() * failed.sum()
    failed_below = np.cumsum(failed) - failed
    return float((happened * (failed_below + failed / 2)).sum() / total) if total > 0 else None


def bins_of(predicted_N: np.ndarray) -> np.ndarray:
    """The bin of each probability; 1 lies in the last."""
    bins_N: np.ndarray = np.minimum((predicted_N * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return bins_N
