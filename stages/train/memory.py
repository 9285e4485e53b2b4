"""What a training takes of the device's memory, from config and shapes alone, before anything is allocated.

The least is certain: weights, AdamW's averages, and gradients or one chunk of the objective. A run whose least is not
free is refused. Activations are estimated from what each operation of a layer keeps for its backward pass; a run of
which only the whole estimate does not fit is warned about, since it may fit all the same.

Symbols: S tokens and Q = A*K slots of the largest micro-batch, D hidden, I MLP width, H*E and G*E widths of queries and
keys, e bytes of the compute dtype.
"""

import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config

from stages.errors import SettingError
from stages.train.attention import GROUP_QUERIES
from stages.train.feed import NUM_BUFFERS
from stages.train.fused import CHUNK_BYTES
from stages.train.model import Qwen3DSparkModel
from stages.train.order import Schedule, plan_epoch, plan_micro_batches
from stages.train.settings import TrainSection
from storage import CacheReader
from storage.text import format_bytes

FLOAT32_BYTES = 4
CPU_SCRATCH_BYTES = {"float32": 48 << 20, "bfloat16": 112 << 20}  # of libraries and the heap's gaps (measured)
PLANNED_SAMPLES = 100_000  # of the first epoch; their largest micro-batch is taken for that of the run (assumption)
NUM_ADAMW_AVERAGES = 2

CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # cgroup v1 writes a number of this size for "no limit"

logger = logging.getLogger(__name__)


class MemoryShortError(SettingError):
    """The least that a training takes is not free now; it may be once others have ended."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """A micro-batch: tokens of its row, blocks and documents in it."""

    num_tokens: int
    num_anchors: int
    num_documents: int = 1


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device of one rank."""

    weights: int
    """float32, and the target's embedding and head in the compute dtype."""
    gradients: int
    adamw: int
    objective: int
    """One chunk of it."""
    activations: int
    """Of the largest micro-batch, with what its backward pass makes on the way and weights in the compute dtype."""
    batches: int
    """States of the micro-batches that are staged."""

    @property
    def least(self) -> int:
        """What every run of this config takes. A step of one micro-batch has its gradients only behind the chunk."""
        return self.weights + self.adamw + max(self.gradients, self.objective)

    @property
    def total(self) -> int:
        """The whole estimate."""
        return sum(asdict(self).values())

    def describe(self) -> str:
        """Every part, in one line."""
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in asdict(self).items())


def largest_batch(
    reader: CacheReader, train: TrainSection, *, schedule: Schedule, config: Qwen3Config, device: torch.device
) -> BatchShape:
    """The micro-batch of the first epoch that takes the most memory; lengths and masks are known from the index."""
    indices = reader.split_indices("train")
    tokens = reader.num_tokens[indices].astype(np.int64)
    anchors = np.clip(reader.num_supervised[indices].astype(np.int64) - 1, 0, config.num_anchors)
    order = plan_epoch(len(indices), seed=train.seed, epoch=0)
    longest = int(tokens.argmax())
    shapes = {BatchShape(num_tokens=int(tokens[longest]), num_anchors=int(anchors[longest]))}
    for step in range(min(schedule.steps_per_epoch, math.ceil(PLANNED_SAMPLES / schedule.global_batch_size))):
        chosen = schedule.batch(step, order)
        for row in plan_micro_batches(tokens[chosen].tolist(), max_batch_tokens=train.max_batch_tokens):
            rows = chosen[row.start : row.stop]
            sums = (int(tokens[rows].sum()), int(anchors[rows].sum()))
            shapes.add(BatchShape(num_tokens=sums[0], num_anchors=sums[1], num_documents=len(rows)))

    def weigh(shape: BatchShape) -> int:
        return _activation_bytes(config, shape, dtype=train.dtype, device=device.type)

    return max(shapes, key=weigh)


