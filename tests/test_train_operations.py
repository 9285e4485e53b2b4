"""A training as its operator meets it: stops, kills, NaN, profiles and coverage."""

import gzip
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from pipeline.cli import main
from pipeline.config import to_toml
from pipeline.stage_two import open_cache, train_draft
from stages.train import DSparkTrainerModule, Qwen3DSparkModel, interrupt
from stages.train import run as training
from stages.train.anchors import choose_anchors
from stages.train.batches import PlannedBatch, gather_batch, plan_batches
from stages.train.checkpoint import find_checkpoint
from stages.train.coverage import count_slots
from stages.train.interrupt import StopRequest, stop_on_signals
from stages.train.loop import Stepper, plan_steps
from stages.train.metrics import StepTotals, read_metrics
from stages.train.nonfinite import NonFiniteLossError, replay
from stages.train.order import plan_schedule
from stages.train.parallel import Ranks
from stages.train.run import build_draft
from storage import CacheReader
from tiny_target import make_config

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(cached: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 8 steps, validated every 3."""
    config = make_config(cached, train__run_dir=tmp_path_factory.mktemp("trained") / "run", train__validate_every=3)
    train_draft(config)
    return config.train.run_dir


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """All that was logged, without what depends on the clock."""
    timed = {"seconds", "tokens_per_second", "eta_seconds", "waited_seconds", "wait_share"}
    return [{key: value for key, value in row.items() if key not in timed} for row in read_metrics(run_dir)]


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    return {
        f"{file}/{name}": tensor
        for file in ("model", "optimizer")
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
    }


def assert_equal_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@contextmanager
def before_each_step(action: Callable[[Stepper], None]) -> Iterator[None]:
    original = Stepper.step

    def step(self: Stepper, *arguments: Any, **named: Any) -> Any:
        action(self)
        return original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", step)
        yield


@contextmanager
def while_validating(action: Callable[[], None]) -> Iterator[None]:
    original = DSparkTrainerModule.score

    def score(self: DSparkTrainerModule, *arguments: Any, **named: Any) -> Any:
        action()
        return original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DSparkTrainerModule, "score", score)
        yield


# Stops and resumes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_is_resumed_after_every_step_is_bit_identical(cached: Path, tmp_path: Path, dtype: str) -> None:
    """Eight runs of one step each, across the edge behind step 4; only a stop writes these checkpoints."""
    options: dict[str, Any] = {"train__dtype": dtype, "train__checkpoint_every": 100, "train__validate_every": 2}
    whole = make_config(cached, train__run_dir=tmp_path / "whole", **options)
    train_draft(whole)
    parts = make_config(cached, train__run_dir=tmp_path / "parts", **options)
    with before_each_step(lambda stepper: stepper.stop.ask("the test")):
        for step in range(1, 9):
            result = train_draft(parts)
            assert (result.num_steps, result.was_stopped) == (step, True)
            assert result.draft_dir.exists() == (step == 8)
    result = train_draft(parts)
    assert result.was_complete
    assert not result.was_stopped
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert {row["epoch"] for row in rows(tmp_path / "parts") if row["kind"] == "train"} == {0, 1}
    assert_equal_tensors(tensors(tmp_path / "parts", 8), tensors(tmp_path / "whole", 8))
    assert {tensor.dtype for tensor in tensors(tmp_path / "parts", 8).values()} == {torch.float32}
    last = load_file(tmp_path / "parts" / "draft" / "model.safetensors")
    assert {tensor.dtype for tensor in last.values()} == {getattr(torch, dtype)}


def test_sigterm_ends_a_training_with_a_checkpoint_and_a_hint(cached: Path, tmp_path: Path) -> None:
    config = make_config(
        cached, train__run_dir=tmp_path / "run", train__max_steps=3000, train__epochs=750, train__checkpoint_every=10**6
    )
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    command = [sys.executable, "-m", "pipeline.cli", "train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for number, expected in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):
        before = max((row["step"] for row in read_metrics(tmp_path / "run")), default=0)
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while max((row["step"] for row in read_metrics(tmp_path / "run")), default=0) < before + 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        done = max(row["step"] for row in read_metrics(tmp_path / "run"))
        hint = f"stopped by {expected} behind step {done} of 3000: run the same command again to continue from "
        assert output.splitlines()[-1].startswith(hint)
        assert f"{expected}: the step in progress is finished" in errors
        found = find_checkpoint(tmp_path / "run" / "checkpoints")
        assert found is not None
        assert found[1].step == done
        assert f"continuing behind step {before} of 3000" in output or before == 0
        assert not (tmp_path / "run" / "draft").exists()
        assert not (tmp_path / "run" / "evaluation.json").exists()


def test_a_second_signal_ends_at_once() -> None:
    script = (
        "import signal\n"
        "from stages import signals\n"
        "from stages.train import interrupt\n"
        "with interrupt.stop_on_signals():\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('a launcher repeats what a terminal sent', flush=True)\n"
        "    signals.REPEAT_SECONDS = 0.0\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('not reached', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, len(ended.stdout.splitlines())) == (-signal.SIGINT, 1), ended.stderr


def test_handlers_are_put_back_and_left_alone_in_other_threads() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked_by == "SIGINT"
        with pytest.raises(interrupt.StopAskedError):
            stop.check(Ranks(device=CPU))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    seen = []

    def elsewhere() -> None:
        with stop_on_signals() as stop:
            seen.append((stop.asked_by, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(None, before[0])]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN, "nohup's choice"
    finally:
        signal.signal(signal.SIGINT, before[1])


class OneOfTwo(Ranks):
    """This rank beside another one with the same sums, which was asked to stop."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor *= 2
        tensor[-1] += 1
        return tensor


def test_all_ranks_stop_when_one_was_asked(cached: Path) -> None:
    config = make_config(cached)
    reader = open_cache(config, layers=None)
    module = DSparkTrainerModule(build_draft(config.draft, reader, seed=0))
    (planned,) = plan_batches(reader, [0], max_batch_tokens=1, num_anchors=3, seed=0, epoch=0)
    totals = StepTotals()
    totals.add(module(**gather_batch(reader, planned, device=CPU)))
    totals.count(num_tokens=planned.num_tokens)
    totals.reduce(OneOfTwo(device=CPU))
    assert float(totals.sums()["num_asked_to_stop"]) == 1
    assert totals.ratios()["num_tokens"] == 2 * planned.num_tokens
    stop = StopRequest()
    assert not stop.agree(Ranks(device=CPU))
    assert stop.agree(OneOfTwo(device=CPU))
    assert stop.agreed
    assert stop.asked_by is None


def test_a_stop_before_the_first_step(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = make_config(cached, train__run_dir=tmp_path / "run")

    def build(*arguments: Any, **named: Any) -> Qwen3DSparkModel:
        signal.raise_signal(signal.SIGTERM)
        return build_draft(*arguments, **named)

    monkeypatch.setattr(training, "build_draft", build)
    result = train_draft(config)
    assert (result.num_steps, result.was_stopped) == (0, True)
    assert "stopped by SIGTERM before the first step: run the same command again to start" in caplog.text
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert rows(tmp_path / "run") == []


@pytest.mark.parametrize("step", [3, 8])
def test_a_stop_while_validating_makes_up_for_it_later(cached: Path, trained: Path, tmp_path: Path, step: int) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__validate_every=3)

    def ask() -> None:
        if rows(tmp_path / "run")[-1]["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    with while_validating(ask):
        result = train_draft(config)
    assert (result.num_steps, result.was_stopped) == (step, True)
    assert rows(tmp_path / "run")[-1]["kind"] == "train"
    assert not train_draft(config).was_stopped
    assert rows(tmp_path / "run") == rows(trained)
    assert_equal_tensors(tensors(tmp_path / "run", 8), tensors(trained, 8))
    assert (tmp_path / "run" / "draft" / "model.safetensors").is_file()


@pytest.mark.parametrize("step", [3, 8])
def test_a_validation_cut_off_by_a_kill_is_made_up_for(cached: Path, trained: Path, tmp_path: Path, step: int) -> None:
    """An error stands for the kill. The checkpoint of the step is there, its validation is not."""
    config = make_config(cached, train__run_dir=tmp_path / "run", train__validate_every=3)

    def die() -> None:
        if rows(tmp_path / "run")[-1]["step"] == step:
            raise InterruptedError("killed")

    with while_validating(die), pytest.raises(InterruptedError):
        train_draft(config)
    assert (tmp_path / "run" / "checkpoints" / f"step_{step:08d}").exists()
    train_draft(config)
    assert rows(tmp_path / "run") == rows(trained)


def test_a_kill_while_a_checkpoint_is_written_costs_only_that(cached: Path, trained: Path, tmp_path: Path) -> None:
    """The child is killed between the files and the rename of the checkpoint of step 6."""
    config = make_config(cached, train__run_dir=tmp_path / "run", train__validate_every=3)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from pipeline.config import load_config\n"
        "from pipeline.stage_two import train_draft\n"
        "rename = Path.rename\n"
        "def kill(self, target):\n"
        "    if target.name == 'step_00000006':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rename(self, target)\n"
        "Path.rename = kill\n"
        "train_draft(load_config(Path(sys.argv[1])))\n"
    )
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", script, str(file)]
    killed = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(left) == 2, left
    assert left[0].startswith(".step_00000006.")
    train_draft(config)
    assert sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_00000006",
        "step_00000008",
    ]
    assert rows(tmp_path / "run") == rows(trained)
    assert_equal_tensors(tensors(tmp_path / "run", 8), tensors(trained, 8))


