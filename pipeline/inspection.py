"""What a cache is, as numbers: identity, sizes, lengths, mask coverage, norms, frequent tokens, exclusions.

The plan tells most of it, for an unfinished cache too. States, tokens and records are looked at in samples of bounded
size, drawn with a seed, so the time does not grow with the cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from storage import (
    CacheError,
    CachePlan,
    CacheReader,
    CommitRecord,
    LossyCommitRecord,
    LossyCommitRecordV1,
    Sample,
    list_commits,
    read_commit,
)

SEED = 0
MAX_NORM_SAMPLES = 64
MAX_NORM_TOKENS = 32_768  # 1 GB of states of Qwen3-4B with five layers
MAX_TOKEN_SHARDS = 16
MAX_SIZED_SHARDS = 256
NUM_BINS = 12
NUM_FREQUENT_TOKENS = 10
MAX_EXCLUSIONS = 20
MAX_RELATIVE_ERROR = 0.05  # of a layer's worst tokens but 1 %: above, other encodings are named


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of values in [edges[i], edges[i + 1]); the last bin has its upper edge too."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LayerNorms:
    """L2 norms of the states of one layer (None: the last state), a value per token; None where no norm is finite."""

    layer: int | None
    mean: float | None
    max: float | None
    num_zero: int
    num_non_finite: int


@dataclass(frozen=True, kw_only=True)
class StateSample:
    """Norms over `num_samples` samples of committed shards; `errors` says which others could not be read."""

    num_samples: int
    num_tokens: int
    layers: tuple[LayerNorms, ...]
    errors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """A token id, how often it occurs in the counted samples files, and its text where target/ has a tokenizer."""

    token_id: int
    count: int
    text: str | None


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """A quarantined sample, where it came from, and the layer (None: the last state) that is the reason."""

    sample_id: int
    source_file: str
    source_row: int
    layer: int | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class TotalVariation:
    """½·‖p_exact - p_decoded‖₁ of the target's distribution, at the positions that the looked-at commits recorded."""

    num_positions: int
    mean: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """‖decoded - exact‖₂ / ‖exact‖₂ of one layer (None: the last state) over `num_tokens` tokens."""

    layer: int | None
    num_tokens: int
    median: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class EncodingLoss:
    """What a lossy encoding costs, from the records of up to MAX_SIZED_SHARDS committed shards.

    `total_variation` is None where no position was measured; `layers` is empty where records have none (version 1).
    """

    encoding: str
    total_variation: TotalVariation | None
    layers: tuple[LayerError, ...]

    @property
    def bad_layers(self) -> tuple[LayerError, ...]:
        """Those of which more than 1 % of the tokens are above MAX_RELATIVE_ERROR."""
        return tuple(layer for layer in self.layers if layer.p99 > MAX_RELATIVE_ERROR)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything that `dspark inspect` shows. Sizes in bytes.

    `num_committed_bytes` are the chunk files of committed shards, from their records; `is_estimated`: from
    MAX_SIZED_SHARDS of them, by tokens. `loss` is None where nothing is lost. Lengths, masks and splits are of every
    planned sample.
    """

    path: str
    identity: dict[str, Any]
    provenance: dict[str, str]
    num_shards: int
    num_committed_shards: int
    num_samples: int
    num_tokens: int
    num_supervised: int
    splits: dict[str, dict[str, int]]
    dropped: dict[str, int]
    payload_bytes: int
    payload_bytes_per_token: int
    plan_file_bytes: int
    num_committed_tokens: int
    num_committed_bytes: int
    is_estimated: bool
    loss: EncodingLoss | None
    lengths: Histogram
    length_quantiles: tuple[int, ...]
    supervised: Histogram
    mask_shares: Histogram
    states: StateSample
    num_counted_tokens: int
    frequent_tokens: tuple[TokenCount, ...]
    num_excluded: int
    exclusions: tuple[Exclusion, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every planned shard is committed."""
        return self.num_committed_shards == self.num_shards

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "is_complete": self.is_complete}


def inspect_cache(path: Path) -> Inspection:
    """Look at a planned cache, whether or not all its shards are there. Raises CacheError."""
    plan = CachePlan.read(path)
    summary, index = plan.manifest.plan, plan.index
    commits, markers = list_commits(path)
    committed = sorted(commits & set(range(plan.num_shards)))
    num_committed_tokens = sum(plan.planned_shard(shard).num_tokens for shard in committed)
    num_counted, frequent = count_tokens(plan)
    records = _read_records(plan, committed, markers)
    num_excluded, exclusions = list_exclusions(plan, sorted(markers & set(committed)))
    return Inspection(
        path=str(path),
        identity=plan.manifest.identity.model_dump(mode="json"),
        provenance=dict(plan.header.provenance),
        num_shards=plan.num_shards,
        num_committed_shards=len(committed),
        num_samples=summary.num_samples,
        num_tokens=summary.num_tokens,
        num_supervised=summary.num_supervised,
        splits={split: counts.model_dump() for split, counts in summary.splits.items()},
        dropped=dict(summary.dropped),
        payload_bytes=summary.payload_bytes,
        payload_bytes_per_token=plan.header.token_bytes,
        plan_file_bytes=plan.plan_file_bytes(),
        num_committed_tokens=num_committed_tokens,
        num_committed_bytes=size_shards(records, num_tokens=num_committed_tokens),
        is_estimated=len(committed) > MAX_SIZED_SHARDS,
        loss=sum_up_loss(plan, records),
        lengths=count_values(index.num_tokens),
        length_quantiles=tuple(np.quantile(index.num_tokens, [0, 0.25, 0.5, 0.75, 1]).astype(int).tolist()),
        supervised=count_values(index.num_supervised),
        mask_shares=_histogram(index.num_supervised / index.num_tokens, np.linspace(0, 1, 11)),
        states=measure_norms(CacheReader(path, partial=True)),
        num_counted_tokens=num_counted,
        frequent_tokens=frequent,
        num_excluded=num_excluded,
        exclusions=exclusions,
    )


def count_values(values: npt.NDArray[np.int32]) -> Histogram:
    """Histogram of counts with whole edges at about equal ratios, from the smallest value to the largest."""
    low, high = int(values.min()), int(values.max())
    steps = np.geomspace(max(low, 1), high + 1, NUM_BINS + 1)[1:] if high else np.ones(1)
    return _histogram(values, np.unique([low, *np.ceil(steps).astype(np.int64)]))


def _histogram(values: npt.NDArray[Any], edges: npt.NDArray[Any]) -> Histogram:
    counts, _ = np.histogram(values, edges)
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))


def size_shards(records: Sequence[CommitRecord], *, num_tokens: int) -> int:
    """Bytes of the chunk files that hold `num_tokens`, from the records of all their shards or of a part of them."""
    num_bytes = sum(array.file_bytes for record in records for array in record.arrays.values())
    return num_bytes * num_tokens // max(sum(record.num_tokens for record in records), 1)


def measure_loss(plan: CachePlan) -> EncodingLoss | None:
    """What the encoding of the plan's committed shards costs; None for an exact one, or where no shard is committed."""
    commits, markers = list_commits(plan.path)
    committed = sorted(commits & set(range(plan.num_shards)))
    return sum_up_loss(plan, _read_records(plan, committed, markers)) if plan.header.encoding.lossy else None


def sum_up_loss(plan: CachePlan, records: Sequence[CommitRecord]) -> EncodingLoss | None:
    """As `measure_loss`, of these records."""
    lossy = [record for record in records if isinstance(record, LossyCommitRecordV1)]
    if not lossy:
        return None
    values = [value for record in lossy for value in record.total_variation]
    return EncodingLoss(
        encoding=plan.header.encoding.name,
        total_variation=_sum_up_variation(values) if values else None,
        layers=tuple(_sum_up_layers(plan, [record for record in lossy if isinstance(record, LossyCommitRecord)])),
    )


def _sum_up_variation(values: Sequence[float]) -> TotalVariation:
    return TotalVariation(num_positions=len(values), mean=float(np.mean(values)), p99=float(np.quantile(values, 0.99)))


def _sum_up_layers(plan: CachePlan, records: Sequence[LossyCommitRecord]) -> Iterator[LayerError]:
    for place, layer in enumerate([*plan.header.identity.layers, None]):
        values = [value for record in records for value in record.relative_error[place]]
        if values:
            median, p99 = np.quantile(values, [0.5, 0.99]).tolist()
            yield LayerError(layer=layer, num_tokens=len(values), median=median, p99=p99)


def _read_records(plan: CachePlan, committed: Sequence[int], markers: set[int]) -> list[CommitRecord]:
    """The records of up to MAX_SIZED_SHARDS committed shards."""
    return [_read_record(plan, shard, markers) for shard in _draw(committed, MAX_SIZED_SHARDS)]


def _read_record(plan: CachePlan, shard: int, markers: set[int]) -> CommitRecord:
    return read_commit(plan.planned_shard(shard), has_marker=shard in markers)


def _draw(shards: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the shards, at random."""
    chosen = np.random.default_rng(SEED).permutation(len(shards))[:count]
    return [shards[place] for place in sorted(chosen.tolist())]


def measure_norms(reader: CacheReader) -> StateSample:
    """Norms of up to MAX_NORM_SAMPLES random samples, of MAX_NORM_TOKENS or little more in all."""
    norms: list[torch.Tensor] = []
    errors: list[str] = []
    num_tokens = 0
    for index in np.random.default_rng(SEED).permutation(len(reader))[:MAX_NORM_SAMPLES].tolist():
        try:
            norms.append(_token_norms(reader[index]))
        except CacheError as error:
            errors.append(str(error))
            continue
        num_tokens += len(norms[-1])
        if num_tokens >= MAX_NORM_TOKENS:
            break
    norms_TL = torch.cat(norms) if norms else torch.zeros(0, len(reader.layers) + 1)
    layers = zip([*reader.layers, None], norms_TL.unbind(1), strict=True)
    return StateSample(
        num_samples=len(norms),
        num_tokens=num_tokens,
        layers=tuple(_summarise_norms(layer, norms_T) for layer, norms_T in layers),
        errors=tuple(sorted(set(errors))),
    )


def _token_norms(sample: Sample) -> torch.Tensor:
    """[T, L + 1], the last state behind the layers."""
    states = torch.cat([sample.hidden_states, sample.last_hidden_states[:, None]], dim=1)
    norms_TL: torch.Tensor = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
    return norms_TL


def _summarise_norms(layer: int | None, norms_T: torch.Tensor) -> LayerNorms:
    finite = norms_T[norms_T.isfinite()]
    return LayerNorms(
        layer=layer,
        mean=float(finite.mean()) if len(finite) else None,
        max=float(finite.max()) if len(finite) else None,
        num_zero=int((norms_T == 0).sum()),
        num_non_finite=len(norms_T) - len(finite),
    )


def count_tokens(plan: CachePlan) -> tuple[int, tuple[TokenCount, ...]]:
    """(tokens counted, the most frequent ones), over up to MAX_TOKEN_SHARDS samples files. Raises CacheError."""
    shards = _draw(range(plan.num_shards), MAX_TOKEN_SHARDS)
    ids = np.concatenate([sample.input_ids for shard in shards for sample in plan.read_samples(shard)])
    values, counts = np.unique(ids, return_counts=True)
    top = np.argsort(-counts, kind="stable")[:NUM_FREQUENT_TOKENS]
    token_ids = values[top].tolist()
    rows = zip(token_ids, counts[top].tolist(), token_texts(plan.target_dir, token_ids), strict=True)
    return len(ids), tuple(TokenCount(token_id=token, count=count, text=text) for token, count, text in rows)


def token_texts(target_dir: Path, token_ids: Sequence[int]) -> list[str | None]:
    """The text of each token, None where target/ has no tokenizer that loads.

    By `tokenizer.json` alone: other files of a tokenizer may name Python code beside them, which nothing here runs.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(target_dir / "tokenizer.json"))
        return [str(tokenizer.decode([token], skip_special_tokens=False)) for token in token_ids]
    except Exception:  # tokenizers raises plain Exception, and inspecting needs none
        return [None] * len(token_ids)


def list_exclusions(plan: CachePlan, shards: Sequence[int]) -> tuple[int, tuple[Exclusion, ...]]:
    """(quarantined samples, the first MAX_EXCLUSIONS of them) of the committed shards that have some."""
    total = 0
    shown: list[Exclusion] = []
    for shard in shards:
        excluded = _read_record(plan, shard, {shard}).excluded
        total += len(excluded)
        if len(shown) == MAX_EXCLUSIONS:
            continue
        planned = {sample.sample_id: sample for sample in plan.read_samples(shard)}
        shown += [
            Exclusion(
                sample_id=item.sample_id,
                source_file=planned[item.sample_id].source_file,
                source_row=planned[item.sample_id].source_row,
                layer=item.layer,
                reason=item.reason,
            )
            for item in excluded[: MAX_EXCLUSIONS - len(shown)]
        ]
    return total, tuple(shown)
