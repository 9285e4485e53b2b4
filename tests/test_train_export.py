"""Exported drafts: a server of its own drafts from either form what the trained draft does, and nothing is guessed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draft_reference import HIDDEN, MASK_ID, VOCAB, tiny_config, tiny_model, tiny_target_config
from full_disk import limited_file_size
from served_draft import SHARED, Block, ServerError, draft_block, load_served
from stages.errors import SettingError
from stages.train import Qwen3DSparkModel
from stages.train.config import build_draft_config
from stages.train.draft_folder import read_draft
from stages.train.export import (
    FORMS,
    ExportError,
    Form,
    ServedTarget,
    dspark_fields,
    export_weights,
    speculators_fields,
    write_export,
)
from stages.train.warm_start import load_initial_weights

TARGET = ServedTarget(name="some/target", architectures=("Qwen3ForCausalLM",))
TOKENS = [3, 14, 15, 9, 2, 6]
HEADS: dict[str, dict[str, Any]] = {
    "vanilla": {"markov_head_type": "vanilla"},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "no Markov head": {"markov_rank": 0},
    "confidence without Markov": {"markov_head_type": "rnn", "confidence_head_with_markov": False},
    "no confidence": {"markov_head_type": "gated", "enable_confidence_head": False},
    "embeddings and last block": {"target_layer_ids": [-1, 5], "block_size": 5},
}


def export(
    model: Qwen3DSparkModel, out: Path, *, form: Form, dtype: torch.dtype = torch.float32, shared: bool = True
) -> Path:
    weights = export_weights(model, dtype=dtype, with_target_weights=shared)
    if form == "dspark":
        fields = dspark_fields(model.config, dtype=dtype)
    else:
        fields = speculators_fields(model.config, target=TARGET, dtype=dtype)
    write_export(out, fields=fields, weights=weights, texts={"README.md": "a card\n"})
    return out


def target_states() -> dict[int, Tensor]:
    """What the target's blocks gave for TOKENS; every layer something else, so that no id can stand for another."""
    generator = torch.Generator().manual_seed(5)
    return {layer: torch.randn(len(TOKENS), HIDDEN, generator=generator) for layer in range(-1, 6)}


@torch.no_grad()
def own_block(model: Qwen3DSparkModel) -> Block:
    """The block that the project's own modules draft greedily behind TOKENS."""
    size, states = model.block_size, target_states()
    hidden = torch.cat([states[layer] for layer in model.config.target_layer_ids], dim=-1)[None]
    h_11KD = model(torch.tensor([TOKENS]), hidden, torch.tensor([[len(TOKENS) - 1]]))
    base_KV = model.base_logits(h_11KD[0, 0])
    logits_KV, previous_11K = base_KV.clone(), torch.zeros(1, 1, size, dtype=torch.long)
    previous_11K[0, 0, 0] = TOKENS[-1]
    for slot in range(size):
        if model.markov_head is not None:
            latent = model.markov_head.latent(h_11KD, previous_11K)[0, 0, slot]
            logits_KV[slot] = base_KV[slot] + model.markov_head.bias(latent)
        if slot + 1 < size:
            previous_11K[0, 0, slot + 1] = logits_KV[slot].argmax()
    confidences = None
    if model.confidence_head is not None:
        embedded = None
        if model.confidence_head.with_markov and model.markov_head is not None:
            embedded = model.markov_head.embed(previous_11K)
        confidences = model.confidence_head(h_11KD, embedded)[0, 0]
    return Block([int(token) for token in logits_KV.argmax(-1)], logits_KV, confidences)


def shared_tensors(model: Qwen3DSparkModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name in SHARED}


