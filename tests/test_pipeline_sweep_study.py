"""How processes share the trials of a sweep, without a training: what is claimed, freed, drawn, refused."""

import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from pipeline.config import Config, load_config, to_toml
from pipeline.sweep import data_base
from pipeline.sweep import study as study_module
from pipeline.sweep.study import ClaimedTrial, Trials, open_trials
from stages.errors import SettingError
from tiny_target import make_config

CACHE = {"cache.identity": "a", "cache.plan": "b"}
GRID = '[sweep.grid]\n"train.seed" = [0, 1, 2]\n"draft.markov_rank" = [0, 8]'
TPE = """
[sweep]
sampler = "tpe"
num_trials = 13
[sweep.parameters]
"train.lr" = { low = 1e-4, high = 1e-1, log = true }
"draft.markov_rank" = [0, 8, 16]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_config(tmp_path_factory.mktemp("base"))


def make(base: Config, sweep: str, run_dir: Path) -> Config:
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    file = run_dir.parent / "sweep.toml"
    file.write_text(f"{to_toml(base)}\n{sweep}\n")
    return load_config(file, [f"train.run_dir={run_dir}"])


def drain(trials: Trials, *, tau: Callable[[ClaimedTrial], float]) -> list[dict[str, Any]]:
    found = []
    while (claimed := trials.claim()) is not None:
        found.append(claimed.params)
        trials.complete(claimed, tau=tau(claimed))
    return found


def test_two_openings_never_get_the_same_trial(base: Config, tmp_path: Path) -> None:
    config = make(base, GRID, tmp_path / "run")
    left, right = open_trials(config, cache=CACHE), open_trials(config, cache=CACHE)
    held = [trials.claim() for _ in range(3) for trials in (left, right)]
    numbers = [trial.number for trial in held if trial is not None]
    assert numbers == [0, 1, 2, 3, 4, 5]
    assert left.claim() is None
    assert right.is_held_here()
    for trials, trial in zip([left, right] * 3, held, strict=True):
        assert trial is not None
        trials.complete(trial, tau=1.0 + trial.number)
    assert left.count() == right.count(TrialState.COMPLETE) == 6
    assert left.claim() is None
    assert not right.is_held_here()


def test_a_trial_whose_holder_is_gone_is_claimed_again_with_its_values(base: Config, tmp_path: Path) -> None:
    config = make(base, TPE, tmp_path / "run")
    first = open_trials(config, cache=CACHE)
    claimed, other = first.claim(), first.claim()
    assert claimed is not None
    assert other is not None
    assert first.report(claimed, step=2, tau=1.5) is False
    study_module.os.close(claimed.lock)  # what the end of a process does
    second = open_trials(config, cache=CACHE)
    assert second.count(TrialState.RUNNING) == 2
    again = second.claim()
    assert again is not None
    assert (again.number, again.params) == (claimed.number, claimed.params)
    assert second.report(again, step=2, tau=1.25) is False  # a validation done again; the first one counts
    assert second.study.trials[again.number].intermediate_values == {2: 1.5}
    third = second.claim()
    assert third is not None
    assert third.number == 2  # the other one is held


def test_a_trial_that_was_put_back_comes_first(base: Config, tmp_path: Path) -> None:
    trials = open_trials(make(base, GRID, tmp_path / "run"), cache=CACHE)
    first, second = trials.claim(), trials.claim()
    assert first is not None
    assert second is not None
    trials.put_back(first)
    trials.put_back(first)  # nothing more
    again = trials.claim()
    assert again is not None
    assert again.number == first.number
    trials.fail(again, "does not fit")
    trials.put_back(again)  # it has ended
    third = trials.claim()
    assert third is not None
    assert third.number == 2
    assert trials.study.trials[0].state == TrialState.FAIL
    assert trials.study.trials[0].user_attrs["reason"] == "does not fit"


def test_a_trial_that_is_put_back_is_never_found_waiting_and_held(base: Config, tmp_path: Path) -> None:
    """A claims the only trial and puts it back, while B claims at every moment in between."""
    config = make(base, GRID.replace("0, 1, 2]", "0]").replace("0, 8]", "0]"), tmp_path / "run")
    left, right = open_trials(config, cache=CACHE), open_trials(config, cache=CACHE)
    claimed = left.claim()
    assert claimed is not None
    original, waits = left.storage.set_trial_state_values, threading.Event()

    def slowly(*arguments: Any, **options: Any) -> bool:
        changed = original(*arguments, **options)
        waits.set()
        time.sleep(1.0)
        return changed

    left.storage.set_trial_state_values = slowly  # type: ignore[method-assign]
    with ThreadPoolExecutor() as pool:
        put_back = pool.submit(left.postpone, claimed, "no descriptors")
        assert waits.wait(30)
        again = right.claim()
        put_back.result()
    assert again is not None
    assert again.number == claimed.number


def test_a_waiting_trial_that_a_process_holds_is_passed_over(base: Config, tmp_path: Path) -> None:
    trials = open_trials(make(base, GRID, tmp_path / "run"), cache=CACHE)
    first = trials.claim()
    assert first is not None
    trials._set_state(first.number, TrialState.WAITING)
    second = trials.claim()
    assert second is not None
    assert second.number == 1
    assert trials.study.trials[0].state == TrialState.WAITING
    assert trials.is_held_here()
    trials.put_back(first)
    again = trials.claim()
    assert again is not None
    assert again.number == first.number


def test_what_was_let_go_of_is_free_though_a_child_has_its_descriptor(base: Config, tmp_path: Path) -> None:
    trials = open_trials(make(base, GRID, tmp_path / "run"), cache=CACHE)
    claimed = trials.claim()
    assert claimed is not None
    inherited = study_module.os.dup(claimed.lock)  # what a fork gives
    trials.put_back(claimed)
    again = trials.claim()
    assert again is not None
    assert again.number == claimed.number
    study_module.os.close(inherited)


DAMAGES = {
    "attribute": "UPDATE trial_user_attributes SET value_json = '{'",
    "place": "DELETE FROM trial_user_attributes WHERE key = 'place'",
    "origin": "UPDATE study_user_attributes SET value_json = '[1'",
    "state": "UPDATE trials SET state = 'WHAT'",
    "number": "UPDATE trials SET number = 'x'",
    "table": "ALTER TABLE trials DROP COLUMN datetime_start",
    "params": "UPDATE trial_params SET distribution_json = '{}'",
}


@pytest.mark.parametrize("damage", [*DAMAGES, "cut", "bytes"])
def test_a_damaged_study_is_named_with_what_to_do(base: Config, tmp_path: Path, damage: str) -> None:
    config = make(base, GRID, tmp_path / "run")
    trials = open_trials(config, cache=CACHE)
    done, claimed = trials.claim(), trials.claim()
    assert done is not None
    assert claimed is not None
    trials.complete(done, tau=1.5)
    file = tmp_path / "run" / "study.db"
    trials.storage.engine.dispose()
    if damage in DAMAGES:
        with sqlite3.connect(file) as connection:
            connection.execute(DAMAGES[damage])
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:8192])
    else:
        data = bytearray(file.read_bytes())
        for place in range(4096, len(data), 512):
            data[place : place + 64] = b"\xff" * 64
        file.write_bytes(data)
    with pytest.raises(SettingError, match=r"study\.db: cannot be used.*move it away.*trial\.json"):
        drain(open_trials(config, cache=CACHE), tau=lambda _: 1.0)


def test_machines_that_share_a_data_base_free_a_trial_once_it_is_silent(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders stand for two machines: neither sees the other's locks."""
    sweep = GRID.replace(
        "[sweep.grid]", f'[sweep]\nname = "s"\nstorage = "sqlite:///{tmp_path}/shared.db"\n[sweep.grid]'
    )
    here = open_trials(make(base, sweep, tmp_path / "here" / "run"), cache=CACHE)
    there = open_trials(make(base, sweep, tmp_path / "there" / "run"), cache=CACHE)
    claimed = here.claim()
    assert claimed is not None
    study_module.os.close(claimed.lock)  # its process is killed; the reports end with it
    claimed.finished.set()
    other = there.claim()
    assert other is not None
    assert other.number == 1
    assert not here.is_held_here()
    assert there.is_held_here()
    now = time.time()
    monkeypatch.setattr(study_module.time, "time", lambda: now + study_module.GRACE_SECONDS + 1)
    taken = there.claim()
    assert taken is not None
    assert (taken.number, taken.params) == (claimed.number, claimed.params)
    assert here.study.trials[0].user_attrs["place"] == there.place


