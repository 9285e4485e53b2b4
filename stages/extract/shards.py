"""Computing the missing shards: four steps that run side by side, each on the result of the one before.

    prepare      take hold of a shard, read its samples, batch them
    compute      get their states: run the target and copy them to memory, or read another project's cache
    write        look for what is not finite, encode, write
    publish      sync, rename, commit

Between the steps are bounded queues (`ahead`), so memory does not grow with the cache: at most two shards' bytes of
states, or two batches where these are larger.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from stages.errors import StageError
from stages.extract.ahead import ahead
from stages.extract.capture import TOO_LARGE, CapturedBatch, find_non_finite
from stages.extract.decode_error import ShardError
from stages.extract.settings import ExtractSection
from storage import CacheBusyError, CachePlan, CacheWriter, PlannedSample, ShardWriter, plan_batches
from storage.progress import Position, log_position
from storage.text import format_duration

MAX_BATCHES_ALIVE = 8
WIDER = 'cache.encoding = "bf16"'  # which holds whatever a target computes

ComputeStates = Callable[[list[PlannedSample]], CapturedBatch]
CheckStates = Callable[[list[PlannedSample], CapturedBatch], None]

logger = logging.getLogger(__name__)


class QuarantineError(StageError, RuntimeError):
    """Too many samples have non-finite states."""


@dataclass(eq=False)
class OpenShard:
    """A shard between `prepare` and `publish`."""

    number: int
    writer: ShardWriter
    samples: list[PlannedSample]
    error: ShardError | None  # of a lossy encoding


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of a shard that share a forward pass; `is_first`, `is_last` of their shard."""

    shard: OpenShard
    samples: list[PlannedSample]
    is_first: bool
    is_last: bool


def compute_shards(
    writer: CacheWriter,
    shards: list[int],
    *,
    compute: ComputeStates,
    check: CheckStates | None = None,
    head_VD: torch.Tensor,
    extract: ExtractSection,
) -> Iterator[int]:
    """Compute and commit these shards in this order, skipping those that another process holds; yield each committed.

    `compute` gives the states of a batch; `check` is shown those of each shard's first and last batch; `head_VD` is the
    target's `lm_head`, for what a lossy encoding costs.
    Raises QuarantineError once the cache excludes too many samples, whichever run excluded them.
    """
    plan = writer.plan
    batch_bytes = extract.max_batch_tokens * plan.header.token_bytes
    max_alive = min(max(2 * plan.manifest.identity.shard_bytes // batch_bytes, 2), MAX_BATCHES_ALIVE)
    stopped = threading.Event()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="encode"))
        steps = _Steps(writer, compute=compute, check=check, head_VD=head_VD, extract=extract, pool=pool)
        steps.check_quarantine()
        stack.callback(steps.discard)  # whatever is open when an error comes
        prepared = stack.enter_context(ahead(steps.prepare(shards), max_alive=max_alive, stopped=stopped))
        captured = stack.enter_context(ahead(steps.compute(prepared), max_alive=max_alive, stopped=stopped))
        written = stack.enter_context(ahead(steps.write(captured), max_alive=2, stopped=stopped))
        stack.callback(stopped.set)  # called first: no step goes on to the end of its shard
        for shard in written:
            yield steps.publish(shard)