def rounded(model: Qwen3DSparkModel, dtype: torch.dtype) -> Qwen3DSparkModel:
    """The model with weights of `dtype`, computing in float32; rope never rounds."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False], ids=["whole", "without target weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_a_server_drafts_what_the_draft_does(
    form: Form, shared: bool, dtype: torch.dtype, head: str, tmp_path: Path
) -> None:
    model = tiny_model(tiny_config(**HEADS[head]))
    folder = export(model, tmp_path / "out", form=form, dtype=dtype, shared=shared)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    expected = own_block(rounded(model, dtype))
    target = None if shared else shared_tensors(model)
    block = draft_block(load_served(folder, target=target), TOKENS, target_states())
    assert block.tokens == expected.tokens
    torch.testing.assert_close(block.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert (block.confidences is None) == (expected.confidences is None)
    if block.confidences is not None and expected.confidences is not None:
        torch.testing.assert_close(block.confidences, expected.confidences, rtol=1e-4, atol=1e-4)
    if not shared:
        with pytest.raises(ServerError, match="embed_tokens"):
            load_served(folder)


@pytest.mark.parametrize("form", FORMS)
def test_a_draft_without_a_markov_head_is_written_with_one_that_adds_nothing(form: Form, tmp_path: Path) -> None:
    """vLLM and SGLang load no other; rank 1 costs two numbers a token of the vocabulary."""
    model = tiny_model(tiny_config(markov_rank=0))
    folder = export(model, tmp_path / "out", form=form)
    fields, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert (fields["markov_rank"], fields["markov_head_type"], fields["confidence_head_with_markov"]) == (
        1,
        "vanilla",
        False,
    )
    for name in ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight"):
        assert torch.equal(weights[name], torch.zeros(VOCAB, 1))
    block = draft_block(load_served(folder), TOKENS, target_states())
    torch.testing.assert_close(block.logits, own_block(model).logits, rtol=1e-4, atol=1e-4)
    if form == "dspark":
        back = own_block(read_draft(folder))
        assert torch.equal(back.logits, own_block(model).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "no Markov head"])
@pytest.mark.parametrize("scale", [0.25, 16.0])
def test_a_server_that_scales_the_bias_too_drafts_what_was_trained(
    scale: float, head: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Trained: scale * head + bias. vLLM computes scale * (head + bias), with the bias of the file."""
    target = tiny_target_config(logit_scale=scale)
    settings: dict[str, Any] = {"mask_token_id": MASK_ID, "num_draft_layers": 2, "block_size": 3, "markov_rank": 5}
    config = build_draft_config(target, **{**settings, "target_layer_ids": [0, 3], **HEADS[head]})
    model = tiny_model(config)
    folder = export(model, tmp_path / "out", form="dspark", dtype=dtype)
    expected = own_block(rounded(tiny_model(config), dtype))
    block = draft_block(load_served(folder), TOKENS, target_states())
    assert block.tokens == expected.tokens
    torch.testing.assert_close(block.logits, expected.logits, rtol=1e-4, atol=1e-4)
    back = read_draft(folder)  # here it is again as it was trained, and exported once more the same file
    torch.testing.assert_close(own_block(back).logits, expected.logits, rtol=1e-4, atol=1e-4)
    again = export(back, tmp_path / "again", form="dspark", dtype=dtype)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_soft_capped_bias_is_left_as_it_was_trained(tmp_path: Path) -> None:
    """It is added after the cap; no number in the file makes a server do that."""
    target = tiny_target_config(logit_scale=0.25, final_logit_softcapping=30.0)
    config = build_draft_config(target, mask_token_id=MASK_ID, target_layer_ids=[0, 3], markov_rank=5)
    model = tiny_model(config)
    folder = export(model, tmp_path / "out", form="dspark")
    name = "markov_head.markov_w2.weight"
    assert torch.equal(load_file(folder / "model.safetensors")[name], model.state_dict()[name])
    assert torch.equal(read_draft(folder).state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize("shared", [True, False])
def test_a_tied_draft_is_exported_with_one_tensor_for_both(shared: bool, tmp_path: Path) -> None:
    model = tiny_model()
    model.load_target_head(model.embed_tokens.weight)
    folder = export(model, tmp_path / "out", form="dspark", shared=shared)
    stored = {"embed_tokens.weight"} if shared else set()
    assert set(load_file(folder / "model.safetensors")) & set(SHARED) == stored
    block = draft_block(load_served(folder, target=shared_tensors(model)), TOKENS, target_states())
    torch.testing.assert_close(block.logits, own_block(model).logits, rtol=1e-4, atol=1e-4)
    if shared:
        torch.testing.assert_close(own_block(read_draft(folder)).logits, own_block(model).logits)


@pytest.mark.parametrize("shared", [True, False])
def test_the_dspark_form_comes_back_bit_for_bit(shared: bool, tmp_path: Path) -> None:
    model = tiny_model()
    folder = export(model, tmp_path / "out", form="dspark", shared=shared)
    if not shared:
        with pytest.raises(SettingError, match=r"lacks the target's embed_tokens\.weight and lm_head\.weight"):
            read_draft(folder)
        return
    back = read_draft(folder)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert dspark_fields(back.config, dtype=torch.float32) == dspark_fields(model.config, dtype=torch.float32)


def off_by_one(fields: dict[str, Any], key: str) -> None:
    fields[key] = [layer + 1 for layer in fields[key]]


# What a config says -> how it goes wrong. Each must be noticed: by an error, or by other logits.
CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "rope_theta": lambda f: f.update(rope_theta=f["rope_theta"] * 2),
    "rope": lambda f: f.update(
        rope_theta=1e4, rope_parameters=f["rope_parameters"] | {"rope_theta": 1e4}
    ),
    "rms_norm_eps": lambda f: f.update(rms_norm_eps=0.1),
    "num_attention_heads": lambda f: f.update(num_attention_heads=2),
    "num_key_value_heads": lambda f: f.update(num_key_value_heads=4),
    "head_dim": lambda f: f.update(head_dim=4, num_attention_heads=8, num_key_value_heads=4),
    "num_hidden_layers": lambda f: f.update(num_hidden_layers=1, layer_types=["full_attention"]),
    "layer_types": lambda f: f.update(layer_types=["sliding_attention"] * 2),
    "hidden_size": lambda f: f.update(hidden_size=8),
    "intermediate_size": lambda f: f.update(intermediate_size=8),
    "vocab_size": lambda f: f.update(vocab_size=30),
    "dtype": lambda f: f.update(dtype="bfloat16"),
    "tie_word_embeddings": lambda f: f.update(tie_word_embeddings=True),
}  # fmt: skip
OWN_CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "mask_token_id": lambda f: f.update(mask_token_id=MASK_ID - 1),
    "block_size": lambda f: f.update(block_size=2),
    "markov_rank": lambda f: f.update(markov_rank=0),
    "markov_head_type": lambda f: f.update(markov_head_type="vanilla"),
    "enable_confidence_head": lambda f: f.update(enable_confidence_head=False),
    "confidence_head_with_markov": lambda f: f.update(confidence_head_with_markov=False),
    "sample_from_anchor": lambda f: f.update(sample_from_anchor=False),
}
LAYERS: dict[Form, str] = {"dspark": "target_layer_ids", "speculators": "aux_hidden_state_layer_ids"}


