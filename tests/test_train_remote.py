"""Training and the command line over a cache in a store: the same draft as from the local copy, at any interruption."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from object_store import ObjectStore, serve_objects
from pipeline.config import ConfigError, load_config, to_toml
from pipeline.stage_one import settings_of
from pipeline.stage_two import evaluate_draft, train_draft
from stages.errors import SettingError
from stages.extract.run import estimate, extract
from stages.train.checkpoint import CheckpointError
from stages.train.metrics import read_metrics
from stages.train.order import plan_epoch, plan_windows
from storage import push_cache
from test_pipeline_cli import dspark
from tiny_target import make_config

NUM_CHATS = 300  # five shards of 1 MB


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with serve_objects() as store:
        yield store


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, store: ObjectStore) -> Path:
    """A folder with a tiny target and its cache, which is also in the store."""
    folder = tmp_path_factory.mktemp("cached")
    result = extract(settings_of(make_config(folder, num_chats=NUM_CHATS)))
    assert result.num_shards >= 5
    push_cache(folder / "cache", store.url("train"))
    return folder


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir) if row["kind"] == "train"]


def same_weights(left: Path, right: Path) -> bool:
    a, b = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_window_is_a_permutation_of_whole_shards() -> None:
    shards = np.repeat(np.arange(11), [5, 1, 7, 3, 4, 4, 9, 2, 6, 8, 3])
    seen = set()
    for epoch in range(6):
        order = plan_windows(shards, window=3, seed=5, epoch=epoch)
        assert sorted(order.tolist()) == list(range(len(shards)))
        groups = []
        rest = order
        while len(rest):  # a group ends where three shards are used up
            members = list(dict.fromkeys(shards[rest].tolist()))[:3]
            size = int(np.isin(shards, members).sum())
            assert set(shards[rest[:size]].tolist()) == set(members)
            groups.append(frozenset(members))
            rest = rest[size:]
        assert [len(group) for group in groups] == [3, 3, 3, 2]
        first = shards[order[: int(np.isin(shards, list(groups[0])).sum())]]
        assert np.count_nonzero(np.diff(first)) > 2, "the samples of a group are mixed"
        seen.add(tuple(groups))
        assert order.tolist() == plan_windows(shards, window=3, seed=5, epoch=epoch).tolist()
    assert len(seen) == 6, "every epoch has groups of its own"
    whole = plan_epoch(len(shards), seed=5, epoch=0).tolist()
    assert plan_windows(shards, window=0, seed=5, epoch=0).tolist() == whole
    assert plan_windows(shards, window=11, seed=5, epoch=0).tolist() == whole
    assert (
        plan_windows(shards + 70, window=3, seed=5, epoch=0).tolist()
        == plan_windows(shards, window=3, seed=5, epoch=0).tolist()
    ), "only which samples share a shard counts"


def test_training_from_the_store_equals_training_from_the_local_copy(
    cached: Path, store: ObjectStore, tmp_path: Path
) -> None:
    """Three epochs' worth of steps with validations between, in a folder that holds three of the five shards."""
    options = {"train__max_steps": 12, "train__global_batch_size": 48, "train__shuffle_window": 2}
    local = make_config(cached, train__run_dir=tmp_path / "local", **options)
    remote = make_config(
        cached, train__run_dir=tmp_path / "remote", cache__path=store.url("train"),
        cache__staging=tmp_path / "staging", cache__staging_bytes=4_000_000, **options,
    )  # fmt: skip
    first = train_draft(local)
    store.requests.clear()
    second = train_draft(remote)
    assert losses(tmp_path / "local") == losses(tmp_path / "remote")
    assert same_weights(first.draft_dir, second.draft_dir)
    assert len(store.fetched("hidden_states/c/0/0/0")) >= 5
    assert evaluate_draft(local, draft_dir=first.draft_dir) == evaluate_draft(remote, draft_dir=second.draft_dir)
    whole = make_config(cached, train__run_dir=tmp_path / "whole", **{**options, "train__shuffle_window": 0})
    train_draft(whole)
    assert losses(tmp_path / "whole") != losses(tmp_path / "local")


def test_an_epoch_fetches_each_shard_once(cached: Path, store: ObjectStore, tmp_path: Path) -> None:
    config = make_config(
        cached, train__run_dir=tmp_path / "run", train__global_batch_size=32, train__epochs=1, train__max_steps=100,
        train__validate_every=1000, cache__path=store.url("train"), cache__staging=tmp_path / "staging",
        cache__staging_bytes=3_500_000, train__shuffle_window=2, evaluate__max_samples=1,
    )  # fmt: skip
    store.requests.clear()
    result = train_draft(config)
    assert result.num_steps == len(losses(tmp_path / "run")) < 100
    fetched = store.fetched("hidden_states/c/0/0/0")
    assert len(fetched) >= 5
    once = [key for key, count in fetched.items() if count == 1]
    assert len(fetched) - len(once) <= 1, "but for the shard of the one validation sample at the end"


def test_the_window_belongs_to_what_a_run_is_made_from(cached: Path, store: ObjectStore, tmp_path: Path) -> None:
    places = {"cache__path": store.url("train"), "cache__staging": tmp_path / "staging"}
    train_draft(make_config(cached, train__run_dir=tmp_path / "run", **places))
    with pytest.raises(CheckpointError, match=r"train\.shuffle_window: the run has 4, now 0"):
        train_draft(make_config(cached, train__run_dir=tmp_path / "run"))
    assert train_draft(make_config(cached, train__run_dir=tmp_path / "run", train__shuffle_window=4)).was_complete, (
        "where the cache lies is no input"
    )


def test_extract_wants_a_folder(cached: Path, store: ObjectStore) -> None:
    config = make_config(cached, cache__path=store.url("new"))
    for stage in (extract, estimate):
        with pytest.raises(SettingError, match=r"'s3://caches-\w+/new': extract writes to a local folder.*dspark push"):
            stage(settings_of(config))


def test_an_address_survives_the_config(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, cache__path="s3://bucket/a", cache__staging=tmp_path, cache__staging_bytes=10)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert load_config(file) == config
    assert (config.cache.path, config.cache.staging) == ("s3://bucket/a", tmp_path)
    assert load_config(file, ["cache.path=here"]).cache.path == Path("here")
    for override in ("cache.path=1", "cache.staging_bytes=0", "train.shuffle_window=-1"):
        with pytest.raises(ConfigError, match=override.partition("=")[0]):
            load_config(file, [override])


def test_the_command_line(cached: Path, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    file = tmp_path / "config.toml"
    file.write_text(to_toml(make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=2)))
    url = store.url("cli")
    assert "shards copied, 0 were there" in dspark("push", cached / "cache", url).output
    assert " 0 of " in dspark("push", cached / "cache", url).output
    assert "shards copied" in dspark("pull", url, tmp_path / "back").output
    assert "whole" in dspark("verify", tmp_path / "back").output
    shown = dspark("inspect", url).output
    assert f"cache {url}" in shown
    assert "tokens a sample" in shown
    trained = dspark("train", file, "--set", f"cache.path={url}").output
    assert url in "".join(trained.replace("│", "").split())
    assert (tmp_path / "home/dspark-offline/staging").is_dir()
    assert "dspark pull it" in dspark("verify", url, ok=False).output
    assert "then dspark push it there" in dspark("extract", file, "--set", f"cache.path={url}", ok=False).output
    os.remove(tmp_path / "back/commits/00001.json")
    partly = dspark("push", tmp_path / "back", store.url("partly")).output
    assert "is incomplete: 1 of" in partly
