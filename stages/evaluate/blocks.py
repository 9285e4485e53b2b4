"""Scores of slots put in a rectangle of blocks, which every metric of this stage starts from.

Shape suffixes: N supervised slots of all samples, M blocks, K slots of a block.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from stages.errors import SettingError


class SlotScores(Protocol):
    """Scores of one sample; every property is [N], ordered by block, and within a block by slot."""

    @property
    def anchor(self) -> Any: ...
    @property
    def slot(self) -> Any: ...
    @property
    def accept_rate(self) -> Any: ...
    @property
    def top1_agree(self) -> Any: ...
    @property
    def greedy_accept_rate(self) -> Any: ...
    @property
    def cross_entropy(self) -> Any: ...
    @property
    def confidence(self) -> Any | None: ...


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Blocks with at least one supervised slot; arrays are [M, K] unless a shape is given.

    What lies behind a block's last supervised slot is 0 everywhere.
    """

    num_samples: int
    """Scored samples, those without a block too."""
    sample: np.ndarray
    """[M] sample ids."""
    length: np.ndarray
    """[M] supervised slots, 1 to K: the first ones."""
    accept: np.ndarray
    """Accept rate: the probability that the target takes the draft's token, if it took those before."""
    top1: np.ndarray
    """1 where draft and target have the same most likely token."""
    greedy_accept: np.ndarray
    """Accept rate of a draft that takes its most likely token instead of sampling: the target's probability of it."""
    cross_entropy: np.ndarray
    confidence: np.ndarray | None
    """Predicted accept rate; None without a confidence head."""

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def block_size(self) -> int:
        return int(self.accept.shape[1])

    @property
    def supervised(self) -> np.ndarray:
        """Which slots are: bool [M, K]."""
        return np.arange(self.block_size) < self.length[:, None]

    @property
    def survival(self) -> np.ndarray:
        """The probability that a slot's token is taken together with all before it: accept rates multiplied up."""
        return np.cumprod(self.accept, axis=1)

    def select(self, chosen_M: np.ndarray) -> "Blocks":
        """The blocks at which the mask is true."""
        arrays = {name: value[chosen_M] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, num_samples=len(np.unique(arrays["sample"])), **arrays)


def gather_blocks(batches: Iterable[tuple[int, SlotScores]], *, block_size: int) -> Blocks:
    """Blocks of (sample id, scores of that sample alone) pairs. Raises SettingError when no slot is supervised."""
    pairs = list(batches)
    sample_N = np.repeat([sample_id for sample_id, _ in pairs], [len(batch.slot) for _, batch in pairs]).astype(int)
    if not len(sample_N):
        raise SettingError("nothing to evaluate: the split has no supervised slot; raise data.validation_fraction")
    scores = [batch for _, batch in pairs]
    slot_N = _join(scores, "slot").astype(int)
    block_N = _number_blocks(sample_N, _join(scores, "anchor"), slot_N)
    starts = np.flatnonzero(slot_N == 0)

    def place(name: str) -> np.ndarray:
        placed_MK = np.zeros((len(starts), block_size))
        placed_MK[block_N, slot_N] = _join(scores, name)
        return placed_MK

    return Blocks(
        num_samples=len(pairs),
        sample=sample_N[starts],
        length=np.bincount(block_N),
        accept=place("accept_rate"),
        top1=place("top1_agree"),
        greedy_accept=place("greedy_accept_rate"),
        cross_entropy=place("cross_entropy"),
        confidence=None if any(batch.confidence is None for batch in scores) else place("confidence"),
    )


def _number_blocks(sample_N: np.ndarray, anchor_N: np.ndarray, slot_N: np.ndarray) -> np.ndarray:
    """Which block each slot lies in. A block's slots are neighbours and start at slot 0."""
    starts = np.flatnonzero(slot_N == 0)
    block_N = np.cumsum(slot_N == 0) - 1
    first_N = starts[block_N]
    in_order = (slot_N == np.arange(len(slot_N)) - first_N) & (block_N >= 0)
    if not (in_order & (anchor_N == anchor_N[first_N]) & (sample_N == sample_N[first_N])).all():
        raise AssertionError("scores are not ordered by block and slot")
    return block_N


def _join(scores: list[SlotScores], name: str) -> np.ndarray:
    return np.concatenate([np.asarray(getattr(batch, name), dtype=np.float64) for batch in scores])
