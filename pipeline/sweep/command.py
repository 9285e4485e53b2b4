"""`dspark sweep`: in this process, in several of this machine, or in the ranks of one job; then what came of it."""

from functools import partial

from rich.console import Console

from pipeline.config import Config
from pipeline.report.command import report
from pipeline.report.compare import compare_runs
from pipeline.report.runs import read_runs
from pipeline.report.table import print_table
from pipeline.sweep.desk import Desk
from pipeline.sweep.plan import sweep_section
from pipeline.sweep.processes import run_parallel
from pipeline.sweep.record import RECORD_FILE
from pipeline.sweep.run import check_sweep, open_sweep, run_trials, summarize
from pipeline.sweep.study import Trials
from stages.train.parallel import Ranks


def sweep(config: Config, *, ranks: Ranks, console: Console) -> None:
    """Train the trials that are left, and report how they compare. Raises ConfigError, SettingError, CacheError."""
    ranks.on_first(lambda: check_sweep(config, world=ranks.world))
    is_parallel = sweep_section(config).parallel > 1
    say = partial(console.print, markup=False)
    opened: list[Trials] = []  # of rank 0: a data base does not travel
    ranks.on_first(lambda: opened.append(open_sweep(config)))
    if is_parallel:
        was_stopped = not run_parallel(config, say=say)
    else:
        desk = Desk(opened[0], say=say) if ranks.is_first else None
        was_stopped = not run_trials(config, desk, ranks=ranks)
    if ranks.is_first:
        say(summarize(opened[0], was_stopped=was_stopped).describe())
        if missing := opened[0].find_missing():
            say(f"complete, but no longer there to be compared: {', '.join(missing)}")
        if any(config.train.run_dir.glob(f"*/{RECORD_FILE}")):  # none on a machine that came too late
            if was_stopped:
                print_table(compare_runs(read_runs([config.train.run_dir])), console=console)
            else:
                report([config.train.run_dir], out=None, console=console)
