"""Training on a cache that is there: what the config leaves open is the cache's, what it says is compared."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.cached_values import SECTIONS, adopt_cache
from pipeline.cli import main
from pipeline.config import Config, load_config, parse_config, to_toml
from pipeline.stage_one import settings_of
from pipeline.stage_two import open_cache, train_draft
from pipeline.sweep.plan import trial_config
from stages.extract.run import extract
from storage import CacheIdentity, CacheIdentityError, CacheReader
from tiny_target import make_config

# Nothing of this is a default, and all of it changes what is cached.
UNUSUAL = {
    "cache__encoding": "int8",
    "cache__layers": [0, 3],
    "cache__shard_bytes": 1_000_001,
    "target__dtype": "float32",
    "target__attn_implementation": "eager",
    "data__max_length": 60,
    "data__overlong": "truncate",
    "data__supervise": "last",
    "data__min_supervised_tokens": 3,
    "data__validation_fraction": 0.3,
    "extract__max_batch_tokens": 300,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_config(tmp_path_factory.mktemp("made"), **UNUSUAL)
    extract(settings_of(config))
    return config


def open_config(made: Config, run_dir: Path, **tables: dict[str, Any]) -> Config:
    """Target, data and cache of `made`, a run of two steps, and `tables`."""
    train = {"run_dir": str(run_dir), "max_steps": 2, "global_batch_size": 4, "device": "cpu", "dtype": "float32"}
    base = {
        "target": {"model": made.target.model},
        "data": {"files": list(made.data.files)},
        "cache": {"path": str(made.cache.path)},
        "draft": {"num_layers": 1, "num_anchors": 4, "markov_rank": 4, "block_size": 4},
        "train": train,
    }
    return parse_config({**base, **{name: base.get(name, {}) | table for name, table in tables.items()}}, where="test")


def test_training_takes_what_the_config_leaves_open_from_the_cache(made: Config, tmp_path: Path) -> None:
    config = open_config(made, tmp_path / "run")
    assert train_draft(config).num_steps == 2
    saved = load_config(tmp_path / "run" / "config.toml")
    for key, value in UNUSUAL.items():
        section, name = key.split("__")
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(getattr(saved, section), name) == expected
    assert open_cache(saved, layers=None).layers == (0, 3)
    assert adopt_cache(config).model_dump(include=set(SECTIONS)) == saved.model_dump(include=set(SECTIONS))
    assert adopt_cache(open_config(made, tmp_path, cache={"path": str(tmp_path / "none")})).cache.encoding == "bf16"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("cache", "encoding", "bf16"),
        ("cache", "layers", (1, 3)),
        ("target", "dtype", "bfloat16"),
        ("target", "attn_implementation", "sdpa"),
        ("data", "max_length", 61),
        ("data", "supervise", "all"),
        ("data", "validation_fraction", 0.05),
        ("extract", "max_batch_tokens", 16384),
    ],
)
def test_what_the_config_says_is_compared_also_if_it_is_the_default(
    made: Config, tmp_path: Path, section: str, key: str, value: object
) -> None:
    config = open_config(made, tmp_path / "run", **{section: {key: value}})
    with pytest.raises(CacheIdentityError, match=rf"\n  {key}: cache has .*, this run has "):
        train_draft(config)


def test_every_key_of_the_identity_can_be_left_open(made: Config) -> None:
    """What else the identity has is computed from the target and the data."""
    keys = {key for name in SECTIONS for key in type(getattr(made, name)).model_fields}
    computed = {name for name in CacheIdentity.model_fields if name.endswith("_digest")} | {"format_version"}
    assert CacheIdentity.model_fields.keys() - keys - computed <= {"max_samples"}


def test_sweeps_and_continued_extractions_adopt_too(made: Config, tmp_path: Path) -> None:
    """`train --extract` on a cache of which a shard is gone computes it as it was."""
    sweep = {"parameters": {"train.lr": [0.1, 0.2]}}
    trial = trial_config(open_config(made, tmp_path / "sweep", sweep=sweep), {"train.lr": 0.1}, number=0)
    assert open_cache(trial, layers=None).identity.encoding == "int8"
    commit = made.cache.folder / "commits" / "00000.json"
    before = commit.read_bytes()
    commit.unlink()
    file = tmp_path / "open.toml"
    tables = open_config(made, tmp_path / "run").model_dump(mode="json", exclude_unset=True, exclude_none=True)
    lines = []
    for name, table in tables.items():
        whole = to_toml(open_config(made, tmp_path / "run")).split(f"[{name}]\n")[1].split("\n\n")[0].splitlines()
        lines += [f"[{name}]", *(line for line in whole if line.split(" = ")[0] in table)]
    file.write_text("\n".join(lines) + "\n")
    result = CliRunner().invoke(main, ["train", "--extract", "--no-evaluate", str(file)])
    assert result.exit_code == 0, result.output
    assert "1 of" in result.output
    assert commit.read_bytes() == before
    assert CacheReader(made.cache.path).identity.dtype == "float32"
