"""Forward and backward of the trainer module, fused and grouped, against its plain form, on the same batches.

    python benchmarks/step.py [--only NAME ...] [--rounds N] [--core]

Shapes: `mid`; `mix`, lengths and answers as in conversations, with padded anchors and cut blocks; `long` and `wide`,
which say how time and memory grow; `reference`, the paper's recipe, on CUDA only. For each: time of the fused step /
the plain one, pairwise, first calls left out; extra memory at its peak, each form in a process of its own; useful
operations a second over the rate of a large matrix product of the same run. Useful operations are the multiplications
and additions of matrix products that the objective needs: no padding, no masked score, each position's target
distribution once. `--core` takes processor time of one thread, which other processes on the machine change little.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import ratio
from transformers import Qwen3Config

from stages.train import DSparkTrainerModule, Qwen3DSparkModel, build_draft_config
from stages.train.anchors import choose_anchors
from stages.train.loop import compute_dtype
from stages.train.slots import Slots, find_slots


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A draft and its batches. `lengths`: tokens of a sample; `answers`: share of it that is supervised, at its end."""

    vocab: int = 32768
    hidden: int = 512
    intermediate: int = 1536
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    layers: int = 3
    target_layers: int = 3
    rank: int = 128
    tokens: int = 1024
    anchors: int = 128
    block: int = 7
    rows: int = 1
    unsupervised: int = 300
    is_mix: bool = False
    dtype: str = "float32"
    device: str = "cpu"


clock = time.perf_counter
MID = Shape()
SHAPES = {
    "mid-float32": MID,
    "mid-bfloat16": replace(MID, dtype="bfloat16"),
    "mix-float32": replace(MID, is_mix=True, rows=8),
    "mix-bfloat16": replace(MID, is_mix=True, rows=8, dtype="bfloat16"),
    "long-float32": replace(MID, tokens=4096, anchors=512),
    "wide-float32": replace(MID, vocab=131072),
    "reference": Shape(
        vocab=151936, hidden=2560, intermediate=9728, heads=32, kv_heads=8, head_dim=128, layers=5, target_layers=5,
        rank=256, tokens=4096, anchors=512, dtype="bfloat16", device="cuda",
    ),
}  # fmt: skip


