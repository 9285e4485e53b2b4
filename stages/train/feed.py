"""The batches of each step, in the order of the plan, gathered from the cache by a thread while the step before runs.

The thread plans, reads, checks, decodes and copies into a ring of staging buffers, across the edges of steps and
epochs; the step takes what is ready and gives back what it is done with. On CUDA the thread also starts the copies to
the device, on a stream of its own. Nothing here has run on a GPU.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from queue import SimpleQueue

import numpy as np
import torch

from stages.train.batches import PlannedBatch, StagingBuffer, plan_batch
from stages.train.order import plan_rank_batches
from stages.train.settings import TrainSection
from storage import CacheReader

# One that the step reads, one that is ready, one that is being filled: neither waits for the other as long as gathering
# a batch takes no longer than a step over one.
NUM_BUFFERS = 3

# How long an interrupted training waits for its thread. Only a read from a store takes longer; the thread then ends
# with that read, or with the process.
JOIN_SECONDS = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """Which samples an optimizer step sees, all ranks together."""

    step: int
    epoch: int
    indices: np.ndarray
    order: str = ""
    """Digest of the epoch's order: two runs with the same one see the same samples in the same steps."""


@dataclass(frozen=True, kw_only=True)
class FedBatch:
    """A micro-batch of this rank, ready on the device. `arguments` are `DSparkTrainerModule.forward`'s."""

    planned: PlannedBatch
    arguments: dict[str, torch.Tensor]
    number: int
    """From 1."""
    num_batches: int
    """Micro-batches of this rank in the step; the same on every rank."""
    waited_seconds: float
    """How long the step stood still for this batch. What a GPU waits for the copy of a batch is not in it."""

    @property
    def is_last(self) -> bool:
        """Whether it is the last of its step."""
        return self.number == self.num_batches


