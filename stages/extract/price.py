"""What an extraction will cost, told before it starts: bytes and hours."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from stages.extract.decode_error import TOKENS_PER_SHARD
from stages.extract.target import TOKENIZER_FILES, TargetParts
from stages.target_shape import parse_target_shape
from storage import ENCODINGS, INNER_TOKENS, CacheHeader

ASSUMED_UTILISATION = 0.4  # assumption: share of the device's matrix rate that a forward pass reaches
ASSUMED_DECODE_UTILISATION = 0.05  # assumption: the same of decoding in batches, which reads all weights for each token
RATE_SECONDS = 0.3  # how long the matrix rate is measured
COMPRESSED_SHARE = 0.70  # of bf16 states, measured: 0.66 to 0.70; what a cache really takes is known when it is there
SHARD_FILE_BYTES = 16_384  # metadata, commit and samples file of a shard without its rows: 4 to 10 KB measured
TARGET_EXTRA_BYTES = 131_072  # of target/: shape, chat template, final norm, tensor names (assumption)
MEASURED_BYTES = 16  # of one error in a lossy shard's commit: a line of JSON
SAMPLE_ROW_BYTES = 512  # index, source file and row of a sample, before compression (assumption: names of 400 bytes)

# Relative L2 error of the worst of SmolLM2-135M's layers, median over tokens: measured (benchmarks/RESULTS.md).
KNOWN_ERRORS = {"int8": 0.016, "fp8": 0.026}


@dataclass(frozen=True, kw_only=True)
class Tier:
    """What one encoding would take. Exact, but for a compressed one, which is expected from measurements.

    `known_error`: what a lossy one loses of a layer of a real target, as `KNOWN_ERRORS` has it.
    """

    encoding: str
    bytes_per_token: int
    num_bytes: int
    known_error: float | None


@dataclass(frozen=True, kw_only=True)
class Price:
    """Samples, tokens, bytes and hours of one extraction.

    `num_bytes` are the states, `num_overhead_bytes` an upper bound of the rest (see `bound_overhead`), `num_free_bytes`
    those of the disk under the cache.
    """

    num_samples: int
    num_tokens: int
    num_supervised: int
    bytes_per_token: int
    num_bytes: int
    num_overhead_bytes: int
    num_free_bytes: int
    num_forward_parameters: int
    hours: float
    device: str
    encoding: str
    tiers: tuple[Tier, ...]
    layers: tuple[int, ...]
    max_length: int

    @property
    def fits(self) -> bool:
        return self.num_bytes + self.num_overhead_bytes <= self.num_free_bytes


def expected_bytes(num_bytes: int, header: CacheHeader) -> int:
    """What `num_bytes` of planned payload will take on disk: less where the encoding compresses them."""
    return int(num_bytes * COMPRESSED_SHARE) if header.encoding.compressed else num_bytes


def count_target_bytes(parts: TargetParts, *, folder: Path, dtype: torch.dtype) -> int:
    """Size of the cache's target/: the embedding, the head where it is another tensor, and the target's small files."""
    rows = {id(module.weight): module.weight for module in (parts.embed_tokens, parts.lm_head)}
    small = [folder / name for name in ("config.json", *TOKENIZER_FILES)]
    files = sum(file.stat().st_size for file in small if file.is_file())
    return int(sum(weight.numel() for weight in rows.values())) * dtype.itemsize + files + TARGET_EXTRA_BYTES


def bound_overhead(header: CacheHeader, *, num_samples: int, num_tokens: int, target_bytes: int) -> int:
    """What a cache takes beside its states, in bytes, at most.

    A shard's last inner chunk is padded to 256 tokens, and two neighbouring shards hold more than `shard_bytes`
    together; the plan has 5 bytes a token and a row a sample; `target_bytes` as `count_target_bytes` says.
    """
    states = num_tokens * header.token_bytes
    num_shards = min(2 * states // header.identity.shard_bytes + 1, num_samples)
    errors = TOKENS_PER_SHARD * (len(header.identity.layers) + 1) * MEASURED_BYTES if header.encoding.lossy else 0
    padding = num_shards * (INNER_TOKENS * header.token_bytes + SHARD_FILE_BYTES + errors)
    return padding + 5 * num_tokens + SAMPLE_ROW_BYTES * num_samples + target_bytes


def price_tiers(header: CacheHeader, *, num_tokens: int) -> tuple[Tier, ...]:
    """The same states in every encoding."""
    tiers = []
    for name in ENCODINGS:
        stored = header.model_copy(update={"identity": header.identity.model_copy(update={"encoding": name})})
        token_bytes = expected_bytes(stored.token_bytes, stored)
        num_bytes = num_tokens * token_bytes
        error = KNOWN_ERRORS.get(name)
        tiers.append(Tier(encoding=name, bytes_per_token=token_bytes, num_bytes=num_bytes, known_error=error))
    return tuple(tiers)


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that `path` is on or will be made on."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def count_forward_parameters(parts: TargetParts) -> int:
    """Parameters that a token passes through in the decoder stack; a model without storage will do.

    Embedding and head do not count (extraction runs neither as a matrix product). Of a mixture of experts, only the
    chosen share of the experts does.
    """
    shape = parse_target_shape(parts.model.config)
    chosen, experts = shape.num_active_experts, shape.num_experts
    skipped = {id(weight) for module in parts.decoder.modules() if isinstance(module, nn.Embedding)
               for weight in module.parameters()}  # fmt: skip
    total = 0.0
    for name, parameter in parts.decoder.named_parameters():
        if id(parameter) not in skipped:
            share = chosen / experts if chosen and experts and ".experts." in name else 1.0
            total += parameter.numel() * share
    return int(total)


def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product on `device`, measured now."""
    size = 4096 if device.type == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=device, dtype=torch.float32).to(dtype)
    torch.mm(left, right)
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < RATE_SECONDS:
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
    return 2 * size**3 * count / elapsed


def estimate_hours(
    *,
    num_parameters: int,
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    utilisation: float = ASSUMED_UTILISATION,
) -> float:
    """Hours of forward passes: 2 operations a parameter and token, at the measured matrix rate of this device."""
    return 2 * num_parameters * num_tokens / (measure_matrix_rate(device, dtype) * utilisation) / 3600
