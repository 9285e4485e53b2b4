"""Moving a cache to a store and back: ``push_cache`` and ``pull_cache``.

Both keep the commit protocol at the destination: the files of the plan, the manifest, then of each shard the data, the
marker, the commit record. Killed at any moment, the same call goes on with the shards that are not whole there. Bytes
are compared with the committed checksums on the way: before an upload, and after a download.
"""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from storage import layout
from storage.commit import REMEDY, CommitRecord, PlannedShard, list_commits, parse_commits, read_commit
from storage.errors import (
    CacheBusyError,
    CacheCorruptError,
    CacheFormatError,
    CacheIdentityError,
    CacheNotFoundError,
    CacheReadError,
    CacheUsageError,
)
from storage.faults import fault_point
from storage.fetch import fetch_commit, fetch_manifest, fetch_recorded, fetch_shard, list_store_commits, shard_bytes
from storage.files import read_inside
from storage.locks import locked_shard
from storage.manifest import Manifest
from storage.plan import CachePlan, check_recorded
from storage.plan_files import copy_plan
from storage.progress import Position, log_position
from storage.remote import RemoteStore, is_remote
from storage.text import format_duration
from storage.verify import find_array_problems
from storage.writer import CacheWriter
from storage.zarr_array import group_metadata

NUM_THREADS = 4  # shards on their way at once

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TransferResult:
    """What a push or a pull did. ``num_missing`` shards are not committed at the source, ``num_busy`` are left to
    another process that fetches or computes them at the destination."""

    num_shards: int
    num_copied: int
    num_present: int
    num_missing: int
    num_busy: int
    num_bytes: int
    seconds: float


def push_cache(path: str | os.PathLike[str], url: str) -> TransferResult:
    """Copy every committed shard of a local cache to a store, unless it is whole there.

    Raises CacheIdentityError where the store holds another cache, CacheCorruptError for damaged local bytes (which are
    not uploaded), CacheReadError where the store cannot be reached.
    """
    plan, store = CachePlan.read(_parse_folder(path)), RemoteStore(url)
    _push_plan(plan, store)
    commits, markers = list_commits(plan.path)
    there, _ = parse_commits(store.list_names(layout.COMMITS))

    def push(shard: int) -> int | None:
        planned = plan.planned_shard(shard)
        if shard in there:
            if _is_whole(store, planned):
                return 0
            store.remove(layout.commit_name(shard))
        return _push_shard(store, planned, read_commit(planned, has_marker=shard in markers))

    return _copy_shards("pushed", plan, commits, push)


def pull_cache(url: str, path: str | os.PathLike[str]) -> TransferResult:
    """Copy every committed shard of the cache in a store to a local directory, unless it is whole there.

    The directory is new, or an interrupted pull's, or a cache of the same plan. Raises CacheNotFoundError without a
    cache at the address, CacheIdentityError where the directory holds another one, CacheExistsError where it holds
    other files, CacheCorruptError for damaged bytes in the store, CacheSpaceError, CacheReadError.
    """
    store, root = RemoteStore(url), _parse_folder(path)
    manifest = fetch_manifest(store)
    try:
        _check_same_plan(CachePlan.read(root).manifest, manifest, where=str(root))
    except CacheNotFoundError:
        copy_plan(root, manifest, lambda name: fetch_recorded(store, name, manifest, root=root))
    plan = CacheWriter(root).plan  # which also removes what the dead have left
    commits, _ = list_store_commits(store, plan.num_shards)
    return _copy_shards("pulled", plan, commits, partial(_pull_shard, store, plan))


def _copy_shards(verb: str, plan: CachePlan, commits: set[int], copy: Callable[[int], int | None]) -> TransferResult:
    """Copy the committed shards side by side; ``copy`` gives their bytes, 0 if they are there, None if they are busy.

    The first error stops the copying; what was copied until then stays.
    """
    started = time.monotonic()
    sizes: list[int | None] = []
    wanted = sorted(commits & set(range(plan.num_shards)))
    total = int(plan.index.shard_tokens[wanted].sum())
    done_tokens = 0
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for shard, num_bytes in zip(wanted, pool.map(copy, wanted), strict=True):
            sizes.append(num_bytes)
            done_tokens += int(plan.index.shard_tokens[shard])
            if num_bytes:
                seconds = time.monotonic() - started
                rate = sum(size or 0 for size in sizes) / seconds
                left = seconds * (total - done_tokens) / done_tokens
                log_position(
                    logger,
                    Position(name=verb, done=len(sizes), total=len(wanted), eta_seconds=left),
                    f"shard {shard:6d}  {verb}  {len(sizes):5d}/{len(wanted)}  {num_bytes / 1e6:8.1f} MB  "
                    f"{rate / 1e6:8.1f} MB/s  ETA {format_duration(left)}",
                )
    return TransferResult(
        num_shards=plan.num_shards,
        num_copied=sum(bool(size) for size in sizes),
        num_present=sizes.count(0),
        num_missing=plan.num_shards - len(wanted),
        num_busy=sizes.count(None),
        num_bytes=sum(size or 0 for size in sizes),
        seconds=time.monotonic() - started,
    )