def outcome(folder: Path) -> Tensor | None:
    """The logits that a server drafts with, or None where it refuses."""
    try:
        return draft_block(load_served(folder), TOKENS, target_states()).logits
    except (ServerError, KeyError, RuntimeError):
        return None


@pytest.mark.parametrize("form", FORMS)
def test_every_field_is_noticed_when_it_is_changed_or_missing(form: Form, tmp_path: Path) -> None:
    folder = export(tiny_model(tiny_config(markov_head_type="gated")), tmp_path / "out", form=form)
    file = folder / "config.json"
    whole, expected = file.read_text(), outcome(folder)
    assert expected is not None

    def check(name: str, change: Callable[[dict[str, Any]], Any], *, inner: bool) -> None:
        fields = json.loads(whole)
        change(fields["transformer_layer_config"] if inner else fields)
        file.write_text(json.dumps(fields))
        found = outcome(folder)
        assert found is None or found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-3), name

    is_nested = form == "speculators"
    for name, change in CHANGES.items():
        check(name, change, inner=is_nested)
    for name, change in OWN_CHANGES.items():
        check(name, change, inner=False)
    check("layers", lambda fields: off_by_one(fields, LAYERS[form]), inner=False)
    for name in CHANGES:
        if name != "rope":
            check(f"no {name}", lambda fields, name=name: fields.pop(name), inner=is_nested)
    for name in (*OWN_CHANGES, LAYERS[form]):
        check(f"no {name}", lambda fields, name=name: fields.pop(name), inner=False)
    if is_nested:
        for name in ("draft_vocab_size", "speculators_config", "sliding_window_non_causal", "target_hidden_size"):
            check(f"no {name}", lambda fields, name=name: fields.pop(name), inner=False)


def test_the_fields_of_the_speculators_form() -> None:
    """The layout of speculators 0.9.0, whose own class loaded such folders and gave the same logits."""
    fields = speculators_fields(
        tiny_config(target_layer_ids=[-1, 2, 5], block_size=7), target=TARGET, dtype=torch.bfloat16
    )
    backbone = fields.pop("transformer_layer_config")
    assert fields == {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": "dspark",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": 7, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {"name_or_path": "some/target", "architectures": ["Qwen3ForCausalLM"]},
        },
        "aux_hidden_state_layer_ids": [0, 3, 6],
        "block_size": 7, "mask_token_id": MASK_ID, "sample_from_anchor": True, "markov_rank": 5,
        "markov_head_type": "vanilla", "enable_confidence_head": True, "confidence_head_with_markov": True,
        "target_hidden_size": HIDDEN, "draft_vocab_size": 31, "sliding_window_non_causal": True,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    assert backbone["model_type"] == "qwen3"
    assert backbone["num_hidden_layers"] == 2
    assert backbone["rope_parameters"] == {"rope_type": "default", "rope_theta": 50.0}
    assert not set(backbone) & {"block_size", "target_layer_ids", "num_target_layers", "num_anchors", "architectures"}


