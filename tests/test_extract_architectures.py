"""Every decoder and image-text-to-text class of transformers is taken, or refused in one line without weights."""

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from stages.errors import StageError
from stages.extract.capture import check_blocks
from stages.extract.model_files import TargetError
from stages.extract.settings import TargetSection
from stages.extract.target import build_skeleton
from stages.target_shape import parse_target_shape
from stages.train import build_draft_config

NAMES = sorted(
    {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
)
# Families that people serve: refusing one of these would be a regression. Built without weights here.
TAKEN = {
    "apertus", "cohere2", "exaone4", "falcon_h1", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "glm4",
    "glm4_moe", "glm4v", "gpt2", "gpt_neox", "gpt_oss", "granite", "internvl", "lfm2", "llama", "llama4", "llava",
    "mistral", "mistral3", "mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen3_5",
    "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "smollm3", "voxtral",
}  # fmt: skip
REFUSED = {
    "bart": "expected a decoder-only language model",
    "bert": "found no stack of 12 blocks with a final norm",
    "deepseek_v4": r"its blocks give \[1, 8, 4, 4096\]",
    "gemma3n_text": r"its blocks give \[4, 1, 8, 2048\]",
    "mamba": "num_attention_heads: expected a positive number",
    "paligemma": "attention to later tokens",
    "phi": "lm_head has a bias",
    "whisper": "expected a decoder-only language model",
}


def try_name(name: str, folder: Path) -> None:
    """What an estimate does before it tokenises, for a config of this type with its defaults."""
    (folder / "config.json").write_text("{}")
    config = CONFIG_MAPPING[name]()
    shape = parse_target_shape(config)
    target = TargetSection(model=str(folder), attn_implementation="eager")
    check_blocks(build_skeleton(folder, config, target=target), layers=range(-1, shape.num_layers))
    build_draft_config(shape, mask_token_id=0, intermediate_size=64)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "gemma4_assistant"])  # has no default config
def test_no_class_ends_in_a_traceback(name: str, tmp_path: Path) -> None:
    refusal = None
    try:
        try_name(name, tmp_path)
    except StageError as error:
        refusal = str(error)
    assert refusal is None or name not in TAKEN, refusal
    assert "\n" not in (refusal or "")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=REFUSED[name]):
        try_name(name, tmp_path)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_an_attention_that_a_class_does_not_have_is_told_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TargetError, match=r'set target\.attn_implementation = "eager"'):
        build_skeleton(tmp_path, CONFIG_MAPPING[name](), target=TargetSection(model=str(tmp_path)))