def _parse_folder(path: str | os.PathLike[str]) -> Path:
    if is_remote(path):
        raise CacheUsageError(f"{path}: is an address; a cache is copied between a local folder and an address")
    return Path(path)


def _push_plan(plan: CachePlan, store: RemoteStore) -> None:
    """Upload the files of the plan and then the manifest, unless the store has the same plan already."""
    try:
        _check_same_plan(fetch_manifest(store), plan.manifest, where=store.url)
    except CacheNotFoundError:

        def push(name: str) -> None:
            check_recorded(plan.path, name, plan.manifest)
            store.put(plan.path / name, name)

        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for _ in pool.map(push, plan.manifest.files):
                pass
        fault_point("push.plan")
        store.write(layout.MANIFEST, plan.manifest.render())


def _check_same_plan(found: Manifest, wanted: Manifest, *, where: str) -> None:
    """Refuse to mix two caches."""
    differences = found.identity.differences(wanted.identity)
    if differences:
        lines = "".join(f"\n  {line}" for line in differences)
        raise CacheIdentityError(f"{where}: holds a cache that was made from other inputs:{lines}\nName another place.")
    if found.plan_digest != wanted.plan_digest:
        raise CacheIdentityError(
            f"{where}: holds a cache of the same identity, but of other tokens (plan {found.plan_digest[:12]}, to be "
            f"copied {wanted.plan_digest[:12]}); name an empty destination"
        )


def _is_whole(store: RemoteStore, planned: PlannedShard) -> bool:
    """Whether the store has a record of the shard and data of the sizes that the record names."""
    directory = layout.shard_name(planned.shard)
    try:
        record = fetch_commit(store, planned)
        sizes = [store.size(f"{directory}/{spec.data_name}") for spec in planned.arrays]
        if record.excluded:
            store.size(layout.excluded_name(planned.shard))
    except (CacheCorruptError, CacheNotFoundError):
        return False
    return sizes == [record.arrays[spec.name].file_bytes for spec in planned.arrays]


def _push_shard(store: RemoteStore, planned: PlannedShard, record: CommitRecord) -> int:
    directory = layout.shard_name(planned.shard)
    store.write(f"{directory}/{layout.group_metadata_name()}", group_metadata())
    for spec in planned.arrays:
        name = f"{directory}/{spec.data_name}"
        problem = next(find_array_problems(planned.root, name, spec, record.arrays[spec.name]), None)
        metadata = f"{directory}/{layout.array_metadata_name(spec.name)}"
        if problem is None and not _has_bytes(planned.root, metadata, spec.metadata()):
            name, problem = metadata, "its bytes are not the ones that the plan implies"
        if problem is not None:
            raise CacheCorruptError(f"{planned.root / name}: {problem}; not pushed; {REMEDY}")
        store.write(metadata, spec.metadata())
        store.put(planned.root / name, name)
        fault_point("push.array")
    if record.excluded:
        store.write(layout.excluded_name(planned.shard), b"")
    else:
        store.remove(layout.excluded_name(planned.shard))
    fault_point("push.data")
    store.write(layout.commit_name(planned.shard), record.render())
    return shard_bytes(planned, record)


def _has_bytes(root: Path, name: str, expected: bytes) -> bool:
    try:
        return read_inside(root, name, num_bytes=len(expected)) == expected
    except CacheCorruptError:
        return False


def _pull_shard(store: RemoteStore, plan: CachePlan, shard: int) -> int | None:
    planned = plan.planned_shard(shard)
    try:
        with locked_shard(plan.path, shard):
            damage = _find_damage(planned)
            if damage is None:
                return 0
            if damage:
                logger.info("shard %6d  is damaged here and pulled again: %s", shard, damage)
            record = fetch_commit(store, planned)
            fetch_shard(store, planned, record)
    except CacheBusyError:
        logger.info("shard %6d  is another process's", shard)
        return None
    return shard_bytes(planned, record)


def _find_damage(planned: PlannedShard) -> str | None:
    """What is wrong with the shard here: None if it is committed with data of the recorded sizes, "" if it is not.

    Nothing is removed: the new copy comes first. Raises CacheReadError for files that cannot be read just now, which
    says nothing about what is in them.
    """
    directory = layout.shard_name(planned.shard)
    try:
        if not os.path.lexists(planned.root / layout.commit_name(planned.shard)):
            return ""
        has_marker = os.path.lexists(planned.root / layout.excluded_name(planned.shard))
        record = read_commit(planned, has_marker=has_marker)
        for spec in planned.arrays:
            name = f"{directory}/{spec.data_name}"
            for problem in find_array_problems(planned.root, name, spec, record.arrays[spec.name], quick=True):
                return f"{name}: {problem}"
    except (CacheCorruptError, CacheFormatError, FileNotFoundError) as error:
        return str(error).removesuffix(f"; {REMEDY}")  # this pull is the remedy
    except CacheReadError as error:
        raise CacheReadError(f"{error}; it may be sound and is left as it is: see to this and pull again") from error
    return None