def estimate_memory(
    config: Qwen3Config,
    shape: BatchShape,
    *,
    dtype: str,
    device: torch.device,
    state_bytes: int = 2,
    num_shards: int = 1,
    recomputes: bool = False,
    is_tied: bool = False,
) -> MemoryEstimate:
    """What training a draft of this config takes at micro-batches of this shape.

    `state_bytes` is the size of a cached number; `num_shards` over how many ranks weights, gradients and averages are
    spread; `recomputes`: activations inside a layer are made again in the backward pass; `is_tied`: the target's
    embedding is its head.
    """
    with torch.device("meta"):
        model = Qwen3DSparkModel(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if is_tied:
        model.lm_head.weight = model.embed_tokens.weight
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    # The three vocabulary-wide tensors of a slot in the objective; on CUDA two more in float32.
    slot_bytes = config.vocab_size * (3 * _size_of(dtype) + (2 * FLOAT32_BYTES if device.type == "cuda" else 0))
    logits = shape.num_anchors * config.block_size * slot_bytes
    trained_bytes = -(-trained // num_shards) * FLOAT32_BYTES
    layers = len(config.target_layer_ids) + 1
    activations = _activation_bytes(config, shape, dtype=dtype, device=device.type, recomputes=recomputes)
    if dtype == "bfloat16":  # autocast keeps a copy of each trained weight for the length of a micro-batch
        activations += 2 * trained
    return MemoryEstimate(
        weights=trained_bytes + frozen * _size_of(dtype),
        gradients=trained_bytes,
        adamw=NUM_ADAMW_AVERAGES * trained_bytes,
        objective=min(CHUNK_BYTES[device.type], logits),
        activations=activations,
        batches=NUM_BUFFERS * shape.num_tokens * layers * config.hidden_size * state_bytes,
    )


def check_memory(estimate: MemoryEstimate, shape: BatchShape, *, free: int | None, device: torch.device) -> None:
    """Print the estimate, and refuse a run whose least is not free. Raises MemoryShortError.

    `free` None: not known, nothing is refused.
    """
    there = "unknown" if free is None else format_bytes(free)
    logger.info(
        "memory on %s: about %s of %s free (%s; at %d tokens and %d blocks a micro-batch)",
        device, format_bytes(estimate.total), there, estimate.describe(), shape.num_tokens, shape.num_anchors,
    )  # fmt: skip
    if free is None:
        return
    if estimate.least > free:
        raise MemoryShortError(
            f"this training needs at least {format_bytes(estimate.least)} on {device}, weights "
            f"{format_bytes(estimate.weights)}, gradients {format_bytes(estimate.gradients)}, AdamW "
            f"{format_bytes(estimate.adamw)} and the objective {format_bytes(estimate.objective)}, and {there} are "
            "free; lower draft.num_layers, draft.intermediate_size or draft.markov_rank, or train on a larger device"
        )
    if estimate.total > free:
        logger.warning(
            "the largest micro-batches may not fit: about %s for activations and batches beside the %s that are "
            "needed anyhow, and %s are free; lower train.max_batch_tokens or draft.num_anchors if it ends for memory",
            format_bytes(estimate.total - estimate.least), format_bytes(estimate.least), there,
        )  # fmt: skip


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on the device; None where nothing tells.

    On a CPU that is what the machine has available with its swap, or less within the limit of a control group, shared
    among the ranks of the machine.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    bounds = [bound for bound in (_available(), *_group_bounds()) if bound is not None]
    return min(bounds) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if bounds else None


def _activation_bytes(
    config: Qwen3Config, shape: BatchShape, *, dtype: str, device: str, recomputes: bool = False
) -> int:
    """What forward and backward keep, counted operation by operation from the layers as they are written.

    Norms keep their float32 input and its normed form, and their output is kept by each product behind it, once in
    float32 and once for each product under autocast. Attention keeps queries, keys and values, and its output; the MLP
    gate, its silu, up, and their product. The objective keeps the gradient of W2.
    """
    half, e = dtype == "bfloat16", _size_of(dtype)
    hidden, width = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    tokens, slots = shape.num_tokens, shape.num_anchors * config.block_size
    norm = FLOAT32_BYTES + e
    a_slot = hidden * (4 * FLOAT32_BYTES + (5 * e if half else 2 * e)) + queries * (norm + 3 * e) + 4 * width * e
    a_slot += keys * norm
    a_token = keys * norm + (2 * hidden * e if half else 0)
    a_layer = slots * a_slot + tokens * a_token + _attended_bytes(shape, slots, width=keys, e=e, device=device)
    num_layers = int(config.num_hidden_layers)
    kept = 1 if recomputes else num_layers  # of the others only the input is kept
    once = tokens * hidden * (3 * FLOAT32_BYTES + (0 if half else len(config.target_layer_ids) * e))
    once += slots * hidden * (5 + num_layers - kept) * FLOAT32_BYTES + config.vocab_size * config.markov_rank * 4
    backward = slots * (max(3 * width, 4 * queries) * e + 4 * hidden * FLOAT32_BYTES)
    backward += tokens * (4 * keys * e + 3 * hidden * FLOAT32_BYTES)
    return int(once + backward + kept * a_layer) + (CPU_SCRATCH_BYTES[dtype] if device == "cpu" else 0)


def _attended_bytes(shape: BatchShape, slots: int, *, width: int, e: int, device: str) -> int:
    """Keys and values side by side as attention keeps them. On a CPU each group of blocks has its own, and its mask:
    half of its document's context in the mean."""
    if device != "cpu":
        return (shape.num_tokens + slots) * 2 * width * e
    context = shape.num_tokens // shape.num_documents // 2
    groups = max(-(-slots // GROUP_QUERIES), shape.num_documents)
    return groups * context * 2 * width * e + slots * (2 * width + context) * e


def _size_of(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else FLOAT32_BYTES


def _available() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree")) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _group_bounds() -> list[int]:
    """What the limits of this process's control group and of those above it leave, reclaimable file pages included."""
    bounds = []
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, place in lines:
        if controllers == "":
            root, limit, usage, cached = CGROUPS, "memory.max", "memory.current", "file"
        elif "memory" in controllers.split(","):
            root, limit, usage, cached = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "cache"
        else:
            continue
        folder = root / place.lstrip("/")
        for group in [folder, *folder.parents][: len(folder.relative_to(root).parts) + 1]:
            bound = _group_bound(group, limit=limit, usage=usage, cached=cached)
            bounds += [] if bound is None else [bound]
    return bounds


def _group_bound(group: Path, *, limit: str, usage: str, cached: str) -> int | None:
    try:
        text = (group / limit).read_text().strip()
        if text == "max" or int(text) >= UNLIMITED:
            return None
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(text) - int((group / usage).read_text()) + int(statistics[cached])
    except (OSError, KeyError, ValueError):
        return None
