"""Time the pipeline on this machine, each figure beside a baseline of the same run: `make bench`.

    extraction   tokens/s of the whole of stage one / the same batches through the same target, no capture, no disk
    reading      bytes/s of mapped samples from the cache, first touch and warm / copying as many bytes in memory
    training     time of a step from the cache / with its batches held in memory; share of time spent gathering

Uses the embedded default. Results go to RESULTS.md by hand, with date and machine.
"""

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.config import Config, load_config
from pipeline.stage_one import settings_of
from stages.device import choose_device
from stages.extract import run as extraction
from stages.extract.capture import pad_batch
from stages.extract.target import load_target
from stages.train.batches import gather_batch
from stages.train.loop import Stepper, compute_dtype
from stages.train.module import DSparkTrainerModule
from stages.train.order import plan_epoch
from stages.train.run import build_draft, objective_arguments
from storage import CacheReader, plan_batches

ROOT = Path(__file__).parent.parent
NUM_STEPS = 12


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def bench_extraction(config: Config) -> None:
    """Whole stage one against bare forward passes of the same batches, the second and third time that each is run."""
    result = extraction.extract(settings_of(config))  # cold: builds the plan, loads the target
    plan, device = result.plan, choose_device(config.extract.device)
    parts = load_target(Path(config.target.model), target=config.target, device=device)
    batches = []
    for shard in range(plan.num_shards):
        samples = plan.read_samples(shard)
        for batch in plan_batches([sample.num_tokens for sample in samples], config.extract.max_batch_tokens):
            batches.append(pad_batch([samples[row].input_ids for row in batch]))

    @torch.inference_mode()
    def bare() -> None:
        for ids_BT, mask_BT in batches:
            mask = None if bool(mask_BT.all()) else mask_BT.to(device)
            parts.decoder(input_ids=ids_BT.to(device), attention_mask=mask, use_cache=False)

    def whole() -> None:
        for commit in (config.cache.path / "commits").glob("*.json"):
            commit.unlink()
        extraction.extract(settings_of(config))

    ratios, rates = [], []
    for _ in range(3):
        bare_seconds, whole_seconds = seconds(bare), seconds(whole)
        ratios.append(bare_seconds / whole_seconds)
        rates.append(result.num_tokens / whole_seconds)
    print(f"extraction  {statistics.median(rates):10,.0f} tokens/s   / bare forward {statistics.median(ratios):.2f}")
    print(f"            of the cold run, plan and loading included: {result.num_tokens / result.seconds:,.0f} tokens/s")


def bench_reading(config: Config) -> None:
    """Every byte of every sample summed, mapped; against the sum of as many bytes that lie in memory."""
    reader = CacheReader(config.cache.path)
    num_bytes = reader.manifest.plan.payload_bytes

    def scan() -> None:
        for index in range(len(reader)):
            sample = reader[index]
            sample.hidden_states.view(torch.int16).max()
            sample.last_hidden_states.view(torch.int16).max()

    first = seconds(scan)
    warm = statistics.median(seconds(scan) for _ in range(3))
    memory = torch.ones(num_bytes // 2, dtype=torch.int16)
    in_memory = statistics.median(seconds(memory.max) for _ in range(3))
    print(f"reading     {num_bytes / first / 1e9:10.2f} GB/s first touch, checksums included")
    print(f"            {num_bytes / warm / 1e9:10.2f} GB/s warm       / in memory {in_memory / warm:.2f}")


def bench_training(config: Config) -> None:
    """The same optimizer steps from the cache, and with their batches gathered beforehand."""
    reader = CacheReader(config.cache.path)
    device = choose_device(config.train.device)
    model = build_draft(config.draft, reader, seed=0).to(device)
    module = DSparkTrainerModule(model, **objective_arguments(config.objective))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepper = Stepper(module=module, optimizer=torch.optim.AdamW(trained), reader=reader, train=config.train)
    indices = reader.split_indices("train")
    order = indices[plan_epoch(len(indices), seed=0, epoch=0)]
    size = config.train.global_batch_size
    steps = [order[step * size : (step + 1) * size] for step in range(NUM_STEPS)]
    stepper.step(steps[0], epoch=0, lr=0.0)  # first calls are slow; they do not count
    from_cache, from_memory, gathering, tokens = [], [], [], 0
    for step in steps[1:]:
        from_cache.append(seconds(lambda step=step: stepper.step(step, epoch=0, lr=0.0)))
        planned = stepper.plan(step, epoch=0)
        tokens += sum(batch.num_tokens for batch in planned)
        held: list[dict[str, torch.Tensor]] = []
        gathering.append(seconds(lambda p=planned, h=held: h.extend(gather_batch(reader, b, device=device) for b in p)))

        def step_in_memory(held: list[dict[str, torch.Tensor]] = held) -> None:
            for batch in held:
                with compute_dtype(device, config.train.dtype):
                    module(**batch).loss_num.backward()
            stepper.optimizer.step()
            stepper.optimizer.zero_grad(set_to_none=True)

        from_memory.append(seconds(step_in_memory))
    ratio = statistics.median(a / b for a, b in zip(from_cache, from_memory, strict=True))
    print(f"training    {statistics.median(from_cache):10.3f} s a step      / batches in memory {ratio:.3f}")
    share = sum(gathering) / sum(from_cache)
    print(f"            {tokens / sum(from_cache):10,.0f} tokens/s; gathering is {share:.1%} of the time")


def main() -> None:
    logging.disable(logging.WARNING)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        config = load_config(ROOT / "configs" / "embedded.toml", [f"cache.path={folder}/cache"])
        bench_extraction(config)
        bench_reading(config)
        bench_training(config)


if __name__ == "__main__":
    main()