def make_model(shape: Shape) -> Qwen3DSparkModel:
    target = Qwen3Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=36,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        max_position_embeddings=8192, dtype=torch.float32,
    )  # fmt: skip
    config = build_draft_config(
        target, num_draft_layers=shape.layers, block_size=shape.block, num_anchors=shape.anchors,
        markov_rank=shape.rank, mask_token_id=shape.vocab - 1, target_layer_ids=list(range(shape.target_layers)),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3DSparkModel(config).to(shape.device)
    if (
        shape.dtype == "bfloat16"
    ):  # as in training: the target's own weights need no gradient, and are not master weights
        model.embed_tokens.bfloat16()
        model.lm_head.bfloat16()
    return model


def make_batches(shape: Shape) -> list[dict[str, torch.Tensor]]:
    """Samples padded to the longest of them and to the number of anchors: what the plain form takes."""
    random = np.random.default_rng(0)
    lengths = [shape.tokens] * shape.rows
    if shape.is_mix:  # log-normal with mean 600; spread as in chat data (assumption: sigma 0.7)
        drawn = random.lognormal(math.log(600) - 0.7**2 / 2, 0.7, size=shape.rows)
        lengths = np.clip(drawn, 64, shape.tokens).astype(int).tolist()
    batches = []
    for row, length in enumerate(lengths):
        mask = torch.zeros(length, dtype=torch.uint8)
        if shape.is_mix:
            # Half of the samples have few candidates: short answers between long questions.
            answer = int(random.integers(4, 12)) if row % 2 else int(random.integers(40, 120))
            question = 60 if row % 2 else 20
            for start in range(question, length, answer + question):
                mask[start : start + answer] = 1
        else:
            mask[shape.unsupervised :] = 1
        anchors = choose_anchors(mask, shape.anchors, seed=0, epoch=0, sample_id=row)
        padded = torch.full((1, shape.anchors), -1)
        padded[0, : len(anchors)] = anchors
        generator = torch.Generator().manual_seed(row)
        scale = 3 / math.sqrt(shape.hidden)  # distributions that are neither flat nor sharp
        batch = {
            "input_ids": torch.randint(shape.vocab - 1, (1, length), generator=generator),
            "target_hidden_states": torch.randn(
                1, length, shape.target_layers * shape.hidden, generator=generator
            ).bfloat16(),
            "loss_mask": mask[None],
            "target_last_hidden_states": (
                scale * math.sqrt(shape.hidden) * torch.randn(1, length, shape.hidden, generator=generator)
            ).bfloat16(),
            "anchor_positions": padded,
        }
        batches.append({name: tensor.to(shape.device) for name, tensor in batch.items()})
    return batches


def make_module(shape: Shape, *, is_plain: bool) -> DSparkTrainerModule:
    return DSparkTrainerModule(make_model(shape), loss_decay_gamma=4.0, is_plain=is_plain)


def run_step(module: DSparkTrainerModule, shape: Shape, batches: list[dict[str, torch.Tensor]]) -> float:
    """Seconds of forward and backward over all batches."""
    module.zero_grad(set_to_none=True)
    _wait(shape)
    started = clock()
    for batch in batches:
        with compute_dtype(torch.device(shape.device), shape.dtype):
            module(**batch).loss_num.backward()
    _wait(shape)
    return clock() - started


def _wait(shape: Shape) -> None:
    if shape.device == "cuda":
        torch.cuda.synchronize()


def count_operations(shape: Shape, batches: list[dict[str, torch.Tensor]]) -> float:
    """Multiplications and additions of the matrix products that forward and backward need."""
    total = 0.0
    for batch in batches:
        slots = find_slots(batch["loss_mask"], batch["anchor_positions"], None, block_size=shape.block)
        total += 2 * _multiplications(shape, slots, num_tokens=batch["input_ids"].shape[1])
    return total


def _multiplications(shape: Shape, slots: Slots, *, num_tokens: int) -> float:
    query, key = shape.hidden * shape.heads * shape.head_dim, shape.hidden * shape.kv_heads * shape.head_dim
    mlp = 3 * shape.hidden * shape.intermediate
    num_slots, num_last = slots.num_blocks * shape.block, len(slots)
    context = num_tokens * shape.target_layers * shape.hidden**2 * 2  # no gradient to the cache
    context += shape.layers * num_tokens * 2 * key * 3
    blocks = 3 * (shape.layers - 1) * num_slots * (2 * query + 2 * key + mlp)
    blocks += 3 * (num_slots * 2 * key + num_last * (2 * query + mlp))
    seen = float((slots.block_anchors + shape.block).sum())  # keys of each block's slots
    per_key = shape.heads * shape.head_dim * 2 * 3
    attention = ((shape.layers - 1) * shape.block + num_last / max(slots.num_blocks, 1)) * seen * per_key
    distinct = len(slots.flat_position.unique())
    head = shape.vocab * shape.hidden * (2 * num_last + distinct) + 3 * shape.vocab * shape.rank * num_last
    return context + blocks + attention + head


def matmul_rate(shape: Shape) -> float:
    """Operations a second of a large square product in the shape's dtype, the best of some."""
    size = 8192 if shape.device == "cuda" else 2048
    matrix = torch.randn(size, size, device=shape.device, dtype=getattr(torch, shape.dtype))
    best = math.inf
    for _ in range(4):
        _wait(shape)
        started = clock()
        matrix @ matrix
        _wait(shape)
        best = min(best, clock() - started)
    return 2 * size**3 / best


def peak_memory(name: str, *, is_plain: bool) -> int:
    """Bytes that a second step adds to what the process holds between steps, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, *(["--plain"] if is_plain else [])]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def _measure_peak(shape: Shape, *, is_plain: bool) -> int:
    module, batches = make_module(shape, is_plain=is_plain), make_batches(shape)
    run_step(module, shape, batches)
    module.zero_grad(set_to_none=True)
    if shape.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_step(module, shape, batches)
        return torch.cuda.max_memory_allocated() - before
    before, peak, is_over = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.002):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run_step(module, shape, batches)
    is_over.set()
    watcher.join()
    return peak - before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(name: str, *, rounds: int) -> None:
    shape = SHAPES[name]
    if shape.device == "cuda" and not torch.cuda.is_available():
        print(f"step        {name}: needs a CUDA device, not run here")
        return
    batches = make_batches(shape)
    modules = [make_module(shape, is_plain=is_plain) for is_plain in (False, True)]
    times: list[list[float]] = [[], []]
    rates = []
    for number in range(rounds + 1):
        rates.append(matmul_rate(shape))
        for module, seconds in zip(modules, times, strict=True):
            took = run_step(module, shape, batches)
            if number:
                seconds.append(took)
    operations = count_operations(shape, batches)
    fused, plain = times
    useful = statistics.median(operations / took / rate for took, rate in zip(fused, rates[1:], strict=True))
    print(f"step        {name}: {statistics.median(fused):.3f} s    / plain {ratio(fused, plain)}")
    print(f"            {operations / 1e9:,.1f} G useful operations, {useful:.2f} of a large product's rate")
    peaks = [peak_memory(name, is_plain=is_plain) for is_plain in (False, True)]
    print(f"            peak extra memory {peaks[0] / 1e6:,.0f} MB, / plain {peaks[0] / peaks[1]:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", choices=list(SHAPES))
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--core", action="store_true")
    arguments = parser.parse_args()
    if arguments.peak:
        print(_measure_peak(SHAPES[arguments.peak], is_plain=arguments.plain))
        return
    if arguments.core:
        global clock  # noqa: PLW0603
        clock = time.process_time
        torch.set_num_threads(1)
    for name in arguments.only:
        measure(name, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
