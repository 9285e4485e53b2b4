"""``samples/NNNNN.parquet``: token ids and loss masks of one shard, one row per sample in the shard's order.

Written by ``CachePlan.write``; read by the extractor (what to compute) and by the reader (what to return).
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.errors import CacheFormatError, CacheUsageError
from storage.index import PlanIndex
from storage.manifest import SPLITS, CacheHeader, Split
from storage.tables import SAMPLES_SCHEMA, TableSize, read_codes, read_table, render_table


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedSample:
    """One sample of T tokens: input_ids [T] int32, loss_mask [T] uint8 of 0 and 1, and where it came from."""

    sample_id: int
    source_file: str
    source_row: int
    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    split: Split

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Tokens whose loss mask is 1."""
        return int(np.count_nonzero(self.loss_mask))


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardTokens:
    """Token ids and masks of a shard, concatenated [tokens], and the digest over them."""

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    digest: str


def check_sample(sample: PlannedSample, header: CacheHeader) -> None:
    """Refuse a sample that the cache could not give back as it is, or that the target could not embed."""
    ids, mask = sample.input_ids, sample.loss_mask
    limit = header.identity.max_length
    rules = {
        "input_ids must be int32 [T] with T > 0": ids.dtype == np.int32 and ids.ndim == 1 and len(ids) > 0,
        "loss_mask must be uint8 of the same shape": mask.dtype == np.uint8 and mask.shape == ids.shape,
        f"more than max_length = {limit} tokens": ids.size <= limit,
        f"split must be one of {SPLITS}": sample.split in SPLITS,
        "sample_id and source_row must not be negative": sample.sample_id >= 0 and sample.source_row >= 0,
        "loss_mask must be of 0 and 1": mask.size == 0 or mask.max() <= 1,
        f"token ids must lie in [0, {header.vocab_size})": ids.size == 0
        or 0 <= ids.min() <= ids.max() < header.vocab_size,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        where = f"sample {sample.sample_id} ({sample.source_file}, row {sample.source_row})"
        raise CacheUsageError(f"{where}: {'; '.join(broken)}")


def digest_tokens(samples: Sequence[PlannedSample]) -> str:
    """sha256 over, sample by sample: sample_id and T as int64, T ids as int32, T masks as uint8, all little-endian."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(struct.pack("<qq", sample.sample_id, sample.num_tokens))
        digest.update(sample.input_ids.astype("<i4", copy=False).tobytes())
        digest.update(sample.loss_mask.tobytes())
    return digest.hexdigest()


def render_samples(samples: Sequence[PlannedSample]) -> bytes:
    """The bytes of a samples file (the same for the same samples and pyarrow release)."""
    ends = np.cumsum([sample.num_tokens for sample in samples])
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values)), type=SAMPLES_SCHEMA.field(name).type)
        for name, values in (
            ("input_ids", [sample.input_ids for sample in samples]),
            ("loss_mask", [sample.loss_mask for sample in samples]),
        )
    ]
    columns = [
        pa.array([sample.sample_id for sample in samples], pa.int64()),
        pa.array([sample.source_file for sample in samples], pa.string()),
        pa.array([sample.source_row for sample in samples], pa.int64()),
        *lists,
    ]
    return render_table(pa.Table.from_arrays(columns, schema=SAMPLES_SCHEMA))


def samples_size(index: PlanIndex, shard: int) -> TableSize:
    """What the samples file of a shard holds."""
    return TableSize(num_rows=len(index.shard_rows(shard)), num_values=int(index.shard_tokens[shard]))


def parse_samples(data: bytes, index: PlanIndex, shard: int, *, where: str) -> list[PlannedSample]:
    """Read a shard's samples back and check them against the index."""
    rows = index.shard_rows(shard)
    table = read_table(data, SAMPLES_SCHEMA, samples_size(index, shard), where=where)
    columns = [table.column(name).combine_chunks() for name in ("input_ids", "loss_mask")]
    lengths = [column.value_lengths().to_numpy() for column in columns]
    expected = index.num_tokens[rows.start : rows.stop]
    sample_ids = table.column("sample_id").to_numpy()
    if not np.array_equal(sample_ids, index.sample_ids[rows.start : rows.stop]):
        raise CacheFormatError(f"{where}: its sample ids are not those of the index")
    if not all(np.array_equal(length, expected) for length in lengths):
        raise CacheFormatError(f"{where}: its token counts are not those of the index")
    ids, masks = (np.array(column.flatten().to_numpy()) for column in columns)
    files = [names[code] for codes, names in read_codes(table.column("source_file")) for code in codes.tolist()]
    source_rows = table.column("source_row").to_pylist()
    return [
        PlannedSample(
            sample_id=int(index.sample_ids[row]),
            source_file=files[row - rows.start],
            source_row=source_rows[row - rows.start],
            input_ids=ids[start : start + length],
            loss_mask=masks[start : start + length],
            split=SPLITS[index.split_codes[row]],
        )
        for row, start, length in zip(
            rows, index.token_offsets[rows.start : rows.stop].tolist(), expected.tolist(), strict=True
        )
    ]


def concatenate(samples: Sequence[PlannedSample]) -> ShardTokens:
    """Flat arrays of a shard, as the reader slices them."""
    return ShardTokens(
        input_ids=np.concatenate([sample.input_ids for sample in samples]),
        loss_mask=np.concatenate([sample.loss_mask for sample in samples]),
        digest=digest_tokens(samples),
    )