@pytest.mark.parametrize("field", ["logit_scale", "final_logit_softcapping"])
def test_what_the_speculators_form_cannot_say_is_refused(field: str) -> None:
    target = tiny_target_config(**{field: 2.0})
    config = build_draft_config(target, mask_token_id=MASK_ID, target_layer_ids=[0, 3])
    with pytest.raises(ExportError, match=rf"no place for the target's {field} 2\.0.*--format dspark"):
        speculators_fields(config, target=TARGET, dtype=torch.float32)
    assert dspark_fields(config, dtype=torch.float32)[field] == 2.0


def test_a_dtype_that_the_weights_do_not_fit(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.fc.weight[0, 0] = 1e5
    with pytest.raises(ExportError, match=r"not finite in float16: fc\.weight; export as bfloat16"):
        export_weights(model, dtype=torch.float16, with_target_weights=True)
    assert export_weights(model, dtype=torch.bfloat16, with_target_weights=True)["fc.weight"].isfinite().all()


@pytest.mark.parametrize("num_bytes", [0, 1000, 20_000])
def test_a_full_disk_leaves_nothing(num_bytes: int, tmp_path: Path) -> None:
    model = tiny_model()
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) > 20_000
    with limited_file_size(num_bytes), pytest.raises(ExportError, match=r"out: cannot write: .*nothing of it is left"):
        export(model, tmp_path / "out", form="dspark")
    assert os.listdir(tmp_path) == []
    export(model, tmp_path / "out", form="dspark")


def test_what_is_there_stays(tmp_path: Path) -> None:
    model = tiny_model()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link"):
        with pytest.raises(ExportError, match=f"{name}: exists already; name a new folder"):
            export(model, tmp_path / name, form="dspark")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "link"]
    with pytest.raises(ExportError, match="file/below: cannot write"):
        export(model, tmp_path / "file" / "below", form="dspark")


def drop(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file({key: value.clone() for key, value in weights.items() if key != name}, folder / "model.safetensors")

    return damage


def put_in_config(folder: Path, **changes: object) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))


def no_gate(folder: Path) -> None:
    put_in_config(folder, markov_head_type="vanilla")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no draft here"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no draft here"),
    "config cut": (lambda folder: (folder / "config.json").write_text('{"a'), r"as a draft: config\.json"),
    "config a list": (
        lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: expected a JSON object",
    ),
    "config of other types": (
        lambda folder: put_in_config(folder, markov_rank=[]), r"out: cannot be read as a draft: int\(\) argument must",
    ),
    "config without sense": (
        lambda folder: put_in_config(folder, num_attention_heads="x"), r"as a draft: .*num_attention_heads",
    ),
    "weights cut": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), r"as a draft: model\.safetensors",
    ),
    "head gone": (drop("lm_head.weight"), r"lacks the target's lm_head\.weight"),
    "tensor gone": (drop("fc.weight"), r"its weights have no fc\.weight"),
    "gate unknown": (no_gate, r"markov_head\.gate_proj\.bias, which its config does not ask for"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_folder_that_is_no_whole_draft_is_refused(kind: str, tmp_path: Path) -> None:
    """transformers fills such gaps with random numbers."""
    damage, message = DAMAGES[kind]
    folder = export(tiny_model(tiny_config(markov_head_type="gated")), tmp_path / "out", form="dspark")
    read_draft(folder)
    damage(folder)
    with pytest.raises(SettingError, match=message):
        read_draft(folder)


@pytest.mark.parametrize("name", ["evil\n# x", "a/b\r", "a\x1b[31m", "a\u2028b", "a\ud800"])
def test_a_name_that_would_break_a_card_is_refused(name: str) -> None:
    with pytest.raises(ExportError, match="the target's name: expected printable characters, got '"):
        ServedTarget(name=name)


@pytest.mark.parametrize("form", FORMS)
def test_a_training_does_not_start_from_what_is_for_servers(form: Form, tmp_path: Path) -> None:
    model = tiny_model()
    folder = export(model, tmp_path / "out", form=form, shared=False)
    message = "lacks the target's" if form == "dspark" else "is in the speculators form, which only servers read"
    with pytest.raises(SettingError, match=rf"draft\.init_from: .*out: {message}"):
        load_initial_weights(model, folder)
