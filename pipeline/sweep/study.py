"""The trials of a sweep as its processes share them: an Optuna study, and who is at work on which trial.

A trial runs, may wait again, and ends complete, pruned or failed; what has ended is never trained again, but for
failed ones when somebody asks for it. The study
numbers the trials, whoever begins them, and the number says which of the planned ones it is: so processes and machines
need not agree on anything else.

Whoever trains a trial holds a lock on a file of the sweep's folder, which the system lets go of when the process ends.
So a running trial without a holder was interrupted, and waits again: with its number, its values and its run folder, in
which the training continues. In a data base that several machines share, a trial of another folder counts as
interrupted once its process has not reported for GRACE_SECONDS.
"""

import os
import threading
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from pipeline.config import Config
from pipeline.sweep.data_base import naming_study, open_storage, study_errors
from pipeline.sweep.plan import describe_sweep, plan_distributions, plan_params, sweep_section
from pipeline.sweep.record import RECORD_FILE
from pipeline.sweep.settings import SweepSection
from stages.errors import SettingError
from stages.whole_files import write_whole
from storage.errors import CacheReadError
from storage.locks import exclusive, lock, open_lock, unlock

OWN_STUDY = "sweep"  # in that file
LOCKS = ".locks"
BEAT_SECONDS = 30.0
# Ten missed reports: the machine is gone, or its clock is minutes off those of the others (assumption).
GRACE_SECONDS = 300.0

