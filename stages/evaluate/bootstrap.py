"""95 % intervals by bootstrap over groups, samples or prompts: the blocks of one are not independent."""

from dataclasses import dataclass

import numpy as np

BOOTSTRAP_ROUNDS = 1000
BOOTSTRAP_SEED = 0
ENOUGH_GROUPS = (
    30  # below that, what resampling says of noise is visibly too small (assumption: the usual rule of thumb)
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(values: np.ndarray, *, groups: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `values`, resampling whole groups."""
    return bootstrap_ratio(values, np.ones(len(values)), groups=groups)


def bootstrap_ratio(numerators: np.ndarray, denominators: np.ndarray, *, groups: np.ndarray) -> tuple[float, float]:
    """95 % interval of Σ numerators / Σ denominators, resampling whole groups; (0, 0) where all is 0."""
    _, positions = np.unique(groups, return_inverse=True)
    tops, bottoms = np.bincount(positions, weights=numerators), np.bincount(positions, weights=denominators)
    return _interval(_draw_ratios(tops, bottoms)) if bottoms.sum() > 0 else (0.0, 0.0)


def estimate_ratio(num_G: np.ndarray, den_G: np.ndarray) -> Estimate:
    """Σ num / Σ den over groups; some group has a den."""
    return _estimate(float(num_G.sum() / den_G.sum()), _draw_ratios(num_G, den_G))


def estimate_difference(
    num_G: np.ndarray, den_G: np.ndarray, other_num_G: np.ndarray, other_den_G: np.ndarray
) -> Estimate:
    """The first ratio minus the other, over the same groups: what varies between groups alike in both cancels out."""
    value = num_G.sum() / den_G.sum() - other_num_G.sum() / other_den_G.sum()
    return _estimate(float(value), _draw_ratios(num_G, den_G) - _draw_ratios(other_num_G, other_den_G))


def widen(interval: tuple[float, float], value: float) -> tuple[float, float]:
    """The interval with the value in it.

    Where all groups are alike, draws and value are the same number, and rounding may set them apart by a last bit.
    """
    return min(interval[0], value), max(interval[1], value)


def _draw_ratios(num_G: np.ndarray, den_G: np.ndarray) -> np.ndarray:
    """Ratios of the resampled groups, the same draws for every statistic of as many groups; NaN where den is 0."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    ratios = np.full(BOOTSTRAP_ROUNDS, np.nan)
    for number in range(BOOTSTRAP_ROUNDS):  # one at a time, since all of them take gigabytes at a million groups
        drawn = generator.integers(len(num_G), size=len(num_G))
        den = den_G[drawn].sum()
        if den > 0:
            ratios[number] = num_G[drawn].sum() / den
    return ratios


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = widen(_interval(draws), value)
    return Estimate(value=value, low=low, high=high)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)
