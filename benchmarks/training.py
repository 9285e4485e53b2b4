"""Optimizer steps from the cache against the same steps on batches held in memory; what the feed alone can deliver.

Steps: the embedded default in each encoding, warm. Both ways do the same steps through the same `Stepper`, in blocks of
neighbouring steps that take turns. A block from the cache has a step before and steps behind that are not timed, so
that its thread gathers for one step a step. Waiting is what the steps stood still for a batch.
Feed alone: batches of random states of a large target's shape (2,560 x 6), asked for as fast as they come, warm,
against copies of as many bytes within memory.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import embedded, make_cache, ratio, scratch_folder, seconds

from pipeline.config import Config
from pipeline.stage_one import settings_of
from stages.device import choose_device
from stages.extract import run as extraction
from stages.train.batches import gather_batch
from stages.train.feed import NUM_BUFFERS, BatchFeed, FedBatch, PlannedStep
from stages.train.loop import Stepper
from stages.train.module import DSparkTrainerModule
from stages.train.order import plan_epoch
from stages.train.parallel import Ranks
from stages.train.run import build_draft, objective_arguments
from stages.train.settings import TrainSection
from storage import CacheReader

ENCODINGS = ("bf16", "int8", "bf16-lossless")
NUM_STEPS = 8  # of a block
ROUNDS = 7
HIDDEN, LAYERS = 2560, 5
TOKENS = 48_000


def main() -> None:
    for encoding in ENCODINGS:
        with scratch_folder() as folder:
            config = embedded(Path(folder), f"cache.encoding='{encoding}'")
            extraction.extract(settings_of(config))
            measure_steps(config)
    for encoding in ENCODINGS:
        with scratch_folder() as folder:
            measure_feed(Path(folder) / "cache", encoding)


def measure_steps(config: Config) -> None:
    """The same optimizer steps from the cache, and with their batches gathered beforehand."""
    reader = CacheReader(config.cache.path)
    device = choose_device(config.train.device)
    model = build_draft(config.draft, reader, seed=0).to(device)
    module = DSparkTrainerModule(model, **objective_arguments(config.objective))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ranks = Ranks(device=device)
    stepper = Stepper(module=module, optimizer=torch.optim.AdamW(trained), train=config.train, ranks=ranks)
    feed = BatchFeed(reader=reader, train=config.train, num_anchors=config.draft.num_anchors, device=device)
    indices = reader.split_indices("train")
    order = indices[plan_epoch(len(indices), seed=0, epoch=0)]
    size = config.train.global_batch_size
    steps = [
        PlannedStep(step=step, epoch=0, indices=order[step * size : (step + 1) * size])
        for step in range(1 + NUM_STEPS + NUM_BUFFERS)
    ]
    timed = steps[1 : 1 + NUM_STEPS]
    held = [hold(feed, step) for step in timed]
    tokens = sum(batch.planned.num_tokens for batches in held for batch in batches)

    def from_cache() -> tuple[float, float]:
        """Seconds of the timed steps, and how many of them they waited."""
        fed = feed.run(steps)
        stepper.step(next(fed)[1], lr=0.0)
        started = time.perf_counter()
        rows = [stepper.step(batches, lr=0.0) for _, batches in itertools.islice(fed, NUM_STEPS)]
        passed = time.perf_counter() - started
        fed.close()
        return passed, sum(row["waited_seconds"] for row in rows)

    def from_memory() -> None:
        for batches in held:
            stepper.step(batches, lr=0.0)

    from_cache()  # first calls are slow, and the first touch of a chunk checks it
    from_memory()
    cache, memory, waited = [], [], []
    for _ in range(ROUNDS):
        passed, stood_still = from_cache()
        cache.append(passed)
        waited.append(stood_still / passed)
        memory.append(seconds(from_memory))
    encoding = reader.identity.encoding
    print(
        f"training {encoding:13} {statistics.median(cache) / NUM_STEPS:6.3f} s a step, {tokens / min(cache):7,.0f} "
        f"tokens/s   / batches in memory {ratio(cache, memory)}; waiting {statistics.median(waited):.2%}",
        flush=True,
    )


def hold(feed: BatchFeed, step: PlannedStep) -> list[FedBatch]:
    """A step's batches in memory of their own."""
    planned = feed.plan(step)
    return [
        FedBatch(
            planned=batch, arguments=gather_batch(feed.reader, batch, device=feed.device), number=number,
            num_batches=len(planned), waited_seconds=0.0,
        )
        for number, batch in enumerate(planned, start=1)
    ]  # fmt: skip


def measure_feed(path: Path, encoding: str) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(1200) - 0.32, 0.8, 1000).astype(int), 16, 4096)
    lengths = lengths[np.cumsum(lengths) <= TOKENS].tolist()
    make_cache(path, lengths, hidden_size=HIDDEN, num_layers=LAYERS, encoding=encoding, shard_bytes=256_000_000)
    reader = CacheReader(path)
    feed = BatchFeed(reader=reader, train=TrainSection(), num_anchors=512, device=choose_device("cpu"))
    step = PlannedStep(step=0, epoch=0, indices=rng.permutation(len(reader)))
    num_bytes = sum(lengths) * HIDDEN * (LAYERS + 1) * 2
    source = torch.zeros(num_bytes // 16, dtype=torch.float64)
    target = torch.zeros_like(source)

    def drain() -> None:
        for _, batches in feed.run([step]):
            for _ in batches:
                pass

    def copy() -> None:
        for _ in range(2):  # half as much memory, twice
            target.copy_(source)

    drain()
    fed, copied = time_turns(drain, copy)
    print(
        f"feed alone {encoding:13} {num_bytes / min(fed) / 1e9:6.2f} GB/s, {sum(lengths) / min(fed):9,.0f} tokens/s   "
        f"a copy of the bytes in memory / feed {ratio(copied, fed)}",
        flush=True,
    )


def time_turns(*actions: Callable[[], object]) -> list[list[float]]:
    """Seconds of each action, taken in turns."""
    rounds = [[seconds(action) for action in actions] for _ in range(ROUNDS)]
    return [list(times) for times in zip(*rounds, strict=True)]


if __name__ == "__main__":
    main()
