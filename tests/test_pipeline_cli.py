"""The command line as a person meets it, the README's commands among them."""

import json
import logging
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline import cli
from pipeline.cli import main
from pipeline.config import load_config, to_toml
from stages.evaluate.calibration import read_calibration
from stages.evaluate.evaluation import read_evaluation
from storage import bytes_per_token
from tiny_target import make_config, save_tiny_target

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").iterdir())]


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file for a tiny target; the commands below run on it in their order."""
    folder = tmp_path_factory.mktemp("cli")
    file = folder / "config.toml"
    file.write_text(to_toml(make_config(folder)))
    return file


def dspark(*arguments: object, ok: bool = True) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert (result.exit_code == 0) == ok, result.output
    return result


def test_the_whole_way(config_file: Path) -> None:
    folder = config_file.parent
    estimate = dspark("estimate", config_file).output
    assert re.search(r"bytes a token\s+│ 256", estimate)
    assert not (folder / "cache").exists()
    trained = dspark("train", "--extract", config_file).output
    for expected in ("shards computed", "tau", "acceptance by slot", "256 bytes a token", "run/draft"):
        assert expected in " ".join(trained.replace("│", " ").split()), expected
    evaluation = json.loads((folder / "run" / "evaluation.json").read_text())
    assert f"{evaluation['tau']:.3f}" in trained
    assert len(evaluation["accept_rate_per_pos"]) == 4
    again = dspark("train", "--extract", config_file).output
    assert "is complete: reusing" in again
    assert "is trained already (8 steps)" in again
    saved = load_config(folder / "run" / "config.toml")  # with what the config left to the cache: its longest sample
    given = load_config(config_file)
    assert saved == given.model_copy(update={"data": given.data.model_copy(update={"max_length": 1024})})
    assert f"{evaluation['tau']:.3f}" in dspark("evaluate", config_file).output
    assert f"{evaluation['tau']:.3f}" in dspark("report", folder / "run").output
    assert "whole" in dspark("verify", config_file).output
    assert "tokens a sample" in dspark("inspect", folder / "cache").output


def test_the_resolved_config_is_printed_where_it_is_asked_for(config_file: Path) -> None:
    assert "[objective]" not in dspark("estimate", config_file).output
    shown = dspark("estimate", config_file, "--show-config", "--set", "train.seed=77").output
    assert "[objective]" in shown
    assert "seed = 77" in shown
    refused = dspark("train", config_file, "--set", "cache.path='/nonexistent/cache'", ok=False).output
    assert len(refused.splitlines()) < 10


def test_training_takes_a_cache_of_any_shard_size(config_file: Path) -> None:
    dspark("train", "--extract", config_file)
    run = config_file.parent / "other-shards"
    dspark("train", config_file, "--set", "cache.shard_bytes=2000000", "--set", f"train.run_dir='{run}'")
    refused = dspark("extract", config_file, "--set", "cache.shard_bytes=2000000", ok=False).output
    assert "shard_bytes: cache has 1000000, this run has 2000000" in refused


def test_verify_names_the_damage_and_fails(config_file: Path, tmp_path: Path) -> None:
    folder = config_file.parent
    overrides = ["--set", f"cache.path='{tmp_path / 'cache'}'"]
    dspark("extract", config_file, *overrides)
    payload = tmp_path / "cache" / "shards" / "00000.zarr" / "last_hidden_states" / "c" / "0" / "0"
    data = bytearray(payload.read_bytes())
    data[100] ^= 4
    payload.write_bytes(data)
    assert dspark("verify", "--quick", tmp_path / "cache").exit_code == 0
    failed = dspark("verify", config_file, *overrides, ok=False).output
    assert "shards/00000.zarr/last_hidden_states" in failed
    report = json.loads(dspark("verify", "--json", tmp_path / "cache", ok=False).output)
    assert [problem["array"] for problem in report["problems"]] == ["last_hidden_states"]
    refused = dspark("train", config_file, *overrides, "--set", f"train.run_dir='{folder / 'other'}'", ok=False).output
    assert "Error: " in refused
    assert "last_hidden_states" in refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "CONFIG", "--set", "train.lrr=1"], "unknown key train.lrr; did you mean lr?"),
        (["train", "nowhere.toml"], "nowhere.toml: no such config file"),
        (["train", "CONFIG", "--set", "cache.path='/nonexistent/cache'"], "/nonexistent/cache"),
        (["extract", "CONFIG", "--set", "data.files=['none.jsonl']"], "nothing matches 'none.jsonl'"),
        (["extract", "CONFIG", "--set", "target.model=./nowhere"], "no folder './nowhere'"),
        (["estimate", "CONFIG", "--set", "target.model=models/q4.gguf"], "gguf_file='q4.gguf', quantization_config="),
        (["extract", "CONFIG", "--set", "extract.device=cuda:99"], "cuda"),
        (["evaluate", "CONFIG", "--draft", "nowhere"], "no draft here"),
        (["report", "nowhere"], "nowhere: no such run"),
        (["verify", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_message_without_a_traceback(config_file: Path, arguments: list[str], message: str) -> None:
    arguments = [str(config_file) if argument == "CONFIG" else argument for argument in arguments]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert f"Error: {message}" in result.output or message in result.output.rsplit("Error: ", 1)[-1]


def test_memory_that_runs_out_is_one_line(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load_config", lambda *_: np.empty(1 << 60, dtype=np.uint8))  # an exabyte
    result = CliRunner().invoke(main, ["estimate", str(config_file)])
    assert result.exit_code == 1
    assert result.output == "Error: out of memory; see what else runs on this machine\n"


def test_a_draft_of_another_target_is_not_evaluated(config_file: Path, tmp_path: Path) -> None:
    dspark("train", "--extract", config_file)
    other = make_config(tmp_path)
    save_tiny_target(Path(other.target.model), seed=1)
    other_file = tmp_path / "config.toml"
    other_file.write_text(to_toml(other))
    dspark("extract", other_file)
    draft = config_file.parent / "run" / "draft"
    refused = dspark("evaluate", other_file, "--draft", draft, ok=False).output
    assert "trained for another target" in refused
    assert not (draft / "evaluation.json").exists()
    numbers = draft.parent / "evaluation.json"
    numbers.unlink()
    dspark("evaluate", config_file, "--draft", draft)
    assert numbers.is_file(), "where reports look"
    copy = shutil.copytree(draft, tmp_path / "copy")
    dspark("evaluate", config_file, "--draft", copy)
    assert (copy / "evaluation.json").is_file()


def test_evaluate_calibrates_the_draft_and_simulates_its_server(config_file: Path, tmp_path: Path) -> None:
    dspark("train", "--extract", config_file)
    draft = config_file.parent / "run" / "draft"
    evaluation = read_evaluation(config_file.parent / "run" / "evaluation.json")
    assert evaluation.scheduling is not None
    assert read_calibration(draft) == evaluation.scheduling.calibration
    untold = " ".join(dspark("evaluate", config_file).output.replace("│", " ").split())
    assert "outlook" not in untold
    assert "tokens/s, " not in untold, "nobody measured a server"
    assert evaluation.scheduling.outlook.throughput.file is None
    assert f"tau, greedy draft {evaluation.tau_greedy:.3f} ({evaluation.tau_greedy_low:.3f} to" in untold
    everything = f"on all {evaluation.num_samples} conversations, uncalibrated"
    assert f"confidence ECE {evaluation.confidence_ece:.3f} {everything}" in untold
    calibration = evaluation.scheduling.calibration
    assert calibration.num_fitted_samples < 30
    assert [t == 1 for t in calibration.temperatures] == [slot in calibration.kept_slots for slot in range(4)]
    if calibration.kept_slots:
        slots = ", ".join(str(slot + 1) for slot in calibration.kept_slots)
        assert f"temperature 1 at slots {slots}: too few conversations" in untold
    table = tmp_path / "server.csv"
    table.write_text("tokens,steps_per_second\n1,50\n300,10\n")
    arguments = ["evaluate", config_file, "--set", f"evaluate.throughput_table='{table}'"]
    shown = " ".join(dspark(*arguments).output.replace("│", " ").split())
    again = read_evaluation(config_file.parent / "run" / "evaluation.json")
    assert again.scheduling is not None
    assert again.scheduling.calibration == evaluation.scheduling.calibration
    assert again.scheduling.outlook.throughput.file == str(table)
    rows = {row.num_requests: row for row in again.scheduling.outlook.concurrencies}
    assert list(rows) == [1, 2, 4, 8, 16, 32], "64 requests of 1 + 4 tokens are more than 300"
    assert f"32 requests scheduled {rows[32].scheduled.tokens_per_second:,.0f} tokens/s" in shown
    assert f"against no draft {rows[32].gain_on_no_draft:+.1%}" in shown or rows[32].best_length == 0
    fitted, measured = (
        again.scheduling.calibration.num_fitted_samples,
        again.scheduling.calibration.num_measured_samples,
    )
    assert fitted + measured == again.num_samples
    assert f"fitted on {fitted} conversations, measured on {measured} others: ECE " in shown
    costs = tmp_path / "dspark_sps.json"
    costs.write_text('{"sample_batch_tokens":[5,40],"sample_steps_per_sec":[50.0,10.0],"max_batch_tokens":64}')
    by_costs = " ".join(dspark(*arguments[:2], "--set", f"evaluate.throughput_table='{costs}'").output.split())
    assert "8 requests" not in by_costs, "not among those that are printed"
    assert "1 request" in by_costs
    table.write_text("tokens,steps_per_second\n1,50\n4,10\n")
    assert "ends at 4 tokens" in dspark(*arguments, ok=False).output


def test_a_target_that_no_draft_fits_is_refused_before_extraction(tmp_path: Path) -> None:
    target = tmp_path / "target"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4096, n_embd=32, n_layer=4, n_head=2, n_positions=1024)
    save_tiny_target(target)
    GPT2LMHeadModel(config).save_pretrained(target)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(make_config(tmp_path)))
    assert "set draft.intermediate_size" in dspark("extract", file, ok=False).output
    assert not (tmp_path / "cache").exists()
    dspark("train", "--extract", file, "--set", "draft.intermediate_size=64")


def readme_commands() -> list[str]:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"```console\n(.*?)```", pages, flags=re.DOTALL)
    return [
        line.removeprefix("$ ").split("  #")[0].strip()
        for block in blocks
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


def test_the_readme_shows_commands() -> None:
    assert any(command.startswith("make train") for command in readme_commands())
    assert sum(command.startswith("dspark") for command in readme_commands()) >= 5


@pytest.mark.parametrize("command", sorted({command for command in readme_commands() if command.startswith("dspark")}))
def test_every_dspark_command_of_the_readme_runs(command: str, config_file: Path) -> None:
    """The same options, on the tiny config instead of the README's."""
    folder = config_file.parent
    dspark("train", "--extract", config_file)
    command = command.replace("configs/mine.toml", str(config_file)).replace("caches/mine", str(folder / "cache"))
    command = command.replace("runs/mine", str(folder / "run")).replace("caches/copy", str(folder / "copy"))
    command = command.replace("/nvme/staging", str(folder / "staging"))
    command = command.replace("data/answers", str(folder / "answers"))
    if "s3://" in command:
        command = command.replace("s3://bucket/mine", "memory://readme")
        dspark("push", folder / "cache", "memory://readme")
    dspark(*shlex.split(command)[1:])


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {word for command in readme_commands() for word in re.findall(r"^make ([a-z]+)", command)}
    assert named <= targets
    assert {"setup", "extract", "train", "evaluate", "sweep", "report", "checks", "test", "bench", "clean"} <= targets


