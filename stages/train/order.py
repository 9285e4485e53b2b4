"""Which samples an optimizer step sees: pure functions of the seed and of the cache's sample ids.

Nothing here depends on how many workers or ranks there are, so a resume needs no more than the number of the next step.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.errors import SettingError
from stages.train.settings import TrainSection

# Shards of a shuffle window where they are fetched: some thousand conversations of the default shard size, so that a
# batch is as mixed as in a whole-epoch shuffle (assumption), and no more than 2 GB that must be there at once.
REMOTE_WINDOW = 4


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of a run. `num_samples` is the size of the training split."""

    num_samples: int
    global_batch_size: int
    num_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left."""
        return -(-self.num_samples // self.global_batch_size)

    def epoch(self, step: int) -> int:
        """The epoch that step `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int, order: np.ndarray) -> np.ndarray:
        """The entries of the epoch's `order` that step `step` trains on."""
        start = step % self.steps_per_epoch * self.global_batch_size
        return order[start : start + self.global_batch_size]


def plan_schedule(train: TrainSection, *, num_samples: int) -> Schedule:
    """The number of steps: all epochs, cut at `train.max_steps`. Raises SettingError without any sample."""
    if num_samples < 1:
        raise SettingError("the cache's training split is empty; lower data.validation_fraction or extract more data")
    steps_per_epoch = -(-num_samples // train.global_batch_size)
    num_steps = steps_per_epoch * train.epochs
    return Schedule(
        num_samples=num_samples,
        global_batch_size=train.global_batch_size,
        num_steps=min(num_steps, train.max_steps or num_steps),
    )


def plan_epoch(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(num_samples), [N] int64, a function of its arguments alone.

    It sorts raw Philox output, which is the same in every version of numpy; `Generator.permutation` need not be.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_samples), kind="stable")


def plan_windows(shards: np.ndarray, *, window: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the samples that lie in `shards` [N], [N] int64, a function of its arguments alone.

    Shards are shuffled and cut into groups of `window`, samples are shuffled within each group: whoever reads in this
    order needs no more than `window` shards at a time, and each of them once. `window` 0 puts all shards in one group.
    """
    order = plan_epoch(len(shards), seed=seed, epoch=epoch)
    if window == 0:
        return order
    present, positions = np.unique(shards, return_inverse=True)
    stream = np.random.Philox(np.random.SeedSequence([seed, epoch, len(present)]))
    place = np.empty(len(present), dtype=np.int64)
    place[np.argsort(stream.random_raw(len(present)), kind="stable")] = np.arange(len(present))
    return order[np.argsort((place // window)[positions][order], kind="stable")]


def resolve_window(train: TrainSection, *, is_remote: bool) -> TrainSection:
    """The section with `shuffle_window` filled in: it decides the order, so a resumed run must have the same."""
    if train.shuffle_window is not None:
        return train
    return train.model_copy(update={"shuffle_window": REMOTE_WINDOW if is_remote else 0})


def digest_order(sample_ids: np.ndarray) -> str:
    """sha256 of sample ids in the order in which they are trained: two runs with one hash saw the same data."""
    return hashlib.sha256(np.ascontiguousarray(sample_ids, dtype="<i8").tobytes()).hexdigest()


def plan_micro_batches(num_tokens: Sequence[int], *, max_batch_tokens: int) -> list[range]:
    """Runs of neighbouring samples that fit the budget when laid end to end; a longer sample goes alone."""
    batches: list[range] = []
    start, total = 0, 0
    for index, tokens in enumerate(num_tokens):
        if index > start and total + tokens > max_batch_tokens:
            batches.append(range(start, index))
            start, total = index, 0
        total += tokens
    if len(num_tokens):
        batches.append(range(start, len(num_tokens)))
    return batches


def plan_rank_batches(num_tokens: Sequence[int], *, max_batch_tokens: int, rank: int, world: int) -> list[range]:
    """One rank's share of the step's micro-batches: every `world`-th, and an empty one where others have one more.

    The micro-batches are those of a single process, so the loss is the same at any number of ranks.
    """
    batches = plan_micro_batches(num_tokens, max_batch_tokens=max_batch_tokens)
    own = batches[rank::world]
    return own if len(own) == -(-len(batches) // world) else [*own, range(0)]


def learning_rate(step: int, *, num_steps: int, peak: float, warmup_fraction: float) -> float:
    """Linear warm-up to `peak`, then a cosine that would reach zero one step after the last."""
    warmup = int(np.ceil(warmup_fraction * num_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return float(peak * 0.5 * (1 + np.cos(np.pi * progress)))