def test_a_trial_reports_while_it_is_held(base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "BEAT_SECONDS", 0.05)
    sweep = GRID.replace("[sweep.grid]", f'[sweep]\nstorage = "sqlite:///{tmp_path}/shared.db"\n[sweep.grid]')
    trials = open_trials(make(base, sweep, tmp_path / "run"), cache=CACHE)
    claimed = trials.claim()
    assert claimed is not None
    before = trials.study.trials[0].user_attrs["beat"]
    deadline = time.monotonic() + 30
    while trials.study.trials[0].user_attrs["beat"] == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    trials.complete(claimed, tau=1.0)


def _tau(claimed: ClaimedTrial) -> float:
    return 2.0 - abs(claimed.params["train.lr"] - 0.01) + 0.01 * float(claimed.params["draft.markov_rank"])


def test_tpe_draws_the_same_however_often_it_is_interrupted(base: Config, tmp_path: Path) -> None:
    whole = drain(open_trials(make(base, TPE, tmp_path / "whole"), cache=CACHE), tau=_tau)
    parts = []
    config = make(base, TPE, tmp_path / "parts")
    while (claimed := (trials := open_trials(config, cache=CACHE)).claim()) is not None:
        if claimed.number >= 9:  # around the tenth, where it begins to look at what came before
            trials.put_back(claimed)
            trials = open_trials(config, cache=CACHE)
            claimed = trials.claim() or claimed
        parts.append(claimed.params)
        trials.complete(claimed, tau=_tau(claimed))
    assert parts == whole
    assert len({params["train.lr"] for params in whole}) == 13
    assert all(1e-4 <= params["train.lr"] <= 1e-1 for params in whole)
    other = make(base, TPE.replace("13", "1\nseed = 5"), tmp_path / "other")
    assert drain(open_trials(other, cache=CACHE), tau=_tau) != whole[:1]


