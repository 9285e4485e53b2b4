"""Imports of other projects' caches: equal to an extraction, checked against the target, resumed, refused."""

import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from peer_files import Forward, run_forwards, write_dataset, write_deepspec, write_speculators
from pipeline.cli import main
from pipeline.config import Config, to_toml
from pipeline.stage_one import extract, import_cache, open_source
from pipeline.stage_two import open_cache, train_draft
from stages.errors import SettingError
from stages.extract import import_run
from stages.extract.import_check import MAX_STATE_ERROR
from stages.extract.peer_caches import PeerCacheError
from stages.extract.rows import DataError
from stages.extract.run import ExtractResult
from stages.extract.shards import QuarantineError
from storage import CacheIdentityError, CacheIncompleteError, CachePlan, CacheReader, CacheSpaceError, verify_cache
from tiny_target import NUM_LAYERS, make_config, save_tiny_target

LAYERS = (-1, 1, 3)
THEIR_LAYERS = (0, 2, 4)  # the same in speculators' numbering
MAX_OFFSET = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class World:
    """A target, a cache that `extract` made with it, and forwards of the same samples for other projects' files."""

    folder: Path
    config: Config
    forwards: list[Forward]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    # One sample a batch: bits depend on the batch, and the other project's forwards are of single samples.
    config = make_config(folder, extract__max_batch_tokens=1, num_chats=60)
    plan = extract(config, show_price=lambda *_: None).plan
    samples = sorted(
        (sample for shard in range(plan.num_shards) for sample in plan.read_samples(shard)),
        key=lambda sample: sample.sample_id,
    )
    assert [sample.sample_id for sample in samples] == list(range(60))
    pairs = [(sample.input_ids.tolist(), sample.loss_mask.tolist()) for sample in samples]
    return World(folder=folder, config=config, forwards=run_forwards(Path(config.target.model), pairs))


@pytest.fixture
def config(world: World, tmp_path: Path) -> Config:
    """The same target and settings, with another cache, and data files that are not there."""
    return make_config(
        tmp_path,
        target__model=world.config.target.model,
        data__files=[str(tmp_path / "none.jsonl")],
        cache__layers=None,
    )


def import_deepspec(config: Config, folder: Path) -> ExtractResult:
    return import_cache(config, open_source("deepspec", folder, dataset=None, layers=None), show_price=lambda *_: None)


def import_speculators(config: Config, folders: tuple[Path, Path], layers: tuple[int, ...] = THEIR_LAYERS) -> Any:
    source = open_source("speculators", folders[0], dataset=folders[1], layers=layers)
    return import_cache(config, source, show_price=lambda *_: None)


def check_equal(found: CacheReader, expected: CacheReader, *, last_tolerance: float) -> None:
    samples = dict(zip(expected.sample_ids.tolist(), expected, strict=True))
    assert sorted(found.sample_ids.tolist()) == sorted(samples)
    for sample in found:
        other = samples[sample.sample_id]
        assert torch.equal(sample.input_ids, other.input_ids)
        assert torch.equal(sample.loss_mask, other.loss_mask)
        assert sample.split == other.split
        assert torch.equal(sample.hidden_states, other.hidden_states)
        error = (sample.last_hidden_states.float() - other.last_hidden_states.float()).norm()
        assert error <= last_tolerance * other.last_hidden_states.float().norm()


def test_deepspec_states_arrive_bit_for_bit(world: World, config: Config, tmp_path: Path) -> None:
    source = write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS)
    plan = import_deepspec(config, source).plan
    assert plan.num_shards > 1
    check_equal(CacheReader(config.cache.path), CacheReader(world.config.cache.path), last_tolerance=0.0)
    assert verify_cache(config.cache.path).ok
    identity, extracted = plan.manifest.identity, CachePlan.read(world.config.cache.path).manifest.identity
    assert identity.imported_from == "deepspec"
    assert extracted.imported_from is None
    assert [line.split(":")[0] for line in identity.differences(extracted)] == ["data_digest", "max_batch_tokens"]
    assert plan.header.provenance["data"] == str(source)
    assert plan.read_samples(0)[0].source_file == str(source / "samples.idx")


def test_speculators_states_arrive_with_their_norm(world: World, config: Config, tmp_path: Path) -> None:
    plan = import_speculators(config, write_speculators(tmp_path / "source", world.forwards, layers=THEIR_LAYERS)).plan
    assert plan.header.identity.layers == LAYERS
    assert plan.header.identity.imported_from == "speculators"
    check_equal(CacheReader(config.cache.path), CacheReader(world.config.cache.path), last_tolerance=1e-2)


