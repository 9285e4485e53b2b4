"""Extraction from end to end on a tiny target: the bytes, the resume, the refusals."""

import hashlib
import itertools
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import Config, to_toml
from pipeline.inspection import inspect_cache
from pipeline.stage_one import settings_of
from stages.extract import run
from stages.extract.capture import TOO_LARGE, Capture, CapturedBatch, PaddedBatch, pad_batch
from stages.extract.rows import DataError
from stages.extract.samples import SampleCounts, choose_split, hash_first_prompt
from stages.extract.shards import ComputeStates, QuarantineError, compute_shards
from stages.extract.target import TargetError, load_target
from storage import (
    CacheIdentityError,
    CacheIncompleteError,
    CachePlan,
    CacheReader,
    CacheSpaceError,
    CacheWriter,
    PlannedSample,
    ShardWriter,
    plan_batches,
    verify_cache,
)
from tiny_target import make_chats, make_config, write_jsonl

ROOT = Path(__file__).parent.parent


def extract(config: Config) -> run.ExtractResult:
    return run.extract(settings_of(config))


def digest_tree(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("encoding", ["bf16", "fp32", "bf16-lossless"])
def test_the_cache_equals_a_fresh_forward_bit_for_bit(tmp_path: Path, encoding: str) -> None:
    config = make_config(tmp_path, cache__layers=[-1, 0, 1, 2, 3], cache__encoding=encoding, num_chats=60)
    plan = extract(config).plan
    parts = load_target(Path(config.target.model), target=config.target, device=torch.device("cpu"))
    with CacheReader(config.cache.path) as reader:
        cached = {reader.sample_ids[index]: reader[index] for index in range(len(reader))}
        assert plan.num_shards > 1
        for shard in range(plan.num_shards):
            samples = plan.read_samples(shard)
            for batch in plan_batches([sample.num_tokens for sample in samples], config.extract.max_batch_tokens):
                members = [samples[row] for row in batch]
                padded = pad_batch([sample.input_ids for sample in members])
                with torch.inference_mode():
                    states = parts.model(
                        input_ids=padded.input_ids,
                        attention_mask=None if padded.real_places is None else padded.attention_mask,
                        use_cache=False,
                        output_hidden_states=True,
                    ).hidden_states
                for row, sample in enumerate(members):
                    stored = cached[sample.sample_id]
                    assert stored.input_ids.tolist() == sample.input_ids.tolist()
                    for place, layer in enumerate([-1, 0, 1, 2]):
                        fresh = states[layer + 1][row, : sample.num_tokens]
                        assert torch.equal(stored.hidden_states[:, place].to(fresh.dtype), fresh), (
                            sample.sample_id,
                            layer,
                        )
                    last = states[-1][row, : sample.num_tokens]
                    assert torch.equal(stored.last_hidden_states.to(last.dtype), last)
                    with torch.inference_mode():  # transformers shows the last block's output only through the norm
                        assert torch.equal(parts.final_norm(stored.hidden_states[:, 4].to(last.dtype)), last)
    assert verify_cache(config.cache.path).ok


def test_a_target_that_is_spread_by_a_device_map_gives_the_same_bytes(tmp_path: Path) -> None:
    whole, spread = make_config(tmp_path), make_config(tmp_path, cache__path=tmp_path / "spread")
    extract(whole)
    extract(spread.model_copy(update={"target": spread.target.model_copy(update={"device_map": "auto"})}))
    assert digest_tree(spread.cache.path) == digest_tree(whole.cache.path)


def test_the_cached_head_gives_the_targets_logits(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    extract(config)
    parts = load_target(Path(config.target.model), target=config.target, device=torch.device("cpu"))
    reader = CacheReader(config.cache.path)
    head = load_file(reader.target_dir / "head.safetensors")
    sample = reader[0]
    with torch.inference_mode():
        expected = parts.model(input_ids=sample.input_ids[None].long()).logits[0]
    found = sample.last_hidden_states @ head["lm_head.weight"].T
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.98
    assert torch.equal(head["embed_tokens.weight"], parts.embed_tokens.weight)


def test_a_second_run_reuses_the_cache_without_loading_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path)
    assert extract(config).num_computed_shards > 0
    before = digest_tree(config.cache.path)
    monkeypatch.setattr(run.targets, "load_target", lambda *_a, **_k: pytest.fail("the target was loaded"))
    assert extract(config).num_computed_shards == 0
    assert digest_tree(config.cache.path) == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"data__max_length": 64}, "max_length"),
        ({"cache__layers": [0, 1, 3]}, "layers"),
        ({"cache__encoding": "fp32"}, "encoding"),
        ({"data__supervise": "last"}, "supervise"),
        ({"target__dtype": "float32"}, "dtype"),
        ({"extract__max_batch_tokens": 256}, "max_batch_tokens"),
    ],
)
def test_another_identity_is_refused_by_name(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    extract(make_config(tmp_path))
    with pytest.raises(CacheIdentityError, match=rf"\n  {field}: cache has .*, this run has"):
        extract(make_config(tmp_path, **change))


def test_other_weights_and_other_data_are_another_identity(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    extract(config)
    weights = Path(config.target.model) / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-2] + b"\x11\x22")
    with pytest.raises(CacheIdentityError, match="target_weights_digest"):
        extract(config)
    weights.write_bytes(original)
    write_jsonl(Path(config.data.files[0]), make_chats(25))
    with pytest.raises(CacheIdentityError, match="data_digest"):
        extract(config)