@dataclass(frozen=True, kw_only=True)
class BatchFeed:
    """This rank's micro-batches. They hold `NUM_BUFFERS` times `train.max_batch_tokens` tokens of states at most.

    A sample that is longer than the budget makes the buffer that it comes to as long. On CUDA one batch more than that
    lies on the device.
    """

    reader: CacheReader
    train: TrainSection
    num_anchors: int
    device: torch.device
    rank: int = 0
    world: int = 1

    def plan(self, step: PlannedStep) -> list[PlannedBatch]:
        """This rank's micro-batches of a step, without their states."""
        return [self._plan_batch(step, share) for share in self._shares(step)]

    def run(self, steps: Iterable[PlannedStep]) -> Iterator[tuple[PlannedStep, Iterator[FedBatch]]]:
        """Each step with its batches. On a CPU a batch's tensors are valid until the next one, or step, is asked for.

        `steps` is consumed by the thread, some batches ahead. An error of it, or of the cache, is raised where the
        batch would have come; every step before is complete then. Closing the iterator ends the thread.
        """
        thread = _FeedThread(self, steps)
        try:
            while (first := thread.take()) is not None:
                batches = _rest_of_step(thread, first.fed)
                yield first.step, batches
                for _ in batches:  # that were not asked for
                    pass
        finally:
            thread.stop()

    @cached_property
    def buffer_tokens(self) -> int:
        """Tokens that a buffer has room for: the budget, or what the longest samples of a step come to."""
        lengths = np.sort(self._num_tokens[self.reader.split_indices("train")])
        return min(self.train.max_batch_tokens, int(lengths[-self.train.global_batch_size :].sum(dtype=np.int64)))

    def _shares(self, step: PlannedStep) -> list[range]:
        lengths = self._num_tokens[step.indices].tolist()
        budget = self.train.max_batch_tokens
        return plan_rank_batches(lengths, max_batch_tokens=budget, rank=self.rank, world=self.world)

    def _plan_batch(self, step: PlannedStep, share: range) -> PlannedBatch:
        indices = step.indices[share.start : share.stop]
        return plan_batch(
            self.reader, indices.tolist(), self._sample_ids[indices].tolist(),
            num_anchors=self.num_anchors, seed=self.train.seed, epoch=step.epoch,
        )  # fmt: skip

    # The reader puts its columns together anew each time, which costs milliseconds for a million samples.
    @cached_property
    def _num_tokens(self) -> np.ndarray:
        return self.reader.num_tokens

    @cached_property
    def _sample_ids(self) -> np.ndarray:
        return self.reader.sample_ids


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A batch of a step in the buffer that is given back once the batch is done with."""

    step: PlannedStep
    fed: FedBatch
    buffer: StagingBuffer


@dataclass(frozen=True)
class _Ended:
    """The last thing that the thread puts: the error that ended it, if any."""

    error: BaseException | None


class _FeedThread:
    """The thread and its two queues: buffers that are free go in, batches come out, in order."""

    def __init__(self, feed: BatchFeed, steps: Iterable[PlannedStep]) -> None:
        self._feed = feed
        self._stream: torch.cuda.Stream | None = None
        if feed.device.type == "cuda":
            self._stream = torch.cuda.Stream(feed.device)  # type: ignore[no-untyped-call]
        self._ready: SimpleQueue[_Ready | _Ended] = SimpleQueue()
        self._free: SimpleQueue[StagingBuffer | None] = SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self._free.put(StagingBuffer(feed.reader, num_tokens=feed.buffer_tokens, device=feed.device))
        self._in_use: StagingBuffer | None = None
        self._started, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(steps,), name="batch-feed", daemon=True)
        self._thread.start()
        self._started.wait()
        torch.set_num_threads(torch.get_num_threads())  # what the thread set is also the default of later threads

    def take(self) -> _Ready | None:
        """The next batch, None behind the last; the one before is done with. Raises the thread's error."""
        if self._in_use is not None:
            self._free.put(self._in_use)
            self._in_use = None
        started = time.monotonic()
        ready = self._ready.get()
        if isinstance(ready, _Ended):
            if ready.error is not None:
                raise ready.error
            return None
        self._in_use = ready.buffer
        if ready.buffer.copied is not None:
            stream = torch.cuda.current_stream(self._feed.device)
            stream.wait_event(ready.buffer.copied)
            for tensor in ready.fed.arguments.values():  # the thread's stream made them, this one must let them go
                tensor.record_stream(stream)
        return replace(ready, fed=replace(ready.fed, waited_seconds=time.monotonic() - started))

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopped.set()
        self._free.put(None)  # wakes it
        self._thread.join(JOIN_SECONDS)
        if self._thread.is_alive():
            logger.warning("a read of the cache is still going on; it is left to itself")

    def _run(self, steps: Iterable[PlannedStep]) -> None:
        _compute_alone()
        self._started.set()
        try:
            with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                self._feed_steps(steps)
            self._ready.put(_Ended(None))
        except BaseException as error:  # for whoever takes the batches
            self._ready.put(_Ended(error))

    def _feed_steps(self, steps: Iterable[PlannedStep]) -> None:
        for step in steps:
            shares = self._feed._shares(step)
            for number, share in enumerate(shares, start=1):
                planned = self._feed._plan_batch(step, share)
                buffer = self._free.get()
                if buffer is None or self._stopped.is_set():
                    return
                fed = FedBatch(
                    planned=planned, arguments=buffer.gather(planned), number=number, num_batches=len(shares),
                    waited_seconds=0.0,
                )  # fmt: skip
                self._ready.put(_Ready(step=step, fed=fed, buffer=buffer))


def _compute_alone() -> None:
    """Let this thread's torch operations use no other thread.

    One core copies several GB/s, more than a step reads. A second team of OpenMP threads would have the step's own team
    sleep between operations instead of spin, since there are more of them than cores, and every operation wait for it.
    """
    torch.get_num_threads()  # its first call in a thread sets the default, so it must not be a later one
    torch.set_num_threads(1)


def _rest_of_step(thread: _FeedThread, batch: FedBatch) -> Iterator[FedBatch]:
    """The batch and those of its step that come behind it."""
    yield batch
    while not batch.is_last:
        ready = thread.take()
        if ready is None:
            raise AssertionError("the feed ended inside a step")
        batch = ready.fed
        yield batch