def test_fp8_states_are_scaled_back(world: World, config: Config, tmp_path: Path) -> None:
    import_speculators(config, write_speculators(tmp_path / "source", world.forwards, layers=THEIR_LAYERS, fp8=True))
    expected = CacheReader(world.config.cache.path)
    samples = dict(zip(expected.sample_ids.tolist(), expected, strict=True))
    for sample in CacheReader(config.cache.path):
        other = samples[sample.sample_id].hidden_states.float()
        assert 1e-3 < (sample.hidden_states.float() - other).norm() / other.norm() < 0.05


def test_the_target_of_an_import_is_that_of_an_extraction(world: World, config: Config, tmp_path: Path) -> None:
    import_deepspec(config, write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS))
    heads = [load_file(path / "target" / "head.safetensors") for path in (config.cache.path, world.config.cache.path)]
    assert heads[0].keys() == heads[1].keys()
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_some_of_the_layers_and_shorter_samples(world: World, config: Config, tmp_path: Path) -> None:
    config = with_settings(config, cache={"layers": (1,)}, data={"max_length": 60, "min_supervised_tokens": 20})
    plan = import_deepspec(config, write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS)).plan
    assert plan.manifest.plan.dropped["truncated to data.max_length"] > 0
    assert plan.manifest.plan.dropped["dropped: fewer supervised tokens than data.min_supervised_tokens"] > 0
    reader = CacheReader(config.cache.path)
    assert reader.layers == (1,)
    assert reader.num_tokens.max() == 60
    for sample in reader:
        forward = world.forwards[sample.sample_id]
        assert torch.equal(sample.hidden_states, forward.layers([1])[:60])
        assert torch.equal(sample.last_hidden_states, forward.last[:60])
    with pytest.raises(SettingError, match=r"cache\.layers: \[2\] are not in .*, which has \[-1, 1, 3\]"):
        import_deepspec(with_settings(config, cache={"layers": (1, 2)}), tmp_path / "source")


def with_settings(config: Config, **sections: dict[str, Any]) -> Config:
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


@pytest.mark.parametrize("peer", ["deepspec", "speculators"])
def test_stage_two_trains_on_an_imported_cache(world: World, config: Config, tmp_path: Path, peer: str) -> None:
    if peer == "deepspec":
        import_deepspec(config, write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS))
    else:
        import_speculators(config, write_speculators(tmp_path / "source", world.forwards, layers=THEIR_LAYERS))
    shutil.rmtree(tmp_path / "source")
    result = train_draft(config)
    assert result.num_steps == 8
    lines = (config.train.run_dir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    # What an import cannot know is not compared, the rest is; the target may be gone by then.
    free = with_settings(config, data={"supervise": "last"}, extract={"max_batch_tokens": 7})
    open_cache(free, layers=None)
    open_cache(with_settings(free, target={"model": "no/where"}), layers=None)
    for model in (config.target.model, "no/where"):
        wrong = with_settings(config, target={"model": model}, data={"validation_fraction": 0.5})
        with pytest.raises(CacheIdentityError, match=r"validation_fraction: cache has 0\.25, this run has 0\.5"):
            open_cache(wrong, layers=None)
    other = save_tiny_target(tmp_path / "other", seed=1)
    with pytest.raises(CacheIdentityError, match="target_weights_digest"):
        open_cache(with_settings(config, target={"model": str(other)}), layers=None)


def test_extract_and_import_leave_each_others_caches_alone(world: World, config: Config, tmp_path: Path) -> None:
    import_deepspec(config, write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS))
    config = with_settings(config, data={"files": world.config.data.files}, cache={"layers": LAYERS})
    with pytest.raises(CacheIdentityError, match=r"(?s)data_digest: .*It was imported from deepspec, so it cannot be"):
        extract(config, show_price=lambda *_: None)
    extracted = with_settings(config, cache={"path": world.config.cache.path})
    with pytest.raises(CacheIdentityError, match="this run has 'deepspec:"):
        import_deepspec(extracted, tmp_path / "source")


