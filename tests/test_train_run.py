"""Training over a cache: what a step adds up to, exact resume, checkpoints, and the draft that comes out."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from full_disk import limited_file_size
from pipeline.config import Config, to_toml
from pipeline.stage_one import settings_of
from pipeline.stage_two import evaluate_draft, open_cache, train_draft
from stages.errors import SettingError
from stages.extract.run import extract
from stages.train import DSparkTrainerModule, Qwen3DSparkModel
from stages.train.batches import gather_batch, plan_batches
from stages.train.checkpoint import CheckpointError, find_checkpoint, save_checkpoint, save_draft
from stages.train.loop import NonFiniteLossError, Stepper
from stages.train.metrics import read_metrics
from stages.train.order import learning_rate, plan_epoch, plan_micro_batches
from stages.train.run import build_draft
from storage import CacheCorruptError, CacheFormatError, CacheIdentityError, CacheIncompleteError, CacheReader
from storage_cache import fill_cache, plan_cache
from tiny_target import make_config

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir) if row["kind"] == "train"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(left: Path, right: Path) -> None:
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_training_lowers_the_loss_and_leaves_a_draft(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=30, train__checkpoint_every=50)
    result = train_draft(config)
    curve = losses(config.train.run_dir)
    assert len(curve) == 30
    assert np.mean([loss for _, loss, _ in curve[-5:]]) < 0.9 * curve[0][1]
    model = Qwen3DSparkModel.from_pretrained(result.draft_dir)
    assert model.config.target_layer_ids == [-1, 1, 3]
    evaluation = evaluate_draft(config, draft_dir=result.draft_dir)
    logged = [row for row in read_metrics(config.train.run_dir) if row["kind"] == "validation"][-1]
    assert evaluation.tau == pytest.approx(logged["tau"], rel=1e-6), "the shipped draft is the trained one"
    assert 1 < evaluation.tau_low < evaluation.tau < evaluation.tau_high < 5
    again = train_draft(config)
    assert again.was_complete
    assert losses(config.train.run_dir) == curve


@pytest.mark.parametrize("stop_after", [3, 6])
def test_a_resumed_run_is_bit_identical(cached: Path, tmp_path: Path, stop_after: int) -> None:
    """Checkpoints lie at 3, 6 and 8; an epoch has 4 steps or so, so one resume is inside and one across an edge."""
    whole = make_config(cached, train__run_dir=tmp_path / "whole")
    train_draft(whole)
    parts = make_config(cached, train__run_dir=tmp_path / "parts", train__keep_last=5)
    train_draft(parts)
    checkpoints = tmp_path / "parts" / "checkpoints"
    for folder in checkpoints.iterdir():
        if int(folder.name.removeprefix("step_")) > stop_after:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    for file in (tmp_path / "parts" / "draft").iterdir():
        file.unlink()
    result = train_draft(parts)
    assert not result.was_complete
    assert losses(parts.train.run_dir) == losses(whole.train.run_dir)
    assert_equal_weights(result.draft_dir, tmp_path / "whole" / "draft")
    assert_equal_weights(checkpoints / "step_00000008", tmp_path / "whole" / "checkpoints" / "step_00000008")


@pytest.mark.slow
def test_a_killed_training_ends_in_the_same_losses(cached: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train__max_steps": 40, "train__checkpoint_every": 4, "train__dtype": "float32"}
    whole = make_config(cached, train__run_dir=tmp_path / "whole", **options)
    killed = make_config(cached, train__run_dir=tmp_path / "killed", **options)
    files = {}
    for name, config in (("whole", whole), ("killed", killed)):
        files[name] = tmp_path / f"{name}.toml"
        files[name].write_text(to_toml(config))
    command = [sys.executable, "-m", "pipeline.cli", "train", "--no-evaluate"]
    # Both in processes of one kind: another number of threads may sum in another order.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(files["whole"])], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=300)
    num_kills = 0
    for target_step in (6, 17, 30):
        process = subprocess.Popen([*command, str(files["killed"])], env=environment, stdout=subprocess.DEVNULL)
        while (
            process.poll() is None and max([step for step, *_ in losses(tmp_path / "killed")], default=0) < target_step
        ):
            time.sleep(0.01)
        process.kill()
        num_kills += process.wait() == -signal.SIGKILL
    assert num_kills > 0, "every process ended before it could be killed"
    subprocess.run(
        [*command, str(files["killed"])], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=300
    )
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert_equal_weights(tmp_path / "killed" / "draft", tmp_path / "whole" / "draft")


def test_a_checkpoint_cut_short_gives_way_to_the_one_before(
    cached: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run")
    train_draft(config)
    expected = losses(config.train.run_dir)
    checkpoints = config.train.run_dir / "checkpoints"
    os.truncate(checkpoints / "step_00000008" / "model.safetensors", 1000)
    found = find_checkpoint(checkpoints)
    assert found is not None
    assert found[0].name == "step_00000006"
    assert "step_00000008 is damaged (model.safetensors: expected" in caplog.text
    train_draft(config)
    assert losses(config.train.run_dir) == expected
    for folder in checkpoints.iterdir():
        (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole"):
        train_draft(config)


@pytest.mark.parametrize(
    ("change", "field"), [({"train__lr": 0.5}, r"train\.lr"), ({"draft__markov_rank": 4}, r"draft\.markov_rank")]
)
def test_a_run_is_not_continued_with_other_settings(
    cached: Path, tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    train_draft(make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=3))
    with pytest.raises(CheckpointError, match=rf"{field}: the run has .*, now"):
        train_draft(make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=3, **change))


def test_micro_batches_add_up_to_the_same_step(cached: Path, tmp_path: Path) -> None:
    """One big packed row, many small ones: the loss and the gradient norm of a step are the same."""
    curves = []
    for budget in (1, 200, 100_000):
        config = make_config(
            cached, train__run_dir=tmp_path / str(budget), train__max_batch_tokens=budget, train__max_steps=3
        )
        train_draft(config)
        rows = [row for row in read_metrics(config.train.run_dir) if row["kind"] == "train"]
        curves.append([[row["loss"], row["tau"], row["grad_norm"]] for row in rows])
        expected = {1: 4, 100_000: 1}.get(budget)
        assert expected is None or rows[0]["num_micro_batches"] == expected
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-4)
    np.testing.assert_allclose(curves[2], curves[0], rtol=2e-4)


def test_a_gathered_batch_is_the_cache_side_by_side(cached: Path) -> None:
    reader = CacheReader(make_config(cached).cache.path, layers=(-1, 3))
    indices = [4, 0, 2]
    (planned,) = plan_batches(reader, indices, max_batch_tokens=10_000, num_anchors=3, seed=0, epoch=1)
    batch = gather_batch(reader, planned, device=CPU)
    start = 0
    for index in indices:
        sample = reader[index]
        rows = slice(start, start + sample.num_tokens)
        start += sample.num_tokens
        assert torch.equal(batch["input_ids"][0, rows], sample.input_ids.long())
        assert torch.equal(batch["loss_mask"][0, rows], sample.loss_mask)
        assert torch.equal(batch["target_hidden_states"][0, rows], torch.cat(sample.hidden_states.unbind(1), dim=-1))
        assert torch.equal(batch["target_last_hidden_states"][0, rows], sample.last_hidden_states)
        inside = [anchor for anchor in batch["anchor_positions"][0].tolist() if rows.start <= anchor < rows.stop]
        assert len(inside) == 3
        assert all(batch["loss_mask"][0, anchor] and batch["loss_mask"][0, anchor + 1] for anchor in inside)
    assert batch["seq_lens"].sum() == start == batch["input_ids"].numel()


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first = plan_epoch(100, seed=1, epoch=0)
    assert sorted(first.tolist()) == list(range(100))
    assert np.array_equal(first, plan_epoch(100, seed=1, epoch=0))
    assert not np.array_equal(first, plan_epoch(100, seed=1, epoch=1))
    assert not np.array_equal(first, plan_epoch(100, seed=2, epoch=0))
    assert plan_epoch(8, seed=0, epoch=0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4], "runs made before would not resume"


def test_micro_batches_keep_order_and_budget() -> None:
    assert plan_micro_batches([3, 4, 9, 1, 1, 1], max_batch_tokens=7) == [range(2), range(2, 3), range(3, 6)]
    assert plan_micro_batches([], max_batch_tokens=7) == []


def test_the_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(step, num_steps=100, peak=1.0, warmup_fraction=0.04) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(left > right for left, right in pairwise(rates[4:]))
    assert 0 < rates[-1] < 1e-3


def test_a_loss_that_is_not_finite_stops_with_the_samples(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run")
    reader = open_cache(config, layers=None)
    original = DSparkTrainerModule.forward

    def forward(self: DSparkTrainerModule, *arguments: Any, **named: Any) -> Any:
        named["target_hidden_states"] = named["target_hidden_states"] * float("nan")
        return original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DSparkTrainerModule, "forward", forward)
        with pytest.raises(NonFiniteLossError, match=r"the loss is nan .* on samples \[\d+"):
            train_draft(config)
    assert len(reader) > 0
    assert find_checkpoint(config.train.run_dir / "checkpoints") is None


def test_the_cache_is_held_against_the_config(cached: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheIdentityError, match="max_length: cache has 1024, this run has 99"):
        train_draft(make_config(cached, data__max_length=99, train__run_dir=tmp_path / "run"))
    with pytest.raises(SettingError, match=r"\[2\] are not in the cache, which stores \[-1, 1, 3\]"):
        train_draft(make_config(cached, draft__target_layer_ids=[1, 2], train__run_dir=tmp_path / "run"))


def test_a_layer_subset_of_the_cache_trains(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, draft__target_layer_ids=[-1, 3], train__run_dir=tmp_path / "run", train__max_steps=2)
    result = train_draft(config)
    assert weights(result.draft_dir)["fc.weight"].shape == (32, 64)
    assert evaluate_draft(config, draft_dir=result.draft_dir).num_slots > 0


def test_training_needs_neither_target_nor_data(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    extract(settings_of(config))
    Path(config.target.model).rename(tmp_path / "gone")
    Path(config.data.files[0]).unlink()
    assert train_draft(config).num_steps == 8


@pytest.mark.parametrize("damage", ["truncate", "flip", "commit"])
def test_a_damaged_cache_is_refused(tmp_path: Path, damage: str) -> None:
    config = make_config(tmp_path)
    extract(settings_of(config))
    payload = config.cache.path / "shards" / "00000.zarr" / "hidden_states" / "c" / "0" / "0" / "0"
    if damage == "truncate":
        os.truncate(payload, payload.stat().st_size // 2)
    elif damage == "flip":
        data = bytearray(payload.read_bytes())
        for position in range(0, len(data) // 2, 1000):
            data[position] ^= 1
        payload.write_bytes(data)
    else:
        (config.cache.path / "commits" / "00000.json").unlink()
    expected = CacheIncompleteError if damage == "commit" else CacheCorruptError
    with pytest.raises(expected):
        train_draft(config)
    assert not (config.train.run_dir / "draft").exists()


@pytest.mark.parametrize("name", ["config.json", "head.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "pipe", "no folder"])
def test_a_damaged_target_is_refused(cached: Path, tmp_path: Path, name: str, damage: str) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", cache__path=tmp_path / "cache")
    shutil.copytree(cached / "cache", tmp_path / "cache")
    file = tmp_path / "cache" / "target" / name
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "no folder":
        shutil.rmtree(file.parent)
    else:
        file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    with pytest.raises(CacheCorruptError, match="target/" if damage == "no folder" else f"target/{name}: "):
        train_draft(config)


def test_a_cache_without_a_target_is_refused(tmp_path: Path) -> None:
    plan_cache(tmp_path, [20])
    fill_cache(tmp_path)
    with pytest.raises(CacheFormatError, match=r"manifest\.json: names no target/head\.safetensors"):
        build_draft(make_config(tmp_path / "other").draft, CacheReader(tmp_path), seed=0)


def test_a_full_disk_keeps_the_checkpoint_before_and_no_part(cached: Path, tmp_path: Path) -> None:
    """The model's weights are the first file above the limit."""
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=6)
    original = Stepper.step

    with pytest.MonkeyPatch.context() as patch, ExitStack() as disk:

        def step(self: Stepper, *arguments: Any, **named: Any) -> Any:
            if (config.train.run_dir / "checkpoints" / "step_00000003").exists():
                disk.enter_context(limited_file_size(300_000))
            return original(self, *arguments, **named)

        patch.setattr(Stepper, "step", step)
        with pytest.raises(CheckpointError, match=r"step_00000006: cannot write: .*; the checkpoints made before"):
            train_draft(config)
    assert os.listdir(config.train.run_dir / "checkpoints") == ["step_00000003"]
    with limited_file_size(300_000), pytest.raises(CheckpointError, match="draft: cannot write: "):
        save_draft(
            tmp_path / "draft",
            draft_model=Qwen3DSparkModel.from_pretrained(config.train.run_dir / "checkpoints/step_00000003"),
            dtype=torch.float32,
        )
    assert not list(tmp_path.glob(".draft*"))
    assert train_draft(config).num_steps == 6


