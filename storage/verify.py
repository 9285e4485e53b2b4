"""Checking every byte of a cache, and saying which file, shard, array and inner chunk is wrong.

Damage never raises: it becomes a line of the report. A partly extracted cache verifies too, and lists what is missing.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage import layout
from storage.commit import ArrayRecord, CommitRecord, PlannedShard, list_commits, plan_shard, read_commit
from storage.errors import CacheCorruptError, CacheError, CacheNotFoundError, CacheUsageError
from storage.files import crc32c_hex, open_inside, read_inside
from storage.index import PlanIndex, parse_index
from storage.manifest import Manifest, digest_plan, read_manifest
from storage.plan import check_recorded, read_recorded, read_shard_samples
from storage.remote import is_remote
from storage.samples import digest_tokens
from storage.zarr_array import ArraySpec, group_metadata


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong; ``shard`` and ``array`` are None where it is not about one."""

    file: str
    shard: int | None
    array: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was found. ``ok`` means: complete, and every byte is the committed one."""

    problems: tuple[Problem, ...]
    num_shards: int
    num_checked_bytes: int
    missing_shards: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """No problem and nothing missing."""
        return not self.problems and not self.missing_shards


def verify_cache(
    path: str | os.PathLike[str], *, quick: bool = False, progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Check a cache; ``quick`` compares sizes of payload files instead of reading them.

    ``progress`` is called with (shards done, shards to check). Raises CacheNotFoundError if there is no directory,
    CacheUsageError for an address.
    """
    if is_remote(path):
        raise CacheUsageError(f"{path}: is an address; dspark pull it, which checks every byte, or verify a local copy")
    root = Path(path)
    if not root.is_dir():
        raise CacheNotFoundError(f"{root}: is not a directory; check the path")
    check = _Verification(root, quick=quick)
    check.run(progress)
    return VerifyReport(
        problems=tuple(check.problems),
        num_shards=check.num_shards,
        num_checked_bytes=check.num_checked_bytes,
        missing_shards=tuple(check.missing),
    )


@dataclass(kw_only=True, eq=False)
class _Place:
    """What a check is about, for the report."""

    file: str
    shard: int | None = None
    array: str | None = None


@dataclass(eq=False)
class _Verification:
    root: Path
    quick: bool = field(kw_only=True)
    problems: list[Problem] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    num_shards: int = 0
    num_checked_bytes: int = 0
    expected: set[str] = field(default_factory=set)

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        manifest = self._check_manifest()
        if manifest is None:
            return
        self.num_shards = manifest.plan.num_shards
        index = self._check_plan_files(manifest)
        commits, markers = self._list_commits()
        self.missing = sorted(set(range(self.num_shards)) - commits)
        present = sorted(commits & set(range(self.num_shards)))
        if index is None:  # reported; without it the size of a shard is not known
            return
        token_digests = self._check_samples(manifest, index)
        for done, shard in enumerate(present):
            self._check_shard(plan_shard(self.root, manifest, index, shard), token_digests, shard in markers)
            if progress is not None:
                progress(done + 1, len(present))
        self._check_strangers()

    def _check_manifest(self) -> Manifest | None:
        place = _Place(file=layout.MANIFEST)
        try:
            manifest = read_manifest(self.root)
        except (CacheError, OSError) as error:
            self._report(place, error)
            return None
        self._count(place, len(manifest.render()))
        return manifest

    def _check_plan_files(self, manifest: Manifest) -> PlanIndex | None:
        """Compare each file of the plan with the manifest; give the index if it is sound."""
        index: PlanIndex | None = None
        for name, record in manifest.files.items():
            place = _Place(file=name)
            self.expected.add(name)
            try:
                check_recorded(self.root, name, manifest)
                if name == layout.INDEX:
                    index = parse_index(read_recorded(self.root, name, manifest), manifest.plan, where=name)
            except (CacheError, OSError) as error:
                self._report(place, error)
            else:
                self._count(place, record.num_bytes)
        return index

    def _check_samples(self, manifest: Manifest, index: PlanIndex) -> dict[int, str]:
        """Token digest of each shard whose samples file is sound; all together must give the plan's digest."""
        digests: dict[int, str] = {}
        for shard in range(self.num_shards):
            try:
                digests[shard] = digest_tokens(read_shard_samples(self.root, manifest, index, shard))
            except (CacheError, OSError) as error:
                if not any(problem.file == layout.samples_name(shard) for problem in self.problems):
                    self._report(_Place(file=layout.samples_name(shard), shard=shard), error)
        if len(digests) == self.num_shards:
            found = digest_plan(manifest.identity, list(digests.values()))
            if found != manifest.plan_digest:
                self._report(_Place(file=layout.MANIFEST), f"plan_digest is not that of the samples, {found}")
        return digests

    def _list_commits(self) -> tuple[set[int], set[int]]:
        try:
            return list_commits(self.root)
        except OSError as error:
            self._report(_Place(file=layout.COMMITS), error)
            return set(), set()

    def _check_shard(self, planned: PlannedShard, token_digests: dict[int, str], has_marker: bool) -> None:
        place = _Place(file=layout.commit_name(planned.shard), shard=planned.shard)
        record: CommitRecord | None = None
        self.expected.add(place.file)
        try:
            record = read_commit(planned, has_marker=has_marker)
            if record.token_digest != token_digests.get(planned.shard, record.token_digest):
                raise CacheCorruptError("token_digest is not that of the planned samples")
            self._count(place, len(record.render()))
        except (CacheError, OSError) as error:
            self._report(place, error)
        if has_marker:
            marker = _Place(file=layout.excluded_name(planned.shard), shard=planned.shard)
            self._check_exact(marker, b"")
        shard_name = layout.shard_name(planned.shard)
        group = _Place(file=f"{shard_name}/{layout.group_metadata_name()}", shard=planned.shard)
        self._check_exact(group, group_metadata())
        for spec in planned.arrays:
            metadata = f"{shard_name}/{layout.array_metadata_name(spec.name)}"
            self._check_exact(_Place(file=metadata, shard=planned.shard, array=spec.name), spec.metadata())
            data = _Place(file=f"{shard_name}/{spec.data_name}", shard=planned.shard, array=spec.name)
            self._check_array(data, spec, record.arrays[spec.name] if record else None)

    def _check_exact(self, place: _Place, expected: bytes) -> None:
        self.expected.add(place.file)
        try:
            if read_inside(self.root, place.file) != expected:
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

    def _check_strangers(self) -> None:
        """Report whatever is there and is not part of the cache."""
        uncommitted: set[int] = set()
        for name in _list_files(self.root):
            if name in self.expected:
                continue
            parts = name.split("/")
            shard = layout.parse_shard(parts[1]) if parts[0] == layout.SHARDS and len(parts) > 1 else None
            if shard is not None and shard in self.missing:
                if shard not in uncommitted:
                    self._report(_Place(file=layout.shard_name(shard), shard=shard), "has no commit record (a crash)")
                uncommitted.add(shard)
            elif any(layout.parse_temp(part) for part in parts):
                self._report(_Place(file=name), "is a temporary of a writer that runs or has died")
            else:
                self._report(_Place(file=name, shard=shard), "is not part of the cache")

    def _report(self, place: _Place, what: object) -> None:
        text = f"is missing ({what})" if isinstance(what, FileNotFoundError) else str(what)
        text = text.removeprefix(f"{self.root / place.file}: ")
        self.problems.append(Problem(file=place.file, shard=place.shard, array=place.array, what=text))

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
