"""What a cache can be at most, looked at before memory is taken for it: a small file can claim to be anything.

The limits lie far beyond any cache that is of use, and planning refuses what reading would. Within them, what a file
may hold follows from the plan: see ``TableSize`` for tables, ``max_commit_bytes`` for commit records.
"""

from typing import TYPE_CHECKING

from storage import layout
from storage.tables import INDEX_SCHEMA, SAMPLES_SCHEMA, TableSize

if TYPE_CHECKING:
    from storage.manifest import Manifest

MAX_RECORD_BYTES = 32 << 20  # of a manifest or a commit: 300,000 shards, 150 TB of shards of the default size
MAX_LAYERS = 1024
MAX_TOKEN_BYTES = 8 << 20  # every layer of a target of 126 layers and 16,384 channels, and an inner chunk of 2 GiB
MAX_SHARD_TOKENS = 1 << 26
MAX_SHARD_SAMPLES = 1 << 20
MAX_TARGET_TEXT_BYTES = 1 << 28  # of a file of target/ that is read whole: a config, a tokenizer

_RECORD_BYTES = 1 << 16  # what the fields of a commit take that do not grow with the shard
_LAYER_BYTES, _CHUNK_BYTES, _SAMPLE_BYTES, _POSITION_BYTES = 8192, 32, 512, 32  # and those that do, rendered


def find_excess(manifest: "Manifest") -> list[str]:
    """What a manifest claims that cannot be: totals that contradict each other, files larger than their content."""
    plan, header = manifest.plan, manifest.header
    ordered = 0 < plan.num_shards <= plan.num_samples <= plan.num_tokens and plan.num_supervised <= plan.num_tokens
    if not ordered:
        return [
            f"the shard, sample and token counts cannot be: {plan.num_shards} shards, {plan.num_samples} samples, "
            f"{plan.num_tokens} tokens, {plan.num_supervised} of them supervised"
        ]
    rows, tokens = min(plan.num_samples, MAX_SHARD_SAMPLES), min(plan.num_tokens, MAX_SHARD_TOKENS)
    tokens = min(tokens, rows * header.identity.max_length)
    samples_bytes = TableSize(num_rows=rows, num_values=tokens).file_bytes(SAMPLES_SCHEMA)
    sizes = {name: record.num_bytes for name, record in manifest.files.items()}
    problems = [
        f"{name}: {size} bytes, at most {samples_bytes} can be samples"
        for name, size in sizes.items()
        if name.startswith(f"{layout.SAMPLES}/") and size > samples_bytes
    ]
    index_size = TableSize(num_rows=plan.num_samples)
    if problem := index_size.find_misfit(sizes[layout.INDEX], INDEX_SCHEMA):
        problems.append(f"{layout.INDEX}: {problem}")
    return problems[:3]


def find_shard_excess(*, num_samples: int, num_tokens: int) -> str | None:
    """What is wrong with a shard of so many samples and tokens, if anything."""
    if num_samples <= MAX_SHARD_SAMPLES and num_tokens <= MAX_SHARD_TOKENS:
        return None
    return (
        f"holds {num_samples} samples of {num_tokens} tokens, a shard holds {MAX_SHARD_SAMPLES} of {MAX_SHARD_TOKENS} "
        "at most"
    )


def max_commit_bytes(*, num_layers: int, num_chunks: int, num_samples: int, num_tokens: int) -> int:
    """What the commit record of a shard cannot exceed: crc32c of chunks, excluded samples, measured positions."""
    grown = (
        num_layers * _LAYER_BYTES + num_chunks * _CHUNK_BYTES + num_samples * _SAMPLE_BYTES
        + num_tokens * _POSITION_BYTES
    )  # fmt: skip
    return min(_RECORD_BYTES + grown, MAX_RECORD_BYTES)
