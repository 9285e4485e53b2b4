"""Bootstrap intervals over samples: the blocks of one conversation are not independent."""

import numpy as np

BOOTSTRAP_ROUNDS = 1000
BOOTSTRAP_SEED = 0


def bootstrap_mean(values: np.ndarray, *, groups: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `values`, resampling whole groups."""
    return bootstrap_ratio(values, np.ones(len(values)), groups=groups)


def bootstrap_ratio(numerators: np.ndarray, denominators: np.ndarray, *, groups: np.ndarray) -> tuple[float, float]:
    """95 % interval of Σ numerators / Σ denominators, resampling whole groups; (0, 0) where all is 0."""
    _, positions = np.unique(groups, return_inverse=True)
    tops, bottoms = np.bincount(positions, weights=numerators), np.bincount(positions, weights=denominators)
    if not bottoms.sum() > 0:
        return 0.0, 0.0
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    ratios = []
    for _ in range(BOOTSTRAP_ROUNDS):  # one at a time, since all of them take gigabytes at a million samples
        drawn = generator.integers(len(tops), size=len(tops))
        bottom = bottoms[drawn].sum()
        if bottom > 0:
            ratios.append(tops[drawn].sum() / bottom)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
