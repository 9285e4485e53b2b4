"""95 % intervals by bootstrap over groups: samples or prompts, since the blocks of one are not independent."""

from dataclasses import dataclass

import numpy as np

BOOTSTRAP_ROUNDS = 1000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def estimate_ratio(num_G: np.ndarray, den_G: np.ndarray) -> Estimate:
    """Σ num / Σ den over groups; some group has a den."""
    low, high = np.nanquantile(_draw_ratios(num_G, den_G), [0.025, 0.975])
    return Estimate(value=float(num_G.sum() / den_G.sum()), low=float(low), high=float(high))


def estimate_difference(
    num_G: np.ndarray, den_G: np.ndarray, other_num_G: np.ndarray, other_den_G: np.ndarray
) -> Estimate:
    """The first ratio minus the other, over the same groups: what varies between groups alike in both cancels out."""
    draws = _draw_ratios(num_G, den_G) - _draw_ratios(other_num_G, other_den_G)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    value = num_G.sum() / den_G.sum() - other_num_G.sum() / other_den_G.sum()
    return Estimate(value=float(value), low=float(low), high=float(high))


def _draw_ratios(num_G: np.ndarray, den_G: np.ndarray) -> np.ndarray:
    """Ratios of the resampled groups, the same draws for every statistic of as many groups; NaN where den is 0."""
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(len(num_G), size=(BOOTSTRAP_ROUNDS, len(num_G)))
    num, den = num_G[drawn].sum(1).astype(np.float64), den_G[drawn].sum(1).astype(np.float64)
    ratios: np.ndarray = np.divide(num, den, out=np.full(BOOTSTRAP_ROUNDS, np.nan), where=den > 0)
    return ratios
