"""What is told before an extraction: the bytes of target/, and that a draft can be built at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline import stage_one
from pipeline.config import Config
from stages.errors import SettingError
from stages.extract import run
from stages.extract.price import count_target_bytes
from tiny_target import SHAPE, make_config, save_tiny_target

HALF_HEAD = SHAPE["head_dim"] // 2
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * HALF_HEAD, "long_factor": [4.0] * HALF_HEAD,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}


def wide_target(folder: Path, *, is_tied: bool) -> Path:
    """A target whose embedding outweighs its tokenizer, as those of real ones do."""
    save_tiny_target(folder)
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": 4096, "hidden_size": 256, "max_position_embeddings": 1024}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=is_tied, eos_token_id=2))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_size_of_target_is_bounded_closely(tmp_path: Path, is_tied: bool) -> None:
    wide_target(tmp_path / "target", is_tied=is_tied)
    config = make_config(tmp_path, num_chats=4)
    settings = stage_one.settings_of(config)
    inputs = run.describe_inputs(settings, with_weights=False)
    skeleton = run.build_skeleton(inputs, settings)
    bound = count_target_bytes(skeleton, folder=inputs.folder, dtype=torch.bfloat16)
    run.extract(settings)
    written = sum(file.stat().st_size for file in (config.cache.folder / "target").rglob("*") if file.is_file())
    assert written >= (1 if is_tied else 2) * 4096 * 256 * 2, "the embedding, and the head where it is another"
    assert written <= bound <= 1.2 * written


def set_rope(config: Config, rope: dict[str, Any]) -> None:
    file = Path(config.target.model) / "config.json"
    fields = json.loads(file.read_text()) | {"rope_parameters": rope}
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        YARN,
        LONGROPE,
    ],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("head", ["vanilla", "gated"])
def test_a_draft_that_can_be_built_passes(tmp_path: Path, rope: dict[str, Any], head: str) -> None:
    config = make_config(tmp_path, draft__markov_head_type=head, draft__target_layer_ids=[1, 3])
    set_rope(config, rope)
    stage_one.check_draft(config, run.describe_inputs(stage_one.settings_of(config), with_weights=False).shape)


@pytest.mark.parametrize(
    ("rope", "max_length", "message"),
    [
        (LONGROPE | {"short_factor": [1.0] * 5}, 16, "expected 8 short factors, got 5"),
        (LONGROPE | {"long_factor": [1.0] * 5}, 64, "expected 8 long factors, got 5"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}, 64, "no draft can be built for this qwen3 target"),
        (YARN | {"rope_theta": 1.0}, 64, "no draft can be built for this qwen3 target"),
    ],
)
def test_a_draft_that_cannot_be_built_is_refused_before_anything_is_computed(
    tmp_path: Path, rope: dict[str, Any], max_length: int, message: str
) -> None:
    config = make_config(tmp_path, data__max_length=max_length)
    set_rope(config, rope)
    for work in (stage_one.estimate, lambda config: stage_one.extract(config, show_price=lambda *_: None)):
        with pytest.raises(SettingError, match=message):
            work(config)
    assert not config.cache.folder.exists()
