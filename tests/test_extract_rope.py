"""Extraction under ropes that depend on the length of a text: one set for a whole cache, whatever a batch holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from pipeline import stage_one
from stages.extract.capture import Capture
from stages.extract.target import TargetError, find_parts
from stages.rope import describe_rope, mixes_ropes, pin_rope
from stages.target_shape import parse_target_shape
from storage import CachePlan, CacheReader
from tiny_target import SHAPE, make_config, save_tiny_target

SHORT, LONG = [1.0] * 8, [4.0] * 8
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MAX_POSITIONS = 64
PHI3 = {key: value for key, value in SHAPE.items() if key != "head_dim"} | {
    "max_position_embeddings": MAX_POSITIONS, "original_max_position_embeddings": 16, "pad_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": LONGROPE,
    "proportional": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}  # fmt: skip


def make_target(name: str) -> Any:
    torch.manual_seed(0)
    shape = {**SHAPE, "max_position_embeddings": MAX_POSITIONS, "initializer_range": 0.3}
    if name == "phi3":
        return Phi3ForCausalLM(Phi3Config(**PHI3, rope_parameters=dict(LONGROPE))).eval()
    if name == "phimoe":
        rope = LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.5}
        shape = {key: value for key, value in shape.items() if key != "head_dim"}
        return PhimoeForCausalLM(PhimoeConfig(**shape, num_local_experts=2, rope_parameters=rope)).eval()
    if name == "gemma3":
        ropes = {"full_attention": dict(LONGROPE), "sliding_attention": dict(ROPES["default"])}
        kinds = ["sliding_attention", "full_attention"] * 2
        config = Gemma3TextConfig(**shape, sliding_window=8, layer_types=kinds, rope_parameters=ropes)
        return Gemma3ForCausalLM(config).eval()
    return LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=dict(ROPES[name]))).eval()


def ids(num_tokens: int, *, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 60, (num_tokens,), generator=generator, dtype=torch.int32).numpy()


@pytest.mark.parametrize("name", [*ROPES, "phi3", "phimoe", "gemma3"])
@pytest.mark.parametrize("max_length", [16, 40])
def test_states_do_not_depend_on_the_neighbours(name: str, max_length: int) -> None:
    """Ten tokens alone, beside the longest text, and alone again afterwards."""
    model = make_target(name)
    pin_rope(model, max_length=max_length)
    capture = Capture(find_parts(model), layers=[0, 1, 2, 3], dtype=torch.float32)
    text, neighbour = ids(10, seed=1), ids(max_length, seed=2)
    alone, together, again = capture([text]), capture([neighbour, text]), capture([text])
    torch.testing.assert_close(together.hidden_states[max_length:], alone.hidden_states, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together.last_hidden_states[max_length:], alone.last_hidden_states, rtol=1e-3, atol=1e-3)
    assert torch.equal(again.hidden_states, alone.hidden_states)


@pytest.mark.parametrize(("max_length", "factors"), [(16, SHORT), (17, LONG), (MAX_POSITIONS, LONG)])
def test_the_set_is_that_of_the_longest_text(max_length: int, factors: list[float]) -> None:
    """Held against a target that has no other set to choose."""
    model = make_target("phi3")
    pin_rope(model, max_length=max_length)
    one = Phi3ForCausalLM(
        Phi3Config(**PHI3, rope_parameters=LONGROPE | {"short_factor": factors, "long_factor": factors})
    )
    one.load_state_dict(model.state_dict())
    input_ids = torch.from_numpy(ids(12, seed=1))[None].long()
    with torch.no_grad():
        pinned, expected = model(input_ids).logits, one.eval()(input_ids).logits
    assert torch.equal(pinned, expected)


@pytest.mark.parametrize("name", ["phi3", "dynamic"])
def test_a_text_as_long_as_the_longest_is_as_transformers_has_it(name: str) -> None:
    model, free = make_target(name), make_target(name)
    pin_rope(model, max_length=40)
    input_ids = torch.from_numpy(ids(40, seed=1))[None].long()
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, free(input_ids).logits)


def test_which_rope_is_said() -> None:
    phi = Phi3Config(**PHI3, rope_parameters=dict(LONGROPE))
    assert (
        describe_rope(parse_target_shape(phi), max_length=16)
        == "longrope with its short factors (max_length 16, original positions 16)"
    )
    assert (
        describe_rope(parse_target_shape(phi), max_length=17)
        == "longrope with its long factors (max_length 17, original positions 16)"
    )
    assert not mixes_ropes(parse_target_shape(phi), max_length=16)
    assert mixes_ropes(parse_target_shape(phi), max_length=17)
    for name in ("default", "yarn", "llama3", "linear"):
        assert not describe_rope(parse_target_shape(make_target(name).config), max_length=64)
        assert not mixes_ropes(parse_target_shape(make_target(name).config), max_length=64)
    dynamic = make_target("dynamic").config
    assert describe_rope(parse_target_shape(dynamic), max_length=64) == "dynamic as for 64 tokens"
    assert not mixes_ropes(parse_target_shape(dynamic), max_length=64)
    fixed = HunYuanDenseV1Config(
        rope_parameters={"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4}
    )
    assert not describe_rope(parse_target_shape(fixed), max_length=64)


@pytest.fixture(scope="module")
def longrope_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longrope")
    save_tiny_target(folder / "target")  # its tokenizer
    shape = {**PHI3, "vocab_size": 4096, "max_position_embeddings": 1024, "original_max_position_embeddings": 64}
    rope = LONGROPE | {"original_max_position_embeddings": 64}
    torch.manual_seed(0)
    config = Phi3Config(**shape, rope_parameters=rope, eos_token_id=2)
    Phi3ForCausalLM(config).save_pretrained(folder / "target")
    return folder


def test_a_cache_has_one_rope_which_its_record_names(longrope_world: Path) -> None:
    config = make_config(
        longrope_world,
        target__dtype="float32",
        cache__encoding="fp32",
        cache__layers=[1, 3],
        data__validation_fraction=0,
    )
    stage_one.extract(config, show_price=lambda *_: None)
    only_long = Phi3Config.from_pretrained(config.target.model)
    only_long.rope_parameters = {**only_long.rope_parameters, "short_factor": LONG}
    model = AutoModelForCausalLM.from_pretrained(config.target.model, config=only_long, dtype=torch.float32).eval()
    with CacheReader(config.cache.path) as reader:
        lengths = [reader[index].num_tokens for index in range(len(reader))]
        assert min(lengths) < 64 < max(lengths)  # transformers alone would have mixed two ropes
        rope = reader.manifest.header.provenance["rope"]
        assert rope == "longrope with its long factors (max_length 1024, original positions 64)"
        for index in range(len(reader)):
            sample = reader[index]
            with torch.no_grad():
                states = model(input_ids=sample.input_ids[None].long(), output_hidden_states=True).hidden_states
            torch.testing.assert_close(sample.hidden_states[:, 0], states[2][0], rtol=1e-3, atol=1e-3)


def test_a_cache_begun_with_mixed_ropes_is_not_continued(longrope_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(longrope_world, cache__path=longrope_world / "old", cache__layers=[1, 3])
    with monkeypatch.context() as earlier:
        earlier.setattr("stages.extract.run._describe_rope", lambda *_a, **_k: {})
        stage_one.extract(config, show_price=lambda *_: None)
    stage_one.extract(config, show_price=lambda *_: None)  # whole: nothing is added to it
    commits = sorted((longrope_world / "old" / "commits").glob("*.json"))
    commits[0].unlink()
    assert "rope" not in CachePlan.read(longrope_world / "old").header.provenance
    with pytest.raises(TargetError, match=r"let each batch choose the target's rope; expected longrope with its long"):
        stage_one.extract(config, show_price=lambda *_: None)
