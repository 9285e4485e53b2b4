"""What the benchmarks share: timing, cold files, and caches of known content."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.config import Config, load_config
from storage import FORMAT_VERSION, CacheHeader, CacheIdentity, CachePlan, CacheWriter, PlannedSample

ROOT = Path(__file__).parent.parent


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder on the checkout's disk, removed at the end; what a kill leaves lies in `build/`, which git ignores."""
    (ROOT / "build").mkdir(exist_ok=True)
    return tempfile.TemporaryDirectory(dir=ROOT / "build")


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def core_seconds(action: Callable[[], object]) -> float:
    """Processor time of this process: what a core needs for it, whatever else runs on the machine."""
    started = time.process_time()
    action()
    return time.process_time() - started


def ratio(baseline: list[float], measured: list[float]) -> str:
    """Median of the pairwise ratios, with their extremes: pairs were timed one after the other."""
    pairs = [first / second for first, second in zip(baseline, measured, strict=True)]
    return f"{statistics.median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})"


def embedded(folder: Path, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / "embedded.toml", [f"cache.path='{folder}/cache'", *overrides])


def make_cold(folder: Path) -> None:
    """Write what is dirty and drop the folder's pages from memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def make_cache(
    path: Path, lengths: list[int], *, hidden_size: int, num_layers: int, encoding: str, shard_bytes: int
) -> Path:
    """A cache of random bf16 states with the spread of real ones."""
    identity = CacheIdentity(
        format_version=FORMAT_VERSION,
        max_samples=None,
        validation_digest=None,
        **dict.fromkeys(("target_config_digest", "target_weights_digest", "tokenizer_digest"), "made up"),
        **dict.fromkeys(("chat_template_digest", "data_digest", "dtype", "attn_implementation"), "made up"),
        layers=tuple(range(num_layers)),
        encoding=encoding,
        max_length=1 << 20,
        overlong="drop",
        supervise="all",
        min_supervised_tokens=1,
        validation_fraction=0.0,
        max_batch_tokens=1 << 14,
        shard_bytes=shard_bytes,
    )
    header = CacheHeader(
        identity=identity,
        hidden_size=hidden_size,
        num_target_layers=num_layers + 1,
        vocab_size=1000,
        mask_token_id=999,
        logit_scale=None,
        logit_softcap=None,
        provenance={},
    )
    plan = CachePlan.write(path, _samples(lengths), header=header)
    writer = CacheWriter(path)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 16, num_layers + 1, hidden_size, generator=generator)[:, :, :].mul_(
        torch.rand(hidden_size, generator=generator).exp()
    )
    noise = noise.bfloat16()
    for shard in range(plan.num_shards):
        with writer.shard(shard) as shard_writer:
            left = plan.planned_shard(shard).num_tokens
            while left:
                rows = noise[: min(left, len(noise))]
                shard_writer.append(rows[:, :num_layers], rows[:, num_layers])
                left -= len(rows)
    return path


def _samples(lengths: list[int]) -> Iterator[PlannedSample]:
    for row, length in enumerate(lengths):
        ids = np.full(length, row % 999, dtype=np.int32)
        yield PlannedSample(
            sample_id=row,
            source_file="made up",
            source_row=row,
            input_ids=ids,
            loss_mask=np.ones(length, dtype=np.uint8),
            split="train",
        )
