"""Tokens a second of stage one, from prepared samples to committed shards, against bare forward passes.

Bare: the same padded batches through the same target, no capture, no disk. Turns are taken shard group by shard group,
so that both see the same noise. Planning and loading, which a long run does once, are not in it.
"""

import sys
from pathlib import Path

import torch
from common import embedded, ratio, scratch_folder, seconds

from pipeline.config import Config
from pipeline.stage_one import settings_of
from stages.extract import run as extraction
from stages.extract.capture import Capture, PaddedBatch, pad_batch
from stages.extract.shards import compute_shards
from stages.extract.target import load_target
from storage import CachePlan, CacheWriter, plan_batches

ENCODINGS = ("bf16", "bf16-lossless", "int8", "fp8")
ROUNDS = 3


def main() -> None:
    for encoding in sys.argv[1:] or ENCODINGS:
        with scratch_folder() as folder:
            measure(embedded(Path(folder), f"cache.encoding='{encoding}'"), encoding)


def plan_group(config: Config, plan: CachePlan, shards: list[int]) -> list[PaddedBatch]:
    batches = []
    for shard in shards:
        samples = plan.read_samples(shard)
        for rows in plan_batches([sample.num_tokens for sample in samples], config.extract.max_batch_tokens):
            batches.append(pad_batch([samples[row].input_ids for row in rows]))
    return batches


def measure(config: Config, encoding: str) -> None:
    plan = extraction.extract(settings_of(config)).plan
    device = torch.device("cpu")
    parts = load_target(Path(config.target.model), target=config.target, device=device)
    capture = Capture(parts, layers=plan.header.identity.layers, dtype=plan.header.encoding.torch_dtype)
    shards = list(range(plan.num_shards))
    groups = [shards[: len(shards) // 2], shards[len(shards) // 2 :]]
    bare_times, whole_times = [], []
    for group in groups * ROUNDS:
        batches = plan_group(config, plan, group)

        @torch.inference_mode()
        def bare(batches: list[PaddedBatch] = batches) -> None:
            for batch in batches:
                mask = None if batch.real_places is None else batch.attention_mask
                parts.decoder(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)

        def whole(group: list[int] = group) -> None:
            for shard in group:
                (plan.path / "commits" / f"{shard:05d}.json").unlink()
            done = compute_shards(
                CacheWriter(plan.path),
                group,
                compute=lambda samples: capture.launch(pad_batch([sample.input_ids for sample in samples])),
                head_VD=parts.lm_head.weight,
                extract=config.extract,
            )
            assert len(list(done)) == len(group)

        bare_times.append(seconds(bare))
        whole_times.append(seconds(whole))
    tokens = plan.manifest.plan.num_tokens * ROUNDS
    rates = f"{tokens / sum(whole_times):9,.0f} tokens/s, bare {tokens / sum(bare_times):9,.0f}"
    print(f"extraction {encoding:14} {rates}   / bare forward {ratio(bare_times, whole_times)}", flush=True)


if __name__ == "__main__":
    main()
