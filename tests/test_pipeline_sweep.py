"""Sweeps for real: trained, evaluated, killed, continued, pruned, shared by processes, refused."""

import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from click.testing import CliRunner, Result
from optuna.trial import TrialState
from rich.console import Console
from safetensors.torch import load_file

from pipeline import stage_two
from pipeline.cli import main
from pipeline.config import load_config, to_toml
from pipeline.sweep import command as sweep_command
from pipeline.sweep import desk as desk_module
from pipeline.sweep.record import read_trial
from stages.errors import SettingError
from stages.train.checkpoint import find_checkpoint
from stages.train.loop import Stepper
from stages.train.metrics import read_metrics
from stages.train.parallel import Ranks
from storage import CacheReader
from tiny_target import make_config

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 180.0


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    file = folder / "base.toml"
    file.write_text(to_toml(make_config(folder)))
    assert CliRunner().invoke(main, ["extract", str(file)], catch_exceptions=False).exit_code == 0
    return folder


def write_sweep(cached: Path, tmp_path: Path, sweep: str, **changes: Any) -> Path:
    config = make_config(cached, train__run_dir=tmp_path / "run", **{"train__max_steps": 4, **changes})
    file = tmp_path / "sweep.toml"
    file.write_text(f"{to_toml(config)}\n{sweep}\n")
    return file


def run(file: Path, *options: str, command: str = "sweep") -> Result:
    return CliRunner().invoke(main, [command, str(file), *options], catch_exceptions=False)


