"""The staging folder: whole shards of remote caches on a local disk, fetched on demand, of a bounded total size.

    STAGING/space.lock                 held while space is counted and made
    STAGING/turn.lock                  held while waiting for space: first come, first served
    STAGING/KEY/                       the plan of a cache and those of its shards that are here, in the cache's layout
    STAGING/KEY.shards/NNNNN.lock      shared: a reader uses the shard; exclusive: it is being fetched or evicted
    STAGING/KEY.shards/NNNNN.bytes     what the shard takes, written before it is fetched; its time is the last use

KEY is a digest of the manifest. Any number of processes may share the folder. The kernel releases the locks of the
dead; what they left half fetched has a charge and no commit record, so the next process fetches it anew or evicts it.
The bound holds for shards; plans (token ids, index, target) are small beside them and stay. Whoever waits behind the
turn, or for a shard whose fetcher waits, lets go of what it holds, so none that share a small bound wait in a circle.
A copy that proves damaged is fetched again once, while the damaged one stays for whoever has it open.
"""

import hashlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from storage import layout
from storage.commit import CommitRecord, PlannedShard
from storage.errors import (
    CacheCorruptError,
    CacheFormatError,
    CacheNotFoundError,
    CacheReadError,
    CacheSpaceError,
    CacheUsageError,
)
from storage.faults import fault_point
from storage.fetch import fetch_commit, fetch_manifest, fetch_recorded, fetch_shard, list_store_commits, shard_bytes
from storage.files import check_folders, disk_errors, read_inside, sync_directory, write_atomic
from storage.locks import exclusive, lock, locked_shard, open_lock, unlock
from storage.manifest import Manifest
from storage.plan import PLAN_REMEDY, CachePlan
from storage.remote import RemoteStore
from storage.temps import remove_stale_temps, remove_tree

# Sixty shards of the default size: two shuffle windows of four shards each for seven trainings at once (assumption),
# and no more than a training machine's local disk has to spare.
DEFAULT_STAGING_BYTES = 32_000_000_000

# How long a read waits while nobody takes or lets go of a shard: trainings do so in seconds to minutes (assumption).
SPACE_WAIT_SECONDS = 600.0
POLL_SECONDS = 0.05
MAX_CHARGE_BYTES = 20  # digits of any 64-bit number

logger = logging.getLogger(__name__)


