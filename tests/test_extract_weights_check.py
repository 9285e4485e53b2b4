"""Targets whose files are not what would be in memory: quantised without a quantizer, with tensors left over."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import Config
from pipeline.stage_one import settings_of
from stages.extract import run
from stages.extract.target import TargetError
from stages.extract.weights_check import find_unknown
from tiny_target import make_config, save_tiny_target

PROJECTION = "model.layers.0.mlp.up_proj.weight"


def change_target(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Config:
    """A config whose target has these tensors and config fields too."""
    target = save_tiny_target(folder / "target")
    weights = load_file(target / "model.safetensors")
    save_file(weights | tensors, target / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((target / "config.json").read_text()) | (config or {})
    (target / "config.json").write_text(json.dumps(fields))
    return make_config(folder)


SCALE = {PROJECTION + "_scale": torch.tensor(0.5)}
QUANTISED = [
    pytest.param(SCALE, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "FP8", id="opt"),
    pytest.param({}, {"compression_config": {"format": "float-quantized"}}, "compression_config", id="compression"),
    pytest.param({}, {"quantization": {"group_size": 64, "bits": 4}}, "quantization in config", id="mlx"),
    pytest.param({}, {"quantization_config": {"bits": 4}}, "quantization_config", id="no-method"),
    pytest.param({}, {"quantization_config": {"quant_method": "new"}}, "new", id="unknown-method"),
    pytest.param(SCALE, {}, r"up_proj\.weight_scale \(F32\) is a quantised weight or a scale", id="scale-alone"),
    pytest.param({"model.layers.0.mlp.up_proj.qzeros": torch.zeros(2, dtype=torch.int32)}, {}, "qzeros", id="qzeros"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "expected"), QUANTISED)
def test_a_quantisation_that_is_not_applied_is_refused_without_weights(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    settings = settings_of(change_target(tmp_path, tensors, config))
    for command in (run.estimate, run.extract):
        with pytest.raises(TargetError, match=expected) as caught:
            command(settings)
        assert "name the model in its own precision" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8])
def test_weights_of_eight_bits_without_a_word_in_the_config(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = load_file(save_tiny_target(tmp_path / "target") / "model.safetensors")[PROJECTION]
    config = change_target(tmp_path, {PROJECTION: weight.to(dtype)})
    with pytest.raises(TargetError, match=r"up_proj\.weight \(.*8.*\) is a quantised weight"):
        run.estimate(settings_of(config))


def test_a_file_beside_the_config_may_name_the_quantisation(tmp_path: Path) -> None:
    config = change_target(tmp_path, {})
    (tmp_path / "target" / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(TargetError, match=r"is quantised \(hf_quant_config\.json\)"):
        run.estimate(settings_of(config))


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    config = change_target(tmp_path, {"model.layers.0.mlp.router.weight": torch.zeros(2, 32)})
    run.estimate(settings_of(config))  # names alone do not tell: transformers renames some
    with pytest.raises(TargetError, match=r"1 tensors have no place in Qwen3ForCausalLM.*mlp\.router\.weight"):
        run.extract(settings_of(config))


def test_tensors_that_sound_models_carry_are_passed_over(tmp_path: Path) -> None:
    harmless = {
        "mtp.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2),
        "model.layers.4.eh_proj.weight": torch.zeros(2, 2),
        "model.layers.4.mlp.up_proj.weight": torch.zeros(2, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "visual.patch_embed.proj.weight": torch.zeros(2, 2),
        "model.layers.0.self_attn.k_scale": torch.tensor(1.0),
        "model.layers.0.self_attn.v_proj.v_scale": torch.tensor(1.0),
    }
    assert run.extract(settings_of(change_target(tmp_path, harmless))).num_computed_shards


def test_a_stack_that_the_config_cuts_is_refused(tmp_path: Path) -> None:
    config = change_target(tmp_path, {}, {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3})
    cache = config.cache.model_copy(update={"layers": (-1, 1, 2)})
    with pytest.raises(TargetError, match=r"11 tensors have no place in Qwen3ForCausalLM, .*model\.layers\.3\."):
        run.extract(settings_of(config.model_copy(update={"cache": cache})))


@pytest.mark.parametrize(
    ("name", "is_unknown"),
    [
        ("model.layers.3.mlp.extra.weight", True),
        ("model.layers.4.mlp.extra.weight", True),
        ("model.layers.4.shared_head.norm.weight", False),
        ("h.0.attn.bias", False),
        ("h.0.attn.masked_bias", False),
        ("model.layers.0.self_attn.q_proj.bias", True),
        ("embeddings.position_ids", False),
        ("lm_head.weight", True),
        ("model.vision_tower.encoder.layers.1.fc1.weight", False),
        ("audio_tower.conv1.weight", False),
        ("multi_modal_projector.linear_1.weight", False),
        ("model.layers.0.mlp.experts.5.up_proj.weight", True),
        ("model.norm2.weight", True),
    ],
)
def test_which_unused_tensors_are_known(name: str, is_unknown: bool, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(save_tiny_target(tmp_path / "target"))
    assert list(find_unknown([name], model=model)) == [name] * is_unknown
    model.config.tie_word_embeddings = True
    assert list(find_unknown(["lm_head.weight"], model=model)) == []


def test_the_fp8_form_that_transformers_applies_is_not_refused_by_its_name(tmp_path: Path) -> None:
    """What is wrong with it here, where there is no GPU, is for transformers to say."""
    scale = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config = change_target(tmp_path, {PROJECTION + "_scale_inv": torch.ones(3, 2)}, {"quantization_config": scale})
    run.estimate(settings_of(config))