def start(config_file: Path, *, fault: str | None = None) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if fault is not None:
        environment["DSPARK_FAULT"] = fault
    command = [sys.executable, "-m", "pipeline.cli", "extract", str(config_file)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_killed_extraction_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL of the command amid planning, amid a shard and after a commit; `test_extract_kills.py` has the others."""
    undisturbed = make_config(tmp_path, num_chats=240)
    extract(undisturbed)
    expected = digest_tree(undisturbed.cache.path)
    config = make_config(tmp_path, cache__path=tmp_path / "killed")
    config_file = tmp_path / "config.toml"
    config_file.write_text(to_toml(config))
    partial_states = set()
    for fault in ("plan.samples", "shard.renamed"):
        process = start(config_file, fault=fault)
        assert process.wait(timeout=120) == -signal.SIGKILL
        partial_states.add(tuple(digest_tree(config.cache.path)))
    process = start(config_file)  # and once when a shard was just committed, wherever the process then is
    commits = config.cache.path / "commits"
    count = len(list(commits.glob("[0-9]*.json")))
    while process.poll() is None and len(list(commits.glob("[0-9]*.json"))) <= count:
        time.sleep(0.005)
    process.kill()
    process.wait()
    partial_states.add(tuple(digest_tree(config.cache.path)))
    assert len(partial_states) == 3, "the kills left no partial state behind"
    with pytest.raises(CacheIncompleteError, match="shards are missing"):
        CacheReader(config.cache.path)
    result = extract(config)
    assert 0 < result.num_computed_shards < result.num_shards
    found = digest_tree(config.cache.path)
    assert found == expected
    assert verify_cache(config.cache.path).ok


@pytest.mark.slow
def test_two_extractions_share_the_work(tmp_path: Path) -> None:
    config = make_config(tmp_path, num_chats=120)
    extract(config)
    expected = digest_tree(config.cache.path)
    shared = make_config(tmp_path, cache__path=tmp_path / "shared")
    config_file = tmp_path / "config.toml"
    config_file.write_text(to_toml(shared))
    assert start(config_file, fault="shard.opened").wait(timeout=120) == -signal.SIGKILL  # the plan is there
    processes = [start(config_file), start(config_file)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert digest_tree(shared.cache.path) == expected


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    config = make_config(tmp_path, data__max_bad_fraction=0.5, data__max_length=60)
    rows: list[Any] = make_chats(24)
    rows[3] = {"messages": []}
    rows[5] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows[7] = {"messages": [{"role": "user", "content": "long " * 80}, {"role": "assistant", "content": "b " * 20}]}
    file = write_jsonl(Path(config.data.files[0]), rows)
    file.write_text(file.read_text() + '{"messages": [\n')
    plan = extract(config).plan
    dropped = plan.manifest.plan.dropped
    assert dropped["bad row: empty conversation"] == 1
    assert dropped["dropped: fewer supervised tokens than data.min_supervised_tokens"] == 2  # row 5, and row 7 once cut
    assert [key for key in dropped if key.startswith("bad row: broken JSON")]
    assert dropped["truncated to data.max_length"] > 0
    assert plan.manifest.plan.num_samples == 25 - 4
    assert plan.index.num_tokens.max() == 60
    assert {3, 5, 7, 24}.isdisjoint(plan.index.sample_ids.tolist())


def test_overlong_samples_are_dropped_where_the_config_says_so(tmp_path: Path) -> None:
    dropped = extract(make_config(tmp_path, data__overlong="drop", data__max_length=60)).plan.manifest.plan.dropped
    assert dropped["dropped: longer than data.max_length"] > 0
    assert "truncated to data.max_length" not in dropped


def test_too_many_bad_rows_stop_the_run_with_places(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    write_jsonl(Path(config.data.files[0]), [*make_chats(5), {"messages": []}, {"nothing": 1}])
    with pytest.raises(DataError, match=r"2 of the first 7 rows are bad.*\n.*\n?.*row 5") as error:
        extract(config)
    assert "no column messages" in str(error.value)
    assert not (config.cache.path / "manifest.json").exists()


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "a", "tool_calls": 5},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": "get"}]},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": None}]},
        {"role": "assistant", "content": "a", "tool_calls": [None]},
    ],
)
def test_malformed_tool_calls_are_bad_rows(tmp_path: Path, message: dict[str, Any]) -> None:
    config = make_config(tmp_path, data__max_bad_fraction=0.5)
    rows = [*make_chats(5), {"messages": [{"role": "user", "content": "q"}, message]}]
    write_jsonl(Path(config.data.files[0]), rows)
    dropped = extract(config).plan.manifest.plan.dropped
    assert [count for reason, count in dropped.items() if reason.startswith("bad row: ") and "tool" in reason] == [1]


def test_a_surrogate_anywhere_is_a_bad_row(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.name }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant \n{% endif %}"
    )
    config = make_config(tmp_path, data__max_bad_fraction=0.5, data__chat_template=template)
    chats = make_chats(5)
    chats[2]["messages"][0]["name"] = "\ud800"
    write_jsonl(Path(config.data.files[0]), chats)
    dropped = extract(config).plan.manifest.plan.dropped
    assert dropped["bad row: chat template: the text has an unpaired surrogate"] == 1


def test_an_error_stops_the_other_steps_within_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who leaves the pipeline does not wait for what is begun to be finished."""
    config = make_config(tmp_path, num_chats=240, extract__max_batch_tokens=256)
    original = Capture.launch
    launched = []

    def launch(self: Capture, padded: PaddedBatch) -> CapturedBatch:
        launched.append(1)
        time.sleep(0.02)
        return original(self, padded)

    monkeypatch.setattr(Capture, "launch", launch)
    plan = extract(config).plan
    assert plan.num_shards > 2
    for commit in (config.cache.path / "commits").glob("[0-9]*.json"):
        commit.unlink()
    in_all = len(launched)
    launched.clear()
    monkeypatch.setattr(ShardWriter, "publish", lambda _self: pytest.fail("the disk is gone"))
    with pytest.raises(pytest.fail.Exception, match="the disk is gone"):
        extract(config)
    assert len(launched) < in_all * 2 / plan.num_shards + 20
    assert not [thread for thread in threading.enumerate() if thread.name in ("prepare", "compute", "write")]
    assert not list((config.cache.path / "shards").glob(".tmp*"))


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample is left"):
        extract(make_config(tmp_path, data__min_supervised_tokens=1000))


def test_the_disk_is_checked_before_the_target_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    monkeypatch.setattr(run, "free_bytes", lambda _path: 1_000)
    monkeypatch.setattr(run.targets, "load_target", lambda *_a, **_k: pytest.fail("the target was loaded"))
    with pytest.raises(CacheSpaceError, match=r"needs 0\.00 GB.*larger disk"):
        extract(config)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \*\.safetensors weights"),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "cut short|expected .* bytes, got 1000"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json"),
    ],
)
def test_a_broken_target_is_named(tmp_path: Path, break_it: Any, message: str) -> None:
    config = make_config(tmp_path)
    break_it(Path(config.target.model))
    with pytest.raises(TargetError, match=message):
        extract(config)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("model.layers.2.mlp.gate_proj.weight"),
        lambda tensors: tensors.pop("lm_head.weight"),
        lambda tensors: tensors.update({"model.layers.2.mlp.gate_proj.weight": torch.zeros(2, 2)}),
    ],
)
def test_weights_that_do_not_fit_the_config_are_not_made_up(tmp_path: Path, change: Any) -> None:
    config = make_config(tmp_path)
    change_tensors(Path(config.target.model), change)
    with pytest.raises(
        TargetError, match=r"1 tensors that config\.json asks for .*(model\.layers|lm_head)|cannot be loaded"
    ):
        extract(config)
    assert not (config.cache.path / "manifest.json").exists()