def test_damaged_lines_of_the_metrics_are_left_out(
    cached: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run")
    train_draft(config)
    expected = losses(config.train.run_dir)
    file = config.train.run_dir / "metrics.jsonl"
    file.write_bytes(b'not json\n[1]\n{"step": "3"}\n\xff\n' + file.read_bytes() + b'{"kind": "tr')
    shutil.rmtree(config.train.run_dir / "checkpoints" / "step_00000008")
    train_draft(config)
    assert losses(config.train.run_dir) == expected
    assert "metrics.jsonl: line 4 is not a row of metrics and is left out" in caplog.text
    assert file.read_bytes().startswith(b'{"kind": "train"')


def test_a_complete_run_mends_its_draft(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=2)
    model_file = train_draft(config).draft_dir / "model.safetensors"
    expected = model_file.read_bytes()
    os.truncate(model_file, 1000)
    assert train_draft(config).was_complete
    assert model_file.read_bytes() == expected


@pytest.mark.parametrize(
    "damage", [{"step": "8"}, {"step": 7}, {"files": {}}, {"made_from": {}}, {"made_from": None}, {"more": 1}]
)
def test_a_damaged_trainer_state_gives_way_to_the_one_before(
    cached: Path, tmp_path: Path, damage: dict[str, Any]
) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run")
    train_draft(config)
    newest = config.train.run_dir / "checkpoints" / "step_00000008"
    state = json.loads((newest / "trainer_state.json").read_text())
    (newest / "trainer_state.json").write_text(json.dumps(state | damage))
    (newest / "model.safetensors").unlink()
    found = find_checkpoint(newest.parent)
    assert found is not None
    assert found[0].name == "step_00000006"


def test_initial_weights_follow_the_seed(cached: Path) -> None:
    config = make_config(cached)
    reader = open_cache(config, layers=None)

    def fc(seed: int) -> torch.Tensor:
        return build_draft(config.draft, reader, seed=seed).fc.weight

    assert torch.equal(fc(0), fc(0))
    assert not torch.equal(fc(0), fc(1))


def test_the_run_folder_says_what_it_was_made_from(cached: Path, tmp_path: Path) -> None:
    config: Config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=2)
    train_draft(config)
    found = find_checkpoint(config.train.run_dir / "checkpoints")
    assert found is not None
    made_from = json.loads((found[0] / "trainer_state.json").read_text())["made_from"]
    with CacheReader(config.cache.path) as reader:
        assert made_from["cache.data_digest"] == reader.identity.data_digest
    assert made_from["train.seed"] == 0


