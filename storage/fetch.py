"""Copying the parts of a cache from a store into a directory: nothing has its name before every byte was checked.

Used by ``pull_cache`` (the directory is a cache of its own) and by the staging folder (the directory holds, of each
shard, either all or nothing). The order is the writer's: temporary directory, bytes, checks, sync, rename, marker,
commit record.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage import layout
from storage.bounds import MAX_RECORD_BYTES
from storage.commit import CommitRecord, PlannedShard, check_commit, parse_commits, record_type
from storage.errors import CacheCorruptError, CacheNotFoundError, CacheReadError
from storage.faults import fault_point
from storage.files import check_folders, disk_errors, hash_inside, sync_directory, write_atomic, write_durable
from storage.manifest import Manifest, parse_manifest
from storage.remote import RemoteStore
from storage.temps import remove_tree, temp_path
from storage.verify import find_array_problems
from storage.zarr_array import ArraySpec, group_metadata

NUM_QUESTIONS = 16  # whether a file is there, at a time: each waits for a round trip


def fetch_manifest(store: RemoteStore) -> Manifest:
    """The manifest of the cache in the store. Raises CacheNotFoundError where there is none."""
    try:
        data = store.read(layout.MANIFEST, max_bytes=MAX_RECORD_BYTES)
    except CacheNotFoundError as error:
        raise CacheNotFoundError(
            f"{store.where(layout.MANIFEST)}: not found, so no cache is here; check the address, or dspark push one"
        ) from error
    return parse_manifest(data, where=store.where(layout.MANIFEST))


def list_store_commits(store: RemoteStore, num_shards: int) -> tuple[set[int], set[int]]:
    """Shards that have a record in the store, and shards that have a marker of excluded samples.

    A web server need not list its directories: there each planned record that no list has named is asked for by name.
    """
    try:
        commits, markers = parse_commits(store.list_names(layout.COMMITS))
    except CacheReadError:
        if not store.may_not_list:
            raise
        commits, markers = set(), set()
    unlisted = sorted(set(range(num_shards)) - commits) if store.may_not_list else []
    with ThreadPoolExecutor(NUM_QUESTIONS) as pool:
        for found, name in ((commits, layout.commit_name), (markers, layout.excluded_name)):
            answers = pool.map(store.exists, map(name, unlisted))
            found |= {shard for shard, is_there in zip(unlisted, answers, strict=True) if is_there}
    return commits, markers


def fetch_commit(store: RemoteStore, planned: PlannedShard) -> CommitRecord:
    """A shard's record in the store, held against the plan."""
    where = store.where(layout.commit_name(planned.shard))
    data = store.read(layout.commit_name(planned.shard), max_bytes=planned.max_commit_bytes)
    record = record_type(planned).parse(data, where=where)
    check_commit(record, planned, where=where)
    return record


def fetch_recorded(store: RemoteStore, name: str, manifest: Manifest, *, root: Path, again: bool = False) -> None:
    """Copy a file of the plan into ``root``; it must be what the manifest says. If one is there, only ``again``."""
    final, record = root / name, manifest.files[name]
    if os.path.lexists(final) and not again:
        return
    check_folders(root)
    final.parent.mkdir(parents=True, exist_ok=True)
    temp = temp_path(root / final.name)
    try:
        _fetch(store, name, temp, num_bytes=record.num_bytes)
        _, found = hash_inside(root, temp.name)
        if found != record.crc32c:
            raise CacheCorruptError(
                f"{store.where(name)}: has crc32c {found}, {layout.MANIFEST} says {record.crc32c}; the store's copy "
                "is damaged: delete the cache there and push it again"
            )
        temp.rename(final)
    finally:
        temp.unlink(missing_ok=True)
    sync_directory(final.parent)
    fault_point("fetch.plan")


def fetch_shard(store: RemoteStore, planned: PlannedShard, record: CommitRecord) -> None:
    """Copy a committed shard into ``planned.root``, which must be this process' own to write, and commit it there.

    Raises CacheCorruptError where the store's bytes are not the committed ones; nothing of the shard is then left.
    """
    final = planned.root / layout.shard_name(planned.shard)
    temp = temp_path(final)
    try:
        with disk_errors(temp):
            temp.mkdir()
            fault_point("fetch.opened")
            write_durable(temp / layout.group_metadata_name(), group_metadata())
            for spec in planned.arrays:
                _fetch_array(store, planned, spec, record, temp=temp)
                fault_point("fetch.array")
            for directory, _, _ in os.walk(temp):
                sync_directory(Path(directory))
            fault_point("fetch.synced")
            _retire(planned)
            remove_tree(final)  # what lies there has no record now: a crash left it, or it is damaged
            temp.rename(final)
    finally:
        remove_tree(temp)
    fault_point("fetch.renamed")
    sync_directory(final.parent)
    _publish_commit(planned, record)


def _retire(planned: PlannedShard) -> None:
    """Take back the record of a shard that is replaced, once the new copy is there and checked."""
    commit = planned.root / layout.commit_name(planned.shard)
    if os.path.lexists(commit):
        remove_tree(commit, strict=True)  # whatever lies there
        sync_directory(commit.parent)


def shard_bytes(planned: PlannedShard, record: CommitRecord) -> int:
    """Size of all files that ``fetch_shard`` writes, in bytes."""
    arrays = sum(record.arrays[spec.name].file_bytes + len(spec.metadata()) for spec in planned.arrays)
    return arrays + len(group_metadata()) + len(record.render())


def _fetch_array(
    store: RemoteStore, planned: PlannedShard, spec: ArraySpec, record: CommitRecord, *, temp: Path
) -> None:
    array = record.arrays[spec.name]
    path = temp / spec.data_name
    path.parent.mkdir(parents=True)
    write_durable(temp / layout.array_metadata_name(spec.name), spec.metadata())  # it follows from the plan
    name = f"{layout.shard_name(planned.shard)}/{spec.data_name}"
    _fetch(store, name, path, num_bytes=array.file_bytes)
    problem = next(find_array_problems(temp, spec.data_name, spec, array), None)
    if problem is not None:
        raise CacheCorruptError(f"{store.where(name)}: {problem}; {_remedy(planned.shard)}")


def _fetch(store: RemoteStore, name: str, path: Path, *, num_bytes: int) -> None:
    try:
        store.fetch(name, path, num_bytes=num_bytes)
    except CacheNotFoundError as error:
        raise CacheCorruptError(f"{store.where(name)}: is gone, but recorded; push the cache again") from error


def _publish_commit(planned: PlannedShard, record: CommitRecord) -> None:
    marker = planned.root / layout.excluded_name(planned.shard)
    marker.unlink(missing_ok=True)
    if record.excluded:
        write_durable(marker, b"")
    sync_directory(marker.parent)
    fault_point("fetch.marker")
    write_atomic(planned.root / layout.commit_name(planned.shard), record.render(), fault="fetch.commit")
    fault_point("fetch.committed")


def _remedy(shard: int) -> str:
    return f"the store's copy is damaged: delete {layout.commit_name(shard)} there and push this shard again"