def test_values_that_were_complete_before_are_not_claimed_again(base: Config, tmp_path: Path) -> None:
    sweep = '[sweep]\nsampler = "random"\nnum_trials = 6\n[sweep.parameters]\n"draft.markov_rank" = [0, 8]'
    trials = open_trials(make(base, sweep, tmp_path / "run"), cache=CACHE)
    found = drain(trials, tau=lambda claimed: 1.0 + float(claimed.params["draft.markov_rank"]))
    assert sorted(params["draft.markov_rank"] for params in found) == ["0", "8"]
    assert trials.count(TrialState.COMPLETE) == 6
    for trial in trials.study.trials:
        assert trial.value == 1.0 + float(trial.params["draft.markov_rank"])


def test_the_median_decides_who_is_pruned(base: Config, tmp_path: Path) -> None:
    """Against a plain loop over all that was reported."""
    taus = {0: (1.0, 1.5), 1: (1.2, 1.4), 2: (1.1, 1.6), 3: (1.05, 1.7), 4: (1.3, 1.45), 5: (1.0, 1.9)}
    sweep = GRID.replace("[sweep.grid]", "[sweep]\nprune = true\nprune_startup_trials = 3\n[sweep.grid]")
    trials = open_trials(make(base, sweep, tmp_path / "run"), cache=CACHE)
    complete: list[int] = []
    pruned = {}
    while (claimed := trials.claim()) is not None:
        number = claimed.number
        for index, tau in enumerate(taus[number]):
            earlier = sorted(taus[other][index] for other in complete)
            middle = len(earlier) // 2
            median = earlier[middle] if len(earlier) % 2 else sum(earlier[middle - 1 : middle + 1]) / 2
            best = max(taus[number][: index + 1])  # a trial is judged by its best validation so far
            expected = len(complete) >= 3 and best < median
            assert trials.report(claimed, step=2 * (index + 1), tau=tau) is expected
            if expected:
                pruned[number] = index
                break
        if number in pruned:
            trials.prune(claimed)
        else:
            trials.complete(claimed, tau=taus[number][-1])
            complete.append(number)
    assert pruned == {3: 0, 4: 1, 5: 0}
    assert trials.count(TrialState.PRUNED) == 3


@pytest.mark.parametrize(
    ("sweep", "changes", "cache", "message"),
    [
        (GRID, {}, {**CACHE, "cache.identity": "other"}, r"cache.identity: the sweep has a, now other"),
        (GRID.replace("1, 2", "1, 2, 3"), {}, CACHE, r"sweep.parameters.train.seed: the sweep has \[0, 1, 2\], now"),
        (GRID, {"train__max_steps": 9}, CACHE, "train.max_steps: the sweep has 8, now 9"),
        (GRID, {"evaluate__num_anchors": 5}, CACHE, "evaluate.num_anchors"),
        (GRID.replace("[sweep.grid]", "[sweep]\nprune = true\n[sweep.grid]"), {}, CACHE, "sweep.prune"),
    ],
)
def test_a_sweep_that_was_begun_otherwise_is_refused(
    base: Config, tmp_path: Path, sweep: str, changes: dict[str, Any], cache: dict[str, str], message: str
) -> None:
    open_trials(make(base, GRID, tmp_path / "run"), cache=CACHE)
    sections = {name: getattr(base, name) for name in ("train", "evaluate")}
    for path, value in changes.items():
        section, _, key = path.partition("__")
        sections[section] = sections[section].model_copy(update={key: value})
    changed = make(base.model_copy(update=sections), sweep, tmp_path / "run")
    with pytest.raises(SettingError, match=message):
        open_trials(changed, cache=cache)


