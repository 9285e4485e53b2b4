"""What surrounds the training of a trial: its place in the study, its folder, its record, and what is said of it."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import Config, to_toml
from pipeline.logs import LinePacer, PlainFormatter
from pipeline.stage_two import check_evaluation, evaluate_draft, open_cache, save_evaluation
from pipeline.sweep.passing import MAX_ATTEMPTS, PAUSE_SECONDS
from pipeline.sweep.plan import Point, point_of
from pipeline.sweep.provenance import describe_origin
from pipeline.sweep.record import read_trial, write_trial
from pipeline.sweep.study import ClaimedTrial, Trials
from stages.train.interrupt import StopRequest
from stages.whole_files import write_whole
from storage import CacheReader

POLL_SECONDS = 1.0
REASON_LENGTH = 1000  # of trouble that is shown and kept; the data base takes 2,048
PRUNED = "the sweep"  # behind "stopped by" in the training's last line

Say = Callable[[str], None]


class Desk:
    """Of one process, which works on one trial at a time; under torchrun, of rank 0.

    With `logs_aside`, what is logged while a trial trains goes to its folder's `log.txt`: several are trained at once.
    """

    def __init__(self, trials: Trials, *, say: Say, logs_aside: bool = False) -> None:
        self._trials = trials
        self._say = say
        self._logs_aside = logs_aside
        self._claimed: ClaimedTrial | None = None
        self._point: Point = {}
        self._run_dir: Path | None = None
        self._record: dict[str, Any] = {}
        self._troubles: dict[int, int] = {}
        """How often a trial met trouble that may pass, in this process."""
        self._pruned: dict[str, Any] | None = None
        """The row of the validation at which the trial was given up."""

    def claim(self, stop: StopRequest, *, waits: bool) -> tuple[int, Point] | None:
        """The next trial's number and values; None if none is left, or a stop is asked for while waiting for others."""
        told = False
        while True:
            self._claimed, self._run_dir, self._pruned = self._claim_one(stop), None, None
            if self._claimed is not None:
                self._point = point_of(self._trials.sweep, self._claimed.params)
                return self._claimed.number, self._point
            if not waits or stop.asked_by is not None or not self._trials.is_held_here():
                return None
            if not told:
                self._say("no trial is left to begin; waiting for those that other processes train")
            told = True
            time.sleep(POLL_SECONDS)

    def _claim_one(self, stop: StopRequest) -> ClaimedTrial | None:
        """A trial that met no trouble here; else, after a pause, one that did, if it has attempts left."""
        claimed = self._trials.claim(avoid=self._troubles)
        spent = {number for number, count in self._troubles.items() if count >= MAX_ATTEMPTS}
        if claimed is not None or spent == self._troubles.keys():
            return claimed
        end = time.monotonic() + PAUSE_SECONDS
        while stop.asked_by is None and time.monotonic() < end:
            time.sleep(min(POLL_SECONDS, PAUSE_SECONDS))
        return None if stop.asked_by is not None else self._trials.claim(avoid=spent)

    def begin(self, trial: Config, opened: CacheReader) -> None:
        """Make the trial's folder, or find it as it was interrupted, and note what the trial is made from."""
        claimed, run_dir = self._current, trial.train.run_dir
        values = ", ".join(f"{key} = {value}" for key, value in self._point.items())
        self._say(f"trial {claimed.number + 1} of {self._trials.num_trials}: {values}, in {run_dir}")
        run_dir.mkdir(parents=True, exist_ok=True)
        # The training writes it too, once nothing forbids the run; here also a trial that fails before gets one, but
        # a refused resume must not overwrite what the run was made from.
        if not (run_dir / "checkpoints").exists():
            write_whole(run_dir / "config.toml", to_toml(trial))
        self._run_dir = run_dir
        known = read_trial(run_dir) or {}
        self._record = {"number": claimed.number + 1, "values": self._point, "origin": known.get("origin")}
        reader = open_cache(trial, layers=trial.draft.target_layer_ids, opened=opened)
        origin = describe_origin(trial, reader)
        self._record["origin"] = origin
        self._trials.note(claimed, {"run_dir": str(run_dir), "origin": origin})
        write_trial(run_dir, {**self._record, "state": "started"})
        check_evaluation(trial, opened=reader)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """While a trial trains: what is logged goes to its `log.txt`, if it goes aside."""
        if not self._logs_aside or self._run_dir is None:
            yield
            return
        root = logging.getLogger()
        handlers, aside = root.handlers[:], logging.FileHandler(self._run_dir / "log.txt", encoding="utf-8")
        aside.setFormatter(PlainFormatter("%(asctime)s %(message)s"))
        aside.addFilter(LinePacer())
        root.handlers[:] = [aside]
        try:
            yield
        finally:
            root.handlers[:] = handlers
            aside.close()

    def judge(self, row: dict[str, Any]) -> str | None:
        """Report a validation to the study; a reason to give the trial up, or None."""
        if not self._trials.report(self._current, step=row["step"], tau=row["tau"]):
            return None
        self._pruned = row
        return PRUNED

    def conclude(self, trial: Config, opened: CacheReader, *, was_stopped: bool) -> bool:
        """Evaluate what was trained, or note that it was given up; False if it was interrupted instead."""
        if not was_stopped:
            self._complete(trial, opened)
        elif self._pruned is not None:
            self._prune(trial)
        return not was_stopped or self._pruned is not None

    def fail(self, error: Exception) -> None:
        """Note that the trial's values do not work, and why."""
        claimed, reason = self._current, str(error)
        self._say(f"trial {claimed.number + 1} failed: {reason}")
        if self._run_dir is not None:
            write_trial(self._run_dir, {**self._record, "state": "failed", "reason": reason})
        self._trials.fail(claimed, reason)

    def postpone(self, error: Exception) -> None:
        """Put the trial back for trouble that may pass, to be tried again behind the others."""
        number = self._current.number
        self._troubles[number] = self._troubles.get(number, 0) + 1
        attempt = f"attempt {self._troubles[number]} of {MAX_ATTEMPTS}"
        self._say(f"trial {number + 1} was put back ({attempt}), for trouble that may pass: {error!s:.{REASON_LENGTH}}")
        self._trials.postpone(self._current, f"{error!s:.{REASON_LENGTH}}" or type(error).__name__)

    def put_back(self) -> None:
        """Let the trial wait for whoever continues it, unless it has ended."""
        if self._claimed is not None:
            self._trials.put_back(self._claimed)

    def _complete(self, trial: Config, opened: CacheReader) -> None:
        claimed, run_dir = self._current, trial.train.run_dir
        evaluation = evaluate_draft(trial, draft_dir=run_dir / "draft", opened=opened)
        save_evaluation(evaluation, file=run_dir / "evaluation.json", draft_dir=run_dir / "draft")
        write_trial(run_dir, {**self._record, "state": "complete"})
        self._trials.complete(claimed, tau=evaluation.tau)
        interval = f"95 % interval {evaluation.tau_low:.3f} to {evaluation.tau_high:.3f}"
        self._say(f"trial {claimed.number + 1} complete: tau {evaluation.tau:.3f}  ({interval})")

    def _prune(self, trial: Config) -> None:
        claimed, run_dir, row = self._current, trial.train.run_dir, self._pruned or {}
        reason = f"tau {row['tau']:.3f} behind step {row['step']} is below the median of the trials before it"
        write_trial(run_dir, {**self._record, "state": "pruned", "step": row["step"], "reason": reason})
        self._trials.prune(claimed)
        self._say(
            f"trial {claimed.number + 1} pruned: {reason}; its checkpoint stays, and dspark train "
            f"{run_dir / 'config.toml'} would finish it"
        )

    @property
    def _current(self) -> ClaimedTrial:
        if self._claimed is None:
            raise AssertionError("no trial is claimed")
        return self._claimed