@pytest.mark.parametrize("layers", [(0, 2, 3), (1, 2, 3)])
def test_wrong_layer_ids_are_diagnosed(world: World, config: Config, tmp_path: Path, layers: tuple[int, ...]) -> None:
    source = write_deepspec(tmp_path / "source", world.forwards, layers=layers, written_layers=LAYERS)
    with pytest.raises(
        PeerCacheError, match=r"layer 2 of the source is not block 2's output \(error .*\), but block 1"
    ):
        import_deepspec(config, source)
    assert not (config.cache.path / "manifest.json").exists()
    shutil.rmtree(source)
    write_deepspec(source, world.forwards, layers=LAYERS)  # mended: the same folder goes on
    assert import_deepspec(config, source).num_missing_shards == 0


def test_a_wrong_layer_that_differs_little_is_noticed(world: World, config: Config, tmp_path: Path) -> None:
    """In deep targets one block changes a state by a few percent only, which other kernels might as well."""
    target = tmp_path / "calm"
    shutil.copytree(config.target.model, target)
    tensors = load_file(target / "model.safetensors")
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 0.004
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    forwards = run_forwards(target, [(forward.input_ids, forward.loss_mask) for forward in world.forwards[:20]])
    states = [torch.cat([forward.layers([layer]) for forward in forwards]).float() for layer in (1, 2)]
    assert (states[1] - states[0]).norm() < MAX_STATE_ERROR * states[0].norm()
    config = with_settings(config, target={"model": str(target)})
    wrong = write_deepspec(tmp_path / "wrong", forwards, layers=(1,), written_layers=(2,))
    with pytest.raises(PeerCacheError, match=r"layer 1 of the source is not block 1's output .*, but block 2's output"):
        import_deepspec(config, wrong)
    assert import_deepspec(config, write_deepspec(tmp_path / "right", forwards, layers=(1,))).num_missing_shards == 0


def test_our_numbering_given_for_theirs_is_diagnosed(world: World, config: Config, tmp_path: Path) -> None:
    folders = write_speculators(tmp_path / "source", world.forwards, layers=(2, 3, 4))
    with pytest.raises(PeerCacheError) as error:
        import_speculators(config, folders, layers=(1, 2, 3))
    for theirs, wrong, right in ((1, 0, 1), (2, 1, 2), (3, 2, 3)):
        expected = f"layer {theirs} of the source is not block {wrong}'s output (error"
        line = next(line for line in str(error.value).splitlines() if expected in line)
        assert f"but block {right}'s output (error 0.000)" in line
    assert "give others with --layers" in str(error.value)
    assert "the last state" not in str(error.value)


def test_a_last_state_on_the_wrong_side_of_the_norm_is_diagnosed(world: World, config: Config, tmp_path: Path) -> None:
    before = write_deepspec(tmp_path / "before", world.forwards, layers=LAYERS, pre_norm=True)
    with pytest.raises(
        PeerCacheError,
        match=r"the last state of .* is not the state after the final norm.*but the state before",
    ):
        import_deepspec(config, before)
    after = write_speculators(tmp_path / "after", world.forwards, layers=THEIR_LAYERS, post_norm=True)
    with pytest.raises(
        PeerCacheError,
        match=r"the last state of .* is not the state before the final norm.*but the state after",
    ):
        import_speculators(config, after)


def test_another_target_is_noticed(world: World, config: Config, tmp_path: Path) -> None:
    source = write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS)
    other = save_tiny_target(tmp_path / "other", seed=1)
    with pytest.raises(PeerCacheError, match=r"layer 3 of .*, nor anything near it"):
        import_deepspec(with_settings(config, target={"model": str(other)}), source)
    change_manifest(source, hidden_size=64)
    with pytest.raises(PeerCacheError, match=r"its states have 64 values, those of .* have 32"):
        import_deepspec(config, source)


def test_the_check_reports_how_often_the_target_agrees(
    world: World, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    import_deepspec(config, write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS))
    assert "of the supervised tokens are the target's first choice" in caplog.text
    assert "import check: layer 1 is block 1's output to 0.0000" in caplog.text


