"""``index.parquet``: one row per sample, in the order of shards and of rows within them; no tokens.

Written by ``CachePlan.write``; read whole by whoever opens a cache.
"""

from array import array
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage import layout
from storage.bounds import MAX_SHARD_SAMPLES, MAX_SHARD_TOKENS
from storage.errors import CacheFormatError, CacheUsageError
from storage.manifest import SPLITS, CacheHeader, PlanSummary, SplitCounts
from storage.tables import INDEX_SCHEMA, TableSize, read_codes, read_table, render_table


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
    return render_table(pa.Table.from_arrays(columns, schema=INDEX_SCHEMA))


def parse_index(data: bytes, plan: PlanSummary, header: CacheHeader, *, where: str) -> PlanIndex:
    """Read the index back and check that it is a layout that a plan can have."""
    table = read_table(data, INDEX_SCHEMA, TableSize(num_rows=plan.num_samples), where=where)
    codes = [
        np.array([_split_code(name) for name in names], dtype=np.uint8)[places]
        for places, names in read_codes(table.column("split"))
    ]
    columns = {name: table.column(name).to_numpy() for name in INDEX_SCHEMA.names[:-1]}
    index_codes = np.concatenate(codes)
    _check_layout(columns, index_codes, plan, header, where)
    return PlanIndex(
        sample_ids=columns["sample_id"],
        shards=columns["shard"],
        token_offsets=columns["token_offset"],
        num_tokens=columns["num_tokens"],
        num_supervised=columns["num_supervised"],
        split_codes=index_codes,
    )


def _split_code(name: str) -> int:
    return SPLITS.index(name) if name in SPLITS else len(SPLITS)


def _check_layout(
    columns: dict[str, npt.NDArray[np.int64]],
    codes: npt.NDArray[np.uint8],
    plan: PlanSummary,
    header: CacheHeader,
    where: str,
) -> None:
    shards, tokens = columns["shard"], columns["num_tokens"].astype(np.int64)
    starts = np.cumsum(tokens) - tokens
    steps = np.diff(shards, prepend=shards[:1])
    first = np.flatnonzero(np.concatenate([[True], steps[1:] != 0])) if len(shards) else np.zeros(0, np.int64)
    rules = {
        "the number of samples": len(shards) == plan.num_samples > 0,
        "the shard numbers": len(first) == plan.num_shards and bool(np.all((steps == 0) | (steps == 1))),
        "the token counts": int(tokens.sum()) == plan.num_tokens and bool(np.all(tokens > 0)),
        "the samples longer than max_length": bool(np.all(tokens <= header.identity.max_length)),
        "the split names": bool(np.all(codes < len(SPLITS))),
    }
    if all(rules.values()):
        counts, ends = np.diff(np.append(first, len(shards))), np.append(starts[first], plan.num_tokens)
        offsets = starts - np.repeat(starts[first], counts)
        supervised = columns["num_supervised"]
        rules |= {
            "shard 0": int(shards[0]) == 0,
            "the sizes of shards": int(counts.max()) <= MAX_SHARD_SAMPLES
            and int(np.diff(ends).max()) <= MAX_SHARD_TOKENS,
            "the token offsets": bool(np.array_equal(offsets, columns["token_offset"])),
            "the supervised counts": bool(np.all((supervised >= 0) & (supervised <= tokens))),
            "the sample ids": len(np.unique(columns["sample_id"])) == len(shards) and columns["sample_id"].min() >= 0,
        }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise CacheFormatError(f"{where}: {', '.join(broken)} cannot be those of the plan in {layout.MANIFEST}")
