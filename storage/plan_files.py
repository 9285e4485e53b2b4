"""Writing the files of a plan: samples, target, index, and the manifest that commits them.

Nothing but the manifest's own rename counts. Until then it has its partial name, which marks the directory as that of
an interrupted plan: the next planner clears it and starts over.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage import layout
from storage.errors import CacheExistsError
from storage.faults import fault_point
from storage.files import (
    crc32c_hex,
    disk_errors,
    hash_inside,
    space_errors,
    sync_directory,
    sync_file,
    write_all,
    write_durable,
)
from storage.index import IndexBuilder, PlanIndex, render_index
from storage.locks import lock
from storage.manifest import CacheHeader, FileRecord, Manifest, PlanSummary, digest_plan, seal_manifest
from storage.samples import PlannedSample, digest_tokens, render_samples
from storage.sharding import plan_shards
from storage.temps import remove_stale_temps, remove_tree

NUM_COPY_THREADS = 8  # a plan has a small file a shard, so that copying it waits for round trips and little else


def publish_plan(
    root: Path,
    samples: Iterable[PlannedSample],
    *,
    header: CacheHeader,
    write_target: Callable[[Path], None] | None,
    dropped: Callable[[], Mapping[str, int]] | None,
    mask_token_id: Callable[[], int | None] | None,
) -> None:
    """Write every file of a plan; see ``CachePlan.write``."""
    with space_errors(root), _partial_manifest(root) as partial_fd:
        _remove_partial_plan(root)
        fault_point("plan.started")
        index, token_digests, files = _write_samples(root, samples, header)
        files |= _write_target(root, write_target)
        fault_point("plan.target")
        files[layout.INDEX] = _write_recorded(root, layout.INDEX, render_index(index))
        fault_point("plan.index")
        if mask_token_id is not None:
            header = header.model_copy(update={"mask_token_id": mask_token_id()})
        manifest = seal_manifest(
            header,
            _summarise(index, header, dict(dropped()) if dropped else {}),
            plan_digest=digest_plan(header.identity, token_digests),
            files=dict(sorted(files.items())),
        )
        _publish_manifest(root, partial_fd, manifest)


def copy_plan(root: Path, manifest: Manifest, fetch: Callable[[str], None]) -> None:
    """Publish in ``root`` a plan that was made elsewhere; ``fetch`` puts a file of it, durably, under its name.

    An interrupted plan is cleared first. Raises CacheExistsError as ``CachePlan.write`` does.
    """
    with disk_errors(root), _partial_manifest(root) as partial_fd:
        _remove_partial_plan(root)
        fault_point("plan.started")
        with ThreadPoolExecutor(NUM_COPY_THREADS) as pool:
            for _ in pool.map(fetch, manifest.files):
                pass
        for directory, _, _ in os.walk(root / layout.TARGET):
            sync_directory(Path(directory))
        _publish_manifest(root, partial_fd, manifest)


@contextlib.contextmanager
def _partial_manifest(root: Path) -> Iterator[int]:
    """Hold the manifest under its partial name: it marks the directory as ours and keeps a second planner out."""
    if root.exists() and not root.is_dir():
        raise CacheExistsError(f"{root}: is a file; name an empty or a new directory")
    path = root / layout.PARTIAL_MANIFEST
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        _check_vacant(root)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _lock(fd, root)
        if (root / layout.MANIFEST).exists():  # another planner finished between our look and our lock
            path.unlink(missing_ok=True)
            raise CacheExistsError(_already_planned(root))
        os.ftruncate(fd, 0)
        sync_directory(root)
        yield fd
    finally:
        os.close(fd)


def _lock(fd: int, root: Path) -> None:
    if lock(fd, root / layout.PARTIAL_MANIFEST) == "busy":
        raise CacheExistsError(f"{root}: another process is planning this cache; wait for it")


def _already_planned(root: Path) -> str:
    return f"{root}: is already a planned cache; read the plan to resume it, or delete the directory to start over"


def _check_vacant(root: Path) -> None:
    names = {entry.name for entry in root.iterdir()}
    if layout.MANIFEST in names:
        raise CacheExistsError(_already_planned(root))
    if names and layout.PARTIAL_MANIFEST not in names:
        raise CacheExistsError(
            f"{root}: holds files that are not of an interrupted plan ({', '.join(sorted(names)[:5])}); "
            "name an empty or a new directory"
        )


def _remove_partial_plan(root: Path) -> None:
    for name in (layout.SAMPLES, layout.TARGET, layout.SHARDS, layout.COMMITS, layout.INDEX):
        remove_tree(root / name)
    remove_stale_temps([root])
    for name in (layout.SAMPLES, layout.TARGET, layout.SHARDS, layout.COMMITS):
        (root / name).mkdir()


def _write_recorded(root: Path, name: str, data: bytes) -> FileRecord:
    write_durable(root / name, data)
    return FileRecord(num_bytes=len(data), crc32c=crc32c_hex(data))


def _write_samples(
    root: Path, samples: Iterable[PlannedSample], header: CacheHeader
) -> tuple[PlanIndex, list[str], dict[str, FileRecord]]:
    """Write a samples file per shard; give the index, each shard's token digest, and the files."""
    builder = IndexBuilder()
    token_digests: list[str] = []
    files: dict[str, FileRecord] = {}
    for shard, members in enumerate(plan_shards(samples, header)):
        token_offset = 0
        for sample in members:
            builder.append(
                sample_id=sample.sample_id,
                shard=shard,
                token_offset=token_offset,
                counts=(sample.num_tokens, sample.num_supervised),
                split=sample.split,
            )
            token_offset += sample.num_tokens
        name = layout.samples_name(shard)
        files[name] = _write_recorded(root, name, render_samples(members))
        token_digests.append(digest_tokens(members))
        fault_point("plan.samples")
    sync_directory(root / layout.SAMPLES)
    return builder.finish(), token_digests, files


def _write_target(root: Path, write_target: Callable[[Path], None] | None) -> dict[str, FileRecord]:
    """Let the caller fill target/, then make it durable and record every file."""
    target = root / layout.TARGET
    if write_target is not None:
        write_target(target)
    files: dict[str, FileRecord] = {}
    for path in sorted(target.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            sync_directory(path)
            continue
        name = layout.parse_plan_file(path.relative_to(root).as_posix())
        num_bytes, crc32c = hash_inside(root, name)
        files[name] = FileRecord(num_bytes=num_bytes, crc32c=crc32c)
        sync_file(path)
    sync_directory(target)
    return files


def _summarise(index: PlanIndex, header: CacheHeader, dropped: Mapping[str, int]) -> PlanSummary:
    splits = index.summarise_splits()
    num_tokens = sum(counts.num_tokens for counts in splits.values())
    return PlanSummary.model_validate(
        {
            "num_samples": len(index.sample_ids),
            "num_tokens": num_tokens,
            "num_supervised": sum(counts.num_supervised for counts in splits.values()),
            "num_shards": index.num_shards,
            "payload_bytes": num_tokens * header.token_bytes,
            "splits": splits,
            "dropped": dict(dropped),
        }
    )


def _publish_manifest(root: Path, fd: int, manifest: Manifest) -> None:
    sync_directory(root)
    write_all(fd, manifest.render())
    os.fsync(fd)
    fault_point("plan.manifest")
    (root / layout.PARTIAL_MANIFEST).rename(root / layout.MANIFEST)
    sync_directory(root)
    fault_point("plan.committed")
