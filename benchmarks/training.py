"""Time of an optimizer step from the cache against its batches held in memory; share of time spent gathering."""

import statistics
import tempfile
from pathlib import Path

import torch
from common import ROOT, embedded, seconds

from pipeline.config import Config
from pipeline.stage_one import settings_of
from stages.device import choose_device
from stages.extract import run as extraction
from stages.train.batches import gather_batch
from stages.train.feed import BatchFeed, PlannedStep
from stages.train.loop import Stepper, compute_dtype
from stages.train.module import DSparkTrainerModule
from stages.train.order import plan_epoch
from stages.train.parallel import Ranks
from stages.train.run import build_draft, objective_arguments
from storage import CacheReader

NUM_STEPS = 12


def main() -> None:
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        config = embedded(Path(folder))
        extraction.extract(settings_of(config))
        measure(config)


def measure(config: Config) -> None:
    """The same optimizer steps from the cache, and with their batches gathered beforehand."""
    reader = CacheReader(config.cache.path)
    device = choose_device(config.train.device)
    model = build_draft(config.draft, reader, seed=0).to(device)
    module = DSparkTrainerModule(model, **objective_arguments(config.objective))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ranks = Ranks(device=device)
    stepper = Stepper(module=module, optimizer=torch.optim.AdamW(trained), train=config.train, ranks=ranks)
    feed = BatchFeed(reader=reader, train=config.train, num_anchors=config.draft.num_anchors, device=device)
    indices = reader.split_indices("train")
    order = indices[plan_epoch(len(indices), seed=0, epoch=0)]
    size = config.train.global_batch_size
    steps = [
        PlannedStep(step=step, epoch=0, indices=order[step * size : (step + 1) * size]) for step in range(NUM_STEPS)
    ]
    from_cache, from_memory, gathering, tokens = [], [], [], 0
    for step, batches in feed.run(steps):
        from_cache.append(seconds(lambda b=batches: stepper.step(b, lr=0.0)))
        if step.step == 0:  # first calls are slow; they do not count
            from_cache.clear()
            continue
        planned = feed.plan(step)
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


if __name__ == "__main__":
    main()
