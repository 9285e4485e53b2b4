"""``commits/NNNNN.json``: the record without which a shard does not exist.

Published by ``CacheWriter`` after the shard's directory is durable; read when a shard is first touched. It holds no
time and no host, so the same shard has the same record wherever it was computed.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from storage import layout
from storage.bounds import max_commit_bytes
from storage.encodings import Encoding
from storage.errors import CacheCorruptError, CacheFormatError
from storage.files import read_inside
from storage.index import PlanIndex
from storage.manifest import Manifest
from storage.sealed import Count, Crc32c, Record, SealedRecord, Sha256
from storage.zarr_array import ArraySpec, plan_arrays

# What to do about a damaged shard, wherever the cache came from.
MAKER = "the command that made the cache here (extract, import or pull)"
REMEDY = (
    f"run `dspark verify --repair` on the cache, then {MAKER} again, which makes only what is damaged anew; "
    "a staged copy is fetched anew when it is read again"
)


class ArrayRecord(Record):
    """The chunk file of an array: its size and the crc32c of each inner chunk, padding included."""

    file_bytes: Count
    chunk_crc32c: tuple[Crc32c, ...]


class ExcludedSample(Record):
    """A quarantined sample: its rows are on disk, but no reader returns them."""

    sample_id: Count
    reason: str
    layer: int | None


class CommitRecord(SealedRecord):
    """``commits/NNNNN.json``."""

    shard: Count
    plan_digest: Sha256
    num_samples: Count
    num_tokens: Count
    token_digest: Sha256
    arrays: dict[str, ArrayRecord]
    excluded: tuple[ExcludedSample, ...]


class LossyCommitRecordV1(CommitRecord):
    """The record of a lossy encoding: with total variations between the exact and the decoded target distribution.

    At some supervised positions of the shard, ascending, to six decimals.
    """

    total_variation: tuple[Annotated[float, Field(ge=0, le=1)], ...]


class LossyCommitRecord(LossyCommitRecordV1):
    """Since version 2: also ‖decoded - exact‖₂ / ‖exact‖₂ at some tokens of the shard, ascending, to six decimals.

    A tuple for each stored state: the layers in order, then the last state. A zero state has 0.
    """

    relative_error: tuple[tuple[Annotated[float, Field(ge=0)], ...], ...]


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """What the plan says about a shard, against which its record is held."""

    root: Path
    shard: int
    format_version: int
    plan_digest: str
    num_samples: int
    num_tokens: int
    arrays: tuple[ArraySpec, ...]
    encoding: Encoding

    @property
    def num_states(self) -> int:
        """States of a token: the stored layers and the last one."""
        hidden, *_ = self.specs_of(layout.HIDDEN_STATES)
        return hidden.row_shape[0] + 1

    @property
    def max_commit_bytes(self) -> int:
        """What the shard's record cannot exceed."""
        return max_commit_bytes(
            num_layers=max(math.prod(spec.row_shape[:-1]) for spec in self.arrays),
            num_chunks=sum(spec.num_chunks for spec in self.arrays),
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
        )

    def specs_of(self, array: str) -> tuple[ArraySpec, ...]:
        """An array of states, followed by its scales where it has any."""
        names = (array, layout.scale_name(array))
        return tuple(spec for spec in self.arrays if spec.name in names)


def plan_shard(root: Path, manifest: Manifest, index: PlanIndex, shard: int) -> PlannedShard:
    """The plan of one shard."""
    num_tokens = int(index.shard_tokens[shard])
    return PlannedShard(
        root=root,
        shard=shard,
        format_version=manifest.format_version,
        plan_digest=manifest.plan_digest,
        num_samples=len(index.shard_rows(shard)),
        num_tokens=num_tokens,
        arrays=plan_arrays(manifest.header, num_tokens),
        encoding=manifest.header.encoding,
    )


