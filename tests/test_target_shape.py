"""Shapes read off configs of many classes, and off the files of a cache's `target/`."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from stages.errors import SettingError
from stages.target_shape import CONFIG_FILE, SHAPE_FILE, TargetShape, parse_target_shape, read_target_shape

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "eos_token_id": 2, "bos_token_id": None,
}  # fmt: skip
MIXED = ["sliding_attention"] * 3 + ["full_attention"]


def test_the_shape_of_a_plain_config() -> None:
    config = transformers.Qwen3Config(
        **SMALL, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=True, dtype=torch.bfloat16, pad_token_id=3,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    assert parse_target_shape(config) == TargetShape(
        model_type="qwen3", vocab_size=64, hidden_size=32, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=16,
        intermediate_size=48, max_positions=128, rms_norm_eps=1e-5, initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, sliding_window=None, logit_scale=None,
        logit_softcap=None, num_experts=None, num_active_experts=None, tie_word_embeddings=True, dtype="bfloat16",
        bos_token_id=None, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip


def gemma4() -> PretrainedConfig:
    text = SMALL | {"head_dim": 16, "global_head_dim": 64, "layer_types": MIXED}
    return transformers.Gemma4Config(text_config=text)


def test_of_layers_that_differ_the_sliding_ones_are_taken() -> None:
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = gemma4().get_text_config().head_dim
    shape = parse_target_shape(gemma4())
    assert (shape.head_dim, shape.num_heads, shape.num_kv_heads, shape.num_layers) == (16, 2, 1, 4)
    assert set(shape.rope_parameters) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.CohereConfig(**SMALL, logit_scale=0.25), (0.25, None)),
        (transformers.GraniteConfig(**SMALL, logits_scaling=8.0), (0.125, None)),
        (transformers.HyperCLOVAXConfig(**SMALL, logits_scaling=0.5), (0.5, None)),
        (transformers.FalconH1Config(**SMALL, lm_head_multiplier=0.0625), (0.0625, None)),
        (transformers.Gemma2Config(**SMALL, final_logit_softcapping=30.0), (None, 30.0)),
        (transformers.LlamaConfig(**SMALL), (None, None)),
    ],
    ids=["cohere", "granite", "hyperclovax", "falcon_h1", "gemma2", "llama"],
)
def test_logit_scales_and_caps(config: PretrainedConfig, expected: tuple[float | None, float | None]) -> None:
    shape = parse_target_shape(config)
    assert (shape.logit_scale, shape.logit_softcap) == expected


def test_a_config_of_other_names_and_nesting() -> None:
    """Code of model repositories names sizes and ropes as it likes, and nests text under `llm_config`."""
    inner = {
        "padded_vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": [2, 4, 4], "num_key_value_heads": [1, 2, 2],
        "intermediate_size": [40, 48, 48], "seq_length": 99, "rope_theta": 7e5, "rotary_pct": 0.5,
        "rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 33,
    }  # fmt: skip
    nested = SimpleNamespace(**inner)
    nested.get_text_config = lambda **_: nested
    outer = SimpleNamespace(llm_config=nested, model_type="theirs")
    outer.get_text_config = lambda **_: outer
    for config in (outer, {"model_type": "theirs", "llm_config": inner}):
        shape = parse_target_shape(config)
        assert (shape.vocab_size, shape.hidden_size, shape.num_layers, shape.max_positions) == (64, 32, 3, 99)
        assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, 8)
        assert shape.intermediate_size is None, "several widths: the draft's has to be set"
        assert shape.rope_parameters == {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 7e5, "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 33,
        }  # fmt: skip


@pytest.mark.parametrize("name", ["mamba", "blt"])
def test_a_size_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(SettingError, match=rf"expected a positive number, got None in the config of a {name} target"):
        parse_target_shape(CONFIG_MAPPING[name]())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    shape = parse_target_shape(gemma4())
    (tmp_path / SHAPE_FILE).write_text(shape.render())
    assert read_target_shape(tmp_path) == shape
    (tmp_path / CONFIG_FILE).write_text("{}")  # not looked at
    assert read_target_shape(tmp_path) == shape


@pytest.mark.parametrize(
    ("change", "place"),
    [({"hidden_size": 0}, "hidden_size"), ({"head_dim": "16"}, "head_dim"), ({"extra": 1}, "extra")],
)
def test_a_changed_shape_is_refused(change: dict[str, Any], place: str, tmp_path: Path) -> None:
    fields = json.loads(parse_target_shape(gemma4()).render()) | change
    (tmp_path / SHAPE_FILE).write_text(json.dumps(fields))
    with pytest.raises(SettingError, match=rf"shape\.json: {place}: "):
        read_target_shape(tmp_path)


def test_older_caches_have_the_targets_own_config(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**SMALL, head_dim=16)
    config.save_pretrained(tmp_path)
    assert read_target_shape(tmp_path) == parse_target_shape(transformers.AutoConfig.from_pretrained(tmp_path))
    gemma4().save_pretrained(tmp_path)
    assert read_target_shape(tmp_path).head_dim == 16
    (tmp_path / CONFIG_FILE).write_text("[1]")
    with pytest.raises(SettingError, match="expected a JSON object, got list"):
        read_target_shape(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model_type": "qwen3", "hidden_size": "wide"}))
    with pytest.raises(SettingError, match=r"config\.json: this version of transformers cannot read it"):
        read_target_shape(tmp_path)
