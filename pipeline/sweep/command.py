"""`dspark sweep`: in this process, in several of this machine, or in the ranks of one job; then what came of it."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from pipeline.config import Config
from pipeline.report.compare import Comparison, compare_runs
from pipeline.report.page import write_page
from pipeline.report.runs import read_runs
from pipeline.report.table import print_table
from pipeline.report.words import readable
from pipeline.sweep.desk import Desk
from pipeline.sweep.plan import sweep_section
from pipeline.sweep.processes import run_parallel
from pipeline.sweep.record import RECORD_FILE
from pipeline.sweep.run import check_sweep, open_sweep, run_trials, summarize
from pipeline.sweep.study import Trials
from stages.errors import SettingError
from stages.train.parallel import Ranks

logger = logging.getLogger(__name__)


def sweep(config: Config, *, ranks: Ranks, console: Console, retries_failed: bool = False) -> None:
    """Train the trials that are left, and report how they compare; `retries_failed`: also those that failed.

    Raises ConfigError, SettingError, CacheError.
    """
    ranks.on_first(lambda: check_sweep(config, world=ranks.world))
    is_parallel = sweep_section(config).parallel > 1
    say = partial(console.print, markup=False)
    opened: list[Trials] = []  # of rank 0: a data base does not travel
    ranks.on_first(lambda: opened.append(open_sweep(config, retries_failed=retries_failed)))
    if is_parallel:
        was_stopped = not run_parallel(config, say=say)
    else:
        desk = Desk(opened[0], say=say) if ranks.is_first else None
        was_stopped = not run_trials(config, desk, ranks=ranks)
    if ranks.is_first:
        result = summarize(opened[0], was_stopped=was_stopped)
        say(result.describe())
        if missing := opened[0].find_missing():
            say(f"complete, but no longer there to be compared: {', '.join(missing)}")
        if any(config.train.run_dir.glob(f"*/{RECORD_FILE}")):  # none on a machine that came too late
            comparison = compare_runs(read_runs([config.train.run_dir]))
            print_table(comparison, console=console)
            if not was_stopped:
                _write_page(comparison, config.train.run_dir, say=say)
        if result.postponed and not was_stopped:
            reasons = "".join(f"\n  trial {number + 1}: {reason}" for number, reason in result.postponed.items())
            raise SettingError(
                f"{len(result.postponed)} trials met trouble that may pass each time they were tried; the same command "
                f"tries them again{reasons}"
            )
        if result.num_failed and not result.num_complete and not was_stopped:
            raise SettingError(
                f"no trial is complete, and {result.num_failed} failed; their reasons are above, "
                "and --retry-failed tries them again"
            )


def _write_page(comparison: Comparison, folder: Path, *, say: Callable[[str], None]) -> None:
    """The sweep is complete without it, so that it fails for no page."""
    try:
        say(readable(f"page: {write_page(comparison, folder)}"))
    except (OSError, ValueError, ArithmeticError) as error:
        logger.warning(
            "the trials are complete, but the page could not be written: %s; dspark report %s writes it", error, folder
        )
