"""The plan of a cache: which sample lies in which shard at which row, fixed before the target runs.

``CachePlan.write`` streams samples into shards and publishes the manifest last; a directory without a manifest is not
planned. ``CachePlan.read`` gives the plan back to whoever computes shards. Everything here is a pure function of the
samples and the header, so the bytes of a cache do not depend on who computed which shard.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from storage import layout
from storage.commit import ArrayRecord, PlannedShard, plan_shard, seal_commit
from storage.errors import CacheCorruptError, CacheFormatError, CacheUsageError
from storage.files import crc32c_hex, hash_inside, read_inside
from storage.index import PlanIndex, parse_index
from storage.manifest import CacheHeader, Manifest, read_manifest
from storage.plan_files import publish_plan
from storage.samples import PlannedSample, parse_samples, samples_size
from storage.tables import SAMPLES_SCHEMA
from storage.zarr_array import group_metadata

# What to do about a damaged file of the plan: no shard can be made without it.
PLAN_REMEDY = "put it back from a copy of the cache, or make the cache (extract, import or pull) in an empty folder"


@dataclass(frozen=True, kw_only=True, eq=False)
class CachePlan:
    """A published plan: the manifest, the index columns, and the samples of each shard on demand."""

    path: Path
    manifest: Manifest
    index: PlanIndex

    @classmethod
    def write(
        cls,
        path: str | os.PathLike[str],
        samples: Iterable[PlannedSample],
        *,
        header: CacheHeader,
        write_target: Callable[[Path], None] | None = None,
        dropped: Callable[[], Mapping[str, int]] | None = None,
        mask_token_id: Callable[[], int | None] | None = None,
    ) -> "CachePlan":
        """Plan a cache in a new or empty directory, or in one whose planning was interrupted.

        ``samples`` are in source order; one shard of them is in memory at a time. ``write_target`` puts the target's
        files into the directory that it is given. ``dropped`` is asked once all samples are seen: reason -> count.
        So is ``mask_token_id``, where the samples decide it; its answer stands in the place of the header's.
        Raises CacheExistsError for a directory that is already planned or that holds files of somebody else.
        """
        root = Path(path)
        publish_plan(
            root, samples, header=header, write_target=write_target, dropped=dropped, mask_token_id=mask_token_id
        )
        return cls.read(root)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "CachePlan":
        """Read a published plan. Raises CacheNotFoundError where there is none."""
        root = Path(path)
        manifest = read_manifest(root)
        data = read_recorded(root, layout.INDEX, manifest)
        index = parse_index(data, manifest.plan, manifest.header, where=str(root / layout.INDEX))
        return cls(path=root, manifest=manifest, index=index)

    @property
    def header(self) -> CacheHeader:
        """What the plan was made with."""
        return self.manifest.header

    @property
    def num_shards(self) -> int:
        """Number of planned shards."""
        return self.manifest.plan.num_shards

    @property
    def target_dir(self) -> Path:
        """The target's files."""
        return self.path / layout.TARGET

    def read_samples(self, shard: int) -> list[PlannedSample]:
        """Samples of a shard in the order in which their rows must be appended. Checks size and crc32c of the file."""
        return read_shard_samples(self.path, self.manifest, self.index, shard)

    def planned_shard(self, shard: int) -> PlannedShard:
        """Sizes and arrays of one shard."""
        if not 0 <= shard < self.num_shards:
            raise CacheUsageError(f"{self.path}: there is no shard {shard}; the plan has {self.num_shards}")
        return plan_shard(self.path, self.manifest, self.index, shard)

    def bytes_on_disk(self, shards: Iterable[int] | None = None) -> int:
        """Size of the files that these shards (default: all) will have, in bytes, records included.

        Exact, but for what excluded samples and a lossy encoding's measurements add to a record; of a compressed
        encoding it is what the files cannot exceed.
        """
        wanted = range(self.num_shards) if shards is None else shards
        return sum(_shard_file_bytes(self.planned_shard(shard)) for shard in wanted)

    def measure_states(self) -> int:
        """Bytes that the chunk files of all shards have now: less than planned where compressed or missing."""
        num_bytes = 0
        for shard in range(self.num_shards):
            folder = self.path / layout.shard_name(shard)
            for spec in self.planned_shard(shard).arrays:
                with contextlib.suppress(FileNotFoundError):
                    num_bytes += (folder / spec.data_name).stat().st_size
        return num_bytes

    def plan_file_bytes(self) -> int:
        """Size of the plan itself: manifest, index, samples and target files, in bytes."""
        return len(self.manifest.render()) + sum(record.num_bytes for record in self.manifest.files.values())


def read_recorded(root: Path, name: str, manifest: Manifest) -> bytes:
    """Read a file of the plan and hold it against the manifest."""
    record = manifest.files[name]
    try:
        data = read_inside(root, name, num_bytes=record.num_bytes)
    except FileNotFoundError as error:
        raise CacheCorruptError(f"{root / name}: is named in {layout.MANIFEST}, but is gone; {PLAN_REMEDY}") from error
    if (found := crc32c_hex(data)) != record.crc32c:
        raise CacheCorruptError(
            f"{root / name}: has crc32c {found}, {layout.MANIFEST} says {record.crc32c}; the file is damaged; "
            f"{PLAN_REMEDY}"
        )
    return data


def check_recorded(root: Path, name: str, manifest: Manifest) -> None:
    """Hold a file of the plan, of any size, against the manifest without keeping its bytes."""
    record = manifest.files[name]
    try:
        num_bytes, crc32c = hash_inside(root, name, num_bytes=record.num_bytes)
    except CacheCorruptError as error:
        raise CacheCorruptError(f"{error}; the file is damaged; {PLAN_REMEDY}") from error
    except FileNotFoundError as error:
        raise CacheCorruptError(f"{root / name}: is named in {layout.MANIFEST}, but is gone; {PLAN_REMEDY}") from error
    if (num_bytes, crc32c) != (record.num_bytes, record.crc32c):
        raise CacheCorruptError(
            f"{root / name}: has {num_bytes} bytes with crc32c {crc32c}, expected {record.num_bytes} with "
            f"{record.crc32c}; the file is damaged; "
            f"{PLAN_REMEDY}"
        )


def read_shard_samples(root: Path, manifest: Manifest, index: PlanIndex, shard: int) -> list[PlannedSample]:
    """Samples of one shard, checked against the manifest and the index."""
    name = layout.samples_name(shard)
    if problem := samples_size(index, shard).find_misfit(manifest.files[name].num_bytes, SAMPLES_SCHEMA):
        raise CacheFormatError(f"{root / name}: {layout.MANIFEST} says {problem}")
    return parse_samples(read_recorded(root, name, manifest), index, shard, where=str(root / name))


def _shard_file_bytes(planned: PlannedShard) -> int:
    records = {
        spec.name: ArrayRecord(file_bytes=spec.max_file_bytes, chunk_crc32c=("0" * 8,) * spec.num_chunks)
        for spec in planned.arrays
    }
    record = seal_commit(planned, token_digest="0" * 64, arrays=records)
    arrays = sum(spec.max_file_bytes + len(spec.metadata()) for spec in planned.arrays)
    return arrays + len(group_metadata()) + len(record.render())