def default_staging() -> Path:
    """The user's cache folder, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark-offline" / "staging"


class Lease:
    """A shared lock: while this process holds it, no process evicts the shard."""

    def __init__(self, fd: int, ended: Callable[[], None]) -> None:
        self._fd = fd
        self._ended = ended
        self._pid = os.getpid()

    def release(self) -> None:
        """Let the shard be evicted. What is mapped of it stays readable."""
        if self._fd >= 0:
            if self._pid == os.getpid():  # a forked child closes its copy only: the lock is the parent's
                unlock(self._fd)
            else:
                os.close(self._fd)
            self._fd = -1
            self._ended()

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
        self._leases: Counter[int] = Counter()  # of this object: what it must not evict where there are no locks
        self._leases_lock = threading.RLock()  # a lease may be collected, and end, anywhere
        for directory in self._directories:
            _make_folder(directory)
        check_folders(root)
        remove_stale_temps(self._directories)
        self.plan = self._stage_plan(manifest, data)

    def _stage_plan(self, manifest: Manifest, data: bytes) -> CachePlan:
        """The plan in the staging folder; a copy that is damaged is fetched again once."""
        root = self._folder / self._key
        try:
            fetch_recorded(self.store, layout.INDEX, manifest, root=root)
            if not (root / layout.MANIFEST).exists():
                write_atomic(root / layout.MANIFEST, data, fault="staging.manifest")
            return CachePlan.read(root)
        except (CacheCorruptError, CacheFormatError) as error:
            logger.warning("%s; it is fetched again", str(error).removesuffix(f"; {PLAN_REMEDY}"))
        fetch_recorded(self.store, layout.INDEX, manifest, root=root, again=True)
        write_atomic(root / layout.MANIFEST, data, fault="staging.manifest")
        return CachePlan.read(root)

    def list_commits(self) -> tuple[set[int], set[int]]:
        """Shards that have a record in the store, and shards that have a marker of excluded samples."""
        return list_store_commits(self.store, self.plan.num_shards)

    def read_commit(self, planned: PlannedShard) -> CommitRecord:
        """A shard's record in the store."""
        return fetch_commit(self.store, planned)

    def fetch_file(self, name: str, *, again: bool = False) -> None:
        """Have a file of the plan here; ``again``: in place of a copy that is damaged."""
        if again:
            logger.warning("%s: the copy here is damaged; it is fetched again", self.plan.path / name)
        fetch_recorded(self.store, name, self.plan.manifest, root=self.plan.path, again=again)

    def fetch_samples(self, shard: int, *, again: bool = False) -> None:
        """Have the shard's token ids here, without its states."""
        self.fetch_file(layout.samples_name(shard), again=again)

    def heal(self, shard: int) -> None:
        """Fetch the states of a shard again, whose copy here is damaged; the caller holds a lease of it."""
        logger.warning("%s: the copy here is damaged; it is fetched again", self.plan.path / layout.shard_name(shard))
        planned = self.plan.planned_shard(shard)
        with locked_shard(self.plan.path, shard, wait=True):
            fetch_shard(self.store, planned, self._fetch_record(planned))

    def acquire(self, shard: int, *, release: Callable[[], bool] | None = None) -> Lease:
        """Have the shard here and keep it here while the lease lives; waits for another process that fetches it.

        ``release`` is called while space is missing and everything is in use; it lets go of one shard of this
        process, or gives False. Raises CacheSpaceError if that is not enough, or what ``fetch_shard`` raises.
        """
        path = self._folder / layout.staging_lock_name(self._key, shard)
        fd = open_lock(path)
        try:
            while True:  # between two kinds of lock there is a moment with neither
                self._wait_for(fd, path, shared=True, release=release)
                if self._is_here(shard):
                    os.utime(self._charge(shard))
                    return self._lease(fd, shard)
                self._wait_for(fd, path, shared=False, release=release)
                if not self._is_here(shard):
                    self._fetch(shard, release)
        except BaseException:
            unlock(fd)
            raise

    def _lease(self, fd: int, shard: int) -> Lease:
        def count(change: int) -> None:
            with self._leases_lock:
                self._leases[shard] += change

        count(1)
        return Lease(fd, partial(count, -1))

    def _wait_for(self, fd: int, path: Path, *, shared: bool, release: Callable[[], bool] | None) -> None:
        """Lock a shard; whoever holds it may be waiting for space, and then gets what this process can spare."""
        while lock(fd, path, shared=shared) == "busy":
            if release is not None and self._is_space_awaited():
                release()
            time.sleep(POLL_SECONDS)

    def _is_space_awaited(self) -> bool:
        path = self._folder / layout.STAGING_TURN
        fd = open_lock(path)
        try:
            return lock(fd, path, shared=True) == "busy"  # shared: those who ask are in nobody's way
        finally:
            unlock(fd)

    def _fetch(self, shard: int, release: Callable[[], bool] | None) -> None:
        """Make room for a shard and fetch it. Called with its exclusive lock."""
        self.fetch_samples(shard)
        planned = self.plan.planned_shard(shard)
        record = self._fetch_record(planned)
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

    def _fetch_record(self, planned: PlannedShard) -> CommitRecord:
        try:
            return fetch_commit(self.store, planned)
        except CacheNotFoundError as error:
            where = self.store.where(layout.commit_name(planned.shard))
            raise CacheReadError(f"{where}: is gone since the cache was opened; push it again") from error

    def _reserve(self, shard: int, num_bytes: int, release: Callable[[], bool] | None) -> None:
        """Make room for a shard and count it. A caller that can release waits for what other runs let go of."""
        patience = _Patience(SPACE_WAIT_SECONDS if release and num_bytes <= self._limit else 0)
        path = self._folder / layout.STAGING_TURN
        turn = open_lock(path)
        try:
            is_first = False
            while True:
                is_first = is_first or lock(turn, path) != "busy"
                used = self._try_reserve(shard, num_bytes, release) if is_first else self._give_way(release)
                if used is None:
                    return
                patience.check(self._list_units(), self._space_error(shard, num_bytes, used))
                if patience.is_new:
                    logger.info("%s is full: waiting until other runs let go of a shard", self._folder)
                time.sleep(POLL_SECONDS)
        finally:
            unlock(turn)

    def _try_reserve(self, shard: int, num_bytes: int, release: Callable[[], bool] | None) -> int | None:
        """None once the shard is counted, or the bytes that others use."""
        with exclusive(self._folder / layout.STAGING_LOCK, wait=True):
            used = self._make_room(shard, num_bytes, release)
            if used + num_bytes > self._limit:
                return used
            write_atomic(self._charge(shard), str(num_bytes).encode(), fault="staging.charge")
            return None

    def _give_way(self, release: Callable[[], bool] | None) -> int:
        """Let go of a shard for the sake of who came first; the bytes in use."""
        if release is not None:
            release()
        return sum(unit.num_bytes for unit in self._list_units())

    def _space_error(self, shard: int, num_bytes: int, used: int) -> CacheSpaceError:
        return CacheSpaceError(
            f"{self._folder}: shard {shard} of {self.store.url} takes {num_bytes:,} bytes, {used:,} are in use "
            f"and {self._limit:,} allowed; raise cache.staging_bytes, or stop another run that reads from here"
        )

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
        with self._leases_lock:
            if unit.key == self._key and self._leases[unit.shard]:
                return False
        with exclusive(self._folder / layout.staging_lock_name(unit.key, unit.shard)) as is_free:
            if not is_free:
                return False
            root = self._folder / unit.key
            _remove_shard(root, unit.shard)
            remove_stale_temps([root / layout.SHARDS, root / layout.COMMITS])  # of a process that died fetching it
            (self._folder / layout.staging_charge_name(unit.key, unit.shard)).unlink(missing_ok=True)
            return True

    def _list_units(self) -> Iterator[_Unit]:
        """Every shard in the folder that takes space, or whose space is promised to a process that fetches it."""
        for path in self._folder.glob(layout.staging_charge_pattern()):
            place = layout.parse_staging_charge(path.relative_to(self._folder).as_posix())
            if place is None:
                continue
            try:
                num_bytes, used_ns = _read_charge(path), path.stat().st_mtime_ns
            except FileNotFoundError:
                continue  # its fetch has failed meanwhile
            yield _Unit(key=place[0], shard=place[1], num_bytes=num_bytes, used_ns=used_ns)

    def _is_here(self, shard: int) -> bool:
        return (self.plan.path / layout.commit_name(shard)).exists() and self._charge(shard).exists()

    def _charge(self, shard: int) -> Path:
        return self._folder / layout.staging_charge_name(self._key, shard)