def test_a_stop_ends_a_sweep_and_leaves_evaluation_out(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run")
    file = tmp_path / "sweep.toml"
    file.write_text(f'{to_toml(config)}\n[sweep.grid]\n"train.seed" = [0, 1]\n')
    with before_each_step(lambda _: signal.raise_signal(signal.SIGTERM)):
        ended = CliRunner().invoke(main, ["sweep", str(file)], catch_exceptions=False)
    assert ended.exit_code == 0
    assert "0 of 2 trials have ended: 0 complete; stopped, the same command continues" in ended.output
    assert sorted(folder.name for folder in (tmp_path / "run").glob("seed*")) == ["seed=0"]
    assert not (tmp_path / "run" / "seed=0" / "evaluation.json").exists()


# NaN and Inf


@contextmanager
def spoiled(sample_id: int, reader: CacheReader, change: Callable[[Any], Any]) -> Iterator[None]:
    """`change` what `DSparkTrainerModule.forward` returns for the batch of a sample."""
    original = DSparkTrainerModule.forward
    tokens = reader.read_tokens(reader.sample_ids.tolist().index(sample_id))[0].long()

    def forward(self: DSparkTrainerModule, **named: Any) -> Any:
        metrics = original(self, **named)
        ids = named["input_ids"][0]
        return change(metrics) if len(ids) == len(tokens) and torch.equal(ids, tokens) else metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DSparkTrainerModule, "forward", forward)
        yield