def change_manifest(source: Path, **changes: Any) -> None:
    file = source / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, r"manifest\.json: version: Input should be 2, got 3"),
        ({"hidden_dtype": "float16"}, "hidden_dtype: Input should be 'bfloat16', got 'float16'"),
        ({"index_record_size": 40}, "index_record_size: Input should be 56"),
        ({"num_samples": 61}, r"samples\.idx: expected 61 records of 56 bytes"),
        ({"target_layer_ids": [3, 1]}, "target_layer_ids: expected ascending"),
        ({"target_layer_ids": [1, 2, 9]}, r"\[9\] out of range; the target has 4 layers"),
        ({"num_shards": 7}, "expected shard ids 0 to 6 in order"),
        (
            {"shards": [{"shard_id": 0, "file_name": "../x"}]},
            r"shards\.0\.file_name: expected the plain name of a file in the folder, got '\.\./x'",
        ),
        ({"shards": [{"shard_id": 0, "file_name": ".."}]}, "expected the plain name of a file"),
        ({"shards": [{"shard_id": 0, "file_name": "/etc/passwd"}]}, "expected the plain name of a file"),
    ],
)
def test_a_wrong_manifest_is_named(
    world: World, config: Config, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS)
    change_manifest(source, **changes)
    with pytest.raises((PeerCacheError, SettingError), match=message):
        import_deepspec(config, source)


def test_files_that_are_missing_or_no_json(world: World, config: Config, tmp_path: Path) -> None:
    source = write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS)
    (source / "shard-00003.bin").unlink()
    with pytest.raises(PeerCacheError, match=r"shard-00003\.bin: no such file; the source is not complete"):
        import_deepspec(config, source)
    (source / "manifest.json").write_text("{")
    with pytest.raises(PeerCacheError, match=r"manifest\.json: the file: Invalid JSON"):
        import_deepspec(config, source)
    with pytest.raises(PeerCacheError, match=r"manifest\.json: no such file"):
        import_deepspec(config, tmp_path)


def change_record(source: Path, row: int, change: Callable[[list[int]], object]) -> None:
    """Edit the eight numbers of one record of the index."""
    file = source / "samples.idx"
    data = bytearray(file.read_bytes())
    fields = list(struct.unpack_from("<QIIQQQQQ", data, 56 * row))
    change(fields)
    struct.pack_into("<QIIQQQQQ", data, 56 * row, *fields)
    file.write_bytes(data)


def shift(fields: list[int], by: int) -> None:
    fields[3:] = [offset + by for offset in fields[3:]]


def set_field(fields: list[int], place: int, value: int) -> None:
    fields[place] = value


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda source: cut(source / "shard-00005.bin"), "its tensors end past the end of shard-00005.bin"),
        (lambda source: change_record(source, 4, lambda fields: shift(fields, 1 << 40)), "end past the end"),
        (lambda source: change_record(source, 4, lambda fields: shift(fields, MAX_OFFSET - fields[7])), "past the end"),
        (lambda source: change_record(source, 4, lambda fields: set_field(fields, 5, 1)), "not those of tensors back"),
        (lambda source: change_record(source, 4, lambda fields: set_field(fields, 2, 1)), "its offsets are not those"),
        (lambda source: change_record(source, 4, lambda fields: set_field(fields, 1, 77)), "is not in the manifest"),
    ],
)
def test_a_damaged_sample_is_counted_or_stops_the_import(
    world: World, config: Config, tmp_path: Path, damage: Any, reason: str
) -> None:
    source = write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS)
    damage(source)
    with pytest.raises(DataError, match=rf"(?s)1 of the first 60 rows are bad.*{reason}.*samples\.idx row (4|59)\)"):
        import_deepspec(config, source)
    tolerant = with_settings(config, data={"max_bad_fraction": 0.05})
    plan = import_deepspec(tolerant, source).plan
    assert sum(count for name, count in plan.manifest.plan.dropped.items() if reason in name) == 1
    assert len(CacheReader(config.cache.path)) == 59


def test_padded_samples_are_refused(world: World, config: Config, tmp_path: Path) -> None:
    source = write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS)
    with (source / "shard-00000.bin").open("r+b") as file:
        file.seek(4 * len(world.forwards[0].input_ids))
        file.write(b"\0")
    with pytest.raises(DataError, match="attention_mask is not all one, so the sample is padded"):
        import_deepspec(config, source)