def _read_charge(path: Path) -> int:
    """Raises FileNotFoundError, CacheCorruptError."""
    try:
        text = read_inside(path.parent, path.name, max_bytes=MAX_CHARGE_BYTES)
    except CacheFormatError:
        text = b""
    if not text.isdigit():
        raise CacheCorruptError(f"{path}: is no number of bytes; remove it while no run reads from here")
    return int(text)


class _Patience:
    """How long to wait for others; anew with every shard that one of them takes or lets go of."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._seen: frozenset[_Unit] | None = None
        self.is_new = True  # at the first check only

    def check(self, units: Iterable[_Unit], error: CacheSpaceError) -> None:
        """Raise the error once nothing has changed for so long."""
        seen, now = frozenset(units), time.monotonic()
        self.is_new = self._seen is None
        if seen != self._seen and not self.is_new:
            self._deadline = now + self._seconds
        self._seen = seen
        if now >= self._deadline:
            raise error


def _make_folder(path: Path) -> None:
    with disk_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise CacheUsageError(
                f"{path}: cannot be a folder of the staging: something else is there; remove it, or set cache.staging "
                "to another folder"
            ) from error


def _remove_shard(root: Path, shard: int) -> None:
    """Remove a shard, record first. Called with its exclusive lock."""
    commit = root / layout.commit_name(shard)
    if os.path.lexists(commit):
        remove_tree(commit, strict=True)  # whatever lies there
        sync_directory(commit.parent)
        fault_point("staging.evicting")
    (root / layout.excluded_name(shard)).unlink(missing_ok=True)
    remove_tree(root / layout.shard_name(shard))