def bad_loss(metrics: Any) -> Any:
    object.__setattr__(metrics, "loss_num", metrics.loss_num * float("inf"))
    return metrics


def bad_gradient(metrics: Any) -> Any:
    metrics.loss_num.register_hook(lambda gradient: gradient * float("nan"))
    return metrics


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_is_kept_and_can_be_replayed(cached: Path, trained: Path, tmp_path: Path, kind: str) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_batch_tokens=1)
    reader = open_cache(config, layers=None)
    indices = reader.split_indices("train")
    culprit = int(reader.sample_ids[indices[7]])
    message = r"no weight was changed by this step.*is saved in "
    change = bad_loss if kind == "loss" else bad_gradient
    with spoiled(culprit, reader, change), pytest.raises(NonFiniteLossError, match=message) as caught:
        train_draft(config)
    (file,) = (tmp_path / "run" / "nonfinite").glob("*.safetensors")
    kept = json.loads(file.with_suffix(".json").read_text())
    assert file.name == f"step_{kept['step']:08d}.safetensors"
    done = [row["step"] for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert kept["step"] == len(done) + 1
    assert kept["non_finite_arguments"] == []
    if kind == "loss":
        assert kept["sample_ids"] == [culprit]
        assert f"the loss is inf and the gradient's norm nan on samples [{culprit}]" in str(caught.value)
    else:  # which of the four micro-batches it was cannot be told
        assert len(kept["sample_ids"]) == 1
        assert "the gradient's norm nan" in str(caught.value)
    index = reader.sample_ids.tolist().index(kept["sample_ids"][0])
    (planned,) = plan_batches(reader, [index], max_batch_tokens=1, num_anchors=6, seed=0, epoch=kept["epoch"])
    assert_equal_tensors(load_file(file), gather_batch(reader, planned, device=CPU))
    module = DSparkTrainerModule(Qwen3DSparkModel.from_pretrained(trained / "checkpoints" / "step_00000006"))
    again = replay(file, module)
    assert torch.equal(again.loss, module(**gather_batch(reader, planned, device=CPU)).loss)
    again.loss.backward()
    assert all(tensor.isfinite().all() for name, tensor in load_file(file).items())


def test_a_step_that_is_not_finite_changes_nothing(cached: Path, tmp_path: Path) -> None:
    """The checkpoint before the step is what an undisturbed run has there, and the run goes on from it."""
    config = make_config(cached, train__run_dir=tmp_path / "run", train__checkpoint_every=1, train__max_batch_tokens=1)
    reader = open_cache(config, layers=None)
    with spoiled(int(reader.sample_ids[reader.split_indices("train")[7]]), reader, bad_gradient):
        seen: list[dict[str, torch.Tensor]] = []

        def look(stepper: Stepper) -> None:
            seen.append({name: tensor.clone() for name, tensor in stepper.module.draft_model.state_dict().items()})
            seen[-1]["module"] = stepper.module  # type: ignore[assignment]

        with before_each_step(look), pytest.raises(NonFiniteLossError):
            train_draft(config)
    module: Any = seen[-1].pop("module")
    assert_equal_tensors(seen[-1], module.draft_model.state_dict())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert train_draft(config).num_steps == 8


def test_a_batch_that_cannot_be_kept_does_not_hide_the_error(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "nonfinite").touch()

    def spoil(stepper: Stepper) -> None:
        next(stepper.module.draft_model.layers.parameters()).data.fill_(float("nan"))

    with before_each_step(spoil), pytest.raises(NonFiniteLossError, match=r"the loss is nan .* could not be saved: "):
        train_draft(config)


# Profiles


def test_a_profile_is_a_trace_of_a_few_steps(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_batch_tokens=100_000)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    ended = CliRunner().invoke(main, ["train", str(file), "--profile", "--no-evaluate"], catch_exceptions=False)
    assert ended.exit_code == 0
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert f"profile: {trace}; open it at https://ui.perfetto.dev" in ended.output
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 3
    assert any("scaled_dot_product" in name for name in names)
    assert any("Backward" in name for name in names)


def test_a_run_too_short_for_a_profile_says_so(
    cached: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=1)
    train_draft(config, profiled=True)
    assert "nothing was profiled: that needs more than 2 steps" in caplog.text
    assert not (tmp_path / "run" / "profile").exists()
    assert not (trained / "profile").exists()


# Coverage


def test_coverage_is_what_a_loop_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        lengths = torch.randint(1, 15, (1 + case % 3,), generator=generator).tolist()
        masks = [(torch.rand(length, generator=generator) < 0.7).to(torch.uint8) for length in lengths]
        num_anchors, block_size = 1 + case % 4, 1 + case % 5
        starts = [sum(lengths[:place]) for place in range(len(lengths))]
        chosen = [choose_anchors(mask, num_anchors, seed=case, epoch=0, sample_id=0) for mask in masks]
        predicted, num_slots = set(), 0
        for start, mask, anchors in zip(starts, masks, chosen, strict=True):
            for anchor in anchors.tolist():
                for position in range(anchor + 1, min(anchor + 1 + block_size, len(mask))):
                    if not mask[position]:
                        break
                    predicted.add(start + position)
                    num_slots += 1
        batch = PlannedBatch(
            indices=(0,),
            sample_ids=(0,),
            input_ids=torch.zeros(1, sum(lengths), dtype=torch.long),
            loss_mask=torch.cat(masks)[None],
            seq_lens=torch.tensor([lengths]),
            anchor_positions=torch.cat([anchors + start for anchors, start in zip(chosen, starts, strict=True)])[None],
        )
        assert count_slots(batch, block_size=block_size) == {
            "num_blocks": sum(map(len, chosen)),
            "num_slots": num_slots,
            "num_predicted_tokens": len(predicted),
            "num_supervised_tokens": int(sum(mask.sum() for mask in masks)),
        }


def test_a_step_logs_its_coverage_and_counts(cached: Path, trained: Path) -> None:
    config = make_config(cached)
    reader = open_cache(config, layers=None)
    module = DSparkTrainerModule(build_draft(config.draft, reader, seed=0))
    row = next(row for row in rows(trained) if row["kind"] == "train")
    schedule = plan_schedule(config.train, num_samples=len(reader.split_indices("train")))
    first = next(plan_steps(reader, config.train, schedule=schedule, start=0))
    batches = list(plan_batches(reader, first.indices.tolist(), max_batch_tokens=256, num_anchors=6, seed=0, epoch=0))
    metrics = [module(**gather_batch(reader, batch, device=CPU)) for batch in batches]
    assert row["num_blocks"] == sum(part.num_blocks for part in metrics)
    assert row["num_slots"] == sum(part.num_supervised for part in metrics)
    assert row["num_tokens"] == sum(batch.num_tokens for batch in batches)
    counts = [count_slots(batch, block_size=4) for batch in batches]
    totals = [sum(count[name] for count in counts) for name in ("num_predicted_tokens", "num_supervised_tokens")]
    assert row["coverage"] == totals[0] / totals[1]
    assert 0.2 < row["coverage"] < 1