def change_states(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.unlink(), "has no hs_<row>.safetensors"),
        (lambda file: os.truncate(file, 1000), "cannot be read"),
        (lambda file: file.write_bytes(b"\x80\x04garbage that is no header"), "cannot be read"),
        (lambda file: change_states(file, lambda tensors: tensors["token_ids"].add_(1)), "token_ids of its .* are not"),
        (lambda file: change_states(file, lambda tensors: tensors.pop("token_ids")), "token_ids is not of integers"),
        (
            lambda file: change_states(
                file, lambda tensors: tensors.update(hidden_states=tensors["hidden_states"][:-1].clone())
            ),
            r"hidden_states is not \[T, 4, 32\]",
        ),
        (
            lambda file: change_states(
                file, lambda tensors: tensors.update(hidden_states=tensors["hidden_states"].to(torch.float8_e4m3fn))
            ),
            "hidden_states is not of bf16, fp16, fp32 or scaled e4m3",
        ),
    ],
)
def test_a_row_without_usable_states_is_counted_or_stops_the_import(
    world: World, config: Config, tmp_path: Path, damage: Any, reason: str
) -> None:
    folders = write_speculators(tmp_path / "source", world.forwards, layers=THEIR_LAYERS)
    damage(folders[0] / "hs_9.safetensors")
    with pytest.raises(DataError, match=rf"(?s)1 of the first 60 rows are bad.*{reason}.*dataset row 9\)"):
        import_speculators(config, folders)
    import_speculators(with_settings(config, data={"max_bad_fraction": 0.05}), folders)
    assert sorted(CacheReader(config.cache.path).sample_ids.tolist()) == [row for row in range(60) if row != 9]


def test_a_first_file_that_cannot_be_read(world: World, config: Config, tmp_path: Path) -> None:
    folders = write_speculators(tmp_path / "source", world.forwards, layers=THEIR_LAYERS)
    os.truncate(folders[0] / "hs_0.safetensors", 100)
    with pytest.raises(PeerCacheError, match=r"hs_0\.safetensors: cannot be read: .*; delete it to leave its row out"):
        import_speculators(config, folders)


def test_a_dataset_that_does_not_belong_to_the_states(world: World, config: Config, tmp_path: Path) -> None:
    folders = write_speculators(tmp_path / "source", world.forwards, layers=THEIR_LAYERS)
    write_dataset(folders[1], world.forwards[:50])
    with pytest.raises(PeerCacheError, match=r"has hs_59\.safetensors, but .*dataset has 50 rows"):
        import_speculators(config, folders)
    arrow = folders[1] / "data-00000-of-00001.arrow"
    os.truncate(arrow, arrow.stat().st_size // 2)
    with pytest.raises(PeerCacheError, match=r"arrow: not a readable Arrow stream|has hs_59\.safetensors, but"):
        import_speculators(config, folders)
    arrow.write_bytes(b"no arrow")
    with pytest.raises(PeerCacheError, match=r"arrow: not a readable Arrow stream with input_ids and loss_mask"):
        import_speculators(config, folders)
    (folders[1] / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    with pytest.raises(PeerCacheError, match=r"_data_files\.0\.filename: expected the plain name of a file"):
        import_speculators(config, folders)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((0, 2), r"hidden_states are \[\d+, 4, 32\], expected \[T, 3, D\]: 2 layers, as --layers names, and the final"),
        ((0, 2, 4, NUM_LAYERS + 1), r"expected \[T, 5, D\].*which --layers does not name"),
        ((2, 0, 4), r"--layers: expected ascending, distinct ids from 0 up, got \[2, 0, 4\]"),
        ((-1, 2, 4), "--layers: expected ascending"),
        ((0, 2, 9), r"\[8\] out of range"),
    ],
)
def test_layers_that_cannot_be_the_files(
    world: World, config: Config, tmp_path: Path, layers: tuple[int, ...], message: str
) -> None:
    folders = write_speculators(tmp_path / "source", world.forwards[:5], layers=THEIR_LAYERS)
    with pytest.raises((PeerCacheError, SettingError), match=message):
        import_speculators(config, folders, layers=layers)


