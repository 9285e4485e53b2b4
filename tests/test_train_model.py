"""The draft model: names, config, rope, files, and what a block may see."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import Gemma3Config, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from draft_reference import HIDDEN, MASK_ID, VOCAB, block_states, make_document, pack, tiny_config, tiny_model
from draft_reference import tiny_target_config as target_config
from stages.train import Qwen3DSparkModel, build_draft_config
from stages.train.attention import block_mask
from stages.train.checkpoint import save_draft
from stages.train.config import default_target_layer_ids

LAYER_TENSORS = [
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip
SHAPES = {
    "embed_tokens.weight": [VOCAB, HIDDEN],
    "norm.weight": [HIDDEN],
    "fc.weight": [HIDDEN, 2 * HIDDEN],
    "hidden_norm.weight": [HIDDEN],
    "lm_head.weight": [VOCAB, HIDDEN],
    "markov_head.markov_w1.weight": [VOCAB, 5],
    "markov_head.markov_w2.weight": [VOCAB, 5],
    "confidence_head.proj.weight": [1, HIDDEN + 5],
    "confidence_head.proj.bias": [1],
}
ROPES = [
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]  # fmt: skip


def run(model: Qwen3DSparkModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(batch["input_ids"], batch["target_hidden_states"], batch["anchor_positions"], batch["seq_lens"])


def example_batch() -> dict[str, torch.Tensor]:
    return pack([[make_document(9, seed=1), make_document(7, seed=2)]], [[[0, 4], [0, 3]]])


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({}, {}),
        (
            {"markov_head_type": "gated"},
            {"markov_head.gate_proj.weight": [5, HIDDEN + 5], "markov_head.gate_proj.bias": [5]},
        ),
        (
            {"markov_head_type": "rnn"},
            {"markov_head.joint_proj.weight": [15, 10 + HIDDEN], "markov_head.joint_proj.bias": [15]},
        ),
        ({"markov_rank": 0}, {"confidence_head.proj.weight": [1, HIDDEN]}),
        ({"confidence_head_with_markov": False}, {"confidence_head.proj.weight": [1, HIDDEN]}),
        ({"enable_confidence_head": False}, {}),
    ],
)
def test_tensor_names_and_shapes(changes: dict[str, object], extra: dict[str, list[int]]) -> None:
    model = tiny_model(tiny_config(**changes))
    expected = {**SHAPES, **extra}
    if changes.get("markov_rank") == 0:
        expected = {name: shape for name, shape in expected.items() if not name.startswith("markov_head")}
    if changes.get("enable_confidence_head") is False:
        expected = {name: shape for name, shape in expected.items() if not name.startswith("confidence_head")}
    state = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    layers = {f"layers.{layer}.{name}.weight" for layer in range(2) for name in LAYER_TENSORS}
    assert set(state) == set(expected) | layers
    assert {name: state[name] for name in expected} == expected
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"embed_tokens.weight", "lm_head.weight"}


def test_config_file_holds_every_field_that_servers_read(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "architectures": ["Qwen3DSparkModel"], "model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "hidden_act": "silu",
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "attention_bias": False,
        "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": False,
        "layer_types": ["full_attention", "full_attention"], "use_cache": True, "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rope_theta": 50.0, "rope_scaling": None,
        "block_size": 3, "mask_token_id": MASK_ID, "target_layer_ids": [0, 3], "num_target_layers": 6, "num_anchors": 4,
        "markov_rank": 5, "markov_head_type": "vanilla", "enable_confidence_head": True,
        "confidence_head_with_markov": True, "sample_from_anchor": True,
    }  # fmt: skip
    assert {name: written.get(name, "missing") for name in expected} == expected
    assert not {name for name in written if name.startswith("_")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_give_equal_outputs(rope: dict[str, object], dtype: torch.dtype, tmp_path: Path) -> None:
    config = build_draft_config(
        target_config(rope_parameters=dict(rope)), mask_token_id=MASK_ID, num_draft_layers=2, block_size=3,
        target_layer_ids=[0, 3], markov_rank=5,
    )  # fmt: skip
    model = tiny_model(config).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = Qwen3DSparkModel.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == {
        "embed_tokens.weight",
        "lm_head.weight",
    }
    assert loaded.config.rope_parameters == config.rope_parameters
    assert loaded.rotary_emb.attention_scaling == model.rotary_emb.attention_scaling
    assert loaded.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(loaded.rotary_emb.inv_freq, Qwen3DSparkModel(config).rotary_emb.inv_freq)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(run(loaded, example_batch()), run(model, example_batch()))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_loading_reports_no_missing_keys_and_stays_frozen(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    loaded, info = Qwen3DSparkModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not loaded.lm_head.weight.requires_grad


def test_save_draft_casts_the_file_and_not_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    model.load_target_head(torch.ones(VOCAB, HIDDEN), model.embed_tokens.weight)
    draft = tmp_path / "run" / "draft"
    draft.parent.mkdir()
    for _ in range(2):  # the second replaces the first
        save_draft(draft, draft_model=model, dtype=torch.bfloat16)
    assert model.dtype == torch.float32
    assert [path.name for path in draft.parent.iterdir()] == ["draft"]
    assert json.loads((draft / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(draft / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert all(
            torch.equal(file.get_tensor(name), model.state_dict()[name].bfloat16()) for name in model.state_dict()
        )
    loaded = Qwen3DSparkModel.from_pretrained(draft)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(run(loaded, example_batch()), run(tiny_bfloat16_twin(model), example_batch()))


def tiny_bfloat16_twin(model: Qwen3DSparkModel) -> Qwen3DSparkModel:
    twin = Qwen3DSparkModel(model.config).to(torch.bfloat16)
    twin.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    return twin


def test_rope_stays_exact_through_casts_and_meta_device() -> None:
    config = tiny_config()
    exact = 50.0 ** (-torch.arange(0, 8, 2).double() / 8)
    cast = tiny_model(config).to(torch.bfloat16).to(torch.float32).half()
    with torch.device("meta"):
        empty = Qwen3DSparkModel(config)
    empty.to_empty(device="cpu")
    for model in (cast, empty):
        assert model.rotary_emb.inv_freq.dtype == torch.float32
        torch.testing.assert_close(model.rotary_emb.inv_freq.double(), exact, rtol=1e-6, atol=0)
        assert torch.equal(model.rotary_emb.inv_freq, model.rotary_emb.original_inv_freq)


def test_initial_weights() -> None:
    model = Qwen3DSparkModel(tiny_config(markov_head_type="rnn"))
    assert not model.markov_head.markov_w2.weight.any()  # training starts as DFlash
    for name in ("fc", "markov_head.markov_w1", "layers.1.mlp.up_proj", "markov_head.joint_proj"):
        assert model.get_submodule(name).weight.std().item() == pytest.approx(0.02, rel=0.25), name
    assert model.hidden_norm.weight.eq(1).all()
    torch.manual_seed(3)
    first = Qwen3DSparkModel(tiny_config()).state_dict()
    torch.manual_seed(3)
    assert all(
        torch.equal(tensor, first[name]) for name, tensor in Qwen3DSparkModel(tiny_config()).state_dict().items()
    )


def test_load_target_head_copies_and_checks() -> None:
    model = tiny_model()
    tied = torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16)
    model.load_target_head(tied, tied)
    assert torch.equal(model.embed_tokens.weight, tied.float())
    assert torch.equal(model.lm_head.weight, tied.float())
    assert model.lm_head.weight.data_ptr() != model.embed_tokens.weight.data_ptr()
    with pytest.raises(ValueError, match=r"lm_head: expected \[31, 16\] as in the draft's config, got \[32, 16\]"):
        model.load_target_head(tied, torch.zeros(32, HIDDEN))


def test_states_equal_the_reference_and_padding_anchors_are_finite() -> None:
    model = tiny_model()
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    documents = [make_document(9, seed=1), make_document(7, seed=2)]
    batch = pack([documents], [[[0, 4, 8], [0, 3]]])
    h = run(model, batch)
    assert torch.isfinite(h).all()
    pairs = [(documents[0], 0), (documents[0], 4), (documents[0], 8), (documents[1], 0), (documents[1], 3)]
    for index, (document, anchor) in enumerate(pairs):
        expected = torch.stack(block_states(weights, model.config, document, anchor))
        torch.testing.assert_close(h[0, index].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("anchor", [0, 5, 11])
def test_a_block_sees_nothing_from_its_anchor_on(anchor: int) -> None:
    """Tokens and target states at and after the anchor, and other documents, may be anything but the anchor token."""
    model = tiny_model()
    documents = [make_document(4, seed=1), make_document(12, seed=2), make_document(5, seed=3)]
    batch = pack([documents], [[[], [anchor], []]])
    position = 4 + anchor
    h = run(model, batch)
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["input_ids"] = (changed["input_ids"] + 7) % (VOCAB - 1)
    changed["input_ids"][0, position] = batch["input_ids"][0, position]
    changed["target_hidden_states"][0, position:] = 100.0
    changed["target_hidden_states"][0, :4] = -100.0
    assert torch.equal(run(model, changed)[:, 0], h[:, 0])
    # It does see the anchor token, and the state before the anchor.
    changed["input_ids"][0, position] = (batch["input_ids"][0, position] + 1) % (VOCAB - 1)
    assert not torch.equal(run(model, changed)[:, 0], h[:, 0])
    if anchor:
        moved = {**batch, "target_hidden_states": batch["target_hidden_states"].clone()}
        moved["target_hidden_states"][0, position - 1] += 1.0
        assert not torch.equal(run(model, moved)[:, 0], h[:, 0])


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_markov_latents_see_true_previous_tokens_only(kind: str) -> None:
    model = tiny_model(tiny_config(markov_head_type=kind))
    h, tokens = torch.randn(1, 1, 3, HIDDEN), torch.tensor([[[4, 5, 6]]])
    latent = model.markov_head.latent(h, tokens)
    later = model.markov_head.latent(h, torch.tensor([[[4, 5, 9]]]))
    earlier = model.markov_head.latent(h, torch.tensor([[[9, 5, 6]]]))
    assert torch.equal(latent[:, :, :2], later[:, :, :2])
    assert not torch.equal(latent[:, :, 2], later[:, :, 2])
    assert torch.equal(latent[:, :, 1:], earlier[:, :, 1:]) == (kind != "rnn")
    assert model.markov_head.bias(latent).shape == (1, 1, 3, VOCAB)


def test_context_parts_serve_decoding() -> None:
    """Keys and values of a growing context, made piece by piece, give the block that the training pass gives."""
    model = tiny_model()
    document = make_document(9, seed=5)
    expected = run(model, pack([[document]], [[[6]]]))[:, :1]
    with torch.no_grad():
        pieces = []
        for piece in (slice(0, 4), slice(4, 6)):
            context = model.project_context(document.hidden[None, piece])
            pieces.append(model.context_key_values(context, torch.arange(9)[None, piece]))
        cache = [
            tuple(torch.cat(pair, dim=2) for pair in zip(*layer, strict=True)) for layer in zip(*pieces, strict=True)
        ]
        ids = torch.tensor([[int(document.ids[6]), MASK_ID, MASK_ID]])
        h = model.run_blocks(ids, torch.tensor([[6, 7, 8]]), cache)
    torch.testing.assert_close(h[:, None], expected, rtol=1e-5, atol=1e-6)


@given(st.lists(st.integers(-1, 7), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 4))
def test_block_mask_equals_its_definition(anchors: list[int], block_size: int, start: int) -> None:
    starts = [start if anchor >= start else 0 for anchor in anchors]
    mask = block_mask(torch.tensor([anchors]), torch.tensor([starts]), num_context=8, block_size=block_size)[0, 0]
    assert mask.shape == (len(anchors) * block_size, 8 + len(anchors) * block_size)
    for query, row in enumerate(mask.tolist()):
        block = query // block_size
        context = [starts[block] <= position < anchors[block] for position in range(8)]
        own = [other // block_size == block for other in range(len(anchors) * block_size)]
        assert row == context + own
        assert any(row)


def test_default_layers_of_the_reference_recipe() -> None:
    assert default_target_layer_ids(36) == [1, 9, 17, 25, 33]
    with pytest.raises(ValueError, match="num_target_layers"):
        default_target_layer_ids(0)


@given(st.integers(1, 200))
def test_default_layers_are_valid_for_any_target(num_layers: int) -> None:
    ids = default_target_layer_ids(num_layers)
    assert 1 <= len(ids) <= 5
    assert ids == sorted(set(ids))
    assert all(0 <= layer < num_layers for layer in ids)
    build_draft_config(target_config(num_hidden_layers=num_layers), mask_token_id=MASK_ID)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_layer_ids": [0, 6]}, r"target_layer_ids: \[6\] out of range; the target has 6 layers"),
        ({"target_layer_ids": [-2]}, r"target_layer_ids: \[-2\] out of range"),
        ({"target_layer_ids": [3, 1]}, "target_layer_ids: expected ascending, distinct"),
        ({"target_layer_ids": [1, 1]}, "target_layer_ids: expected ascending, distinct"),
        ({"target_layer_ids": []}, "target_layer_ids: expected ascending, distinct"),
        ({"markov_head_type": "lstm"}, "markov_head_type: expected one of vanilla, gated, rnn, got 'lstm'"),
        ({"mask_token_id": VOCAB}, "mask_token_id: expected an id in the target's embedding, 0 to 30, got 31"),
        ({"mask_token_id": -1}, "mask_token_id: expected"),
        ({"block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"num_draft_layers": 0}, "num_draft_layers: expected at least 1"),
        ({"num_anchors": 0}, "num_anchors: expected at least 1"),
        ({"markov_rank": -1}, "markov_rank: expected at least 0"),
        ({"intermediate_size": 0}, "intermediate_size: expected a positive number, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_a_config_that_is_no_draft_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size, mask_token_id, target_layer_ids"):
        Qwen3DSparkModel(target_config())
    config = tiny_config()
    config.sample_from_anchor = False
    with pytest.raises(ValueError, match="sample_from_anchor"):
        Qwen3DSparkModel(config)
    config = tiny_config()
    config.markov_head_type = "lstm"
    with pytest.raises(ValueError, match="markov_head_type"):
        Qwen3DSparkModel(config)


def other_targets() -> list[object]:
    small = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    gemma = Gemma3TextConfig(**small, head_dim=8, final_logit_softcapping=30.0, sliding_window=4)
    return [
        pytest.param(LlamaConfig(**small, rope_parameters=dict(ROPES[2]), rms_norm_eps=1e-5), ROPES[2], id="llama"),
        pytest.param(Qwen3MoeConfig(**small, head_dim=8, num_experts=2), {"rope_theta": 10000.0}, id="moe"),
        pytest.param(Gemma3Config(text_config=gemma), {"rope_theta": 1e6}, id="nested"),
        pytest.param(SimpleNamespace(), {}, id="gpt2"),
    ]


@pytest.mark.parametrize(("target", "rope"), other_targets())
def test_drafts_for_other_targets(target: object, rope: dict[str, object], tmp_path: Path) -> None:
    if isinstance(target, SimpleNamespace):
        target = GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=6, n_head=2)
        with pytest.raises(ValueError, match=r"intermediate_size: .* got None from the target; set draft"):
            build_draft_config(target, mask_token_id=MASK_ID)
    config = build_draft_config(
        target, mask_token_id=MASK_ID, num_draft_layers=2, block_size=3, target_layer_ids=[-1, 5], markov_rank=5,
        intermediate_size=24,
    )  # fmt: skip
    assert isinstance(config, Qwen3Config)
    text = target.get_text_config(decoder=True)
    assert config.hidden_size == HIDDEN
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, **rope}
    assert config.rms_norm_eps == getattr(text, "rms_norm_eps", 1e-6)
    assert config.num_target_layers == 6
    assert config.layer_types == ["full_attention"] * 2
    assert config.sliding_window is None
    assert getattr(config, "final_logit_softcapping", None) == getattr(text, "final_logit_softcapping", None)
    assert config.dtype in (torch.float32, torch.bfloat16)
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    loaded = Qwen3DSparkModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, example_batch()), run(model, example_batch()))


def test_unknown_ropes_are_refused_and_foreign_keys_dropped() -> None:
    target = target_config()
    target.rope_parameters = {"rope_type": "spiral", "rope_theta": 10.0}
    with pytest.raises(ValueError, match=r"rope_type: expected one of default, .* got 'spiral' from the target"):
        build_draft_config(target, mask_token_id=MASK_ID)
    target.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 10.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    }
    assert build_draft_config(target, mask_token_id=MASK_ID).rope_parameters == {
        "rope_type": "default",
        "rope_theta": 10.0,
    }


def test_logit_scale_of_the_target_is_kept() -> None:
    target = target_config()
    target.logit_scale = 0.25
    assert build_draft_config(target, mask_token_id=MASK_ID).logit_scale == 0.25
    target = target_config()
    target.logits_scaling = 8.0
    assert build_draft_config(target, mask_token_id=MASK_ID).logit_scale == 0.125
    assert not hasattr(tiny_config(), "logit_scale")
