"""Several ranks: real torchrun processes over gloo on this machine's CPU, held against one process alone.

torchrun takes seconds to start, so one start trains many configs, and the tests look at what they left.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import Config, to_toml
from pipeline.stage_one import settings_of
from pipeline.stage_two import open_cache, train_draft
from stages.errors import SettingError
from stages.extract.run import extract
from stages.train import DSparkTrainerModule
from stages.train.batches import EMPTY_BATCH, gather_batch
from stages.train.loop import plan_steps
from stages.train.metrics import read_metrics
from stages.train.order import plan_rank_batches, plan_schedule
from stages.train.parallel import ALONE, join_ranks
from stages.train.run import build_draft
from tiny_target import make_config

ROOT = Path(__file__).parent.parent
NUM_STEPS = 6
TRIALS: dict[str, dict[str, Any]] = {
    "ddp": {"train__parallel": "ddp"},
    "fsdp": {"train__parallel": "fsdp", "train__activation_checkpointing": True},
    "ddp-bf16": {"train__parallel": "auto", "train__dtype": "bfloat16"},
    "fsdp-bf16": {"train__parallel": "fsdp", "train__dtype": "bfloat16"},
    "rnn-ddp": {"draft__markov_head_type": "rnn", "objective__confidence_head_alpha": 0.0},
    "rnn-fsdp": {
        "draft__markov_head_type": "rnn",
        "objective__confidence_head_alpha": 0.0,
        "train__parallel": "fsdp",
    },
}
ALONE_TRIALS: dict[str, dict[str, Any]] = {
    "alone": {},
    "alone-bf16": {"train__dtype": "bfloat16"},
    "rnn-alone": {"draft__markov_head_type": "rnn", "objective__confidence_head_alpha": 0.0},
}
RESUMED = {"from-alone-to-ddp": "ddp", "from-alone-to-fsdp": "fsdp"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    extract(settings_of(make_config(folder)))
    return folder


def trial(folder: Path, name: str, **changes: Any) -> Config:
    """Steps of 5 micro-batches, one conversation each: of two ranks one has 3, the other 2 and an empty one."""
    options = {
        "draft__num_layers": 2, "train__run_dir": folder / name, "train__max_batch_tokens": 1,
        "train__global_batch_size": 5, "train__lr": 1e-3, "train__max_steps": NUM_STEPS, "train__checkpoint_every": 2,
        "train__keep_last": 9,
    }  # fmt: skip
    return make_config(folder, **(options | changes))


def write_config(config: Config, file: Path) -> Path:
    file.write_text(to_toml(config))
    return file


def torchrun(*command: str | Path, log: Path, world: int = 2, **environment: str) -> "subprocess.Popen[bytes]":
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Config]:
    """Every trial, in one process and on two ranks; the resumed ones continue the lone one behind its step 2."""
    alone = {name: trial(folder, name, **changes) for name, changes in ALONE_TRIALS.items()}
    for config in alone.values():
        train_draft(config)
    several = {name: trial(folder, name, **changes) for name, changes in TRIALS.items()}
    for name, parallel in RESUMED.items():
        several[name] = trial(folder, name, train__parallel=parallel)
        copy_run(alone["alone"], several[name], last_step=2)
    files = [write_config(config, folder / f"{name}.toml") for name, config in several.items()]
    log = folder / "log"
    process = torchrun(ROOT / "tests" / "rank_worker.py", *files, log=log)
    try:
        assert process.wait(timeout=300) == 0, log.read_text()
    finally:
        process.kill()
    text = log.read_text()
    assert all(f"rank {rank} of 2 has trained {name}" in text for rank in (0, 1) for name in several)
    return alone | several


def copy_run(source: Config, target: Config, *, last_step: int) -> None:
    """A run as it was behind its step number `last_step`."""
    shutil.copytree(source.train.run_dir, target.train.run_dir)
    for checkpoint in (target.train.run_dir / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > last_step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(target.train.run_dir / "draft")


def rows(config: Config, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_metrics(config.train.run_dir) if row["kind"] == kind]


def assert_same_training(config: Config, expected: Config, *, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    """Loss curves, gradient norms, validations, all checkpoints and the draft agree, and each row was written once."""
    assert [row["step"] for row in rows(config)] == list(range(1, NUM_STEPS + 1))
    for kind, keys in (("train", ("loss", "tau", "grad_norm", "num_tokens", "lr")), ("validation", ("step", "tau"))):
        found, wanted = ([[row[key] for key in keys] for row in rows(run, kind)] for run in (config, expected))
        np.testing.assert_allclose(found, wanted, rtol=rtol)
    names = sorted(path.name for path in (expected.train.run_dir / "checkpoints").iterdir())
    assert sorted(path.name for path in (config.train.run_dir / "checkpoints").iterdir()) == names
    for folder in [f"checkpoints/{name}" for name in names] + ["draft"]:
        left, right = config.train.run_dir / folder, expected.train.run_dir / folder
        assert sorted(path.name for path in left.iterdir()) == sorted(path.name for path in right.iterdir())
        assert (left / "config.json").read_text() == (right / "config.json").read_text()
        for file in left.glob("*.safetensors"):
            found, wanted = load_file(file), load_file(right / file.name)
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert found[name].dtype == tensor.dtype
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=atol, msg=f"{file} {name}")


def test_the_ranks_of_a_step_are_uneven(folder: Path) -> None:
    """What the trials rely on: one rank is filled up with an empty batch."""
    config = trial(folder, "never trained")
    reader = open_cache(config, layers=None)
    schedule = plan_schedule(config.train, num_samples=len(reader.split_indices("train")))
    step = next(plan_steps(reader, config.train, schedule=schedule, start=0))
    lengths = reader.num_tokens[step.indices].tolist()
    shares = [plan_rank_batches(lengths, max_batch_tokens=1, rank=rank, world=2) for rank in (0, 1)]
    assert [[len(share) for share in rank] for rank in shares] == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("name", ["ddp", "fsdp", *RESUMED])
def test_two_ranks_train_as_one(trained: dict[str, Config], name: str) -> None:
    """The same global batch: the same losses and weights, from the start and continued from the lone run's step 2."""
    assert_same_training(trained[name], trained["alone"])
    assert {row["num_micro_batches"] for row in rows(trained[name])[2:]} == {3}
    assert {row["num_micro_batches"] for row in rows(trained["alone"])} == {5}


