"""Measured peak of a training step against its estimate, each case in a forked process: prints one JSON line a case.

Run by test_train_operations.py in a process of its own, with one thread, so that a peak is that of the step alone.
"""

import dataclasses
import json
import os
import resource
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config

from stages.train import DSparkTrainerModule, Qwen3DSparkModel, build_draft_config
from stages.train.batches import PlannedBatch
from stages.train.feed import FedBatch
from stages.train.loop import Stepper
from stages.train.memory import BatchShape, estimate_memory
from stages.train.parallel import Ranks
from stages.train.settings import TrainSection

CPU = torch.device("cpu")


def draft_config(*, hidden: int, width: int, heads: int, layers: int, target_layers: int, vocab: int) -> Qwen3Config:
    target = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=8,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
    )
    return build_draft_config(
        target,
        mask_token_id=3,
        num_draft_layers=layers,
        target_layer_ids=range(target_layers),
        markov_rank=16,
    )


WIDE = draft_config(hidden=640, width=2560, heads=8, layers=2, target_layers=3, vocab=512)
NARROW = draft_config(hidden=256, width=512, heads=4, layers=2, target_layers=5, vocab=300)
CASES = [
    ("mostly weights", WIDE, BatchShape(num_tokens=256, num_anchors=16), "bfloat16"),
    ("long context", NARROW, BatchShape(num_tokens=4096, num_anchors=32), "float32"),
    ("many blocks", NARROW, BatchShape(num_tokens=1024, num_anchors=120), "float32"),
]


def make_batch(config: Qwen3Config, shape: BatchShape) -> FedBatch:
    planned = PlannedBatch(
        indices=(0,),
        sample_ids=(0,),
        input_ids=torch.randint(0, config.vocab_size, (1, shape.num_tokens)),
        loss_mask=torch.ones(1, shape.num_tokens, dtype=torch.uint8),
        seq_lens=torch.tensor([[shape.num_tokens]]),
        anchor_positions=torch.arange(shape.num_anchors)[None] * (shape.num_tokens // (shape.num_anchors + 1)),
    )
    arguments = {
        name: getattr(planned, name) for name in ("input_ids", "loss_mask", "seq_lens", "anchor_positions")
    } | {
        "target_hidden_states": torch.randn(
            1, shape.num_tokens, len(config.target_layer_ids) * config.hidden_size, dtype=torch.bfloat16
        ),
        "target_last_hidden_states": torch.randn(1, shape.num_tokens, config.hidden_size, dtype=torch.bfloat16),
    }
    return FedBatch(planned=planned, arguments=arguments, number=1, num_batches=2, waited_seconds=0.0)


def train_two_steps(config: Qwen3Config, shape: BatchShape, dtype: str) -> None:
    module = DSparkTrainerModule(Qwen3DSparkModel(config))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    stepper = Stepper(module=module, optimizer=optimizer, train=TrainSection(dtype=dtype), ranks=Ranks(device=CPU))
    for _ in range(2):
        first = make_batch(config, shape)
        stepper.step([first, dataclasses.replace(first, number=2)], lr=1e-4)


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    small = draft_config(hidden=64, width=64, heads=2, layers=1, target_layers=1, vocab=100)
    for dtype in ("float32", "bfloat16"):  # libraries load what they load
        train_two_steps(small, BatchShape(num_tokens=64, num_anchors=3), dtype)
    for name, config, shape, dtype in CASES:
        child = os.fork()
        if child == 0:
            before = resident_bytes()
            train_two_steps(config, shape, dtype)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            estimate = estimate_memory(config, shape, dtype=dtype, device=CPU)
            numbers = {"peak": peak, "total": estimate.total, "least": estimate.least}
            sys.stdout.write(json.dumps({"case": f"{name}, {dtype}", **numbers}) + "\n")
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, name


if __name__ == "__main__":
    main()
