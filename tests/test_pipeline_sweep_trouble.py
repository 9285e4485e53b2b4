"""Trouble that passes fails no trial, what failed is tried again on demand, and files are read once a sweep."""

import errno
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from click.testing import CliRunner, Result
from optuna.trial import TrialState
from rich.console import Console

from pipeline import stage_two
from pipeline.cli import main
from pipeline.config import load_config, to_toml
from pipeline.sweep import command as sweep_command
from pipeline.sweep import desk as desk_module
from pipeline.sweep.passing import may_pass
from stages.errors import SettingError
from stages.extract import rows
from stages.extract import run as extract_run
from stages.train import run as train_run
from stages.train.parallel import Ranks
from storage import CachePlan, CacheReader
from storage.errors import CacheCorruptError, CacheReadError
from tiny_target import make_config

SEEDS = '[sweep.grid]\n"train.seed" = [0, 1, 2]'


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    file = folder / "base.toml"
    file.write_text(to_toml(make_config(folder)))
    assert CliRunner().invoke(main, ["extract", str(file)], catch_exceptions=False).exit_code == 0
    return folder


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "PAUSE_SECONDS", 0.0)


def write_sweep(cached: Path, tmp_path: Path, sweep: str = SEEDS) -> Path:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=2)
    file = tmp_path / "sweep.toml"
    file.write_text(f"{to_toml(config)}\n{sweep}\n")
    return file


def run(file: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["sweep", str(file), *options], catch_exceptions=False)


def states(run_dir: Path) -> list[TrialState]:
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{run_dir}/study.db")
    return [trial.state for trial in study.trials]


def raised_from(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def system_error(number: int) -> OSError:
    return OSError(number, "the system says so")


PASSING = {
    "descriptors": lambda: system_error(errno.EMFILE),
    "space": lambda: raised_from(SettingError("cannot write"), system_error(errno.ENOSPC)),
    "disk": lambda: raised_from(CacheReadError("cannot read"), system_error(errno.EIO)),
    "memory": MemoryError,
    "gpu memory": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "cpu memory": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "threads": lambda: RuntimeError("can't start new thread"),
    "processes": lambda: BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    "processes, as text": lambda: RuntimeError("fork: Resource temporarily unavailable"),
    "shared memory": lambda: RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit."
    ),
    "bus error": lambda: RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "),
    "worker killed": lambda: RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
    "safetensors": lambda: ValueError("I/O error: Too many open files (os error 24)"),
}
LASTING = [
    SettingError("draft.block_size: too large"),
    raised_from(SettingError("no such file"), FileNotFoundError(errno.ENOENT, "no such file")),
    CacheCorruptError("bytes differ"),
    RuntimeError("device-side assert triggered"),
    ZeroDivisionError(),
]


class Troubles:
    """A function that raises for one seed as often as it is told, then does what it ever did."""

    def __init__(self, original: Callable[..., Any], make: Callable[[], Exception], *, times: int) -> None:
        self.original, self.make, self.left = original, make, times
        self.seeds: list[int] = []

    def __call__(self, config: Any, **arguments: Any) -> Any:
        self.seeds.append(config.train.seed)
        if config.train.seed == 1 and self.left:
            self.left -= 1
            raise self.make()
        return self.original(config, **arguments)


@pytest.mark.parametrize("trouble", PASSING)
def test_passing_trouble_is_told_from_lasting(trouble: str) -> None:
    assert may_pass(PASSING[trouble]())
    assert not any(may_pass(error) for error in LASTING)


