"""Accepted tokens against threshold: what a server saves that verifies only slots whose predicted survival is high."""

import numpy as np

from stages.evaluate.blocks import Blocks
from storage.sealed import Record

THRESHOLDS = tuple(step / 20 for step in range(21))


class ThresholdCurve(Record):
    """For each threshold, means over blocks. A round verifies the slots up to which the product of confidences is at
    least the threshold; the bonus token is not counted."""

    threshold: tuple[float, ...]
    verified: tuple[float, ...]
    """Draft tokens a round that are verified."""
    accepted: tuple[float, ...]
    """Draft tokens a round that are accepted, by the true accept rates."""


def trace_thresholds(confidence_MK: np.ndarray, blocks: Blocks) -> ThresholdCurve:
    """The curve of these confidences of the blocks."""
    predicted_MK, survival_MK, supervised_MK = (
        np.cumprod(confidence_MK, axis=1),
        blocks.survival,
        blocks.supervised,
    )
    verified, accepted = [], []
    for threshold in THRESHOLDS:
        chosen_MK = (predicted_MK >= threshold) & supervised_MK
        verified.append(float(chosen_MK.sum() / len(blocks)))
        accepted.append(float(survival_MK[chosen_MK].sum() / len(blocks)))
    return ThresholdCurve(threshold=THRESHOLDS, verified=tuple(verified), accepted=tuple(accepted))
