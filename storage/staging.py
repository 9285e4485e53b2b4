"""The staging folder: whole shards of remote caches on a local disk, fetched on demand, of a bounded total size.

    STAGING/space.lock                 held while space is counted and made
    STAGING/KEY/                       the plan of a cache and those of its shards that are here, in the cache's layout
    STAGING/KEY.shards/NNNNN.lock      shared: a reader uses the shard; exclusive: it is being fetched or evicted
    STAGING/KEY.shards/NNNNN.bytes     what the shard takes, written before it is fetched; its time is the last use

KEY is a digest of the manifest. Any number of processes may share the folder. The kernel releases the locks of the
dead; what they left half fetched has a charge and no commit record, so the next process fetches it anew or evicts it.
The bound holds for shards; plans (token ids, index, target) are small beside them and stay.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from storage import layout
from storage.commit import CommitRecord, PlannedShard, parse_commits
from storage.errors import CacheNotFoundError, CacheReadError, CacheSpaceError
from storage.faults import fault_point
from storage.fetch import fetch_commit, fetch_manifest, fetch_recorded, fetch_shard, shard_bytes
from storage.files import sync_directory, write_atomic
from storage.plan import CachePlan
from storage.remote import RemoteStore
from storage.temps import remove_stale_temps, remove_tree

# Sixty shards of the default size: two shuffle windows of four shards each for seven trainings at once (assumption),
# and no more than a training machine's local disk has to spare.
DEFAULT_STAGING_BYTES = 32_000_000_000

# How long a read waits for others to let go of a shard: trainings that share the bound free one in seconds to minutes.
SPACE_WAIT_SECONDS = 120.0
SPACE_POLL_SECONDS = 0.1

logger = logging.getLogger(__name__)


def default_staging() -> Path:
    """The user's cache folder, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark-offline" / "staging"


class Lease:
    """A shared lock: while this process holds it, no process evicts the shard."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pid = os.getpid()

    def release(self) -> None:
        """Let the shard be evicted. What is mapped of it stays readable."""
        if self._fd >= 0:
            if self._pid == os.getpid():  # a forked child closes its copy only: the lock is the parent's
                _unlock(self._fd)
            else:
                os.close(self._fd)
            self._fd = -1

    __del__ = release


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """A shard that takes space: its cache's key, its number, its bytes, and when it was last used."""

    key: str
    shard: int
    num_bytes: int
    used_ns: int