@pytest.mark.parametrize("trouble", ["descriptors", "disk", "gpu memory"])
def test_a_trial_that_meets_passing_trouble_is_tried_again_behind_the_others(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    troubles = Troubles(desk_module.evaluate_draft, PASSING[trouble], times=2)
    monkeypatch.setattr(desk_module, "evaluate_draft", troubles)
    result = run(write_sweep(cached, tmp_path))
    assert result.exit_code == 0, result.output
    assert "trial 2 was put back (attempt 2 of 3), for trouble that may pass: " in result.output
    assert "3 of 3 trials have ended: 3 complete" in result.output
    assert troubles.seeds == [0, 1, 2, 1, 1]


def test_short_memory_is_no_fault_of_a_trial(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real check: two of the trainings find nothing free, later ones do."""
    free, asked = train_run.free_memory, []

    def free_memory(device: torch.device) -> int | None:
        asked.append(device)
        return 1000 if len(asked) in (2, 4) else free(device)

    monkeypatch.setattr(train_run, "free_memory", free_memory)
    result = run(write_sweep(cached, tmp_path))
    assert result.exit_code == 0, result.output
    assert "for trouble that may pass: this training needs at least" in result.output
    assert states(tmp_path / "run") == [TrialState.COMPLETE] * 3


def test_trouble_that_stays_leaves_its_trial_to_the_next_command(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_sweep(cached, tmp_path)
    with monkeypatch.context() as patched:
        troubles = Troubles(desk_module.evaluate_draft, PASSING["descriptors"], times=1000)
        patched.setattr(desk_module, "evaluate_draft", troubles)
        result = run(file)
    assert result.exit_code == 1
    assert "2 of 3 trials have ended: 2 complete, 1 put back" in result.output
    assert "1 trials met trouble that may pass each time they were tried; the same command" in result.output
    assert "trial 2: [Errno 24] the system says so" in result.output
    assert Counter(troubles.seeds) == {0: 1, 1: 3, 2: 1}, "a bounded number of times"
    assert states(tmp_path / "run")[1] == TrialState.WAITING
    again = run(file)
    assert again.exit_code == 0, again.output
    assert "3 of 3 trials have ended: 3 complete" in again.output


def test_failed_trials_are_tried_again_on_demand(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_sweep(cached, tmp_path)
    with monkeypatch.context() as patched:
        broken = Troubles(
            desk_module.evaluate_draft, lambda: stage_two.NonFiniteScoreError("sample 0: NaN"), times=1000
        )
        patched.setattr(desk_module, "evaluate_draft", broken)
        assert "3 of 3 trials have ended: 2 complete, 1 failed" in run(file).output
    assert "2 complete, 1 failed" in run(file).output, "not of itself"
    result = run(file, "--retry-failed")
    assert result.exit_code == 0, result.output
    assert "trial 2 of 3" in result.output
    assert "3 of 3 trials have ended: 3 complete" in result.output
    assert states(tmp_path / "run") == [TrialState.COMPLETE] * 3


def test_a_sweep_reads_its_files_once(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    config = load_config(write_sweep(cached, tmp_path), [])
    copy = tmp_path / "chats.jsonl"  # which this process has not seen
    copy.write_bytes(Path(config.data.files[0]).read_bytes())
    config = config.model_copy(update={"data": config.data.model_copy(update={"files": (str(copy),)})})
    count(extract_run, "digest_files")
    count(rows, "_digest_file")
    count(CachePlan, "read")
    sweep_command.sweep(config, ranks=Ranks(device=torch.device("cpu")), console=Console())
    assert states(tmp_path / "run") == [TrialState.COMPLETE] * 3
    assert (counts["digest_files"], counts["_digest_file"]) == (1, 1)
    assert 2 <= counts["read"] <= 3, "for the study, for all trials, and for the report unless it knows the cache"


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{}\n")
    first = rows.digest_files([str(file)])
    assert rows.digest_files([str(file)]) == first
    file.write_text("[]\n")
    assert rows.digest_files([str(file)]) != first
    file.write_text("{}\n")
    assert rows.digest_files([str(file)]) == first


def test_a_reader_of_other_layers_reads_the_same_cache(cached: Path) -> None:
    path = make_config(cached).cache.path
    with CacheReader(path) as reader, CacheReader(path, layers=(3,)) as expected:
        other = reader.with_layers((3,))
        assert other.layers == (3,)
        assert reader.layers != (3,)
        for index in range(len(expected)):
            assert torch.equal(other[index].hidden_states, expected[index].hidden_states)
        other.close()
        assert torch.equal(reader[0].last_hidden_states, expected[0].last_hidden_states)