def start(file: Path, output: Path, *, gate: Path | None = None) -> subprocess.Popen[bytes]:
    """With a `gate`, each process holds its first trial until another has one too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GATE": str(gate)}
    command = ["-m", "pipeline.cli"] if gate is None else [str(ROOT / "tests" / "gated_sweep.py")]
    with output.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, *command, "sweep", str(file)],
            env=environment, stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process is None or process.poll() is None, "it has ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def states(run_dir: Path) -> list[TrialState]:
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{run_dir}/study.db")
    return [trial.state for trial in study.trials]


def last_step(run_dir: Path) -> int:
    return max((row["step"] for row in read_metrics(run_dir)), default=0)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """All that was logged, without what depends on the clock."""
    timed = {"seconds", "tokens_per_second", "eta_seconds", "waited_seconds", "wait_share"}
    return [{key: value for key, value in row.items() if key not in timed} for row in read_metrics(run_dir)]


def assert_same_runs(left: Path, right: Path) -> None:
    names = sorted(folder.name for folder in left.glob("*/draft/.."))
    assert names == sorted(folder.name for folder in right.glob("*/draft/.."))
    for one, other in zip(sorted(left.glob("*/draft")), sorted(right.glob("*/draft")), strict=True):
        assert rows(one.parent) == rows(other.parent)
        first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
        assert all(torch.equal(first[name], second[name]) for name in first | second)
        assert json.loads((one.parent / "evaluation.json").read_text()) == json.loads(
            (other.parent / "evaluation.json").read_text()
        )


def test_a_sweep_trains_evaluates_and_compares_once(cached: Path, tmp_path: Path) -> None:
    file = write_sweep(cached, tmp_path, '[sweep.grid]\n"draft.markov_head_type" = ["vanilla", "rnn"]')
    first = run(file)
    assert first.exit_code == 0, first.output
    folders = [tmp_path / "run" / f"markov_head_type={head}" for head in ("vanilla", "rnn")]
    assert all((folder / "evaluation.json").is_file() for folder in folders)
    assert "2 of 2 trials have ended: 2 complete" in first.output
    assert f"page: {tmp_path / 'run' / 'report.html'}" in first.output
    assert (tmp_path / "run" / "report.html").is_file()
    before = [read_metrics(folder) for folder in folders]
    second = run(file)
    assert second.exit_code == 0
    assert "2 of 2 trials have ended: 2 complete" in second.output
    assert "trial 1 of 2" not in second.output
    assert [read_metrics(folder) for folder in folders] == before
    assert "no longer there" not in second.output
    out = tmp_path / "exported"
    exported = CliRunner().invoke(main, ["export", str(folders[1] / "checkpoints" / "step_00000004"), str(out)])
    assert exported.exit_code == 0
    names = ["README.md", "calibration.json", "config.json", "model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert "exists already" in CliRunner().invoke(main, ["export", str(folders[1] / "draft"), str(out)]).output


def test_a_sweep_extracts_what_its_cache_lacks(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, tmp_path, '[sweep.grid]\n"train.seed" = [0, 1]')
    result = CliRunner().invoke(main, ["sweep", str(file)])
    assert result.exit_code == 1
    assert "run extract" in result.output
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(file.read_text().replace('"train.seed" = [0, 1]', '"train.lr" = ["fast"]'))
    assert "'fast'" in CliRunner().invoke(main, ["sweep", "--extract", str(wrong)]).output
    assert not (tmp_path / "cache").exists(), "extracted for a sweep that cannot be"
    unsplit = CliRunner().invoke(main, ["sweep", "--extract", str(file), "--set", "data.validation_fraction=0"])
    assert "data.validation_fraction: is 0" in unsplit.output
    assert not (tmp_path / "cache").exists()
    again = run(file, "--extract")
    assert again.exit_code == 0, again.output
    assert "2 of 2 trials have ended: 2 complete" in again.output


def test_a_trial_says_what_it_was_made_from(cached: Path, tmp_path: Path) -> None:
    result = run(write_sweep(cached, tmp_path, '[sweep.grid]\n"train.seed" = [3, 4]'))
    records = [read_trial(tmp_path / "run" / f"seed={seed}") for seed in (3, 4)]
    orders = re.findall(r"epoch 0: order ([0-9a-f]{16})", result.output)
    assert len(set(orders)) == 2
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/run/study.db")
    with CacheReader(cached / "cache") as reader:
        for number, record in enumerate(records):
            assert record is not None
            assert (record["number"], record["values"], record["state"]) == (
                number + 1, {"train.seed": 3 + number}, "complete",
            )  # fmt: skip
            origin = record["origin"]
            assert origin["cache"]["cache.identity"] == reader.identity.digest()
            assert origin["cache"]["cache.plan"] == reader.manifest.plan_digest
            assert origin["order"].startswith(orders[number])
            assert origin["versions"]["torch"] == torch.__version__
            assert {"python", "transformers", "numpy", "optuna", "dspark-offline"} <= origin["versions"].keys()
            assert study.trials[number].user_attrs["origin"] == origin
            evaluation = json.loads((tmp_path / "run" / f"seed={3 + number}" / "evaluation.json").read_text())
            assert study.trials[number].value == evaluation["tau"]
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode == 0 and records[0] is not None and records[0]["origin"]["revision"]:
        assert records[0]["origin"]["revision"].rstrip("+") == head.stdout.strip()


def test_random_and_tpe_train_what_they_draw(cached: Path, tmp_path: Path) -> None:
    for sampler in ("random", "tpe"):
        sweep = f"""
        [sweep]
        sampler = "{sampler}"
        num_trials = 2
        [sweep.parameters]
        "train.lr" = {{ low = 1e-4, high = 1e-1, log = true }}
        "draft.target_layer_ids" = [[1, 3], [-1]]
        """
        folder = tmp_path / sampler
        folder.mkdir()
        result = run(write_sweep(cached, folder, sweep, train__max_steps=1))
        assert "2 of 2 trials have ended: 2 complete" in result.output
        records = [read_trial(trial.parent) for trial in sorted((folder / "run").glob("*/draft"))]
        for number, record in enumerate(records, start=1):
            assert record is not None
            name = f"{number:04d},lr={record['values']['train.lr']:.4g},target_layer_ids="
            (run_dir,) = (folder / "run").glob(f"{name}*")
            assert read_metrics(run_dir)[0]["lr"] == record["values"]["train.lr"]
            layers = json.loads((run_dir / "draft" / "config.json").read_text())["target_layer_ids"]
            assert layers == record["values"]["draft.target_layer_ids"]


def test_a_killed_sweep_continues_the_same_trial_in_its_folder(cached: Path, tmp_path: Path) -> None:
    """SIGKILL in the second trial, behind a checkpoint; the result is that of an undisturbed sweep."""
    sweep = '[sweep.grid]\n"train.seed" = [0, 1]'
    options = {"train__max_steps": 40, "train__checkpoint_every": 10}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run(write_sweep(cached, tmp_path / "whole", sweep, **options))
    file, run_dir = write_sweep(cached, tmp_path / "killed", sweep, **options), tmp_path / "killed" / "run"
    trial = run_dir / "seed=1"
    process = start(file, tmp_path / "output.txt")
    wait_for(lambda: last_step(trial) >= 12, process)
    process.kill()
    process.wait()
    assert states(run_dir) == [TrialState.COMPLETE, TrialState.RUNNING]
    assert not (trial / "evaluation.json").exists()
    record = read_trial(trial)
    assert record is not None
    assert record["state"] == "started"
    result = run(file)
    assert "trial 1 of 2" not in result.output
    assert "trial 2 of 2" in result.output
    assert re.search(r"continuing behind step [123]0 of 40", result.output)
    assert states(run_dir) == [TrialState.COMPLETE] * 2
    assert_same_runs(tmp_path / "whole" / "run", run_dir)


def test_a_sweep_that_is_asked_to_stop_puts_its_trial_back(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_sweep(cached, tmp_path, '[sweep.grid]\n"train.seed" = [0, 1]')
    original = Stepper.step

    def step(self: Stepper, *arguments: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", step)
        stopped = run(file)
    assert stopped.exit_code == 0
    assert "0 of 2 trials have ended: 0 complete; stopped, the same command" in stopped.output
    assert states(tmp_path / "run") == [TrialState.WAITING]
    found = find_checkpoint(tmp_path / "run" / "seed=0" / "checkpoints")
    assert found is not None
    assert found[1].step == 1
    finished = run(file)
    assert "continuing behind step 1 of 4" in finished.output
    assert "2 of 2 trials have ended: 2 complete" in finished.output


def test_a_hopeless_trial_is_pruned_and_can_be_finished_by_hand(cached: Path, tmp_path: Path) -> None:
    """Two good learning rates, then one that learns nothing: it ends at its first validation."""
    sweep = """
    [sweep]
    prune = true
    prune_startup_trials = 2
    [sweep.grid]
    "train.lr" = [1e-2, 2e-2, 1e-12]
    """
    file = write_sweep(
        cached, tmp_path, sweep, train__validate_every=3, train__max_steps=8, train__checkpoint_every=100
    )
    result = run(file)
    assert result.exit_code == 0
    assert "3 of 3 trials have ended: 2 complete, 1 pruned" in result.output
    assert "behind step 3 is below the median of the trials before it" in result.output
    assert "run the same command again" not in result.output
    pruned = tmp_path / "run" / "lr=1e-12"
    assert states(tmp_path / "run") == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    record, found = read_trial(pruned), find_checkpoint(pruned / "checkpoints")
    assert record is not None
    assert (record["state"], record["step"]) == ("pruned", 3)
    assert found is not None
    assert found[1].step == 3
    assert not (pruned / "draft").exists()
    assert [(row["kind"], row["step"]) for row in read_metrics(pruned)][-1] == ("validation", 3)
    assert "trial 3 of 3" not in run(file).output
    assert last_step(pruned) == 3
    finished = run(pruned / "config.toml", command="train")
    assert "continuing behind step 3 of 8" in finished.output
    assert (pruned / "evaluation.json").is_file()


def test_values_that_do_not_work_fail_their_trial_alone(cached: Path, tmp_path: Path) -> None:
    """Layer 0 is not in the cache, and a loss of 1e300 is infinite in float32."""
    sweep = '[sweep.grid]\n"draft.target_layer_ids" = [[0], [1, 3]]\n"objective.ce_loss_alpha" = [0.1, 1e300]'
    file = write_sweep(cached, tmp_path, sweep)
    result = run(file)
    assert result.exit_code == 0, result.output
    assert "4 of 4 trials have ended: 1 complete, 3 failed" in result.output
    record = read_trial(tmp_path / "run" / "target_layer_ids=1_3,ce_loss_alpha=1e+300")
    assert record is not None
    assert record["state"] == "failed"
    assert "Lower train.lr" in record["reason"]
    assert "draft.target_layer_ids: [0] are not in the cache" in result.output
    assert "of 4:" not in run(file).output  # nothing is tried again


@pytest.mark.parametrize(("broken_step", "reason"), [(3, "cross-entropy is NaN"), (4, "tensors are not finite")])
def test_weights_that_break_fail_their_trial_alone(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_step: int, reason: str
) -> None:
    """They are found by the validation behind a step, or by the checkpoint behind the last."""
    original, seen = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        seen.append(self)
        if seen.count(self) == broken_step and self is seen[0]:
            self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    options = {"train__validate_every": 1, "train__checkpoint_every": 100}
    file = write_sweep(cached, tmp_path, '[sweep.grid]\n"train.seed" = [0, 1]', **options)
    result = run(file)
    assert result.exit_code == 0, result.output
    assert "2 of 2 trials have ended: 1 complete, 1 failed" in result.output
    record = read_trial(tmp_path / "run" / "seed=0")
    assert record is not None
    assert reason in record["reason"]
    assert "trial 1 of 2" not in run(file).output


def test_a_trial_that_fails_before_its_training_says_why(cached: Path, tmp_path: Path) -> None:
    layers = '[sweep.parameters]\n"draft.target_layer_ids" = [[0, 1], [1]]'
    result = run(write_sweep(cached, tmp_path, layers, train__max_steps=1))
    assert result.exit_code == 0, result.output
    assert "failed: draft.target_layer_ids: [0] are not in the cache" in " ".join(result.output.split())
    record = read_trial(tmp_path / "run" / "target_layer_ids=0_1")
    assert record is not None
    assert record["state"] == "failed"
    assert "are not in the cache" in record["reason"]


def test_a_folder_that_is_a_run_too_is_a_sweep(cached: Path, tmp_path: Path) -> None:
    file = write_sweep(cached, tmp_path, '[sweep.grid]\n"train.seed" = [0, 1]', train__max_steps=1)
    assert run(file, command="train").exit_code == 0
    result = run(file)
    assert "2 of 2 trials have ended: 2 complete" in result.output
    assert "seed=0" in result.output.split("held-out acceptance")[1]
    both = CliRunner().invoke(main, ["report", *map(str, (tmp_path / "run").glob("seed=*"))])
    assert both.exit_code == 1
    assert "is a sweep, whose own report this would replace" in both.output


def test_a_page_that_cannot_be_written_fails_no_sweep(cached: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    result = run(write_sweep(cached, tmp_path, '[sweep.grid]\n"train.seed" = [0]', train__max_steps=1))
    assert result.exit_code == 0, result.output
    assert "the trials are complete, but the page could not be written: " in result.output
    assert "report.html" in result.output


def test_a_draft_that_cannot_be_evaluated_fails_its_trial_alone(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*_: Any, **__: Any) -> None:
        raise stage_two.NonFiniteScoreError("sample 0: NaN")

    monkeypatch.setattr(desk_module, "evaluate_draft", evaluate)
    result = run(write_sweep(cached, tmp_path, '[sweep.grid]\n"train.seed" = [0]', train__max_steps=1))
    assert result.exit_code == 1, "no trial is complete"
    assert "Error: no trial is complete, and 1 failed" in result.output
    assert "trial 1 failed: sample 0: NaN" in result.output
    assert states(tmp_path / "run") == [TrialState.FAIL]


def test_a_block_longer_than_the_throughput_table_fails_its_trial_before_the_training(
    cached: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("tokens,steps_per_second\n1,100\n10,90\n")
    sweep = '[sweep.grid]\n"draft.block_size" = [16, 4]'
    file = write_sweep(cached, tmp_path, sweep, evaluate__throughput_table=table)
    result = run(file)
    assert result.exit_code == 0, result.output
    assert "2 of 2 trials have ended: 1 complete, 1 failed" in result.output
    failed = tmp_path / "run" / "block_size=16"
    record = read_trial(failed)
    assert record is not None
    assert "ends at 10 tokens; a step of one request has up to 17" in record["reason"]
    assert not (failed / "checkpoints").exists()


@pytest.mark.parametrize("command", ["sweep", "train"])
def test_a_throughput_table_that_is_missing_is_noticed_before_a_training(
    cached: Path, tmp_path: Path, command: str
) -> None:
    sweep = '[sweep.grid]\n"train.seed" = [0]'
    file = write_sweep(cached, tmp_path, sweep, evaluate__throughput_table=tmp_path / "none.csv")
    refused = run(file, command=command)
    assert refused.exit_code == 1
    assert "none.csv: no such file" in refused.output
    assert not (tmp_path / "run").exists()


def test_a_throughput_table_that_vanishes_costs_no_trial(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("tokens,steps_per_second\n1,100\n10,90\n")
    file = write_sweep(cached, tmp_path, '[sweep.grid]\n"train.seed" = [0]', evaluate__throughput_table=table)
    original = desk_module.Desk.claim

    def claim(self: desk_module.Desk, *arguments: Any, **named: Any) -> Any:
        table.unlink()
        return original(self, *arguments, **named)

    monkeypatch.setattr(desk_module.Desk, "claim", claim)
    assert run(file).exit_code == 1
    assert states(tmp_path / "run") == [TrialState.WAITING]


def test_an_error_of_the_code_ends_the_sweep_and_costs_no_trial(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_sweep(cached, tmp_path, '[sweep.grid]\n"train.seed" = [0, 1]')
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", lambda *_, **__: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run(file)
    assert states(tmp_path / "run") == [TrialState.WAITING]
    assert "2 of 2 trials have ended: 2 complete" in run(file).output


def test_a_trial_whose_folder_is_gone_is_named(cached: Path, tmp_path: Path) -> None:
    file = write_sweep(cached, tmp_path, '[sweep.grid]\n"train.seed" = [0, 1]', train__max_steps=1)
    run(file)
    shutil.rmtree(tmp_path / "run" / "seed=0")
    again = run(file)
    assert again.exit_code == 0
    assert "2 of 2 trials have ended: 2 complete" in again.output
    assert "complete, but no longer there to be compared: seed=0" in again.output.splitlines()


def test_a_sweep_keeps_to_its_cache(cached: Path, tmp_path: Path) -> None:
    run(write_sweep(cached, tmp_path, '[sweep.grid]\n"train.seed" = [0]'))
    other = make_config(tmp_path / "other" if (tmp_path / "other").mkdir() is None else tmp_path, num_chats=12)
    base = tmp_path / "other.toml"
    base.write_text(to_toml(other))
    assert run(base, command="extract").exit_code == 0
    file = write_sweep(tmp_path / "other", tmp_path, '[sweep.grid]\n"train.seed" = [0]')
    refused = run(file)
    assert refused.exit_code == 1
    assert "holds a sweep that was begun with something else" in refused.output
    assert "cache.identity: the sweep has" in refused.output


def test_two_trials_at_once_are_those_of_one_after_the_other(cached: Path, tmp_path: Path) -> None:
    sweep = '[sweep]\nparallel = {}\n[sweep.grid]\n"train.seed" = [0, 1, 2]'
    for name, parallel in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        file = write_sweep(cached, tmp_path / name, sweep.format(parallel))
    run(tmp_path / "one" / "sweep.toml")
    gate = tmp_path / "gate"
    gate.mkdir()
    process = start(file, tmp_path / "output.txt", gate=gate)
    assert process.wait(PATIENCE_SECONDS) == 0
    assert len(list(gate.iterdir())) == 2, "two processes, each with a trial at the same time"
    output = (tmp_path / "output.txt").read_text()
    assert "3 of 3 trials have ended: 3 complete" in output
    assert "step      1" not in output
    assert all("step      4/4" in log.read_text() for log in (tmp_path / "two" / "run").glob("*/log.txt"))
    assert len(list((tmp_path / "two" / "run").glob("*/log.txt"))) == 3
    assert_same_runs(tmp_path / "one" / "run", tmp_path / "two" / "run")
    with sqlite3.connect(tmp_path / "two" / "run" / "study.db") as data_base:
        times = data_base.execute("SELECT datetime_start, datetime_complete FROM trials ORDER BY number").fetchall()
    assert times[1][0] < times[0][1]  # the second began before the first ended


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_stop_with_the_process_that_minds_them(cached: Path, tmp_path: Path, number: int) -> None:
    sweep = '[sweep]\nparallel = 2\n[sweep.grid]\n"train.seed" = [0, 1]'
    file = write_sweep(cached, tmp_path, sweep, train__max_steps=3000, train__epochs=750)
    process = start(file, tmp_path / "output.txt")
    folders = [tmp_path / "run" / f"seed={seed}" for seed in (0, 1)]
    wait_for(lambda: all(last_step(folder) >= 2 for folder in folders), process)
    process.send_signal(number)
    assert process.wait(60) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    wait_for(lambda: states(tmp_path / "run") == [TrialState.WAITING] * 2)
    for folder in folders:
        found = find_checkpoint(folder / "checkpoints")
        assert found is not None
        assert found[1].step == last_step(folder)


def test_two_commands_at_once_share_the_trials(cached: Path, tmp_path: Path) -> None:
    """The first is held up in its first trial until the second has trained the others, and waits for it."""
    file = write_sweep(cached, tmp_path, '[sweep.grid]\n"train.seed" = [0, 1, 2]', train__max_steps=30)
    first = start(file, tmp_path / "first.txt")
    wait_for(lambda: last_step(tmp_path / "run" / "seed=0") >= 1, first)
    first.send_signal(signal.SIGSTOP)

    def go_on() -> None:
        wait_for((tmp_path / "run" / "seed=2" / "evaluation.json").is_file)
        first.send_signal(signal.SIGCONT)

    helper = threading.Thread(target=go_on)
    helper.start()
    second = run(file)
    helper.join()
    assert first.wait(PATIENCE_SECONDS) == 0
    texts = [(tmp_path / "first.txt").read_text(), second.output]
    assert [re.findall(r"trial (\d) of 3: ", text) for text in texts] == [["1"], ["2", "3"]]
    assert all("3 of 3 trials have ended: 3 complete" in text for text in texts)
    assert "waiting for those that other processes train" in second.output


def test_the_ranks_of_one_job_take_every_trial_together(cached: Path, tmp_path: Path) -> None:
    file = write_sweep(cached, tmp_path, '[sweep.grid]\n"train.seed" = [0, 1]')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "pipeline.cli", "sweep", str(file)],
        env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 of 2 trials have ended: 2 complete") == 1
    assert done.stdout.count("trial 1 of 2: ") == 1
    assert states(tmp_path / "run") == [TrialState.COMPLETE] * 2


def test_ranks_take_no_two_trials_at_once(cached: Path, tmp_path: Path) -> None:
    config = load_config(write_sweep(cached, tmp_path, '[sweep]\nparallel = 2\n[sweep.grid]\n"train.seed" = [0, 1]'))
    with pytest.raises(SettingError, match=r"sweep.parallel: is 2, but the 3 processes of torchrun"):
        sweep_command.sweep(config, ranks=Ranks(rank=1, world=3), console=Console())


def assert_no_secret(secret: str, *places: Path) -> None:
    files = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    assert files
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_a_data_base_with_a_secret_leaves_none_and_is_continued(cached: Path, tmp_path: Path) -> None:
    secret = "5ecret-of-the-data-base"
    storage = f'[sweep]\nname = "s"\nstorage = "sqlite:///{tmp_path}/shared.db?password={secret}"\n'
    file = write_sweep(cached, tmp_path, f'{storage}[sweep.grid]\n"train.seed" = [0, 1]')
    first = start(file, tmp_path / "first.txt")
    wait_for(lambda: any((tmp_path / "run").glob("*/checkpoints/step_*")), first)
    first.kill()
    first.wait()
    second = start(file, tmp_path / "second.txt")
    assert second.wait(PATIENCE_SECONDS) == 0, (tmp_path / "second.txt").read_text()
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/shared.db")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    assert_no_secret(
        secret,
        tmp_path / "run",
        cached / "cache",
        *(tmp_path / name for name in ("first.txt", "second.txt", "shared.db")),
    )


@pytest.mark.parametrize("password", ["5ecret", "a/5ecret", "a@5ecret", "5ecret%2F"])
def test_a_data_base_that_refuses_is_told_without_its_secret(cached: Path, tmp_path: Path, password: str) -> None:
    storage = f'[sweep]\nstorage = "postgresql://user:{password}@127.0.0.1:1/db"\n'
    file = write_sweep(cached, tmp_path, f'{storage}[sweep.grid]\n"train.seed" = [0, 1]')
    result = run(file)
    assert result.exit_code == 1
    assert "sweep.storage: cannot be used" in result.output
    assert "5ecret" not in result.output
    assert_no_secret("5ecret", tmp_path / "run")
