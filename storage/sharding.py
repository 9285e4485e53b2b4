"""Pure planning (no I/O): which samples share a shard, and which share a forward pass of the target."""

from collections.abc import Iterable, Iterator, Sequence

from storage.bounds import find_shard_excess
from storage.errors import CacheUsageError
from storage.manifest import CacheHeader
from storage.samples import PlannedSample, check_sample


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[range]:
    """Cut a shard's samples into contiguous runs whose padded size (count x longest) stays within the budget.

    One sample alone may exceed it. A pure function of the plan, so which samples share a forward never varies.
    """
    batches: list[range] = []
    start = longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, int(length))
        if row > start and (row + 1 - start) * longest > max_batch_tokens:
            batches.append(range(start, row))
            start, longest = row, int(length)
    return [*batches, range(start, len(lengths))] if len(lengths) else batches


def plan_shards(samples: Iterable[PlannedSample], header: CacheHeader) -> Iterator[list[PlannedSample]]:
    """Fill shards in source order up to ``shard_bytes`` of payload; longest first within a shard, ties in source order.

    A sample that is larger than a shard gets one of its own. Longest first, so that what does not fit into memory
    shows in the first batch.
    """
    limit = header.identity.shard_bytes
    shard: list[PlannedSample] = []
    num_bytes = 0
    for sample in samples:
        check_sample(sample, header)
        sample_bytes = sample.num_tokens * header.token_bytes
        if shard and num_bytes + sample_bytes > limit:
            yield _sort_shard(shard)
            shard, num_bytes = [], 0
        shard.append(sample)
        num_bytes += sample_bytes
    if shard:
        yield _sort_shard(shard)


def _sort_shard(shard: list[PlannedSample]) -> list[PlannedSample]:
    num_tokens = sum(sample.num_tokens for sample in shard)
    if excess := find_shard_excess(num_samples=len(shard), num_tokens=num_tokens):
        raise CacheUsageError(f"the shard of sample {shard[0].sample_id} {excess}; lower cache.shard_bytes")
    return sorted(shard, key=lambda item: -item.num_tokens)
