"""What an extraction will cost, told before it starts: bytes and hours."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.extract.decode_error import TOKENS_PER_SHARD
from storage import ENCODINGS, INNER_TOKENS, CacheHeader

ASSUMED_UTILISATION = 0.4  # assumption: share of the device's matrix rate that a forward pass reaches
RATE_SECONDS = 0.3  # how long the matrix rate is measured
COMPRESSED_SHARE = 0.70  # of bf16 states, measured: 0.66 to 0.70; what a cache really takes is known when it is there
SHARD_FILE_BYTES = 16_384  # metadata, commit and samples file of a shard without its rows: 4 to 10 KB measured
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


def bound_overhead(header: CacheHeader, *, num_samples: int, num_tokens: int) -> int:
    """What a cache takes beside its states, in bytes, at most.

    A shard's last inner chunk is padded to 256 tokens, and two neighbouring shards hold more than `shard_bytes`
    together; the plan has 5 bytes a token and a row a sample; target/ has embedding and head, at most 4 bytes a value.
    """
    states = num_tokens * header.token_bytes
    num_shards = min(2 * states // header.identity.shard_bytes + 1, num_samples)
    errors = TOKENS_PER_SHARD * (len(header.identity.layers) + 1) * MEASURED_BYTES if header.encoding.lossy else 0
    padding = num_shards * (INNER_TOKENS * header.token_bytes + SHARD_FILE_BYTES + errors)
    return padding + 5 * num_tokens + SAMPLE_ROW_BYTES * num_samples + 2 * 4 * header.vocab_size * header.hidden_size


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


def count_forward_parameters(config: Any, *, trust_remote_code: bool) -> int:
    """Parameters that a token passes through in the decoder stack, counted on a model without storage.

    Embedding and head do not count (extraction runs neither as a matrix product). Of a mixture of experts, only the
    chosen share of the experts does.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = next(
        (
            getattr(config, key)
            for key in ("num_local_experts", "num_experts", "n_routed_experts")
            if getattr(config, key, None)
        ),
        None,
    )
    skipped = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module}
    total = 0.0
    for name, parameter in model.named_parameters():
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


def estimate_hours(*, num_parameters: int, num_tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Hours of forward passes: 2 operations a parameter and token, at the measured matrix rate of this device."""
    return 2 * num_parameters * num_tokens / (measure_matrix_rate(device, dtype) * ASSUMED_UTILISATION) / 3600
