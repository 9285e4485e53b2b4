"""What runs may be held against each other, and how far apart their taus are, conversation by conversation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.evaluate.bootstrap import estimate_ratio
from stages.evaluate.calibration import Origin
from stages.evaluate.evaluation import Evaluation

# Assumption: below it, the bootstrap has so few conversations to draw from that its intervals are far too narrow; those
# of one have no width.
MIN_SAMPLES = 5

Measured = tuple[Origin, tuple[tuple[int, int], ...]]
"""What a run was measured on: whence its blocks are, and each sample's id and number of blocks."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """tau of the best minus that of another, over the blocks that both have; `low`, `high`: 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the best is ahead beyond chance: the whole interval is in its favour."""
        return self.low > 0


def measured_on(evaluation: Evaluation) -> Measured:
    """Equal where two runs were scored on the same blocks of the same conversations."""
    return evaluation.origin, tuple((sample.sample_id, sample.num_blocks) for sample in evaluation.samples)


def paired_difference(ones: Sequence[Evaluation], others: Sequence[Evaluation]) -> Difference | None:
    """Mean tau of `ones` minus mean tau of `others`, resampling conversations.

    None where they were scored on different blocks, whose taus say nothing of each other, or on fewer than MIN_SAMPLES.
    """
    if len({measured_on(found) for found in (*ones, *others)}) > 1 or len(ones[0].samples) < MIN_SAMPLES:
        return None
    blocks_G = np.array([sample.num_blocks for sample in ones[0].samples])
    gains_G = _mean_taus(ones) - _mean_taus(others)
    found = estimate_ratio(gains_G * blocks_G, blocks_G)
    return Difference(mean=found.value, low=found.low, high=found.high)


def _mean_taus(evaluations: Sequence[Evaluation]) -> np.ndarray:
    """tau of each conversation, its mean over the evaluations."""
    taus_RG = np.array([[sample.tau for sample in found.samples] for found in evaluations])
    return np.asarray(taus_RG.mean(axis=0))
