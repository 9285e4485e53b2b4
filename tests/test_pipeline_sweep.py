"""Sweeps: the trials of a grid, their folders, and that finished ones are not trained again."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.config import Config, ConfigError, load_config, to_toml
from pipeline.sweep import plan_trials
from stages.train.metrics import read_metrics
from tiny_target import make_config


def with_grid(config: Config, grid: str, tmp_path: Path) -> Path:
    file = tmp_path / "sweep.toml"
    file.write_text(f"{to_toml(config)}\n[sweep.grid]\n{grid}\n")
    return file


def test_every_combination_has_a_folder_of_its_own(tmp_path: Path) -> None:
    file = with_grid(make_config(tmp_path), '"draft.markov_rank" = [0, 8]\n"train.lr" = [1e-3, 1e-2, 1e-1]', tmp_path)
    trials = list(plan_trials(load_config(file)))
    assert [(trial.draft.markov_rank, trial.train.lr) for trial in trials] == [
        (rank, lr) for rank in (0, 8) for lr in (1e-3, 1e-2, 1e-1)
    ]
    assert len({trial.train.run_dir for trial in trials}) == 6
    assert trials[0].train.run_dir.name == "markov_rank=0,lr=0.001"
    assert {trial.cache for trial in trials} == {make_config(tmp_path).cache}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ('"cache.path" = ["a"]', "cannot vary over one cache"),
        ('"train.run_dir" = ["a"]', "cannot vary"),
        ('"draft.markov_rnak" = [1]', "did you mean markov_rank"),
        ('"train.lr" = ["fast"]', "train.lr"),
    ],
)
def test_keys_that_cannot_be_swept(tmp_path: Path, grid: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(plan_trials(load_config(with_grid(make_config(tmp_path), grid, tmp_path))))


def test_a_config_without_a_grid(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the config has none"):
        list(plan_trials(make_config(tmp_path)))


def test_a_sweep_trains_evaluates_and_compares_once(tmp_path: Path) -> None:
    config = make_config(tmp_path, train__max_steps=2)
    file = str(with_grid(config, '"draft.markov_head_type" = ["vanilla", "rnn"]', tmp_path))
    runner = CliRunner()
    assert runner.invoke(main, ["extract", file], catch_exceptions=False).exit_code == 0
    first = runner.invoke(main, ["sweep", file], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    folders = [tmp_path / "run" / f"markov_head_type={head}" for head in ("vanilla", "rnn")]
    assert all((folder / "evaluation.json").is_file() for folder in folders)
    before = [read_metrics(folder) for folder in folders]
    second = runner.invoke(main, ["sweep", file], catch_exceptions=False)
    assert second.output.count("is trained already (2 steps)") == 2
    assert [read_metrics(folder) for folder in folders] == before
    out = tmp_path / "exported"
    exported = runner.invoke(main, ["export", str(folders[1] / "checkpoints" / "step_00000002"), str(out)])
    assert exported.exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "exists already" in runner.invoke(main, ["export", str(folders[1] / "draft"), str(out)]).output