class _Steps:
    """The four steps. Each method runs in a thread of its own; what they share is named here."""

    def __init__(
        self,
        writer: CacheWriter,
        *,
        compute: ComputeStates,
        check: CheckStates | None,
        head_VD: torch.Tensor,
        extract: ExtractSection,
        pool: Executor,
    ) -> None:
        self._writer = writer
        self._plan = writer.plan
        self._compute = compute
        self._check = check
        self._head_VD = head_VD
        self._extract = extract
        self._pool = pool
        self._open: dict[int, OpenShard] = {}
        self._excluded: Counter[int] = Counter()
        self._is_first = len(writer.missing_shards()) == self._plan.num_shards  # until a batch was looked at

    def prepare(self, shards: list[int]) -> Generator[Batch, None, None]:
        for number in shards:
            try:
                shard_writer = self._writer.shard(number, self._pool).open()
            except CacheBusyError as error:
                logger.debug("%s", error)
                continue
            samples = self._plan.read_samples(number)
            measured = ShardError(samples) if self._plan.header.encoding.lossy else None
            shard = self._open[number] = OpenShard(number, shard_writer, samples, measured)
            batches = plan_batches([sample.num_tokens for sample in samples], self._extract.max_batch_tokens)
            for rows in batches:
                yield Batch(
                    shard=shard,
                    samples=samples[rows.start : rows.stop],
                    is_first=rows is batches[0],
                    is_last=rows is batches[-1],
                )

    def compute(self, batches: Iterator[Batch]) -> Generator[tuple[Batch, CapturedBatch], None, None]:
        for batch in batches:
            states = self._compute(batch.samples)
            if self._check is not None and (batch.is_first or batch.is_last):
                self._check(batch.samples, states.wait())
            yield batch, states

    def write(self, captured: Iterator[tuple[Batch, CapturedBatch]]) -> Generator[OpenShard, None, None]:
        for batch, states in captured:
            shard = batch.shard
            states.wait()
            self._quarantine(batch, states)
            shard.writer.append(states.hidden_states, states.last_hidden_states)
            if shard.error:
                shard.error.keep(states)
            if batch.is_last:
                shard.writer.finish()
                if shard.error:
                    shard.error.record(shard.writer, head_VD=self._head_VD, header=self._plan.header)
                yield shard

    def publish(self, shard: OpenShard) -> int:
        shard.writer.publish()
        del self._open[shard.number]
        return shard.number

    def discard(self) -> None:
        for shard in self._open.values():
            shard.writer.discard()

    def _quarantine(self, batch: Batch, states: CapturedBatch) -> None:
        found = list(find_non_finite(states, layers=self._plan.header.identity.layers))
        self._check_range(found, num_samples=len(batch.samples))
        for position, layer, reason in found:
            sample = batch.samples[position]
            place = "last state" if layer is None else f"layer {layer}"
            logger.warning(
                "quarantined sample %d (%s row %d): %s, %s",
                sample.sample_id, sample.source_file, sample.source_row, place, reason,
            )  # fmt: skip
            batch.shard.writer.exclude(sample.sample_id, reason, layer)
            self._excluded[batch.shard.number] += 1
            self.check_quarantine()

    def _check_range(self, found: list[tuple[int, int | None, str]], *, num_samples: int) -> None:
        """Raises QuarantineError where the first batch of a cache shows that its encoding cannot hold the states."""
        large = [layer for _, layer, reason in found if reason == TOO_LARGE]
        if large and self._is_first:
            place = "the last state" if large[0] is None else f"layer {large[0]}"
            raise QuarantineError(
                f"{len(large)} of the first {num_samples} samples: {place}: {TOO_LARGE}; nothing is "
                f"wrong with the target: set {WIDER}, in a new cache.path or after deleting {self._plan.path}"
            )
        self._is_first = False

    def check_quarantine(self) -> None:
        """Raises QuarantineError. What this run excludes counts before it is committed, and only once."""
        num_excluded = self._writer.count_excluded(without=self._excluded) + sum(self._excluded.values())
        limit, num_samples = self._extract.max_quarantined_fraction, self._plan.manifest.plan.num_samples
        if num_excluded > limit * num_samples:
            wider = f"{WIDER} where they are finite, " if self._plan.header.identity.encoding == "fp16" else ""
            raise QuarantineError(
                f"{num_excluded} samples have non-finite states, more than extract.max_quarantined_fraction = "
                f'{limit} of {num_samples}; try {wider}target.dtype = "bfloat16" or "float32", or look at the samples '
                "named above"
            )


class Progress:
    """One fixed-width line a shard: position, rate, bytes, time to go."""

    def __init__(self, plan: CachePlan, shards: list[int]) -> None:
        self._plan = plan
        self._total = sum(plan.planned_shard(shard).num_tokens for shard in shards)
        self._tokens = self._shards = 0
        self._num_shards = len(shards)
        self._started = time.monotonic()

    def log_shard(self, shard: int) -> None:
        """Say that a shard is done, and how far that is."""
        self._shards += 1
        self._tokens += self._plan.planned_shard(shard).num_tokens
        seconds = time.monotonic() - self._started
        rate = self._tokens / seconds
        left = (self._total - self._tokens) / rate
        num_bytes = self._tokens * self._plan.header.token_bytes
        log_position(
            logger,
            Position(name="extract", done=self._shards, total=self._num_shards, eta_seconds=left),
            f"shard {shard:6d}  {self._shards:6d}/{self._num_shards}  {self._tokens:13,d}/{self._total:,d} tokens  "
            f"{rate:9,.0f} tok/s  {num_bytes / 1e9:9.3f} GB  {num_bytes / 1e6 / seconds:7.1f} MB/s  "
            f"ETA {format_duration(left)}",
        )
