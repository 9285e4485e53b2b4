"""Several trainings one after the other in the processes that torchrun starts: what each argument's config says.

With `HANG` in the environment rank 1 sleeps in a step of the first config, and rank 0's patience is seconds.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.stage_two import train_draft
from stages.train import parallel
from stages.train.loop import Stepper

HANGING_CALL = 5


def hang() -> None:
    calls = 0
    original = Stepper.step

    def step(self: Stepper, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == HANGING_CALL and self.ranks.rank == 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or torchrun waits, while the handler waits for the step
            time.sleep(600)
        return original(self, *arguments, **named)

    Stepper.step = step  # type: ignore[method-assign]


def main() -> None:
    configs = [load_config(Path(file)) for file in sys.argv[1:]]
    if "HANG" in os.environ:
        parallel.PATIENCE = timedelta(seconds=3)
    with parallel.join_ranks(configs[0].train) as ranks:
        # Rank 0 decides, and the others learn of its errors.
        with pytest.raises((ZeroDivisionError, parallel.RankError), match="by zero"):
            ranks.on_first(lambda: 1 // 0)
        if "HANG" in os.environ:
            hang()
        for config in configs:
            train_draft(config, ranks=ranks)
            sys.stdout.write(f"rank {ranks.rank} of {ranks.world} has trained {config.train.run_dir.name}\n")


if __name__ == "__main__":
    main()
