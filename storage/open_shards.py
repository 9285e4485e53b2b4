"""The shards that a reader has open: each is opened at first use, in each process on its own.

Those of a remote cache are staged first (staging.py), ahead of use where the reads to come are known (read_ahead.py),
and fetched anew where the copy proves damaged.
"""

import os
import threading
from collections import OrderedDict
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from storage.commit import REMEDY, plan_shard, read_commit
from storage.errors import CacheCorruptError, CacheFormatError
from storage.plan import CachePlan, read_shard_samples
from storage.read_ahead import ReadAhead
from storage.samples import PlannedSample, ShardTokens, concatenate
from storage.shard_files import Access, States, open_arrays
from storage.staging import Lease, StagedCache

# Open shards a process keeps: two files and two mappings each, well under the usual limit of 1,024 open files.
MAX_OPEN_SHARDS = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenShard:
    """A shard's tokens and its two arrays of states."""

    tokens: ShardTokens
    hidden: States
    last: States
    lease: Lease | None  # of a remote cache: keeps the shard in the staging folder


@dataclass(kw_only=True, eq=False)
class _State:
    """What one process has open."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    shards: OrderedDict[int, OpenShard] = field(default_factory=OrderedDict)
    tokens: OrderedDict[int, ShardTokens] = field(default_factory=OrderedDict)
    ahead: ReadAhead | None = None
    pool: Executor | None = None

    def __del__(self) -> None:
        if self.ahead is not None:
            self.ahead.stop()


class OpenShards:
    """Opens the committed shards of a plan, and lets go of those that were used least recently.

    ``staged``: the staging folder that ``plan`` lies in, for a remote cache. ``markers``: shards with excluded samples.
    ``check``: compare each inner chunk's crc32c at first touch. Any thread may call; a forked child opens anew.
    """

    def __init__(
        self, plan: CachePlan, staged: StagedCache | None, *, markers: set[int], mapped: bool, check: bool
    ) -> None:
        self._plan = plan
        self._staged = staged
        self._markers = markers
        self._mapped = mapped
        self._check = check
        self._state = _State()

    def renewed(self) -> Self:
        """Of the same shards, with nothing open."""
        return type(self)(self._plan, self._staged, markers=self._markers, mapped=self._mapped, check=self._check)

    def close(self) -> None:
        """Let go of everything open in this process."""
        self._state = _State()

    def plan_reads(self, rows: npt.NDArray[np.int64], *, num_ahead: int) -> None:
        """Have the shards of these rows of the index staged in this order; nothing to do for a local cache."""
        if self._staged is None:
            return
        state = self._own_state()
        if state.ahead is not None:
            state.ahead.stop()
        state.ahead = ReadAhead(self._staged.acquire, rows, self._plan.index.shards, num_ahead=num_ahead)

    def _own_state(self) -> _State:
        if self._state.pid != os.getpid():  # a forked child: it must not share a lock or the list of checked chunks
            self._state = _State()
        return self._state

    def open(self, shard: int) -> OpenShard:
        """The shard, opened and checked if it was not yet; of a remote cache, a damaged copy is fetched again."""
        state = self._own_state()
        with state.lock:
            opened = state.shards.get(shard)
            if opened is not None:
                state.shards.move_to_end(shard)
                return opened
        tokens = self.open_tokens(shard)
        lease = self._stage(state, shard)  # may take long: other threads go on reading what is open
        with state.lock:
            opened = state.shards.get(shard)
            if opened is None:
                opened = state.shards[shard] = self._read_or_heal(shard, tokens, lease)
            if self._staged is not None:  # of shards that no plan needs, one at a time: others may want the space
                for other in [other for other in state.shards if other != shard and not _is_needed(state, other)]:
                    _close(state.shards.pop(other))
            _trim(state.shards)
            return opened

    def heal(self, shard: int, staged: StagedCache) -> OpenShard:
        """Open a shard again whose staged copy proved damaged as it was read, once it is fetched anew."""
        state = self._own_state()
        with state.lock:
            damaged = state.shards.pop(shard, None)
        lease = damaged.lease if damaged else None
        lease = lease or staged.acquire(shard, release=lambda: self._release(state))
        staged.heal(shard)
        tokens = self.open_tokens(shard)
        with state.lock:
            opened = state.shards[shard] = self._read_shard(shard, tokens, lease)
            return opened

    def _read_or_heal(self, shard: int, tokens: ShardTokens, lease: Lease | None) -> OpenShard:
        """Open a shard; the copy of a remote one is fetched again, once, if it is damaged."""
        try:
            return self._read_shard(shard, tokens, lease)
        except (CacheCorruptError, CacheFormatError):
            if self._staged is None:
                raise
        self._staged.heal(shard)
        return self._read_shard(shard, tokens, lease)

    def open_tokens(self, shard: int) -> ShardTokens:
        """The shard's tokens, without its states."""
        state = self._own_state()
        with state.lock:
            tokens = state.tokens.get(shard)
            if tokens is None:
                tokens = state.tokens[shard] = concatenate(self._read_samples(shard))
            state.tokens.move_to_end(shard)
            _trim(state.tokens)
            return tokens

    def _read_samples(self, shard: int) -> list[PlannedSample]:
        if self._staged is not None:
            self._staged.fetch_samples(shard)
        plan = self._plan
        try:
            return read_shard_samples(plan.path, plan.manifest, plan.index, shard)
        except (CacheCorruptError, CacheFormatError):
            if self._staged is None:
                raise
        self._staged.fetch_samples(shard, again=True)
        return read_shard_samples(plan.path, plan.manifest, plan.index, shard)

    def _stage(self, state: _State, shard: int) -> Lease | None:
        """Have the shard of a remote cache in the staging folder."""
        if self._staged is None:
            return None
        lease = state.ahead.take(shard) if state.ahead else None
        return lease or self._staged.acquire(shard, release=lambda: self._release(state))

    def _release(self, state: _State) -> bool:
        """Let one staged shard go for the sake of another: rather one that no plan needs, or needs last."""
        with state.lock:
            spare = next((shard for shard in state.shards if not _is_needed(state, shard)), None)
            if spare is None and state.ahead and state.ahead.give_back():
                return True
            if spare is None:
                spare = next(iter(state.shards), None)
            if spare is None:
                return False
            _close(state.shards.pop(spare))
            return True

    def count_read(self, row: int, shard: int) -> None:
        """Let a staged shard go once its last planned sample was read."""
        state = self._state
        if state.ahead is not None and state.ahead.finish(row):
            with state.lock:
                opened = state.shards.pop(shard, None)
            if opened is not None:
                _close(opened)
            state.ahead.wake()

    def _read_shard(self, shard: int, tokens: ShardTokens, lease: Lease | None) -> OpenShard:
        plan = self._plan
        planned = plan_shard(plan.path, plan.manifest, plan.index, shard)
        record = read_commit(planned, has_marker=shard in self._markers)
        if tokens.digest != record.token_digest:
            raise CacheCorruptError(
                f"{plan.path}: shard {shard} was computed from other tokens than the plan has; {REMEDY}"
            )
        access = Access(mapped=self._mapped, check=self._check, pool=self._decode_pool())
        hidden, last = open_arrays(planned, record, access)
        return OpenShard(tokens=tokens, hidden=hidden, last=last, lease=lease)

    def _decode_pool(self) -> Executor | None:
        """Threads that decompress side by side, in this process; called under the state's lock."""
        state = self._state
        if state.pool is None and self._plan.header.encoding.compressed:
            state.pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="decode")
        return state.pool


def _is_needed(state: _State, shard: int) -> bool:
    """Whether planned reads of a shard are still to come in this process."""
    return state.ahead is not None and state.ahead.needs(shard)


def _close(opened: OpenShard) -> None:
    """Let the staging folder evict a shard. What others still read of it stays readable: its files are open."""
    if opened.lease is not None:
        opened.lease.release()


def _trim(opened: OrderedDict[int, Any]) -> None:
    while len(opened) > MAX_OPEN_SHARDS:
        opened.popitem(last=False)
