"""Computing the missing shards: four steps that run side by side, each on the result of the one before.

    prepare      take hold of a shard, read its samples, batch them
    compute      get their states: run the target and copy them to memory, or read another project's cache
    write        look for what is not finite, encode, write
    publish      sync, rename, commit

Between the steps are bounded queues (`ahead`), so memory does not grow with the cache: at most two shards' bytes of
states, or two batches where these are larger.
"""

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from stages.errors import StageError
from stages.extract.ahead import ahead
from stages.extract.capture import CapturedBatch, find_non_finite
from stages.extract.decode_error import choose_positions, total_variation
from stages.extract.settings import ExtractSection
from storage import CacheBusyError, CachePlan, CacheWriter, PlannedSample, ShardWriter, plan_batches
from storage.progress import Position, log_position

MAX_BATCHES_ALIVE = 8

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
    measured_rows: list[int]  # whose exact last state is kept until the decoded one can be held against it
    exact_rows: list[torch.Tensor] = field(default_factory=list)
    num_rows: int = 0


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

    def prepare(self, shards: list[int]) -> Generator[Batch, None, None]:
        for number in shards:
            try:
                shard_writer = self._writer.shard(number, self._pool).open()
            except CacheBusyError as error:
                logger.debug("%s", error)
                continue
            samples = self._plan.read_samples(number)
            measured = choose_positions(samples) if self._plan.header.encoding.lossy else []
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
            self._keep_exact(shard, states)
            if batch.is_last:
                shard.writer.finish()
                self._measure(shard)
                yield shard

    def publish(self, shard: OpenShard) -> int:
        shard.writer.publish()
        del self._open[shard.number]
        return shard.number

    def discard(self) -> None:
        for shard in self._open.values():
            shard.writer.discard()

    def _quarantine(self, batch: Batch, states: CapturedBatch) -> None:
        for position, layer, reason in find_non_finite(states, layers=self._plan.header.identity.layers):
            sample = batch.samples[position]
            place = "last state" if layer is None else f"layer {layer}"
            logger.warning(
                "quarantined sample %d (%s row %d): %s, %s",
                sample.sample_id, sample.source_file, sample.source_row, place, reason,
            )  # fmt: skip
            batch.shard.writer.exclude(sample.sample_id, reason, layer)
            self._excluded[batch.shard.number] += 1
            self.check_quarantine()

    def check_quarantine(self) -> None:
        """Raises QuarantineError. What this run excludes counts before it is committed, and only once."""
        num_excluded = self._writer.count_excluded(without=self._excluded) + sum(self._excluded.values())
        limit, num_samples = self._extract.max_quarantined_fraction, self._plan.manifest.plan.num_samples
        if num_excluded > limit * num_samples:
            raise QuarantineError(
                f"{num_excluded} samples have non-finite states, more than extract.max_quarantined_fraction = "
                f'{limit} of {num_samples}; try target.dtype = "bfloat16" or "float32", or look at the samples '
                "named above"
            )

    def _keep_exact(self, shard: OpenShard, states: CapturedBatch) -> None:
        start, stop = shard.num_rows, shard.num_rows + sum(states.num_tokens)
        wanted = [row - start for row in shard.measured_rows if start <= row < stop]
        shard.exact_rows.append(states.last_hidden_states[wanted])
        shard.num_rows = stop

    def _measure(self, shard: OpenShard) -> None:
        """Hold what was written against what was computed, at positions whose states are finite."""
        if not shard.measured_rows:
            return
        exact_PD, decoded_PD = torch.cat(shard.exact_rows), shard.writer.read_last(shard.measured_rows)
        finite = exact_PD.isfinite().all(-1)
        measured = total_variation(
            exact_PD[finite], decoded_PD[finite], head_VD=self._head_VD, header=self._plan.header
        )
        # States near the largest number make logits that are not finite, of which nothing can be said.
        shard.writer.record_total_variation(value for value in measured if math.isfinite(value))


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
        eta = time.strftime("%H:%M:%S", time.gmtime(left))
        num_bytes = self._tokens * self._plan.header.token_bytes
        log_position(
            logger,
            Position(name="extract", done=self._shards, total=self._num_shards, eta_seconds=left),
            f"shard {shard:6d}  {self._shards:6d}/{self._num_shards}  {self._tokens:13,d}/{self._total:,d} tokens  "
            f"{rate:9,.0f} tok/s  {num_bytes / 1e9:9.3f} GB  {num_bytes / 1e6 / seconds:7.1f} MB/s  ETA {eta}",
        )