@pytest.mark.parametrize("name", ["rnn-ddp", "rnn-fsdp"])
def test_a_head_without_weight_in_the_loss_holds_up_no_rank(trained: dict[str, Config], name: str) -> None:
    assert_same_training(trained[name], trained["rnn-alone"])


@pytest.mark.parametrize(("name", "rtol"), [("ddp-bf16", 1e-4), ("fsdp-bf16", 2e-3)])
def test_bfloat16_is_near(trained: dict[str, Config], name: str, rtol: float) -> None:
    """FSDP rounds the layers' norms as well, so it is not as near."""
    expected = trained["alone-bf16"]
    np.testing.assert_allclose([row["loss"] for row in rows(trained[name])], [r["loss"] for r in rows(expected)], rtol)
    np.testing.assert_allclose(
        [row["grad_norm"] for row in rows(trained[name])], [r["grad_norm"] for r in rows(expected)], rtol=0.05
    )
    weights = load_file(trained[name].train.run_dir / "checkpoints" / "step_00000006" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    drafts = [load_file(run.train.run_dir / "draft" / "model.safetensors") for run in (trained[name], expected)]
    for weight in ("embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(drafts[0][weight], drafts[1][weight])


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_continues_what_two_ranks_began(trained: dict[str, Config], folder: Path, name: str) -> None:
    config = trial(folder, f"from-{name}-to-alone")
    copy_run(trained[name], config, last_step=4)
    assert train_draft(config).num_steps == NUM_STEPS
    assert_same_training(config, trained["alone"])


def test_the_empty_batch_of_a_rank_is_no_bad_batch(
    folder: Path, caplog: pytest.LogCaptureFixture, trained: dict[str, Config]
) -> None:
    config = trained["alone"]
    reader = open_cache(config, layers=None)
    module = DSparkTrainerModule(build_draft(config.draft, reader, seed=0))
    metrics = module(**gather_batch(reader, EMPTY_BATCH, device=torch.device("cpu")))
    metrics.loss_num.backward()
    assert metrics.loss_den == metrics.loss_num == module.num_empty_batches == 0
    gradients = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients), "or a rank waits for ever"
    assert not caplog.text
    assert "no supervised slot" not in (folder / "log").read_text()


def find_worker(config_file: Path, rank: int) -> int | None:
    """The process of a rank: not torchrun, whose command line has the config too, but no RANK."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = ((place / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(config_file).encode() in words and f"RANK={rank}".encode() in environment:
            return int(place.name)
    return None


@pytest.fixture
def killable(folder: Path, tmp_path: Path) -> Iterator[tuple[Config, Path]]:
    config = trial(
        folder, tmp_path / "killed", train__max_steps=30, train__checkpoint_every=3, train__keep_last=2,
        train__parallel="fsdp", train__validate_every=30,
    )  # fmt: skip
    yield config, write_config(config, tmp_path / "killed.toml")
    shutil.rmtree(tmp_path / "killed", ignore_errors=True)


def signal_rank_1(config: Config, file: Path, number: int, *, after_step: int, log: Path) -> int:
    """Run the command line on two ranks and send one of them a signal; the exit status of the whole."""
    process = torchrun("-m", "pipeline.cli", "train", file, log=log)
    try:
        while process.poll() is None and len(rows(config)) < after_step:
            time.sleep(0.005)
        worker = find_worker(file, 1)
        assert worker is not None, log.read_text()
        os.kill(worker, number)
        return process.wait(timeout=120)
    finally:
        process.kill()


def test_a_stopped_or_killed_rank_ends_the_job_and_the_command_line_continues_it(
    killable: tuple[Config, Path], tmp_path: Path
) -> None:
    config, file = killable
    log, checkpoints = tmp_path / "log", config.train.run_dir / "checkpoints"
    command = ("-m", "pipeline.cli", "train", file)
    assert signal_rank_1(config, file, signal.SIGTERM, after_step=1, log=log) == 0, log.read_text()
    stopped = len(rows(config))
    assert f"stopped by another rank behind step {stopped} of 30" in log.read_text()
    assert (checkpoints / f"step_{stopped:08d}").is_dir()
    assert signal_rank_1(config, file, signal.SIGKILL, after_step=stopped + 4, log=log) != 0
    done = len(rows(config))
    assert stopped + 4 <= done < 30, "the kill came too late to show anything"
    assert not (config.train.run_dir / "draft").exists()
    process = torchrun(*command, log=log)
    try:
        assert process.wait(timeout=300) == 0, log.read_text()
    finally:
        process.kill()
    text = log.read_text()
    assert [row["step"] for row in rows(config)] == list(range(1, 31))
    assert int(re.findall(r"continuing behind step (\d+) of 30", text)[0]) >= stopped
    for once in ("continuing behind step", "step     30/30", "validation  tau", "held-out acceptance"):
        assert text.count(once) == 1, f"{once}: {text}"
    evaluation = json.loads((config.train.run_dir / "evaluation.json").read_text())
    assert evaluation["tau"] == pytest.approx(rows(config, "validation")[-1]["tau"], rel=1e-6)


def test_a_rank_that_hangs_ends_the_job(folder: Path, tmp_path: Path) -> None:
    file = write_config(trial(folder, tmp_path / "run", train__parallel="ddp"), tmp_path / "config.toml")
    process = torchrun(ROOT / "tests" / "rank_worker.py", file, log=tmp_path / "log", HANG="1")
    try:
        assert process.wait(timeout=120) != 0
    finally:
        process.kill()
    text = (tmp_path / "log").read_text()
    assert "rank 0: another rank has ended or does not answer; what it printed says why" in text


def metrics_of(config: Config) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in rows(config)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointed_activations_change_no_bit(folder: Path, tmp_path: Path, dtype: str) -> None:
    curves = []
    for name, checkpointed in (("kept", False), ("again", True)):
        config = trial(
            folder, tmp_path / name, train__dtype=dtype, train__activation_checkpointing=checkpointed,
            train__max_steps=3, train__max_batch_tokens=300,
        )  # fmt: skip
        draft = train_draft(config).draft_dir
        curves.append((metrics_of(config), (draft / "model.safetensors").read_bytes()))
    assert curves[0] == curves[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the tracer looks at it
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_train_as_eager_ones(
    folder: Path, tmp_path: Path, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the compiler's tracing and its derivatives, but without the minutes of generated C++."""
    original, compiled = torch.compile, []

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append(function.__self__)
        assert options == {"dynamic": True}
        return original(function, **options, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_)
    options = {"train__max_steps": 2, "train__activation_checkpointing": checkpointed}
    eager = trial(folder, tmp_path / "eager", **options)
    other = trial(folder, tmp_path / "compiled", train__compile=True, **options)
    train_draft(eager)
    assert not compiled
    train_draft(other)
    assert len(compiled) == 2
    np.testing.assert_allclose(metrics_of(other), metrics_of(eager), rtol=1e-6)


def test_compile_needs_a_compiler(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SettingError, match=r"train\.compile: needs a C\+\+ compiler .* no no-such-compiler here"):
        train_draft(trial(folder, tmp_path / "run", train__compile=True))


@pytest.mark.parametrize(
    ("environment", "parallel", "message"),
    [
        ({}, "fsdp", r'train\.parallel: "fsdp" is for processes that torchrun starts'),
        ({}, "ddp", r'train\.parallel: "ddp" is for processes'),
        ({"WORLD_SIZE": "2"}, "auto", "WORLD_SIZE = 2 in the environment, but no RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "auto", "expected 0 <= RANK < WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "0"}, "auto", "no MASTER_PORT but 0"),
        ({"LOCAL_RANK": "x"}, "auto", "LOCAL_RANK = 'x' in the environment"),
    ],
)
def test_an_odd_environment_is_told(
    folder: Path, environment: dict[str, str], parallel: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = trial(folder, "never trained", train__parallel=parallel)
    with pytest.raises(SettingError, match=message), join_ranks(config.train):
        pytest.fail("the ranks were joined")


@pytest.mark.parametrize(
    ("device", "world", "message"),
    [
        ("cuda:1", 2, r"train\.device: cuda:1 would be that of every rank"),
        ("auto", 4, "device: cuda:3 is not there: torch sees 2 CUDA devices"),
        ("cuda", 4, "device: cuda:3 is not there"),
    ],
)
def test_each_rank_needs_a_device_of_its_own(
    folder: Path, device: str, world: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    rank = {"RANK": str(world - 1), "LOCAL_RANK": str(world - 1), "WORLD_SIZE": str(world)}
    for name, value in {**rank, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(SettingError, match=message),
        join_ranks(trial(folder, "never trained", train__device=device).train),
    ):
        pytest.fail("the ranks were joined")


def test_one_process_is_all_ranks(folder: Path) -> None:
    with join_ranks(trial(folder, "never trained").train) as ranks:
        assert ranks == ALONE
    tensor = torch.ones(2)
    assert ranks.sum_(tensor) is ranks.broadcast_(tensor) is tensor
    assert ranks.on_first(lambda: 3) == 3
    assert ranks.gather("a") == ["a"]