TROUBLE = "trouble"  # attribute of a trial: why it was last put back
FAILED_TO_WAITING = (
    "UPDATE trials SET state = 'WAITING', datetime_complete = NULL WHERE study_id = :id AND state = 'FAIL'"
)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class ClaimedTrial:
    """A trial that this process works on. Ends by one of the `Trials` methods that take it."""

    number: int
    params: dict[str, Any]
    handle: optuna.Trial
    lock: int
    finished: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The study of one sweep, opened by `open_trials`."""

    sweep: SweepSection
    folder: Path
    place: str
    """Names the folder: trials with the same place have their locks here."""
    planned: list[dict[str, Any]]
    """`plan_params`'s, by the number of the trial."""
    study: optuna.Study
    storage: RDBStorage
    study_id: int

    @property
    def num_trials(self) -> int:
        """Trials in all."""
        return len(self.planned)

    @naming_study
    def count(self, *states: TrialState) -> int:
        """Trials in one of these states; by default all that have ended."""
        return len(self._select(*states or FINISHED))

    @naming_study
    def claim(self, *, avoid: Collection[int] = ()) -> ClaimedTrial | None:
        """A trial that waits, or the next new one; it is this process's from now on. None if there is none left.

        A trial with the values of a complete one gets its tau, and is passed over; so are the numbers to `avoid`, and
        those that wait though a process still holds them.
        """
        held: set[int] = set()
        with exclusive(self.folder / LOCKS / "sweep", wait=True):
            self._free_interrupted()
            while (number := self._take({*avoid, *held})) is not None:
                lock = self._lock_trial(number)
                if lock is None:
                    held.add(number)
                    self._set_state(number, TrialState.WAITING)
                    continue
                claimed = self._start(number, lock)
                if not self._copy_twin(claimed):
                    return claimed
            return None

    @naming_study
    def find_missing(self) -> list[str]:
        """Run folders of complete trials of this folder that are gone, with what they would be compared by."""
        trained = [
            Path(trial.user_attrs["run_dir"]).name  # the sweep's folder may have another name by now
            for trial in self._select(TrialState.COMPLETE)
            if self._is_here(trial) and "run_dir" in trial.user_attrs  # else it has the values of another trial
        ]
        return [name for name in trained if not (self.folder / name / RECORD_FILE).is_file()]

    @naming_study
    def is_held_here(self) -> bool:
        """Whether a process of this folder is at work on a trial."""
        with exclusive(self.folder / LOCKS / "sweep", wait=True):
            open_ = self._select(TrialState.RUNNING, TrialState.WAITING)  # which may still be held for a moment
            return any(self._is_here(trial) and not self._is_free(trial.number) for trial in open_)

    @naming_study
    def note(self, trial: ClaimedTrial, attributes: dict[str, Any]) -> None:
        """Keep these attributes with the trial."""
        for name, value in attributes.items():
            trial.handle.set_user_attr(name, value)

    @naming_study
    def report(self, trial: ClaimedTrial, *, step: int, tau: float) -> bool:
        """Note the tau of a validation; whether the trial should be given up."""
        if step not in self._select()[trial.number].intermediate_values:  # else a validation done again after a kill
            trial.handle.report(tau, step)
        return self.should_prune(trial)

    @naming_study
    def should_prune(self, trial: ClaimedTrial) -> bool:
        """What the last validation says, if the sweep prunes at all."""
        return self.sweep.prune and bool(trial.handle.should_prune())

    @naming_study
    def complete(self, trial: ClaimedTrial, *, tau: float) -> None:
        """The trial has ended with this tau."""
        self.study.tell(trial.handle, tau, skip_if_finished=True)
        self._release(trial)

    @naming_study
    def prune(self, trial: ClaimedTrial) -> None:
        """The trial was given up."""
        self.study.tell(trial.handle, state=TrialState.PRUNED, skip_if_finished=True)
        self._release(trial)

    @naming_study
    def fail(self, trial: ClaimedTrial, reason: str) -> None:
        """The trial's values do not work, for this reason."""
        trial.handle.set_user_attr("reason", reason)
        self.study.tell(trial.handle, state=TrialState.FAIL, skip_if_finished=True)
        self._release(trial)

    @naming_study
    def postpone(self, trial: ClaimedTrial, reason: str) -> None:
        """The trial met trouble that may pass, for this reason, and waits."""
        trial.handle.set_user_attr(TROUBLE, reason)
        self.put_back(trial)

    @naming_study
    def find_postponed(self) -> dict[int, str]:
        """Trials that wait since they met trouble that may pass: number -> reason."""
        waiting = self._select(TrialState.WAITING)
        return {trial.number: trial.user_attrs[TROUBLE] for trial in waiting if trial.user_attrs.get(TROUBLE)}

    @naming_study
    def put_back(self, trial: ClaimedTrial) -> None:
        """The trial was interrupted, and waits for whoever continues it; nothing if it has ended."""
        if trial.finished.is_set():
            return
        try:
            # Nobody may find the trial waiting and yet held, nor free it a second time.
            with exclusive(self.folder / LOCKS / "sweep", wait=True):
                with suppress(optuna.exceptions.UpdateFinishedTrialError):  # another machine took it for interrupted
                    self._set_state(trial.number, TrialState.WAITING)
                self._release(trial)
        finally:
            self._release(trial)

    def _start(self, number: int, lock: int) -> ClaimedTrial:
        # A function of the seed and the trial: a sampler that started anew after a kill would repeat its first draws.
        self.study.sampler = optuna.samplers.TPESampler(seed=(self.sweep.seed * 1_000_003 + number) % 2**32)
        self._sign(number)
        self.storage.set_trial_user_attr(self._trial_id(number), TROUBLE, None)
        self._select()  # shows the study a trial that was made past it
        handle = optuna.Trial(self.study, self._trial_id(number))
        params = self._find_params(handle)
        claimed = ClaimedTrial(number=number, params=params, handle=handle, lock=lock)
        if self.sweep.storage is not None:
            threading.Thread(target=_beat, args=(claimed,), daemon=True).start()
        return claimed

    def _find_params(self, trial: optuna.Trial) -> dict[str, Any]:
        """The trial's parameters: those that it has, the planned ones, or the sampler's, which are kept."""
        distributions = plan_distributions(self.sweep)
        for name, value in self.planned[trial.number].items():
            if name not in trial.params:
                internal = distributions[name].to_internal_repr(value)
                self.storage.set_trial_param(self._trial_id(trial.number), name, internal, distributions[name])
        trial = optuna.Trial(self.study, self._trial_id(trial.number))
        return {name: _suggest(trial, name, values) for name, values in distributions.items()}

    def _copy_twin(self, claimed: ClaimedTrial) -> bool:
        """End the trial with the tau of a complete one that has the same values; a training is a function of them."""
        for other in self._select(TrialState.COMPLETE):
            if other.params == claimed.params and other.value is not None:
                claimed.handle.set_user_attr("same_as", other.number)
                self.complete(claimed, tau=other.value)
                return True
        return False

    def _take(self, avoid: Collection[int]) -> int | None:
        """The number of a trial that waited, or of a new one, which runs now."""
        for trial in self._select(TrialState.WAITING):
            if trial.number in avoid:
                continue
            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # another machine was faster
                self._sign(trial.number)
                if self._set_state(trial.number, TrialState.RUNNING):
                    return trial.number
        if len(self.study.get_trials(deepcopy=False)) >= self.num_trials:
            return None
        # Not `study.ask`: nobody may see the trial before it says whose it is.
        signed = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=self._signature())
        number = self.storage.get_trial_number_from_id(self.storage.create_new_trial(self.study_id, signed))
        if number < self.num_trials:
            return number
        self._set_state(number, TrialState.WAITING)  # another machine took the last; this one waits for a larger sweep
        return None

    def _signature(self) -> dict[str, Any]:
        return {"place": self.place, "beat": time.time()}

    def _sign(self, number: int) -> None:
        for key, value in self._signature().items():
            self.storage.set_trial_user_attr(self._trial_id(number), key, value)

    def _select(self, *states: TrialState) -> list[FrozenTrial]:
        """The planned trials in one of these states, or all of them."""
        trials = self.study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in trials if trial.number < self.num_trials]

    def _free_interrupted(self) -> None:
        """Let running trials wait whose process has ended. Under the sweep's lock, so nobody is about to take one."""
        for trial in self._select(TrialState.RUNNING):
            if self._is_here(trial):
                is_interrupted = self._is_free(trial.number)
            else:
                is_interrupted = time.time() - trial.user_attrs["beat"] > GRACE_SECONDS
            if is_interrupted:
                with suppress(optuna.exceptions.UpdateFinishedTrialError):
                    self._set_state(trial.number, TrialState.WAITING)

    def _is_here(self, trial: FrozenTrial) -> bool:
        return bool(trial.user_attrs["place"] == self.place)

    def _is_free(self, number: int) -> bool:
        lock = self._lock_trial(number)
        if lock is not None:
            unlock(lock)
        return lock is not None

    def _lock_trial(self, number: int) -> int | None:
        """A descriptor that holds the trial's lock until it is closed; None if another has it."""
        return _lock(self.folder / LOCKS / f"trial_{number:04d}")

    def _release(self, trial: ClaimedTrial) -> None:
        if not trial.finished.is_set():
            trial.finished.set()
            unlock(trial.lock)

    def _set_state(self, number: int, state: TrialState) -> bool:
        return self.storage.set_trial_state_values(self._trial_id(number), state)

    def _trial_id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)


