"""``index.parquet``: one row per sample, in the order of shards and of rows within them; no tokens.

Written by ``CachePlan.write``; read whole by whoever opens a cache.
"""

import io
from array import array
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage import layout
from storage.errors import CacheFormatError, CacheUsageError
from storage.manifest import SPLITS, PlanSummary, SplitCounts

_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("token_offset", pa.int64(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("num_supervised", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanIndex:
    """The index as columns [N]; ``token_offsets`` count rows from the start of the sample's shard."""

    sample_ids: npt.NDArray[np.int64]
    shards: npt.NDArray[np.int32]
    token_offsets: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int32]
    num_supervised: npt.NDArray[np.int32]
    split_codes: npt.NDArray[np.uint8]
    shard_starts: npt.NDArray[np.int64] = field(init=False)
    shard_tokens: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        num_shards = int(self.shards.max()) + 1
        counts = np.bincount(self.shards, minlength=num_shards)
        tokens = np.bincount(self.shards, weights=self.num_tokens, minlength=num_shards).astype(np.int64)
        object.__setattr__(self, "shard_starts", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        object.__setattr__(self, "shard_tokens", tokens)

    @property
    def num_shards(self) -> int:
        """Number of planned shards."""
        return len(self.shard_tokens)

    def shard_rows(self, shard: int) -> range:
        """Rows of the index that belong to a shard, in the order in which their tokens lie in it."""
        return range(int(self.shard_starts[shard]), int(self.shard_starts[shard + 1]))

    def summarise_splits(self) -> dict[str, SplitCounts]:
        """Totals of each split."""
        masks = {split: self.split_codes == code for code, split in enumerate(SPLITS)}
        return {
            split: SplitCounts(
                num_samples=int(mask.sum()),
                num_tokens=int(self.num_tokens[mask].sum(dtype=np.int64)),
                num_supervised=int(self.num_supervised[mask].sum(dtype=np.int64)),
            )
            for split, mask in masks.items()
        }


class IndexBuilder:
    """Collects the index row by row, 29 bytes each."""

    def __init__(self) -> None:
        self._columns = {name: array("q") for name in ("sample_id", "shard", "offset", "tokens", "supervised")}
        self._split_codes = bytearray()

    def append(self, *, sample_id: int, shard: int, token_offset: int, counts: tuple[int, int], split: str) -> None:
        """Add the next sample; ``counts`` are its tokens and its supervised tokens."""
        for column, value in zip(self._columns.values(), (sample_id, shard, token_offset, *counts), strict=True):
            column.append(value)
        self._split_codes.append(SPLITS.index(split))

    def finish(self) -> PlanIndex:
        """The index; an empty plan and a repeated sample_id are errors."""
        sample_ids, shards, offsets, tokens, supervised = (
            np.frombuffer(column, dtype=np.int64) for column in self._columns.values()
        )
        if not len(sample_ids):
            raise CacheUsageError("no sample is left to plan: the data is empty or every row was dropped")
        ids, repeats = np.unique(sample_ids, return_counts=True)
        if len(ids) != len(sample_ids):
            raise CacheUsageError(f"sample_id {int(ids[repeats > 1][0])} occurs more than once in the plan")
        return PlanIndex(
            sample_ids=sample_ids,
            shards=shards.astype(np.int32),
            token_offsets=offsets,
            num_tokens=tokens.astype(np.int32),
            num_supervised=supervised.astype(np.int32),
            split_codes=np.frombuffer(bytes(self._split_codes), dtype=np.uint8),
        )


def render_index(index: PlanIndex) -> bytes:
    """The bytes of ``index.parquet`` (the same for the same index and pyarrow release)."""
    codes = pa.array(index.split_codes.astype(np.int32))
    columns = [
        pa.array(index.sample_ids),
        pa.array(index.shards),
        pa.array(index.token_offsets),
        pa.array(index.num_tokens),
        pa.array(index.num_supervised),
        pa.DictionaryArray.from_arrays(codes, pa.array(SPLITS)).cast(pa.string()),
    ]
    return render_table(pa.Table.from_arrays(columns, schema=_SCHEMA))


def render_table(table: pa.Table) -> bytes:
    """Parquet bytes with every option that could vary fixed."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, version="2.6", compression="zstd", row_group_size=1 << 20)
    return buffer.getvalue()


def read_table(data: bytes, schema: pa.Schema, *, where: str) -> pa.Table:
    """Parse Parquet bytes that must have exactly this schema and no nulls."""
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        table.validate(full=True)  # strings are of any bytes until then
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CacheFormatError(f"{where}: is not a readable Parquet file: {error}") from error
    if not table.schema.equals(schema) or any(column.null_count for column in table.columns):
        raise CacheFormatError(f"{where}: expected columns without nulls {_names(schema)}, got {_names(table.schema)}")
    return table


def parse_index(data: bytes, plan: PlanSummary, *, where: str) -> PlanIndex:
    """Read the index back and check that it is a layout that a plan can have."""
    table = read_table(data, _SCHEMA, where=where)
    codes = np.full(table.num_rows, len(SPLITS), dtype=np.uint8)
    for code, split in enumerate(SPLITS):
        codes[pc.equal(table.column("split"), split).to_numpy()] = code
    columns = {name: table.column(name).to_numpy() for name in _SCHEMA.names[:-1]}
    _check_layout(columns, codes, plan, where)
    return PlanIndex(
        sample_ids=columns["sample_id"],
        shards=columns["shard"],
        token_offsets=columns["token_offset"],
        num_tokens=columns["num_tokens"],
        num_supervised=columns["num_supervised"],
        split_codes=codes,
    )


def _check_layout(
    columns: dict[str, npt.NDArray[np.int64]], codes: npt.NDArray[np.uint8], plan: PlanSummary, where: str
) -> None:
    shards, tokens = columns["shard"], columns["num_tokens"].astype(np.int64)
    starts = np.cumsum(tokens) - tokens
    steps = np.diff(shards, prepend=shards[:1])
    first = np.flatnonzero(np.concatenate([[True], steps[1:] != 0])) if len(shards) else np.zeros(0, np.int64)
    rules = {
        "the number of samples": len(shards) == plan.num_samples > 0,
        "the shard numbers": len(first) == plan.num_shards and bool(np.all((steps == 0) | (steps == 1))),
        "the token counts": int(tokens.sum()) == plan.num_tokens and bool(np.all(tokens > 0)),
        "the split names": bool(np.all(codes < len(SPLITS))),
    }
    if all(rules.values()):
        offsets = starts - np.repeat(starts[first], np.diff(np.append(first, len(shards))))
        supervised = columns["num_supervised"]
        rules |= {
            "shard 0": int(shards[0]) == 0,
            "the token offsets": bool(np.array_equal(offsets, columns["token_offset"])),
            "the supervised counts": bool(np.all((supervised >= 0) & (supervised <= tokens))),
            "the sample ids": len(np.unique(columns["sample_id"])) == len(shards) and columns["sample_id"].min() >= 0,
        }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise CacheFormatError(f"{where}: {', '.join(broken)} cannot be those of the plan in {layout.MANIFEST}")


def _names(schema: pa.Schema) -> str:
    return ", ".join(f"{item.name} {item.type}" for item in schema)