@pytest.mark.parametrize("peer", ["deepspec", "speculators"])
def test_an_interrupted_import_goes_on(
    world: World, config: Config, tmp_path: Path, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if peer == "deepspec":
        source = write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS)
        run: Callable[[Config], ExtractResult] = partial(import_deepspec, folder=source)
    else:
        folders = write_speculators(tmp_path / "source", world.forwards, layers=THEIR_LAYERS)
        run = partial(import_speculators, folders=folders)
    run(with_settings(config, cache={"path": tmp_path / "whole"}))
    last = CachePlan.read(tmp_path / "whole").num_shards - 1
    doomed = CachePlan.read(tmp_path / "whole").read_samples(last)[-1].sample_id
    original = import_run._read_states

    def fail(source: Any, sample: Any, **options: Any) -> Any:
        if sample.sample_id == doomed:
            raise OSError("the disk went away")
        return original(source, sample, **options)

    with monkeypatch.context() as patch:
        patch.setattr(import_run, "_read_states", fail)
        with pytest.raises(OSError, match="the disk went away"):
            run(config)
    with pytest.raises(
        CacheIncompleteError, match=r"1 of \d+ shards are missing .* \(or import, or pull\) command again"
    ):
        CacheReader(config.cache.path)
    changed = with_settings(config, extract={"max_batch_tokens": 9})  # means nothing to an import
    assert run(changed).num_computed_shards == 1
    assert run(config).num_computed_shards == 0
    assert tree(config.cache.path) == tree(tmp_path / "whole")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_source_that_changed_is_not_mixed_in(world: World, config: Config, tmp_path: Path) -> None:
    source = write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS)
    plan = import_deepspec(config, source).plan
    commit = sorted((config.cache.path / "commits").glob("*.json"))[-1]
    commit.unlink()
    victim = plan.read_samples(plan.num_shards - 1)[-1].sample_id
    change_ids(source, world.forwards, victim)
    with pytest.raises(PeerCacheError, match=rf"row {victim}: its token ids are not those of the plan; the source"):
        import_deepspec(config, source)
    change_record(source, 4, lambda fields: set_field(fields, 1, 77))
    with pytest.raises(CacheIdentityError, match="data_digest: cache has 'deepspec:"):
        import_deepspec(config, source)


def change_ids(source: Path, forwards: list[Forward], row: int) -> None:
    """Another token in the middle of a sample, with every size as it was."""
    _, shard, num_tokens, start, *_ = struct.unpack_from("<QIIQQQQQ", (source / "samples.idx").read_bytes(), 56 * row)
    with (source / f"shard-{shard:05d}.bin").open("r+b") as file:
        file.seek(start + 4 * (num_tokens // 2))
        file.write(struct.pack("<i", forwards[row].input_ids[num_tokens // 2] + 1))


def test_non_finite_states_are_quarantined_up_to_a_limit(world: World, config: Config, tmp_path: Path) -> None:
    folders = write_speculators(tmp_path / "source", world.forwards, layers=THEIR_LAYERS)
    change_states(
        folders[0] / "hs_7.safetensors", lambda tensors: tensors["hidden_states"].__setitem__((5, 1, 3), float("nan"))
    )
    with pytest.raises(QuarantineError, match="1 samples have non-finite states"):
        import_speculators(config, folders)
    result = import_speculators(with_settings(config, extract={"max_quarantined_fraction": 0.1}), folders)
    assert result.num_excluded == 1
    assert 7 not in CacheReader(config.cache.path).sample_ids


def test_the_disk_is_checked_before_the_target_is_loaded(
    world: World, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_deepspec(tmp_path / "source", world.forwards, layers=LAYERS)
    monkeypatch.setattr("stages.extract.run.free_bytes", lambda _path: 1_000)
    monkeypatch.setattr(import_run.targets, "load_target", lambda *_a, **_k: pytest.fail("the target was loaded"))
    with pytest.raises(CacheSpaceError, match="larger disk"):
        import_deepspec(config, source)


@pytest.fixture
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def dspark(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("_restore_logging")
def test_the_command(world: World, config: Config, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    states, dataset = write_speculators(tmp_path / "source", world.forwards, layers=THEIR_LAYERS)
    options = ["--from", "speculators", "--dataset", dataset]
    assert "give --dataset and --layers" in dspark("import", file, "--from", "speculators", states).output
    assert (
        "--dataset and --layers are for speculators"
        in dspark("import", file, states, "--from", "deepspec", "--layers", "2").output
    )
    assert "expected numbers with commas between" in dspark("import", file, states, *options, "--layers", "2;3").output
    imported = dspark("import", file, *options, "--layers", "0,2,4", states)
    assert imported.exit_code == 0, imported.output
    assert "shards computed" in imported.output
    assert "price of the cache" in imported.output
    assert "forward passes" not in imported.output
    assert "is complete: reusing" in dspark("import", file, *options, "--layers", "0,2,4", states).output
    assert "imported from" in dspark("inspect", config.cache.path).output
    refused = dspark("extract", file, "--set", f"data.files={list(world.config.data.files)}")
    assert refused.exit_code == 1
    assert "It was imported from speculators" in refused.output
    trained = dspark("train", "--extract", file)
    assert trained.exit_code == 0, trained.output
    assert "held-out acceptance" in trained.output