def open_trials(config: Config, *, cache: dict[str, str], retries_failed: bool = False) -> Trials:
    """The sweep's trials, made by the first process that asks for them. `cache` is what the cache's identity says.

    With `retries_failed` those that failed wait again.

    Raises SettingError for a sweep that was begun with other settings or another cache, and for a data base that
    cannot be used.
    """
    sweep = sweep_section(config)
    folder = config.train.run_dir
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    with exclusive(folder / LOCKS / "sweep", wait=True), study_errors(sweep, folder):
        storage = open_storage(sweep, folder)  # makes its tables
        name = _study_name(sweep, folder, storage)
        study = optuna.create_study(
            study_name=name,
            storage=storage,
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=sweep.prune_startup_trials, n_warmup_steps=sweep.prune_warmup_steps
            ),
        )
        _check_same(study, {**describe_sweep(config), **cache}, folder=folder)
        if retries_failed:  # Optuna itself lets no trial begin again; nothing of this study is in its cache yet
            with storage.engine.begin() as connection:
                found = {"id": storage.get_study_id_from_name(name)}
                connection.execute(sqlalchemy.text(FAILED_TO_WAITING), found)
        return Trials(
            sweep=sweep, folder=folder, place=_place(folder), planned=plan_params(sweep), study=study, storage=storage,
            study_id=storage.get_study_id_from_name(name),
        )  # fmt: skip


def _study_name(sweep: SweepSection, folder: Path, storage: RDBStorage) -> str:
    """In a shared data base the sweep's; the folder's own file has one study, whatever the folder is called by now."""
    if sweep.storage is not None:
        return sweep.name or folder.resolve().name
    return next((study.study_name for study in storage.get_all_studies()), OWN_STUDY)


def _check_same(study: optuna.Study, wanted: dict[str, str], *, folder: Path) -> None:
    """Note what a new study is made from; refuse one that was made from something else. Raises SettingError."""
    known = study.user_attrs.get("made_from")
    if known is None:
        study.set_user_attr("made_from", wanted)
        return
    differing = [key for key in sorted({*known, *wanted}) if known.get(key) != wanted.get(key)]
    if differing:
        lines = [f"  {key}: the sweep has {known.get(key)}, now {wanted.get(key)}" for key in differing]
        raise SettingError(
            "\n".join([f"{folder} holds a sweep that was begun with something else:", *lines])
            + "\nIts trials would not be comparable: set train.run_dir to a new folder (and sweep.name, with "
            "sweep.storage), or restore these to continue"
        )


def _suggest(trial: optuna.Trial, name: str, values: BaseDistribution) -> Any:
    match values:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, values.choices)
        case IntDistribution():
            return trial.suggest_int(name, values.low, values.high, step=values.step, log=values.log)
        case FloatDistribution():
            return trial.suggest_float(name, values.low, values.high, step=values.step, log=values.log)
    raise AssertionError(f"{name}: no distribution of ours: {values}")


def _beat(trial: ClaimedTrial) -> None:
    """Report from time to time that the trial's process is alive, until the trial has ended here."""
    while not trial.finished.wait(BEAT_SECONDS):
        with suppress(sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError):  # the next time, or never
            trial.handle.set_user_attr("beat", time.time())


def _place(folder: Path) -> str:
    """A name of the folder that no other has; it is made once, under the sweep's lock."""
    file = folder / LOCKS / "place"
    if not file.is_file():
        write_whole(file, uuid.uuid4().hex)
    return file.read_text(encoding="ascii")


def _lock(file: Path) -> int | None:
    """A descriptor that holds the lock, or None if another has it. Raises CacheReadError."""
    descriptor = open_lock(file)
    try:
        if lock(descriptor, file) != "busy":
            return descriptor
    except CacheReadError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