def seal_commit(
    planned: PlannedShard,
    *,
    token_digest: str,
    arrays: Mapping[str, ArrayRecord],
    excluded: Sequence[ExcludedSample] = (),
    total_variation: Sequence[float] = (),
    relative_error: Sequence[Sequence[float]] = (),
) -> CommitRecord:
    """The record of a written shard, in its plan's version.

    ``total_variation`` and ``relative_error`` are those of a lossy encoding, the values in any order; without the
    second the record says of each state that nothing was measured.
    """
    kind = record_type(planned)
    measured: dict[str, object] = {}
    if issubclass(kind, LossyCommitRecordV1):
        measured["total_variation"] = _in_order(total_variation)
    if issubclass(kind, LossyCommitRecord):
        measured["relative_error"] = tuple(map(_in_order, relative_error or [()] * planned.num_states))
    return kind.seal(
        format_version=planned.format_version,
        shard=planned.shard,
        plan_digest=planned.plan_digest,
        num_samples=planned.num_samples,
        num_tokens=planned.num_tokens,
        token_digest=token_digest,
        arrays=dict(arrays),
        excluded=tuple(sorted(excluded, key=lambda sample: sample.sample_id)),
        **measured,
    )


def record_type(planned: PlannedShard) -> type[CommitRecord]:
    """The form that the shard's record has."""
    if not planned.encoding.lossy:
        return CommitRecord
    return LossyCommitRecordV1 if planned.format_version == 1 else LossyCommitRecord


def _in_order(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(sorted(round(value, 6) for value in values))


def list_commits(root: Path) -> tuple[set[int], set[int]]:
    """Shards that have a commit record, and shards that have a marker of excluded samples: names only."""
    directory = root / layout.COMMITS
    return parse_commits(os.listdir(directory) if directory.is_dir() else [])


def parse_commits(names: Iterable[str]) -> tuple[set[int], set[int]]:
    """Shards with a record and shards with a marker, of the names in a directory of commits."""
    names = list(names)
    commits = {shard for name in names if (shard := layout.parse_commit(name)) is not None}
    excluded = {shard for name in names if (shard := layout.parse_excluded(name)) is not None}
    return commits, excluded


def read_commit(planned: PlannedShard, *, has_marker: bool) -> CommitRecord:
    """Read a shard's record and hold it against the plan and against the marker of excluded samples."""
    name = layout.commit_name(planned.shard)
    where = planned.root / name
    try:
        record = record_type(planned).parse(
            read_inside(planned.root, name, max_bytes=planned.max_commit_bytes), where=str(where)
        )
    except FileNotFoundError as error:
        raise CacheCorruptError(f"{where}: is gone; {REMEDY}") from error
    except CacheCorruptError as error:
        raise CacheCorruptError(f"{error}; {REMEDY}") from error
    check_commit(record, planned, where=str(where))
    if bool(record.excluded) != has_marker:
        state = "has no" if record.excluded else "has a"
        raise CacheCorruptError(
            f"{where}: names {len(record.excluded)} excluded samples, but the shard {state} marker "
            f"{layout.excluded_name(planned.shard)}; {REMEDY}"
        )
    return record


def check_commit(record: CommitRecord, planned: PlannedShard, *, where: str) -> None:
    """Refuse a record of another shard or of another plan; ``where`` is its file, for messages."""
    pairs: dict[str, tuple[object, object]] = {
        "format_version": (record.format_version, planned.format_version),
        "shard": (record.shard, planned.shard),
        "plan_digest": (record.plan_digest, planned.plan_digest),
        "num_samples": (record.num_samples, planned.num_samples),
        "num_tokens": (record.num_tokens, planned.num_tokens),
        "arrays": (sorted(record.arrays), sorted(spec.name for spec in planned.arrays)),
    }
    if isinstance(record, LossyCommitRecord):
        pairs["states with a relative_error"] = (len(record.relative_error), planned.num_states)
    wrong = [f"{name} {got}, planned {expected}" for name, (got, expected) in pairs.items() if got != expected]
    for spec in planned.arrays:
        array = record.arrays.get(spec.name)
        if array and not (spec.fits(array.file_bytes) and len(array.chunk_crc32c) == spec.num_chunks):
            wrong.append(f"{spec.name} {array.file_bytes} bytes, planned {spec.max_file_bytes}")
    if wrong:
        raise CacheFormatError(f"{where}: is of another shard or plan: {'; '.join(wrong)}; {REMEDY}")