def test_the_quarantine_limit_counts_what_earlier_runs_excluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops has committed shards; running it again must not walk around the limit."""
    config = make_config(tmp_path, num_chats=90, extract__max_quarantined_fraction=0.02)
    loose = config.extract.model_copy(update={"max_quarantined_fraction": 0.5})
    with monkeypatch.context() as patch:
        poison(patch, 1)  # every chat has the token that opens a message
        with pytest.raises(QuarantineError):
            extract(config.model_copy(update={"extract": loose}))
    committed = len(list((config.cache.path / "commits").glob("[0-9]*.json")))
    assert committed > 0
    with pytest.raises(QuarantineError):  # although nothing that is still to be computed is poisoned
        extract(config)
    assert len(list((config.cache.path / "commits").glob("[0-9]*.json"))) == committed


def test_a_mask_token_that_the_data_contains(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains the mask token 2; choose another draft\.mask_token_id"):
        extract(make_config(tmp_path, draft__mask_token_id=2))


def test_layer_ids_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache\.layers: \[9\] out of range; the target has 4 layers"):
        extract(make_config(tmp_path, cache__layers=[1, 9]))


def test_the_length_is_bounded_by_the_targets_positions(tmp_path: Path) -> None:
    assert extract(make_config(tmp_path)).plan.manifest.identity.max_length == 1024
    with pytest.raises(ValueError, match=r"data\.max_length: expected at most the target's 1024 positions, got 4000"):
        extract(make_config(tmp_path, data__max_length=4000))


def test_no_such_target(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    missing = config.target.model_copy(update={"model": "./nowhere"})
    with pytest.raises(TargetError, match=r"no folder './nowhere'"):
        extract(config.model_copy(update={"target": missing}))


def poison(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """Let every sequence that contains `token` come out of the target with a NaN in layer 1."""
    original = Capture.launch

    def launch(self: Capture, padded: PaddedBatch) -> CapturedBatch:
        batch = original(self, padded)
        batch = replace(batch, hidden_states=batch.hidden_states.clone())  # may be written to outside inference mode
        start = 0
        for ids, length in zip(padded.input_ids, padded.num_tokens, strict=True):
            if token in ids[:length]:
                batch.hidden_states[start + length // 2, 1, 3] = float("nan")
            start += length
        return batch

    monkeypatch.setattr(Capture, "launch", launch)


def test_non_finite_samples_are_quarantined_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, extract__max_quarantined_fraction=0.1)
    rows = make_chats(24)
    rows[4]["messages"][0]["content"] = "zzqq"
    write_jsonl(Path(config.data.files[0]), rows)
    settings = settings_of(config)
    inputs = run.describe_inputs(settings)
    ids = {
        sample.sample_id: set(sample.input_ids.tolist())
        for sample in run.iterate_samples(inputs, settings, counts=SampleCounts())
    }
    token = min(ids[4] - set().union(*(tokens for sample, tokens in ids.items() if sample != 4)))
    poison(monkeypatch, token)
    result = extract(config)
    assert result.num_excluded == 1
    with CacheReader(config.cache.path) as reader:
        assert 4 not in reader.sample_ids
        assert len(reader) == result.plan.manifest.plan.num_samples - 1
    strict = make_config(tmp_path, cache__path=tmp_path / "strict", extract__max_quarantined_fraction=0.0)
    with pytest.raises(QuarantineError, match="1 samples have non-finite states"):
        extract(strict)
    assert CachePlan.read(strict.cache.path)


def enlarge(config: Config) -> None:
    """The tiny target's embedding times 1e7: its states stay finite in bfloat16 and leave fp16's range from -1 on."""
    file = Path(config.target.model) / "model.safetensors"
    weights = load_file(file)
    name = "model.embed_tokens.weight"
    save_file({**weights, name: weights[name] * 1e7}, file, metadata={"format": "pt"})


def test_states_too_large_for_fp16_are_refused_at_the_first_batch(tmp_path: Path) -> None:
    """They are finite, and bf16 holds them."""
    config = make_config(tmp_path, cache__encoding="fp16", extract__max_quarantined_fraction=1.0)
    enlarge(config)
    match = r"samples: layer -1: finite state above 65,504.*cache\.encoding = \"bf16\", in a new cache\.path"
    with pytest.raises(QuarantineError, match=match):
        extract(config)
    wide = make_config(tmp_path, cache__path=tmp_path / "bf16")
    assert extract(wide).num_excluded == 0
    with CacheReader(wide.cache.path) as reader:
        assert float(reader[0].hidden_states.float().abs().max()) > 65_504


def test_later_states_too_large_for_fp16_are_quarantined_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, num_chats=90, cache__encoding="fp16", extract__max_quarantined_fraction=0.5)
    calls = itertools.count()

    def computing(writer: CacheWriter, shards: list[int], *, compute: ComputeStates, **rest: Any) -> Iterator[int]:
        @torch.inference_mode()
        def enlarged(samples: list[PlannedSample]) -> CapturedBatch:
            batch = compute(samples)
            if next(calls) == 2:
                batch.hidden_states[0, 2, 5] = torch.tensor(70_000.0).half()  # as a finite state of that size arrives
            return batch

        return compute_shards(writer, shards, compute=enlarged, **rest)

    monkeypatch.setattr(run, "compute_shards", computing)
    result = extract(config)
    assert result.num_excluded == 1
    shown = inspect_cache(config.cache.path).exclusions
    assert [(item.layer, item.reason) for item in shown] == [(3, TOO_LARGE)]


def test_equal_prompts_are_on_one_side_of_the_split() -> None:
    mask = np.array([0, 0, 1, 1], dtype=np.uint8)
    prompts = {hash_first_prompt(np.array([1, 2, 3, 4 + i], np.int32), mask) for i in range(20)}
    assert prompts == {hashlib.blake2b(struct.pack("<2i", 1, 2), digest_size=8).digest()}, "as in caches on disk"
    others = [hash_first_prompt(np.array([i, 2, 3, 4], np.int32), mask) for i in range(2000)]
    many = [choose_split(prompt, validation_fraction=0.3) for prompt in others]
    assert 0.25 < many.count("validation") / 2000 < 0.35


@pytest.mark.parametrize(
    ("encoding", "token_bytes"),
    [("bf16", (3 + 1) * 32 * 2), ("int8", (3 + 1) * 32 + 2 * 4)],  # a scale a layer, and 32 / 256 of the last state
)
def test_the_estimate_is_what_extraction_then_writes(tmp_path: Path, encoding: str, token_bytes: int) -> None:
    config = make_config(tmp_path, cache__encoding=encoding)
    (Path(config.target.model) / "model.safetensors").rename(tmp_path / "weights")  # an estimate needs none
    price, counts = run.estimate(settings_of(config))
    assert not config.cache.path.exists()
    (tmp_path / "weights").rename(Path(config.target.model) / "model.safetensors")
    plan = extract(config).plan.manifest.plan
    assert (price.num_samples, price.num_tokens, price.num_bytes) == (
        plan.num_samples,
        plan.num_tokens,
        plan.payload_bytes,
    )
    assert price.bytes_per_token == token_bytes
    assert {tier.encoding for tier in price.tiers if tier.known_error} == {"int8", "fp8"}
    on_disk = sum(file.stat().st_size for file in config.cache.path.rglob("*") if file.is_file())
    assert price.num_bytes < on_disk <= price.num_bytes + price.num_overhead_bytes
    assert price.hours > 0
    assert counts.num_rows == 24
