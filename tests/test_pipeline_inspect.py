"""`dspark inspect` and the options of `dspark verify`, on caches of known content."""

import io
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors.torch import load_file

from pipeline import inspection, show
from pipeline.cli import main
from pipeline.config import to_toml
from pipeline.inspection import EncodingLoss, Histogram, LayerError, count_values, inspect_cache
from pipeline.stage_one import settings_of
from stages.extract.run import extract
from storage import CachePlan, CacheReader, CacheWriter, Sample, verify_cache
from storage_cache import LENGTHS, files_of, fill_cache, make_cache, make_header, make_samples, plan_cache, states_of
from tiny_target import make_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def dspark(*arguments: object, ok: bool = True) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (result.exit_code == 0) == ok, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_numbers_are_those_of_the_samples(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", exclude=(103,))
    found = inspect_cache(cache)
    samples = list(make_samples(LENGTHS))
    assert found.is_complete
    assert (found.num_samples, found.num_tokens) == (len(samples), sum(LENGTHS))
    assert sum(found.lengths.counts) == sum(found.supervised.counts) == sum(found.mask_shares.counts) == len(samples)
    assert (found.lengths.edges[0], found.lengths.edges[-1]) == (min(LENGTHS), max(LENGTHS) + 1)
    for low, high, count in zip(found.lengths.edges, found.lengths.edges[1:], found.lengths.counts, strict=False):
        assert count == sum(low <= length < high for length in LENGTHS)
    assert found.num_committed_bytes == sum(
        path.stat().st_size for path in cache.glob("shards/*/*/c/**/0") if path.is_file()
    )
    assert found.plan_file_bytes == sum(
        path.stat().st_size for path in cache.rglob("*")
        if path.is_file() and path.relative_to(cache).parts[0] not in ("shards", "commits")
    )  # fmt: skip
    ids, counts = np.unique(np.concatenate([sample.input_ids for sample in samples]), return_counts=True)
    assert [token.count for token in found.frequent_tokens] == sorted(counts.tolist(), reverse=True)[:10]
    assert all(token.count == counts[ids == token.token_id][0] for token in found.frequent_tokens)
    (exclusion,) = found.exclusions
    assert (exclusion.sample_id, exclusion.source_file, exclusion.source_row) == (103, "chats.jsonl", 3)
    assert (exclusion.layer, exclusion.reason) == (1, "not finite")


def test_norms_are_those_of_the_states(tmp_path: Path) -> None:
    found = inspect_cache(make_cache(tmp_path / "c", exclude=(103,)))
    header = make_header()
    states = [states_of(sample, header) for sample in make_samples(LENGTHS) if sample.sample_id != 103]
    all_TLD = torch.cat([torch.cat([hidden, last[:, None]], dim=1) for hidden, last in states]).double()
    norms_TL = (all_TLD**2).sum(-1).sqrt()
    assert [norms.layer for norms in found.states.layers] == [-1, 1, 3, None]
    assert found.states.num_tokens == len(norms_TL)
    for place, norms in enumerate(found.states.layers):
        assert norms.mean == pytest.approx(float(norms_TL[:, place].mean()), rel=1e-5)
        assert norms.max == pytest.approx(float(norms_TL[:, place].max()), rel=1e-5)
        assert (norms.num_zero, norms.num_non_finite) == (0, 0)


def test_zero_and_non_finite_layers_are_flagged(tmp_path: Path) -> None:
    plan = plan_cache(tmp_path / "c", [5])
    states = torch.ones(5, 4, 8)
    states[:, 1] = 0
    states[2, 2, 3] = float("nan")
    states[:, 3] = float("inf")
    with CacheWriter(plan.path).shard(0) as shard:
        shard.append(states[:, :3], states[:, 3])
    layers = inspect_cache(plan.path).states.layers
    assert [(norms.num_zero, norms.num_non_finite) for norms in layers] == [(0, 0), (5, 0), (0, 1), (0, 5)]
    assert layers[3].mean is None
    output = dspark("inspect", plan.path).output
    assert "5 zero" in output
    assert "1 not finite" in output
    json.loads(dspark("inspect", "--json", plan.path).output, parse_constant=pytest.fail)


@pytest.mark.parametrize("shards", [[], [1, 4]])
def test_an_unfinished_cache_is_shown_as_such(tmp_path: Path, shards: list[int]) -> None:
    plan = plan_cache(tmp_path / "c", LENGTHS)
    fill_cache(plan.path, shards)
    before = files_of(plan.path)
    output = dspark("inspect", plan.path).output
    assert f"{len(shards)} of 5 shards: incomplete" in output
    fields = json.loads(dspark("inspect", plan.path, "--json").output)
    assert (fields["num_committed_shards"], fields["is_complete"]) == (len(shards), False)
    committed = sum(plan.planned_shard(shard).num_tokens for shard in shards)
    assert fields["num_committed_tokens"] == fields["states"]["num_tokens"] == committed
    assert fields["num_tokens"] == sum(LENGTHS)
    assert files_of(plan.path) == before


def test_a_damaged_shard_is_named_and_the_rest_shown(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    payload = cache / "shards/00002.zarr/last_hidden_states/c/0/0"
    payload.write_bytes(b"x" + payload.read_bytes()[1:])
    found = inspect_cache(cache)
    assert 0 < found.states.num_samples < len(LENGTHS)
    assert all("00002.zarr" in error for error in found.states.errors)
    assert "00002.zarr" in dspark("inspect", cache).output


def test_the_sample_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "c")
    exact = inspect_cache(cache)
    monkeypatch.setattr(inspection, "MAX_NORM_TOKENS", 12)
    monkeypatch.setattr(inspection, "MAX_TOKEN_SHARDS", 2)
    monkeypatch.setattr(inspection, "MAX_SIZED_SHARDS", 3)
    found = inspect_cache(cache)
    assert found.states.num_tokens < 12 + max(LENGTHS)
    assert found.num_counted_tokens < sum(LENGTHS)
    assert found.is_estimated
    assert not exact.is_estimated
    assert 0.5 < found.num_committed_bytes / exact.num_committed_bytes < 2
    assert found == inspect_cache(cache), "the same sample every time"
    monkeypatch.setattr(inspection, "MAX_EXCLUSIONS", 2)
    many = make_cache(tmp_path / "many", exclude=(100, 101, 103, 110))
    assert (inspect_cache(many).num_excluded, len(inspect_cache(many).exclusions)) == (4, 2)
    assert "excluded: 4 samples, the first 2" in dspark("inspect", many).output


@pytest.mark.parametrize(
    ("values", "edges", "counts"),
    [([5, 5], (5, 6), (2,)), ([0, 0, 0], (0, 1), (3,)), ([0, 1], (0, 2), (2,)), ([1, 2, 2], (1, 2, 3), (1, 2))],
)
def test_histograms_of_few_values(values: list[int], edges: tuple[int, ...], counts: tuple[int, ...]) -> None:
    assert count_values(np.array(values, np.int32)) == Histogram(edges=edges, counts=counts)


def test_a_real_cache_shows_the_text_of_its_tokens(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(make_config(tmp_path)))
    dspark("extract", file)
    fields = json.loads(dspark("inspect", "--json", tmp_path / "cache").output)
    assert all(isinstance(token["text"], str) for token in fields["frequent_tokens"])
    assert len(fields["frequent_tokens"]) == 10
    output = dspark("inspect", file).output
    for expected in ("committed", "bytes a token", "tokens a sample", "supervised share", "L2 norms", "█"):
        assert expected in output, expected


def test_a_hostile_cache_says_nothing_to_the_terminal(tmp_path: Path) -> None:
    header = make_header().model_copy(update={"provenance": {"target": "\x1b[31m[red]evil"}})
    plan = CachePlan.write(tmp_path / "c", make_samples([3]), header=header)
    (plan.path / os.fsdecode(b"\x1b[2J\xff")).touch()
    for command in ("inspect", "verify"):
        output = dspark(command, plan.path, ok=command == "inspect").output
        assert "\x1b" not in output
        assert "\\x1b" in output


def test_reports_for_machines(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    file = tmp_path / "report.json"
    fields = json.loads(dspark("verify", "--json", "--report", file, "--workers", 2, cache).output)
    assert fields == json.loads(file.read_text())
    assert (fields["ok"], fields["problems"], fields["bad_shards"], fields["quick"]) == (True, [], [], False)
    assert (fields["num_shards"], fields["num_checked_bytes"]) == (5, sum(map(len, files_of(cache).values())))
    (cache / "commits/00004.json").unlink()
    payload = cache / "shards/00001.zarr/hidden_states/c/0/0/0"
    payload.write_bytes(payload.read_bytes()[:-1] + b"?")
    fields = json.loads(dspark("verify", "--json", "--quick", "--report", file, cache, ok=False).output)
    assert fields == json.loads(file.read_text())
    assert (fields["ok"], fields["missing_shards"], fields["bad_shards"], fields["quick"]) == (False, [4], [1], True)
    assert [set(problem) for problem in fields["problems"]] == [{"file", "shard", "array", "what", "kind"}] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "report.json"]


def test_verify_repair_extract_gives_the_same_bytes(tmp_path: Path) -> None:
    file, cache = tmp_path / "config.toml", tmp_path / "cache"
    file.write_text(to_toml(make_config(tmp_path, num_chats=150)))
    dspark("extract", file)
    before = files_of(cache)
    assert verify_cache(cache).num_shards >= 4
    payload = cache / "shards/00000.zarr/hidden_states/c/0/0/0"
    payload.write_bytes(b"?" + payload.read_bytes()[1:])
    (cache / "shards/00001.zarr/last_hidden_states/c/0/0").unlink()
    record = cache / "commits/00002.json"
    record.write_bytes(record.read_bytes()[:-9])
    output = dspark("verify", "--repair", file, ok=False).output
    assert "dropped shards 0, 1, 2; run the command that made the cache" in output
    assert "3 of" in dspark("extract", file).output
    assert files_of(cache) == before
    dspark("verify", file)
    (cache / "index.parquet").write_bytes(b"PAR1")
    payload.write_bytes(b"!" + payload.read_bytes()[1:])
    report = tmp_path / "report.json"
    refused = dspark("verify", "--repair", "--report", report, cache, ok=False).output
    assert "cannot be repaired: index.parquet of its plan is damaged" in refused
    fields = json.loads(report.read_text())
    assert [problem["file"] for problem in fields["problems"]] == ["index.parquet"]


def test_a_bar_on_a_terminal_and_nothing_on_a_pipe(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    command = [sys.executable, "-m", "pipeline.cli", "verify", str(cache)]
    reading, writing = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    on_terminal = subprocess.run(command, stdout=subprocess.PIPE, stderr=writing, cwd=ROOT, env=environment, check=True)
    os.close(writing)
    drawn = os.read(reading, 1 << 16).decode()
    os.close(reading)
    assert "verify" in drawn
    assert "5/5" in drawn
    assert b"whole" in on_terminal.stdout
    on_pipe = dspark("verify", cache)
    assert on_pipe.stderr == ""
    assert "whole" in on_pipe.stdout


def relative_errors(exact: Sample, decoded: Sample) -> np.ndarray:
    """[T, L + 1] in float64, the last state behind the layers."""
    one, other = (
        torch.cat([sample.hidden_states, sample.last_hidden_states[:, None]], dim=1).double().numpy()
        for sample in (exact, decoded)
    )
    return np.linalg.norm(other - one, axis=-1) / np.linalg.norm(one, axis=-1)


def test_what_a_lossy_encoding_costs_is_measured_and_shown(tmp_path: Path) -> None:
    """The commits' numbers are the total variation of what a reader gets, computed here without the project's code."""
    exact = make_config(tmp_path, cache__path=tmp_path / "exact", target__dtype="float32", num_chats=60)
    lossy = make_config(tmp_path, cache__path=tmp_path / "lossy", target__dtype="float32", cache__encoding="int8")
    for config in (exact, lossy):
        extract(settings_of(config))
    loss = inspect_cache(lossy.cache.path).loss
    assert loss is not None
    found = loss.total_variation
    assert found is not None
    assert inspect_cache(exact.cache.path).loss is None
    head = load_file(exact.cache.path / "target" / "head.safetensors")["lm_head.weight"].float()
    values, errors = [], []
    with CacheReader(exact.cache.path) as truth, CacheReader(lossy.cache.path) as decoded:
        others = {sample.sample_id: sample for sample in decoded}  # smaller samples fill shards in another order
        for one in truth:
            other = others[one.sample_id]
            before = one.loss_mask[1:].bool()  # the state before a supervised token
            p, q = ((sample.last_hidden_states[:-1][before].float() @ head.T).softmax(-1) for sample in (one, other))
            values += ((p - q).abs().sum(-1) / 2).tolist()
            errors.append(relative_errors(one, other))
    assert found.num_positions >= 32
    assert found.mean == pytest.approx(np.mean(values), rel=0.3)  # of a sample of these positions
    assert 0 < found.mean < found.p99 <= max(values) + 1e-6
    errors_TS = np.concatenate(errors)
    assert [error.layer for error in loss.layers] == [*truth.layers, None]
    for place, error in enumerate(loss.layers):
        assert error.num_tokens >= 128
        assert error.median == pytest.approx(np.median(errors_TS[:, place]), rel=0.1)
        assert np.median(errors_TS[:, place]) < error.p99 <= errors_TS[:, place].max() + 1e-6
    assert "lost by the encoding" in CliRunner().invoke(main, ["inspect", str(lossy.cache.path)]).output


def test_a_layer_that_loses_much_is_a_warning_that_names_an_exact_encoding() -> None:
    """More than 5 % in the worst token of a hundred; a cache of version 1 says that it does not know."""
    layers = tuple(
        LayerError(layer=layer, num_tokens=128, median=0.01, p99=p99)
        for layer, p99 in ((3, 0.049), (14, 0.43), (None, 0.02))
    )
    loss = EncodingLoss(encoding="fp8", total_variation=None, layers=layers)
    assert [error.layer for error in loss.bad_layers] == [14]
    console = Console(width=120, record=True, file=io.StringIO())
    show.encoding_loss(console, loss)
    shown = console.export_text()
    assert "warning: layers 14: fp8 loses more than 5% of some states" in shown
    assert 'cache.encoding = "bf16-lossless"' in shown
    assert "0.4300" in shown
    console = Console(width=120, record=True, file=io.StringIO())
    show.encoding_loss(console, replace(loss, layers=()))
    shown = console.export_text()
    assert "version 1 do not say what the encoding loses in a layer" in shown
    assert "warning" not in shown
