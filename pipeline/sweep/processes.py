"""Several trials at once on one machine: worker processes that share a sweep, and the one that minds them."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

import click
import torch

from pipeline.config import Config, ConfigError
from pipeline.logs import configure_logs
from pipeline.sweep.desk import Desk
from pipeline.sweep.plan import sweep_section
from pipeline.sweep.run import open_sweep, run_trials
from stages.errors import StageError
from stages.train.interrupt import stop_on_signals
from stages.train.parallel import join_ranks
from storage import CacheError
from storage.text import plain

WATCH_SECONDS = 0.3  # well below interrupt.REPEAT_SECONDS: a Ctrl-C that workers get twice must count once
STOPPED_STATUS = 3


class WorkerError(StageError, RuntimeError):
    """A worker process of a sweep has failed."""


def run_parallel(config: Config, *, say: Callable[[str], None]) -> bool:
    """Train what is left in `sweep.parallel` processes. False if a signal asked to stop, which all of them obey.

    Raises WorkerError once a worker has failed and the others have stopped behind their steps.
    """
    num_workers = sweep_section(config).parallel
    say(f"{num_workers} trials at once; what each logs is in its folder's log.txt")
    verbose = logging.getLogger().isEnabledFor(logging.DEBUG)
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    workers = [
        context.Process(target=_work, args=(config, index, verbose), name=f"worker {index}")
        for index in range(num_workers)
    ]
    with stop_on_signals() as stop:
        for worker in workers:
            worker.start()
        try:
            running, is_stopping = set(workers), False
            while running:
                wait([worker.sentinel for worker in running], timeout=WATCH_SECONDS)
                running = {worker for worker in running if worker.is_alive()}
                failed = any(worker.exitcode not in (None, 0, STOPPED_STATUS) for worker in workers)
                if not is_stopping and (stop.asked_by is not None or failed):
                    is_stopping = True
                    _ask_to_stop(running)
        finally:
            _ask_to_stop([worker for worker in workers if worker.is_alive()])
    # SIGTERM also ends a worker that has not begun to listen to it.
    broken = [worker for worker in workers if worker.exitcode not in (0, STOPPED_STATUS, -signal.SIGTERM)]
    if broken and stop.asked_by is None:
        states = ", ".join(f"{worker.name}: status {worker.exitcode}" for worker in broken)
        raise WorkerError(
            f"the sweep has ended since a process of it failed ({states}); what it printed, or the log.txt of its "
            "trial, says why. The same command continues"
        )
    return all(worker.exitcode == 0 for worker in workers)


def _ask_to_stop(workers: list[SpawnProcess] | set[SpawnProcess]) -> None:
    for worker in workers:
        worker.terminate()  # SIGTERM: the step in progress is finished


def _work(config: Config, index: int, verbose: bool) -> None:
    """A worker's whole life; its exit status says how it ended."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    configure_logs(verbose=verbose)
    torch.set_num_threads(max(1, torch.get_num_threads() // sweep_section(config).parallel))
    config = _on_own_device(config, index)
    try:
        with join_ranks(config.train) as ranks:
            desk = Desk(open_sweep(config), say=click.echo, logs_aside=True)
            went_through = run_trials(config, desk, ranks=ranks)
    except (ConfigError, StageError, CacheError, OSError) as error:
        click.echo(plain(f"Error: {error}"), err=True)
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        sys.exit(2)
    sys.exit(0 if went_through else STOPPED_STATUS)


def _on_own_device(config: Config, index: int) -> Config:
    """Spread the workers over the machine's GPUs, where the config leaves the device open."""
    num_devices = torch.cuda.device_count()
    if config.train.device not in ("auto", "cuda") or num_devices == 0:
        return config
    train = config.train.model_copy(update={"device": f"cuda:{index % num_devices}"})
    return config.model_copy(update={"train": train})


def _follow_parent() -> None:
    """Stop behind the step in progress once the process that minds the workers is gone, killed for example."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
