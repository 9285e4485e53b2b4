"""What a training refuses, and what it leaves as it was then."""

import errno
import fcntl
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import ConfigError
from pipeline.stage_two import NonFiniteScoreError, evaluate_draft, train_draft
from stages.errors import SettingError
from stages.train.checkpoint import CheckpointError
from stages.train.loop import NothingSupervisedError
from stages.train.metrics import read_metrics
from stages.train.settings import ObjectiveSection
from storage import CacheReader
from tiny_target import make_config


@pytest.mark.parametrize("name", [".", "checkpoints", "checkpoints/step_00000002", "draft", "metrics.jsonl"])
def test_what_lies_in_the_way_is_said(cached: Path, tmp_path: Path, name: str) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=2)
    place = config.train.run_dir / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if name == "metrics.jsonl":
        place.mkdir()
    else:
        place.touch()
    with pytest.raises(CheckpointError, match=rf"{place.name}: (expected a folder|cannot be the folder|cannot write)"):
        train_draft(config)


def test_a_lock_that_is_a_link_is_not_followed(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=2)
    config.train.run_dir.mkdir()
    (config.train.run_dir / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(CheckpointError, match=r"run/\.lock: cannot be opened to lock it: Too many levels of symbolic"):
        train_draft(config)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EMFILE, "cannot be opened to lock it: Too many open files; see to the disk and to limits"),
        (errno.EACCES, "cannot write: Permission denied; see to the disk and run the same command again, what was fin"),
        (errno.EROFS, "cannot write: Read-only file system; see to the disk"),
    ],
)
def test_a_lock_that_cannot_be_opened_says_why(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    real = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("/.lock"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=rf"run/\.lock: {message}"):
        train_draft(make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=2))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"train__betas": [1, 2]}, "betas"),
        ({"train__betas": [0.9, 1.0]}, "betas"),
        ({"train__seed": 10**20}, "seed"),
        ({"train__lr": math.inf}, "lr"),
        ({"train__lr": 1e38}, "lr"),
        ({"train__clip_norm": math.nan}, "clip_norm"),
        ({"train__weight_decay": math.inf}, "weight_decay"),
    ],
)
def test_settings_that_cannot_train_are_refused(cached: Path, change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make_config(cached, **change)


def test_an_objective_without_any_term_is_refused() -> None:
    with pytest.raises(ValueError, match="are all 0, so that nothing is trained"):
        ObjectiveSection(ce_loss_alpha=0.0, l1_loss_alpha=0.0, confidence_head_alpha=0.0)


def test_a_split_without_any_anchor_is_refused(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = CacheReader.read_tokens

    def read_tokens(self: CacheReader, index: Any) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids, _ = original(self, index)
        return input_ids, (torch.arange(len(input_ids)) % 2).to(torch.uint8)

    monkeypatch.setattr(CacheReader, "read_tokens", read_tokens)
    config = make_config(cached, train__run_dir=tmp_path / "run")
    with pytest.raises(NothingSupervisedError, match=r"none of the \d+ samples of the training split has two"):
        train_draft(config)
    assert read_metrics(config.train.run_dir) == []
    assert not (config.train.run_dir / "draft").exists()


def test_two_trainings_do_not_share_a_folder(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, train__run_dir=tmp_path)
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is training"):
            train_draft(config)


def test_a_refused_training_leaves_the_config_of_the_one_that_runs(cached: Path, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (tmp_path / "config.toml").write_text("of the other\n")
        with pytest.raises(CheckpointError, match="another process is training"):
            train_draft(make_config(cached, train__run_dir=tmp_path))
    assert (tmp_path / "config.toml").read_text() == "of the other\n"


def test_a_validation_split_without_any_anchor_is_not_measured(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = CacheReader.read_tokens

    def read_tokens(self: CacheReader, index: Any) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids, loss_mask = original(self, index)
        return input_ids, loss_mask * 0 if index in self.split_indices("validation") else loss_mask

    monkeypatch.setattr(CacheReader, "read_tokens", read_tokens)
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=1)
    assert train_draft(config).num_steps == 1
    assert re.search(r"none of the \d+ validation samples has two supervised tokens in a row", caplog.text)
    assert "validation" not in {row["kind"] for row in read_metrics(config.train.run_dir)}


def test_broken_weights_take_the_place_of_no_checkpoint(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss and the gradient of the last step are finite, what the optimizer makes of them is not."""
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=3, train__checkpoint_every=1)
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        weight = self.param_groups[0]["params"][0]
        if self.state[weight]["step"] == 3:
            weight.data.flatten()[0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(CheckpointError, match=r"step_00000003: not written: .* not finite .* lower train.lr"):
        train_draft(config)
    assert sorted(folder.name for folder in (config.train.run_dir / "checkpoints").iterdir()) == [
        "step_00000001",
        "step_00000002",
    ]
    assert not (config.train.run_dir / "draft").exists()


def test_a_draft_with_broken_weights_is_not_measured(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=1)
    train_draft(config)
    file = config.train.run_dir / "draft" / "model.safetensors"
    broken = {name: tensor.clone() for name, tensor in load_file(file).items()}
    broken["fc.weight"][0, 0] = math.nan
    save_file(broken, file)
    with pytest.raises(NonFiniteScoreError, match=r"sample \d+: the draft's cross-entropy is NaN"):
        evaluate_draft(config, draft_dir=file.parent)


def test_a_run_does_not_start_from_what_it_writes(cached: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = make_config(cached, train__run_dir=run_dir, draft__init_from=run_dir / "draft")
    with pytest.raises(SettingError, match=r"draft.init_from: .* lies in train.run_dir"):
        train_draft(config)