def test_more_trials_may_be_asked_for_later(base: Config, tmp_path: Path) -> None:
    few = TPE.replace("13", "3")
    assert len(drain(open_trials(make(base, few, tmp_path / "run"), cache=CACHE), tau=_tau)) == 3
    more = open_trials(make(base, TPE.replace("13", "5"), tmp_path / "run"), cache=CACHE)
    assert more.count() == 3
    assert len(drain(more, tau=_tau)) == 2
    fewer = open_trials(make(base, few, tmp_path / "run"), cache=CACHE)
    assert (fewer.num_trials, fewer.count(), fewer.claim()) == (3, 3, None)


@pytest.mark.parametrize("url", ["nonsense", "nosuchdialect://host/db", "sqlite:////nonexistent/folder/db"])
def test_a_data_base_that_cannot_be_used(base: Config, tmp_path: Path, url: str) -> None:
    sweep = GRID.replace("[sweep.grid]", f'[sweep]\nstorage = "{url}"\n[sweep.grid]')
    with pytest.raises(SettingError, match=r"sweep.storage: cannot be used"):
        open_trials(make(base, sweep, tmp_path / "run"), cache=CACHE)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:p@h:notaport/S3CRET",
        "postgresql://u:S3CRET@h:5432x/db",
        "mysql://u:a@b:S3CRET/db",
        "sqlite+what://S3CRET@",
    ],
)
def test_a_url_that_cannot_be_read_is_not_shown(base: Config, tmp_path: Path, url: str) -> None:
    sweep = GRID.replace("[sweep.grid]", f'[sweep]\nstorage = "{url}"\n[sweep.grid]')
    with pytest.raises(SettingError, match=r"sweep.storage: cannot be used") as caught:
        open_trials(make(base, sweep, tmp_path / "run"), cache=CACHE)
    assert "S3CRET" not in str(caught.value)


def test_a_file_that_is_no_data_base(base: Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.db").write_text("garbage" * 1000)
    with pytest.raises(SettingError, match=r"study.db: cannot be used"):
        open_trials(make(base, GRID, tmp_path / "run"), cache=CACHE)


@pytest.mark.parametrize("name", ["what?", "50%41", "a#b", "{x}", "two words"])
def test_a_folder_may_have_any_name(base: Config, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "sub" / name
    trials = open_trials(make(base, GRID, folder), cache=CACHE)
    assert len(drain(trials, tau=lambda _: 1.0)) == 6
    assert (folder / "study.db").is_file()
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [name]


def test_a_folder_that_was_renamed_keeps_its_sweep(base: Config, tmp_path: Path) -> None:
    before = open_trials(make(base, GRID, tmp_path / "before" / "run"), cache=CACHE)
    drain(before, tau=lambda _: 1.0)
    (tmp_path / "before").rename(tmp_path / "after")
    (tmp_path / "after" / "run").rename(tmp_path / "after" / "other")
    after = open_trials(make(base, GRID, tmp_path / "after" / "other"), cache=CACHE)
    assert after.count(TrialState.COMPLETE) == 6


def test_a_study_named_after_its_folder_is_continued(base: Config, tmp_path: Path) -> None:
    """As earlier versions named it."""
    (tmp_path / "run").mkdir()
    optuna.create_study(study_name="run", storage=f"sqlite:///{tmp_path}/run/study.db", direction="maximize")
    assert open_trials(make(base, GRID, tmp_path / "run"), cache=CACHE).study.study_name == "run"


def test_many_may_open_a_new_sweep_at_once(base: Config, tmp_path: Path) -> None:
    config = make(base, GRID, tmp_path / "run")
    at_once = threading.Barrier(8)

    def open_() -> str:
        at_once.wait()
        return open_trials(config, cache=CACHE).place

    with ThreadPoolExecutor(8) as pool:
        opened = [pool.submit(open_) for _ in range(8)]
    assert len({future.result() for future in opened}) == 1


def test_a_shared_data_base_that_another_machine_sets_up_is_tried_again(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_base, "RETRY_SECONDS", 0.0)
    original, attempts = data_base.RDBStorage, []

    def connect(*arguments: Any, **named: Any) -> Any:
        attempts.append(arguments)
        if len(attempts) == 1:
            raise sqlalchemy.exc.OperationalError("CREATE TABLE studies", {}, Exception("exists already"))
        return original(*arguments, **named)

    monkeypatch.setattr(data_base, "RDBStorage", connect)
    sweep = GRID.replace("[sweep.grid]", f'[sweep]\nstorage = "sqlite:///{tmp_path}/shared.db"\n[sweep.grid]')
    assert open_trials(make(base, sweep, tmp_path / "run"), cache=CACHE).claim() is not None
    assert len(attempts) == 2


def test_optuna_says_nothing(capfd: pytest.CaptureFixture[str], base: Config, tmp_path: Path) -> None:
    drain(open_trials(make(base, GRID, tmp_path / "run"), cache=CACHE), tau=lambda _: 1.0)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING
