"""A draft's rope: one set of frequencies whatever is packed, and a config that every reader takes alike."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import HunYuanDenseV1Config, Phi3Config, PhimoeConfig

from draft_reference import HIDDEN, MASK_ID, VOCAB, make_document, pack, tiny_config, tiny_model, tiny_target_config
from stages.errors import SettingError
from stages.rope import draft_rope
from stages.train import DSparkTrainerModule, Qwen3DSparkModel, build_draft_config
from stages.train.model import config_fields

HEAD, THETA = 8, 1e4
PLAIN = [THETA ** (-2 * pair / HEAD) for pair in range(HEAD // 2)]
SHORT, LONG = [1.0, 1.5, 2.0, 3.0], [2.0, 8.0, 16.0, 50.0]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": THETA, "short_factor": SHORT, "long_factor": LONG,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": THETA},
    "linear": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": THETA, "factor": 4.0},
    "yarn": YARN,
    "yarn of DeepSeek": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn with a factor": YARN | {"attention_factor": 1.7},
    "yarn untruncated": YARN | {"truncate": False, "beta_fast": 8.0, "beta_slow": 2.0},
    "llama3": LLAMA3,
    "longrope": LONGROPE,
    "longrope with a factor": LONGROPE | {"attention_factor": 1.25},
    "proportional": {"rope_type": "proportional", "rope_theta": THETA, "partial_rotary_factor": 0.25},
}


def yarn_frequencies(rope: dict[str, Any]) -> list[float]:
    """YaRN (arXiv 2309.00071): pairs that turn often keep their frequency, slow ones take 1 / factor of it."""

    def pair_of(turns: float) -> float:
        return HEAD * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = pair_of(rope.get("beta_fast", 32)), pair_of(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, HEAD - 1)
    ramp = [min(max((pair - low) / (high - low), 0), 1) for pair in range(HEAD // 2)]
    return [freq / rope["factor"] * part + freq * (1 - part) for freq, part in zip(PLAIN, ramp, strict=True)]


def read_as_server(fields: dict[str, Any], *, max_model_len: int) -> tuple[list[float], float]:
    """Frequencies and attention factor as vLLM's and SGLang's `get_rope` take them from a draft's config.json."""
    rope = fields["rope_parameters"]
    theta, kind = rope["rope_theta"], rope["rope_type"]
    plain = [theta ** (-2 * pair / HEAD) for pair in range(HEAD // 2)]
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return [freq / rope["factor"] for freq in plain], 1.0
    if kind == "yarn":  # attention_factor and mscale are obeyed by some versions and not by others
        assert not {"attention_factor", "attn_factor", "mscale", "mscale_all_dim"} & rope.keys()
        return yarn_frequencies(rope), 0.1 * math.log(rope["factor"]) + 1
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        which = "long" if max_model_len > original else "short"
        usual = math.sqrt(1 + math.log(fields["max_position_embeddings"] / original) / math.log(original))
        factors = rope[f"{which}_factor"]
        return [freq / part for freq, part in zip(plain, factors, strict=True)], rope.get(f"{which}_mscale", usual)
    if kind == "llama3":
        original = rope["original_max_position_embeddings"]
        low, high = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
        scaled = []
        for freq in plain:
            length = 2 * math.pi / freq
            smooth = min(
                max(
                    (original / length - rope["low_freq_factor"])
                    / (rope["high_freq_factor"] - rope["low_freq_factor"]),
                    0,
                ),
                1,
            )
            assert high < low
            scaled.append(freq * smooth + freq / rope["factor"] * (1 - smooth))
        return scaled, 1.0
    raise AssertionError(f"servers read {kind} in other ways")


def build(rope: dict[str, Any], *, max_length: int | None = None) -> Qwen3DSparkModel:
    target = tiny_target_config(rope_parameters=dict(rope))
    config = build_draft_config(
        target, mask_token_id=MASK_ID, num_draft_layers=2, block_size=3, target_layer_ids=[0, 3], markov_rank=5,
        num_anchors=4, max_length=max_length,
    )  # fmt: skip
    return tiny_model(config)


@pytest.mark.parametrize("rope", KINDS.values(), ids=KINDS.keys())
def test_a_block_does_not_depend_on_what_is_packed_with_it(rope: dict[str, Any]) -> None:
    """A document of 10 tokens alone, beside one of 70 tokens (above both lengths that ropes look at), and after it."""
    model = build(rope)
    short, long = make_document(10, seed=1), make_document(70, seed=2)
    alone = pack([[short]], [[[2, 6]]])
    beside, after = pack([[short, long]], [[[2, 6], [30, 60]]]), pack([[long, short]], [[[30, 60], [2, 6]]])
    with torch.no_grad():
        own, first, second = (
            model(batch["input_ids"], batch["target_hidden_states"], batch["anchor_positions"], batch["seq_lens"])
            for batch in (alone, beside, after)
        )
    torch.testing.assert_close(first[0, :2], own[0, :2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second[0, 2:4], own[0, :2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rope", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_a_batch_without_context_or_supervision_trains_nothing(rope: dict[str, Any], num_tokens: int) -> None:
    module = DSparkTrainerModule(build(rope))
    document = make_document(num_tokens, seed=1, loss_mask=[0] * num_tokens)
    batch = pack([[document]])
    module(**batch).loss.backward()
    assert all(not p.grad.any() for p in module.parameters() if p.requires_grad and p.grad is not None)


def test_the_first_token_as_the_only_anchor_has_no_context() -> None:
    module = DSparkTrainerModule(build(LONGROPE))
    document = make_document(2, seed=1, loss_mask=[1, 1])
    metrics = module(**pack([[document]], [[[0]]]))
    assert metrics.num_supervised == 1
    assert torch.isfinite(metrics.loss)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("max_model_len", [12, 64])
def test_servers_read_the_frequencies_that_were_trained(name: str, max_model_len: int) -> None:
    model = build(KINDS[name])
    frequencies, attention = read_as_server(
        config_fields(model.config, dtype=torch.float32), max_model_len=max_model_len
    )
    np.testing.assert_allclose(model.rotary_emb.inv_freq.double(), frequencies, rtol=1e-5)
    assert model.rotary_emb.attention_scaling == pytest.approx(attention)
    cos, _ = model.rotary_emb(torch.zeros(1), torch.tensor([[5]]))
    np.testing.assert_allclose(cos[0, 0, : HEAD // 2], np.cos(5 * np.array(frequencies)) * attention, atol=1e-5)


USUAL_YARN = 0.1 * math.log(4) + 1  # 1.1386
ATTENTION = {
    "yarn": (YARN, USUAL_YARN),
    # DeepSeek's ratio of two equal scales is 1; a lone mscale is none, as in transformers.
    "both scales": (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
    "unlike scales": (YARN | {"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4) + 1) / USUAL_YARN),
    "one scale": (YARN | {"mscale": 0.707}, USUAL_YARN),
    "named": (YARN | {"attention_factor": 1.7, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.7),
    "longrope": (LONGROPE, math.sqrt(1 + math.log(64 / 16) / math.log(16))),
    "longrope's ratio": (LONGROPE | {"factor": 32.0}, math.sqrt(1 + math.log(32) / math.log(16))),
    "longrope's scales": (LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}, 1.3),
}  # fmt: skip


@pytest.mark.parametrize(("rope", "expected"), ATTENTION.values(), ids=ATTENTION.keys())
def test_the_attention_factor_is_the_targets_own(rope: dict[str, Any], expected: float) -> None:
    model = build(rope)
    assert model.rotary_emb.attention_scaling == pytest.approx(expected)
    for max_model_len in (12, 64):
        assert read_as_server(config_fields(model.config, dtype=torch.float32), max_model_len=max_model_len)[
            1
        ] == pytest.approx(expected)


@pytest.mark.parametrize(("max_length", "factors"), [(12, SHORT), (16, SHORT), (17, LONG), (64, LONG), (None, LONG)])
def test_the_longest_text_of_the_cache_chooses_the_set_of_a_longrope(
    max_length: int | None, factors: list[float]
) -> None:
    model = build(LONGROPE, max_length=max_length)
    expected = [freq / factor for freq, factor in zip(PLAIN, factors, strict=True)]
    np.testing.assert_allclose(model.rotary_emb.inv_freq.double(), expected, rtol=1e-5)


def test_hunyuans_alpha_is_in_the_base_that_is_written() -> None:
    target = HunYuanDenseV1Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
        rope_parameters={"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": THETA},
    )  # fmt: skip
    config = build_draft_config(target, mask_token_id=MASK_ID, target_layer_ids=[1])
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": pytest.approx(THETA * 1000 ** (8 / 6))}
    frequencies = Qwen3DSparkModel(config).rotary_emb.inv_freq
    np.testing.assert_allclose(frequencies, [(1e4 * 1e4) ** (-2 * pair / 8) for pair in range(4)], rtol=1e-5)


def test_a_dynamic_rope_beyond_the_targets_positions_has_the_base_of_the_longest_text() -> None:
    rope = draft_rope(KINDS["dynamic"], head_dim=8, max_positions=64, max_length=128)
    assert rope == {"rope_type": "default", "rope_theta": pytest.approx(THETA * (4 * 2 - 3) ** (8 / 6))}
    assert draft_rope(KINDS["dynamic"], head_dim=8, max_positions=64, max_length=64) == KINDS["default"]


def test_a_draft_turns_whole_heads_where_its_target_turns_parts() -> None:
    """Phi-4-mini: six scales for heads of sixteen numbers, of which twelve are turned."""
    rope = LONGROPE | {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6, "partial_rotary_factor": 0.75}
    target = Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, original_max_position_embeddings=16, pad_token_id=0,
        rope_parameters=rope, partial_rotary_factor=0.75,
    )  # fmt: skip
    config = build_draft_config(target, mask_token_id=MASK_ID, target_layer_ids=[1])
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": THETA}
    assert Qwen3DSparkModel(config).rotary_emb.inv_freq.shape == (8,)
    with pytest.raises(SettingError, match="rope: expected 4 long factors, got 6 from the target"):
        draft_rope(rope | {"partial_rotary_factor": 1.0}, head_dim=8, max_positions=64)


def test_phimoe_scales_are_those_of_the_set() -> None:
    target = PhimoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
        rope_parameters=LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3},
    )  # fmt: skip
    for max_length, expected in ((16, 1.1), (17, 1.3)):
        config = build_draft_config(target, mask_token_id=MASK_ID, target_layer_ids=[1], max_length=max_length)
        assert Qwen3DSparkModel(config).rotary_emb.attention_scaling == expected


@pytest.mark.parametrize("name", ["default", "linear", "yarn", "llama3", "yarn untruncated"])
def test_plain_ropes_are_written_as_the_target_has_them(name: str) -> None:
    assert build(KINDS[name]).config.rope_parameters == KINDS[name]


def test_a_draft_of_two_sets_is_written_with_the_one_that_it_computes() -> None:
    """Configs from elsewhere: the set of the longest text that the config allows, as servers take it."""
    config = tiny_config()
    config.rope_parameters = dict(LONGROPE)
    model = tiny_model(config)
    rope = config_fields(model.config, dtype=torch.float32)["rope_parameters"]
    assert rope["short_factor"] == rope["long_factor"] == LONG
    config = tiny_config()
    config.rope_parameters = {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "rope_theta": THETA}
    assert tiny_model(config).config.rope_parameters == {"rope_type": "default", "rope_theta": THETA}


@pytest.mark.parametrize("name", KINDS)
def test_frequencies_stay_float32_through_casts(name: str) -> None:
    model = build(KINDS[name])
    exact = model.rotary_emb.inv_freq.clone()
    assert torch.equal(model.to(torch.bfloat16).rotary_emb.inv_freq, exact)
