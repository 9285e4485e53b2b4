"""Computing a cache: one writer owns one shard at a time and publishes it whole.

    temporary directory -> rows -> sync files and directories -> rename -> commit record

Each arrow is a point at which the process may die: what is left is either a temporary, or a shard without a record,
and the next writer of that shard removes both. Any number of writers may work on one cache: a shard belongs to the one
that holds the lock on its samples file, and a writer that comes too late is told so by CacheBusyError.
"""

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from types import TracebackType

import torch

from storage import layout
from storage.commit import ArrayRecord, ExcludedSample, list_commits, read_commit, seal_commit
from storage.errors import CacheBusyError, CacheUsageError
from storage.faults import fault_point
from storage.files import check_folders, disk_errors, sync_directory, write_atomic, write_durable
from storage.locks import locked_shard
from storage.plan import CachePlan
from storage.samples import digest_tokens
from storage.shard_files import Access, open_states
from storage.state_writer import StateWriter
from storage.temps import remove_stale_temps, remove_tree, temp_path
from storage.zarr_array import ArrayWriter, group_metadata


class CacheWriter:
    """Writes the shards of a planned cache. Raises CacheNotFoundError where no plan is published."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.plan = CachePlan.read(path)
        self.path = self.plan.path
        self._num_excluded: dict[int, int] = {}
        directories = [self.path / layout.SHARDS, self.path / layout.COMMITS]
        check_folders(self.path)
        with disk_errors(self.path):
            for directory in directories:
                directory.mkdir(exist_ok=True)
            remove_stale_temps([self.path, *directories])

    def missing_shards(self) -> list[int]:
        """Planned shards without a commit, or with one whose shard is gone, ascending."""
        commits, _ = list_commits(self.path)  # first: a shard is there before its commit is
        with os.scandir(self.path / layout.SHARDS) as entries:
            directories = {layout.parse_shard(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)}
        return sorted(set(range(self.plan.num_shards)) - (commits & directories))

    def count_excluded(self, *, without: Collection[int] = ()) -> int:
        """Samples that the committed shards exclude, but for some shards; each record is read once."""
        commits, markers = list_commits(self.path)
        for shard in sorted((commits & markers) - set(self._num_excluded)):
            record = read_commit(self.plan.planned_shard(shard), has_marker=True)
            self._num_excluded[shard] = len(record.excluded)
        return sum(count for shard, count in self._num_excluded.items() if shard not in without)

    def shard(self, shard: int, pool: Executor | None = None) -> "ShardWriter":
        """The context in which a missing shard is written; leaving it without an exception publishes the shard.

        ``pool`` compresses several inner chunks at once. Entering the context raises CacheBusyError if another writer
        holds the shard or has committed it.
        """
        return ShardWriter(self.plan, shard, pool)


class ShardWriter:
    """One shard being written. T tokens, L stored layers, D hidden size. Not for use by two threads at once."""

    def __init__(self, plan: CachePlan, shard: int, pool: Executor | None = None) -> None:
        self._planned = plan.planned_shard(shard)
        self._samples = plan.read_samples(shard)
        self._final = plan.path / layout.shard_name(shard)
        self._commit = plan.path / layout.commit_name(shard)
        self._marker = plan.path / layout.excluded_name(shard)
        self._temp = temp_path(self._final)
        self._lock = contextlib.ExitStack()
        self._pool = pool
        self._is_finished = False
        self._states: list[StateWriter] = []
        self._excluded: dict[int, ExcludedSample] = {}
        self._total_variation: list[float] = []
        self._relative_error: list[list[float]] = []

    def __enter__(self) -> "ShardWriter":
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.publish()
        else:
            self.discard()

    def open(self) -> "ShardWriter":
        """Take hold of the shard, until it is published or discarded. Raises CacheBusyError."""
        try:
            self._lock.enter_context(locked_shard(self._planned.root, self._planned.shard))
            is_here = self._final.is_dir() and not self._final.is_symlink()
            if os.path.lexists(self._commit) and not is_here:  # the shard itself is gone
                self._commit.unlink()
                sync_directory(self._commit.parent)
            self._check_uncommitted()
            with disk_errors(self._temp):
                self._temp.mkdir()
                write_durable(self._temp / layout.group_metadata_name(), group_metadata())
                for name in (layout.HIDDEN_STATES, layout.LAST_HIDDEN_STATES):
                    specs = self._planned.specs_of(name)
                    self._states.append(
                        StateWriter(self._temp, specs, encoding=self._planned.encoding, pool=self._pool)
                    )
        except BaseException:
            self.discard()
            raise
        fault_point("shard.opened")
        return self

    def append(self, hidden_states: torch.Tensor, last_hidden_states: torch.Tensor) -> None:
        """Write the next rows in plan order: [T, L, D] and [T, D], of one sample or of several concatenated.

        Tensors of another dtype are converted to the encoding's; look for values that are not finite after that.
        Their memory may be used again afterwards.
        """
        if len(hidden_states) != len(last_hidden_states):
            raise CacheUsageError(
                f"{self._final}: {len(hidden_states)} rows of hidden_states, but {len(last_hidden_states)} last ones"
            )
        for states, rows in zip(self._states, (hidden_states, last_hidden_states), strict=True):
            states.append(rows)
        fault_point("shard.appended")

    def finish(self) -> None:
        """Write what is left once every row is appended; leaving the context does it too."""
        if not self._is_finished:
            for states in self._states:
                states.finish()
            self._is_finished = True

    def read_hidden(self, rows: Iterable[int]) -> torch.Tensor:
        """`hidden_states` [R, L, D] of rows of the finished shard, as a reader will decode them."""
        return self._read_back(self._states[0].arrays, rows)

    def read_last(self, rows: Iterable[int]) -> torch.Tensor:
        """`last_hidden_states` [R, D] of rows of the finished shard, as a reader will decode them."""
        return self._read_back(self._states[1].arrays, rows)

    def _read_back(self, arrays: Sequence[ArrayWriter], rows: Iterable[int]) -> torch.Tensor:
        opened = open_states(
            self._temp,
            [array.spec for array in arrays],
            {array.spec.name: _record_of(array) for array in arrays},
            self._planned.encoding,
            Access(mapped=False, check=True),
            hint="the disk gives back other bytes than were written",
        )
        return torch.cat([opened.read(row, row + 1) for row in rows])

    def record_total_variation(self, values: Iterable[float]) -> None:
        """What a lossy encoding costs: ½·‖p_exact - p_decoded‖₁ of the target's distribution at some positions."""
        self._total_variation.extend(values)

    def record_relative_error(self, values: Sequence[Sequence[float]]) -> None:
        """What a lossy encoding costs: ‖decoded - exact‖₂ / ‖exact‖₂ at some tokens, of each layer and the last state.

        A cache of version 1 has no place for it.
        """
        self._relative_error = [list(errors) for errors in values]

    def exclude(self, sample_id: int, reason: str, layer: int | None = None) -> None:
        """Quarantine a sample of this shard: its rows are still to be appended, but no reader will return it."""
        if all(sample.sample_id != sample_id for sample in self._samples):
            raise CacheUsageError(f"{self._final}: sample {sample_id} is not in this shard, so it cannot be excluded")
        self._excluded[sample_id] = ExcludedSample(sample_id=sample_id, reason=reason, layer=layer)

    def publish(self) -> None:
        """Make the shard durable, give it its name and its record. Raises CacheBusyError if another was faster."""
        try:
            self._publish()
        finally:
            self.discard()

    def discard(self) -> None:
        """Let go of the shard and remove what is not published; may be called at any time and again."""
        for array in self._arrays():
            array.close()
        remove_tree(self._temp)
        self._lock.close()

    def _check_uncommitted(self) -> None:
        if os.path.lexists(self._commit):
            raise CacheBusyError(f"{self._commit}: the shard is already committed; compute only the missing shards")

    def _publish(self) -> None:
        self.finish()
        fault_point("shard.written")
        for array in self._arrays():
            array.sync()
        sync_directory(self._temp)
        fault_point("shard.synced")
        self._check_uncommitted()
        self._rename()
        self._publish_commit()

    def _rename(self) -> None:
        """Give the shard its name. What lies there without a record was left by a crash between rename and commit."""
        if os.path.lexists(self._final):
            grave = temp_path(self._final)
            self._final.rename(grave)
            remove_tree(grave)
        with disk_errors(self._final):
            self._temp.rename(self._final)
        fault_point("shard.renamed")
        sync_directory(self._final.parent)
        fault_point("shard.published")

    def _publish_commit(self) -> None:
        record = seal_commit(
            self._planned,
            token_digest=digest_tokens(self._samples),
            arrays={array.spec.name: _record_of(array) for array in self._arrays()},
            excluded=list(self._excluded.values()),
            total_variation=self._total_variation,
            relative_error=self._relative_error,
        )
        self._marker.unlink(missing_ok=True)
        if record.excluded:
            write_durable(self._marker, b"")
        sync_directory(self._marker.parent)
        fault_point("commit.marker")
        write_atomic(self._commit, record.render(), fault="commit.written")
        fault_point("commit.renamed")

    def _arrays(self) -> Iterator[ArrayWriter]:
        return (array for states in self._states for array in states.arrays)


def _record_of(array: ArrayWriter) -> ArrayRecord:
    return ArrayRecord(file_bytes=array.file_bytes, chunk_crc32c=tuple(array.chunk_crc32c))