def test_tensorboard_has_the_curves(cached: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=3)
    train_draft(config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = {"train/loss": [loss for _, loss, _ in losses(tmp_path / "run")]}
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged["train/loss"])
    assert {"validation/tau", "train/accept_rate_per_pos/3", "train/grad_norm"} <= set(events.Tags()["scalars"])


def test_pruning_keeps_whole_checkpoints_and_not_damaged_ones(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__checkpoint_every=1, train__keep_last=2)
    train_draft(config)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(folder.name for folder in checkpoints.iterdir()) == ["step_00000007", "step_00000008"]
    os.truncate(checkpoints / "step_00000008" / "model.safetensors", 100)
    found = find_checkpoint(checkpoints)
    assert found is not None
    folder, state = found
    model = Qwen3DSparkModel.from_pretrained(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    save_checkpoint(checkpoints, state=state, draft_model=model, optimizer=optimizer, keep_last=1)
    assert [folder.name for folder in checkpoints.iterdir()] == ["step_00000007"]
    assert find_checkpoint(checkpoints) is not None


def test_layers_written_out_are_the_layers_left_out(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=1)
    train_draft(config)
    layers = list(open_cache(config, layers=None).layers)
    assert train_draft(
        make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=1, draft__target_layer_ids=layers)
    ).was_complete
