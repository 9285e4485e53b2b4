"""A draft that starts with the weights of another: what goes over, what starts fresh, what is refused."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import Config
from pipeline.stage_one import settings_of
from pipeline.stage_two import open_cache, train_draft
from stages.errors import SettingError
from stages.extract.run import extract
from stages.train.checkpoint import CheckpointError
from stages.train.metrics import read_metrics
from stages.train.run import build_draft
from stages.train.warm_start import load_initial_weights
from tiny_target import make_config, save_tiny_target


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run_dir) if row["kind"] == "train"]


def assert_equal_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def warm_config(cached: Path, run_dir: Path, source: Path, **changes: Any) -> Config:
    return make_config(cached, train__run_dir=run_dir, draft__init_from=source, **changes)


@pytest.mark.parametrize("source", ["checkpoints/step_00000008", "draft"])
def test_a_draft_starts_with_the_weights_of_another(cached: Path, trained: Path, tmp_path: Path, source: str) -> None:
    config = warm_config(cached, tmp_path / "run", trained / source, train__seed=5)
    reader = open_cache(config, layers=None)
    model = build_draft(config.draft, reader, seed=5)
    wanted = {name: tensor.float() for name, tensor in load_file(trained / source / "model.safetensors").items()}
    head = load_file(reader.target_dir / "head.safetensors")
    frozen = {name: head[name].float() for name in ("embed_tokens.weight", "lm_head.weight")}
    assert_equal_tensors(dict(model.state_dict()), {**wanted, **frozen})
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "embed_tokens.weight",
        "lm_head.weight",
    ]
    train_draft(config)
    first = next(row for row in rows(tmp_path / "run") if row["kind"] == "train")
    assert first["loss"] < 0.95 * rows(trained)[0]["loss"]


@pytest.mark.parametrize(
    ("before", "after", "fresh"),
    [
        ({}, {"draft__num_layers": 2}, {"layers.1."}),
        ({}, {"draft__block_size": 6}, set()),
        ({}, {"draft__markov_head_type": "gated"}, {"markov_head.gate_proj."}),
        ({"draft__markov_rank": 0}, {}, {"markov_head.", "confidence_head."}),
        ({"draft__enable_confidence_head": False}, {}, {"confidence_head."}),
    ],
)
def test_layers_and_heads_beyond_the_old_draft_start_fresh(
    cached: Path, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], fresh: set[str]
) -> None:
    reader = open_cache(make_config(cached), layers=None)
    old = build_draft(make_config(cached, **before).draft, reader, seed=1)
    old.save_pretrained(tmp_path / "old")
    new = build_draft(make_config(cached, **after).draft, reader, seed=2)
    initial = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    names = load_initial_weights(new, tmp_path / "old")
    expected = {name for name in initial if any(name.startswith(start) for start in fresh)}
    assert set(names) == expected
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, initial[name] if name in expected else old.state_dict()[name]), name


@pytest.mark.parametrize(
    ("before", "after", "problems"),
    [
        ({}, {"draft__markov_rank": 4}, ["markov_head.markov_w1.weight: it has [4096, 8], this draft [4096, 4]"]),
        ({}, {"draft__markov_rank": 0}, ["markov_head.markov_w1.weight: it has [4096, 8], this draft none"]),
        (
            {"draft__num_layers": 2},
            {},
            ["layers.1.mlp.up_proj.weight: it has [48, 32], this draft none", "layers.1.self_attn.q_norm.weight"],
        ),
        ({}, {"draft__intermediate_size": 40}, ["layers.0.mlp.up_proj.weight: it has [48, 32], this draft [40, 32]"]),
        ({}, {"draft__confidence_head_with_markov": False}, ["confidence_head.proj.weight: it has [1, 40]"]),
        ({}, {"draft__mask_token_id": 5}, ["mask_token_id: it has "]),
    ],
)
def test_what_does_not_fit_is_named(
    cached: Path, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], problems: list[str]
) -> None:
    reader = open_cache(make_config(cached), layers=None)
    build_draft(make_config(cached, **before).draft, reader, seed=1).save_pretrained(tmp_path / "old")
    new = build_draft(make_config(cached, **after).draft, reader, seed=2)
    initial = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    with pytest.raises(SettingError, match=r"draft\.init_from: .* does not fit the draft of this config") as caught:
        load_initial_weights(new, tmp_path / "old")
    for problem in problems:
        assert problem in str(caught.value)
    assert_equal_tensors(dict(new.state_dict()), initial)


def test_drafts_of_another_target_or_other_layers_are_no_start(cached: Path, trained: Path, tmp_path: Path) -> None:
    subset = make_config(cached, draft__target_layer_ids=[-1, 3])
    two = open_cache(subset, layers=(-1, 3))
    build_draft(subset.draft, two, seed=0).save_pretrained(tmp_path / "two")
    other_layers = open_cache(make_config(cached), layers=(1, 3))
    new = build_draft(make_config(cached).draft, other_layers, seed=0)
    with pytest.raises(SettingError, match=r"target_layer_ids: it has \[-1, 3\], this draft \[1, 3\]"):
        load_initial_weights(new, tmp_path / "two")
    folder = tmp_path / "other"
    folder.mkdir()
    other = make_config(folder)
    save_tiny_target(Path(other.target.model), seed=1)
    extract(settings_of(other))
    with pytest.raises(SettingError, match=r"embed_tokens\.weight: differs: it was trained for another target"):
        train_draft(warm_config(folder, tmp_path / "run", trained / "draft"))


def test_a_folder_that_is_no_draft_is_no_start(cached: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"draft\.init_from: .*nowhere: no draft here; expected config\.json"):
        train_draft(warm_config(cached, tmp_path / "run", tmp_path / "nowhere"))
    broken = tmp_path / "broken"
    shutil.copytree(trained / "draft", broken)
    weights = load_file(broken / "model.safetensors")
    weights["fc.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingError, match=r"NaN or infinite weights in fc\.weight"):
        train_draft(warm_config(cached, tmp_path / "run", broken))
    os.truncate(broken / "model.safetensors", 1000)
    with pytest.raises(SettingError, match="cannot be read as a draft"):
        train_draft(warm_config(cached, tmp_path / "run", broken))


def test_a_run_knows_its_start_by_what_is_in_it(cached: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "draft", tmp_path / "a")
    train_draft(warm_config(cached, tmp_path / "run", tmp_path / "a", train__max_steps=2))
    (tmp_path / "a").rename(tmp_path / "b")
    assert train_draft(warm_config(cached, tmp_path / "run", tmp_path / "b", train__max_steps=2)).was_complete
    other = trained / "checkpoints" / "step_00000006"
    with pytest.raises(CheckpointError, match=r"draft\.init_from: the run has sha256 \w+, now sha256"):
        train_draft(warm_config(cached, tmp_path / "run", other, train__max_steps=2))
    with pytest.raises(CheckpointError, match=r"draft\.init_from: the run has sha256 \w+, now None"):
        train_draft(make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=2))