def test_the_readme_names_every_config_section_and_file() -> None:
    for section in ("target", "data", "cache", "extract", "draft", "objective", "train", "evaluate", "decode"):
        assert f"[{section}]" in README, section
    for package in ("pipeline", "stages", "storage"):
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "__init__.py":
                assert re.search(rf"\b{re.escape(file.name)}\b", README), f"{file} is not in the README's file tree"


def test_links_lead_somewhere() -> None:
    """Files, and headings of the pages themselves."""
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, heading = link.partition("#")
            if name.startswith("https:"):
                continue
            file = page.parent / name if name else page
            assert file.exists(), f"{page.name}: {link}"
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE) if heading else []
            assert not heading or heading in {title.lower().replace(" ", "-") for title in titles}, (
                f"{page.name}: {link}"
            )


@pytest.mark.parametrize(("name", "hidden_size"), [("Qwen3-4B", 2560), ("Qwen3-8B", 4096), ("Qwen3-14B", 5120)])
def test_the_readme_cost_table_is_computed(name: str, hidden_size: int) -> None:
    token_bytes = bytes_per_token(num_layers=5, hidden_size=hidden_size, encoding="bf16")
    small, large = token_bytes * 100_000 * 1_000 / 1e12, token_bytes * 1.24e9 / 1e12
    assert f"| {name} | {token_bytes:,} | {small:.1f} TB | {large:.1f} TB |" in README


def test_sigterm_ends_a_command_as_ctrl_c_does(config_file: Path, tmp_path: Path) -> None:
    """With a word, and by the signal itself, so that whoever sent it sees that it was obeyed."""
    code = (
        "import signal, sys; from stages.extract.capture import Capture; from pipeline.cli import main\n"
        "Capture.launch = lambda *_: signal.raise_signal(signal.SIGTERM)\n"
        "main(sys.argv[1:])"
    )
    overrides = ["--set", f"cache.path='{tmp_path / 'cache'}'"]
    command = [sys.executable, "-c", code, "extract", str(config_file), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr.splitlines()[-1].startswith("terminated; the same command continues")
    dspark("extract", config_file, *overrides)
