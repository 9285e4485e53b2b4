"""Checking every byte of a cache, and saying which file, shard, array and inner chunk is wrong.

Damage never raises: it becomes a line of the report. A partly extracted cache verifies too, and lists what is missing.
Each part of a cache (a file of the target, a shard with its samples) is checked by one thread; what was found is put
together in the order of the parts, so the report does not depend on the number of threads.
"""

import errno
import os
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from storage import layout
from storage.commit import ArrayRecord, CommitRecord, list_commits, read_commit
from storage.errors import CacheCorruptError, CacheError, CacheNotFoundError, CacheReadError, CacheUsageError
from storage.files import crc32c_hex, open_inside, read_inside
from storage.index import PlanIndex, parse_index
from storage.manifest import Manifest, digest_plan, read_manifest
from storage.plan import CachePlan, check_recorded, read_recorded
from storage.remote import is_remote
from storage.samples import digest_tokens
from storage.zarr_array import ArraySpec, group_metadata

# Reads overlap, checksums do not (google_crc32c keeps the interpreter's lock), so more threads than a few only wait.
MAX_WORKERS = 8

# What says that bytes are gone; any other refusal (permission, a server that is away) says nothing about them.
_DAMAGE = (None, errno.ENOENT, errno.EIO)

ProblemKind = Literal["plan", "shard", "unreadable", "leftover", "stranger"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong; ``shard`` and ``array`` are None where it is not about one.

    ``kind``: damage to a file of the plan or of a committed shard; a file that the system refuses to open, though it
    may be sound; what a writer has left or is writing; a file that is not part of the cache.
    """

    file: str
    shard: int | None
    array: str | None
    what: str
    kind: ProblemKind

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was found. ``ok`` means: complete, and every byte that was looked at is the committed one."""

    problems: tuple[Problem, ...]
    num_shards: int
    num_checked_bytes: int
    missing_shards: tuple[int, ...]
    quick: bool
    seconds: float

    @property
    def ok(self) -> bool:
        """No problem and nothing missing."""
        return not self.problems and not self.missing_shards

    @property
    def bad_shards(self) -> tuple[int, ...]:
        """Damaged shards that have a commit, ascending."""
        shards = {problem.shard for problem in self.problems if problem.kind == "shard"}
        return tuple(sorted(shard for shard in shards if shard is not None))


def verify_cache(
    path: str | os.PathLike[str],
    *,
    quick: bool = False,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a cache with ``num_workers`` threads (default: one per processor, at most 8).

    ``quick`` checks records, metadata and indexes, but of payload, samples and target files only the sizes.
    ``progress`` is called from the calling thread with (shards done, shards planned). Raises CacheNotFoundError if
    there is no directory, CacheUsageError for an address.
    """
    if is_remote(path):
        raise CacheUsageError(f"{path}: is an address; dspark pull it, which checks every byte, or verify a local copy")
    started = time.monotonic()
    root = Path(path)
    if not root.is_dir():
        raise CacheNotFoundError(f"{root}: is not a directory; check the path")
    check = _Check(root, quick=quick)
    manifest = check.read_manifest()
    commits, markers = check.list_commits()
    num_shards = manifest.plan.num_shards if manifest else 0
    missing = tuple(sorted(set(range(num_shards)) - commits))
    if manifest is not None:
        index = check.check_plan_files(manifest)
        if index is not None:  # reported; without it the size of a shard is not known
            plan = CachePlan(path=root, manifest=manifest, index=index)
            parts = _check_shards(plan, commits, markers, quick=quick, num_workers=num_workers, progress=progress)
            check.merge(manifest, parts)
            check.check_strangers(missing)
    return VerifyReport(
        problems=tuple(check.problems),
        num_shards=num_shards,
        num_checked_bytes=check.num_checked_bytes,
        missing_shards=missing,
        quick=quick,
        seconds=time.monotonic() - started,
    )


def is_damaged(plan: CachePlan, shard: int, *, has_marker: bool, quick: bool) -> bool:
    """Whether a committed shard is bad at this moment."""
    check = _Check(plan.path, quick=quick)
    check.check_shard(plan, shard, has_marker=has_marker)
    return any(problem.kind == "shard" for problem in check.problems)


def _check_shards(
    plan: CachePlan,
    commits: Collection[int],
    markers: Collection[int],
    *,
    quick: bool,
    num_workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> list["_Check"]:
    """What was found out about each planned shard, in their order."""

    def check_shard(shard: int) -> _Check:
        check = _Check(plan.path, quick=quick)
        check.check_samples(plan, shard)
        if shard in commits:
            check.check_shard(plan, shard, has_marker=shard in markers)
        return check

    parts = []
    pool = ThreadPoolExecutor(num_workers or min(MAX_WORKERS, os.cpu_count() or 1))
    try:
        for part in pool.map(check_shard, range(plan.num_shards)):
            parts.append(part)
            if progress is not None:
                progress(len(parts), plan.num_shards)
    finally:
        pool.shutdown(cancel_futures=True)
    return parts


@dataclass(frozen=True, kw_only=True)
class _Place:
    """What a check is about, for the report."""

    file: str
    shard: int | None = None
    array: str | None = None
    kind: ProblemKind = "shard"


@dataclass(eq=False)
class _Check:
    """What one thread finds out about its part of a cache, or all of it put together."""

    root: Path
    quick: bool = field(kw_only=True)
    problems: list[Problem] = field(default_factory=list)
    expected: set[str] = field(default_factory=set)
    num_checked_bytes: int = 0
    token_digest: str | None = None

    def read_manifest(self) -> Manifest | None:
        """The manifest if it is sound."""
        place = _Place(file=layout.MANIFEST, kind="plan")
        try:
            manifest = read_manifest(self.root)
        except (CacheError, OSError) as error:
            self._report(place, error)
            return None
        self._count(place, len(manifest.render()))
        return manifest

    def list_commits(self) -> tuple[set[int], set[int]]:
        """Shards that have a commit, and shards that have a marker."""
        try:
            return list_commits(self.root)
        except OSError as error:
            self._report(_Place(file=layout.COMMITS), error)
            return set(), set()

    def check_plan_files(self, manifest: Manifest) -> PlanIndex | None:
        """Check the files of the target and the index; give the index if it is sound.

        Without an index, samples files are held against the manifest here; with one, each is part of its shard.
        """
        place = _Place(file=layout.INDEX, kind="plan")
        index: PlanIndex | None = None
        self.expected.add(place.file)
        try:
            data = read_recorded(self.root, place.file, manifest)
            index = parse_index(data, manifest.plan, manifest.header, where=str(self.root / place.file))
            self._count(place, len(data))
        except (CacheError, OSError) as error:
            self._report(place, error)
        for name in manifest.files:
            if name.startswith(f"{layout.TARGET}/") or (index is None and name != layout.INDEX):
                self._check_recorded(_Place(file=name, kind="plan"), manifest)
        return index

    def merge(self, manifest: Manifest, parts: list["_Check"]) -> None:
        """Take over what was found about every shard; all samples together must give the plan's digest."""
        for part in parts:
            self.problems += part.problems
            self.expected |= part.expected
            self.num_checked_bytes += part.num_checked_bytes
        digests = [part.token_digest for part in parts if part.token_digest is not None]
        if len(digests) == len(parts) and (found := digest_plan(manifest.identity, digests)) != manifest.plan_digest:
            place = _Place(file=layout.MANIFEST, kind="plan")
            self._report(place, f"plan_digest is not that of the samples, {found}")

    def check_samples(self, plan: CachePlan, shard: int) -> None:
        """Check the samples file of a shard and keep the digest of its tokens."""
        place = _Place(file=layout.samples_name(shard), shard=shard, kind="plan")
        if self.quick:
            self._check_recorded(place, plan.manifest)
            return
        self.expected.add(place.file)
        try:
            self.token_digest = digest_tokens(plan.read_samples(shard))
            self._count(place, plan.manifest.files[place.file].num_bytes)
        except (CacheError, OSError) as error:
            self._report(place, error)

    def check_shard(self, plan: CachePlan, shard: int, *, has_marker: bool) -> None:
        """Check record, marker and arrays of a committed shard."""
        planned = plan.planned_shard(shard)
        place = _Place(file=layout.commit_name(shard), shard=shard)
        record: CommitRecord | None = None
        self.expected.add(place.file)
        try:
            record = read_commit(planned, has_marker=has_marker)
            if self.token_digest not in (None, record.token_digest):
                raise CacheCorruptError("token_digest is not that of the planned samples")
            self._count(place, len(record.render()))
        except (CacheError, OSError) as error:
            self._report(place, error)
        if has_marker:
            self._check_exact(_Place(file=layout.excluded_name(shard), shard=shard), b"")
        shard_name = layout.shard_name(shard)
        group = _Place(file=f"{shard_name}/{layout.group_metadata_name()}", shard=shard)
        self._check_exact(group, group_metadata())
        for spec in planned.arrays:
            metadata = f"{shard_name}/{layout.array_metadata_name(spec.name)}"
            self._check_exact(_Place(file=metadata, shard=shard, array=spec.name), spec.metadata())
            data = _Place(file=f"{shard_name}/{spec.data_name}", shard=shard, array=spec.name)
            self._check_array(data, spec, record.arrays[spec.name] if record else None)

    def _check_recorded(self, place: _Place, manifest: Manifest) -> None:
        """Compare a file of the plan with the manifest: its bytes, or where quick its size."""
        num_bytes = manifest.files[place.file].num_bytes
        self.expected.add(place.file)
        try:
            if self.quick:
                _check_size(self.root, place.file, num_bytes)
            else:
                check_recorded(self.root, place.file, manifest)
                self._count(place, num_bytes)
        except (CacheError, OSError) as error:
            self._report(place, error)

    def _check_exact(self, place: _Place, expected: bytes) -> None:
        self.expected.add(place.file)
        try:
            if read_inside(self.root, place.file, num_bytes=len(expected)) != expected:
                raise CacheCorruptError("its bytes are not the ones that the plan implies")
            self._count(place, len(expected))
        except (CacheError, OSError) as error:
            self._report(place, error)

    def _check_array(self, place: _Place, spec: ArraySpec, record: ArrayRecord | None) -> None:
        self.expected.add(place.file)
        try:
            for problem in find_array_problems(self.root, place.file, spec, record, quick=self.quick):
                self._report(place, problem)
            if not self.quick and record is not None:
                self._count(place, record.file_bytes)
        except (CacheError, OSError) as error:
            self._report(place, error)

    def check_strangers(self, missing: Collection[int]) -> None:
        """Report whatever is there and is not part of the cache; ``missing`` shards have no commit."""
        uncommitted: set[int] = set()
        temps: set[str] = set()
        for name in _list_files(self.root):
            if name in self.expected:
                continue
            parts = name.split("/")
            shard = layout.parse_shard(parts[1]) if parts[0] == layout.SHARDS and len(parts) > 1 else None
            if shard is not None and shard in missing:
                if shard not in uncommitted:
                    place = _Place(file=layout.shard_name(shard), shard=shard, kind="leftover")
                    self._report(place, "has no commit record (a crash)")
                uncommitted.add(shard)
            elif parts[0] == layout.COMMITS and layout.parse_excluded(parts[-1]) in missing:
                self._report(_Place(file=name, kind="leftover"), "marks a shard without a commit record (a crash)")
            elif depth := next((depth for depth, part in enumerate(parts, 1) if layout.parse_temp(part)), 0):
                temp = "/".join(parts[:depth])  # a directory is told once, not each file in it
                if temp not in temps:
                    what = "is a temporary of a writer that runs or has died"
                    self._report(_Place(file=temp, kind="leftover"), what)
                temps.add(temp)
            else:
                self._report(_Place(file=name, shard=shard, kind="stranger"), "is not part of the cache")

    def _report(self, place: _Place, what: object) -> None:
        cause = what.__cause__ if isinstance(what, CacheReadError) else what
        is_refusal = isinstance(cause, OSError) and cause.errno not in _DAMAGE
        text = f"is missing ({what})" if isinstance(what, FileNotFoundError) else str(what)
        text = text.removeprefix(f"{self.root / place.file}: ")
        kind = "unreadable" if is_refusal else place.kind
        self.problems.append(Problem(file=place.file, shard=place.shard, array=place.array, what=text, kind=kind))

    def _count(self, place: _Place, num_bytes: int) -> None:
        self.expected.add(place.file)
        self.num_checked_bytes += num_bytes


def find_array_problems(
    root: Path, name: str, spec: ArraySpec, record: ArrayRecord | None, *, quick: bool = False
) -> Iterator[str]:
    """What is wrong with the bytes of an array's chunk file ``root/name``, held against its record.

    ``quick``: size and the index of inner chunks only; no record: the size only. Raises CacheCorruptError for a wrong
    size, FileNotFoundError or CacheReadError.
    """
    with os.fdopen(open_inside(root, name), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        expected = spec.max_file_bytes if record is None else record.file_bytes
        if size != expected and not (record is None and spec.fits(size)):
            raise CacheCorruptError(f"{root / name}: has {size} bytes, expected {expected}")
        if record is None:
            return
        start = size - spec.footer_bytes
        footer = _read_exactly(file.fileno(), np.empty(spec.footer_bytes, dtype=np.uint8), start).tobytes()
        try:
            offsets = spec.parse_footer(footer, file_bytes=size, where=name)
        except CacheCorruptError as error:
            yield str(error).removeprefix(f"{name}: ")
            return
        if quick:
            return
        buffer = np.empty(int(np.diff(offsets).max()), dtype=np.uint8)
        for chunk, crc32c in enumerate(record.chunk_crc32c):
            first, last = offsets[chunk : chunk + 2].tolist()
            data = _read_exactly(file.fileno(), buffer[: last - first], first)
            if (found := crc32c_hex(data)) != crc32c:
                yield f"inner chunk {chunk} has crc32c {found}, expected {crc32c}"


def _check_size(root: Path, name: str, num_bytes: int) -> None:
    with os.fdopen(open_inside(root, name), "rb", buffering=0) as file:
        if (size := os.fstat(file.fileno()).st_size) != num_bytes:
            raise CacheCorruptError(f"has {size} bytes, expected {num_bytes}")


def _read_exactly(fd: int, buffer: npt.NDArray[np.uint8], offset: int) -> npt.NDArray[np.uint8]:
    done = 0
    while done < buffer.size:
        count = os.preadv(fd, [buffer.data[done:]], offset + done)
        if count == 0:
            raise CacheCorruptError(f"ends at byte {offset + done}")
        done += count
    return buffer


def _list_files(root: Path) -> Iterator[str]:
    """Files, links, and empty directories that should not be, relative to the cache, in a fixed order."""
    known = {layout.SAMPLES, layout.SHARDS, layout.COMMITS, layout.TARGET}
    for directory, directories, files in os.walk(root):
        directories.sort()
        base = Path(directory).relative_to(root)
        links = [name for name in directories if (Path(directory) / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield (base / name).as_posix()
        if not files and not directories and base.as_posix() not in {*known, "."}:
            yield base.as_posix()
