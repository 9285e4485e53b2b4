"""A sweep in one process, or in the ranks of one job: trials are taken and trained until none is left."""

import gc
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from optuna.trial import TrialState

from pipeline.config import Config, ConfigError
from pipeline.stage_two import NonFiniteScoreError, open_cache, open_reader, train_draft
from pipeline.sweep import passing
from pipeline.sweep.data_base import StudyError
from pipeline.sweep.desk import Desk
from pipeline.sweep.plan import Point, check_points, sweep_section, trial_config
from pipeline.sweep.provenance import describe_cache
from pipeline.sweep.study import Trials, open_trials
from stages.errors import SettingError
from stages.evaluate.throughput import read_throughput_table
from stages.train.checkpoint import NonFiniteWeightsError
from stages.train.interrupt import stop_on_signals
from stages.train.nonfinite import NonFiniteLossError
from stages.train.parallel import Ranks
from storage import CacheReader

# What the values of one trial can bring about, so that the next may do better. Trouble that may pass (passing.py) puts
# the trial back. Anything else ends the sweep.
TRIAL_ERRORS = (ConfigError, SettingError, NonFiniteLossError, NonFiniteWeightsError, NonFiniteScoreError)


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """How a sweep stands when this process has done its part."""

    num_trials: int
    num_complete: int
    num_pruned: int
    num_failed: int
    postponed: dict[int, str]
    """Those that wait since they met trouble that may pass: number, from 0, and reason."""
    num_running: int
    """Those that other processes are at work on."""
    was_stopped: bool

    def describe(self) -> str:
        """One line."""
        ended = self.num_complete + self.num_pruned + self.num_failed
        parts = [f"{self.num_complete} complete"]
        parts += [f"{self.num_pruned} pruned"] * (self.num_pruned > 0)
        parts += [f"{self.num_failed} failed"] * (self.num_failed > 0)
        parts += [f"{len(self.postponed)} put back"] * bool(self.postponed)
        parts += [f"{self.num_running} trained by other processes"] * (self.num_running > 0)
        line = f"{ended} of {self.num_trials} trials have ended: {', '.join(parts)}"
        return line + ("; stopped, the same command continues" if self.was_stopped else "")


def check_sweep(config: Config, *, world: int) -> None:
    """What can be checked without a cache, for as many ranks. Raises ConfigError, SettingError."""
    section = sweep_section(config)
    if section.parallel > 1 and world > 1:
        raise SettingError(
            f"sweep.parallel: is {section.parallel}, but the {world} processes of torchrun take every trial together; "
            "set it to 1, or start without torchrun"
        )
    check_points(config)
    _check_table(config)


def check_extraction(config: Config) -> None:
    """Whether a cache that is extracted for the sweep would do. Raises ConfigError."""
    if config.data.validation_fraction == 0 and not config.data.validation_files:
        raise ConfigError(
            "data.validation_fraction: is 0, so that the trials of a sweep could not be compared; set it, or "
            "data.validation_files"
        )


def open_sweep(config: Config, *, retries_failed: bool = False) -> Trials:
    """The sweep's trials, once the cache is known to fit; see `open_trials`.

    Raises ConfigError, SettingError, CacheError.
    """
    with open_cache(config, layers=None) as reader:
        if not len(reader.split_indices("validation")):
            raise SettingError(
                f"{config.cache.path}: the cache has no validation split, so that trials could not be compared; "
                "see data.validation_fraction"
            )
        return open_trials(config, cache=describe_cache(reader), retries_failed=retries_failed)


def summarize(trials: Trials, *, was_stopped: bool) -> SweepResult:
    """How the sweep stands now."""
    return SweepResult(
        num_trials=trials.num_trials,
        num_complete=trials.count(TrialState.COMPLETE),
        num_pruned=trials.count(TrialState.PRUNED),
        num_failed=trials.count(TrialState.FAIL),
        postponed=trials.find_postponed(),
        num_running=trials.count(TrialState.RUNNING),
        was_stopped=was_stopped,
    )


def run_trials(config: Config, desk: Desk | None, *, ranks: Ranks) -> bool:
    """Train trials until none is left; all ranks take each of them together. False if a signal asked to stop.

    `desk` is rank 0's. A process alone waits for the trials that others of its folder train, and takes up those that
    are interrupted.
    """
    with stop_on_signals() as stop, open_reader(config.cache) as opened:
        while not stop.agree(ranks):
            claimed = ranks.on_first(lambda: _at(desk).claim(stop, waits=ranks.world == 1))
            if claimed is None:
                return not stop.agree(ranks)
            try:
                goes_on = _run_trial(config, desk, *claimed, ranks=ranks, opened=opened)
            finally:
                if desk is not None:
                    desk.put_back()  # unless it has ended
            if not goes_on:
                return False
    return False


def _run_trial(
    config: Config, desk: Desk | None, number: int, point: Point, *, ranks: Ranks, opened: CacheReader
) -> bool:
    """Train one trial and measure it; False if it was interrupted. Errors of `TRIAL_ERRORS` make it a failed one, those
    that may pass put it back.
    """
    ranks.on_first(lambda: _check_table(config))  # gone by now: no fault of the trial's values
    try:
        trial = trial_config(config, point, number=number)
        ranks.on_first(lambda: _at(desk).begin(trial, opened))
        with nullcontext() if desk is None else desk.logging():
            result = train_draft(trial, ranks=ranks, judge=None if desk is None else desk.judge, opened=opened)
        return ranks.on_first(lambda: _at(desk).conclude(trial, opened, was_stopped=result.was_stopped))
    except StudyError:
        raise
    except Exception as error:
        may_pass = passing.may_pass(error)
        if not may_pass and not isinstance(error, TRIAL_ERRORS):
            raise
        if desk is not None:
            (desk.postpone if may_pass else desk.fail)(error)
        if ranks.world > 1:
            raise  # another rank may not have failed; the same command goes on with the next trial
    gc.collect()  # what the failed training holds, before the next one asks for as much
    torch.cuda.empty_cache()
    return True


def _check_table(config: Config) -> None:
    """See to it that what every trial's evaluation needs is there. Raises SettingError."""
    read_throughput_table(config.evaluate.throughput_table, least_tokens=1)


def _at(desk: Desk | None) -> Desk:
    if desk is None:
        raise AssertionError("rank 0 has the desk")
    return desk