class StagedCache:
    """A remote cache as its staging folder has it. Opening fetches the manifest and, the first time, the index.

    ``staging`` is the folder (default: in the user's cache directory), ``staging_bytes`` bounds the shards in it.
    """

    def __init__(self, url: str, *, staging: Path | None, staging_bytes: int | None) -> None:
        self.store = RemoteStore(url)
        self._folder = (staging or default_staging()).expanduser().absolute()
        self._limit = DEFAULT_STAGING_BYTES if staging_bytes is None else staging_bytes
        manifest = fetch_manifest(self.store)
        data = manifest.render()
        self._key = hashlib.sha256(data).hexdigest()[:32]
        root = self._folder / self._key
        self._directories = [root, *(root / name for name in (layout.SAMPLES, layout.SHARDS, layout.COMMITS))]
        self._directories.append(self._charge(0).parent)
        for directory in self._directories:
            directory.mkdir(parents=True, exist_ok=True)
        remove_stale_temps(self._directories)
        fetch_recorded(self.store, layout.INDEX, manifest, root=root)
        if not (root / layout.MANIFEST).exists():
            write_atomic(root / layout.MANIFEST, data, fault="staging.manifest")
        self.plan = CachePlan.read(root)

    def list_commits(self) -> tuple[set[int], set[int]]:
        """Shards that have a record in the store, and shards that have a marker of excluded samples."""
        return parse_commits(self.store.list_names(layout.COMMITS))

    def read_commit(self, planned: PlannedShard) -> CommitRecord:
        """A shard's record in the store."""
        return fetch_commit(self.store, planned)

    def fetch_samples(self, shard: int) -> None:
        """Have the shard's token ids here, without its states."""
        fetch_recorded(self.store, layout.samples_name(shard), self.plan.manifest, root=self.plan.path)

    def fetch_target(self) -> None:
        """Have the target's files here."""
        for name in self.plan.manifest.files:
            if name.startswith(f"{layout.TARGET}/"):
                fetch_recorded(self.store, name, self.plan.manifest, root=self.plan.path)

    def acquire(self, shard: int, *, release: Callable[[], bool] | None = None) -> Lease:
        """Have the shard here and keep it here while the lease lives; waits for another process that fetches it.

        ``release`` is called while space is missing and everything is in use; it lets go of one shard of this
        process, or gives False. Raises CacheSpaceError if that is not enough, or what ``fetch_shard`` raises.
        """
        fd = self._open_lock(self._key, shard)
        try:
            while True:  # between two kinds of lock there is a moment with neither
                fcntl.flock(fd, fcntl.LOCK_SH)
                if self._is_here(shard):
                    os.utime(self._charge(shard))
                    return Lease(fd)
                fcntl.flock(fd, fcntl.LOCK_EX)
                if not self._is_here(shard):
                    self._fetch(shard, release)
        except BaseException:
            _unlock(fd)
            raise

    def _fetch(self, shard: int, release: Callable[[], bool] | None) -> None:
        """Make room for a shard and fetch it. Called with its exclusive lock."""
        self.fetch_samples(shard)
        planned = self.plan.planned_shard(shard)
        try:
            record = fetch_commit(self.store, planned)
        except CacheNotFoundError as error:
            raise CacheReadError(
                f"{self.store.where(layout.commit_name(shard))}: is gone since the cache was opened; push it again"
            ) from error
        charge = self._charge(shard)
        if charge.exists():  # a dead process was fetching or evicting it
            remove_stale_temps(self._directories)
        _remove_shard(self.plan.path, shard)
        self._reserve(shard, shard_bytes(planned, record), release)
        fault_point("staging.charged")
        try:
            fetch_shard(self.store, planned, record)
        except BaseException:
            charge.unlink(missing_ok=True)
            raise

    def _reserve(self, shard: int, num_bytes: int, release: Callable[[], bool] | None) -> None:
        """Make room for a shard and count it. A caller that can release waits for what other runs let go of."""
        deadline = time.monotonic() + (SPACE_WAIT_SECONDS if release else 0)
        waited = False
        while True:
            with self._space_lock():
                used = self._make_room(shard, num_bytes, release)
                if used + num_bytes <= self._limit:
                    write_atomic(self._charge(shard), str(num_bytes).encode(), fault="staging.charge")
                    return
            if num_bytes > self._limit or time.monotonic() >= deadline:
                raise CacheSpaceError(
                    f"{self._folder}: shard {shard} of {self.store.url} takes {num_bytes:,} bytes, {used:,} are in use "
                    f"and {self._limit:,} allowed; raise cache.staging_bytes, or stop another run that reads from here"
                )
            if not waited:
                logger.info("%s is full: waiting until other runs let go of a shard", self._folder)
                waited = True
            time.sleep(SPACE_POLL_SECONDS)

    def _make_room(self, shard: int, num_bytes: int, release: Callable[[], bool] | None) -> int:
        """Evict shards that nobody uses, the least recently used first, until ``num_bytes`` more are in the bound.

        Gives the bytes that are still taken, by others than ``shard``. Called with the space lock.
        """
        while True:
            units = sorted(self._list_units(), key=lambda unit: unit.used_ns)
            used = sum(unit.num_bytes for unit in units if (unit.key, unit.shard) != (self._key, shard))
            for unit in units:
                if used + num_bytes > self._limit and self._evict(unit):
                    used -= unit.num_bytes
            if used + num_bytes <= self._limit or release is None or not release():
                return used

    def _evict(self, unit: _Unit) -> bool:
        """Remove a shard, record first, unless a process uses it."""
        fd = self._open_lock(unit.key, unit.shard)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            root = self._folder / unit.key
            if not _remove_shard(root, unit.shard):  # a dead process was fetching it
                remove_stale_temps([root / layout.SHARDS, root / layout.COMMITS])
            (self._folder / layout.staging_charge_name(unit.key, unit.shard)).unlink(missing_ok=True)
            return True
        finally:
            _unlock(fd)

    def _list_units(self) -> Iterator[_Unit]:
        """Every shard in the folder that takes space, or whose space is promised to a process that fetches it."""
        for path in self._folder.glob(layout.staging_charge_pattern()):
            place = layout.parse_staging_charge(path.relative_to(self._folder).as_posix())
            try:
                if place is not None:
                    yield _Unit(
                        key=place[0], shard=place[1], num_bytes=int(path.read_text()), used_ns=path.stat().st_mtime_ns
                    )
            except FileNotFoundError:
                continue  # its fetch has failed meanwhile

    def _is_here(self, shard: int) -> bool:
        return (self.plan.path / layout.commit_name(shard)).exists() and self._charge(shard).exists()

    def _charge(self, shard: int) -> Path:
        return self._folder / layout.staging_charge_name(self._key, shard)

    def _open_lock(self, key: str, shard: int) -> int:
        path = self._folder / layout.staging_lock_name(key, shard)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    @contextlib.contextmanager
    def _space_lock(self) -> Iterator[None]:
        fd = os.open(self._folder / layout.STAGING_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            _unlock(fd)


def _unlock(fd: int) -> None:
    """Let go of a lock and its file. A close alone leaves the lock to a child that was forked meanwhile."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _remove_shard(root: Path, shard: int) -> bool:
    """Remove a shard, record first; whether it had one. Called with its exclusive lock."""
    commit = root / layout.commit_name(shard)
    was_whole = commit.exists()
    if was_whole:
        commit.unlink()
        sync_directory(commit.parent)
        fault_point("staging.evicting")
    (root / layout.excluded_name(shard)).unlink(missing_ok=True)
    remove_tree(root / layout.shard_name(shard))
    return was_whole
