"""Captured states held bit for bit against transformers' own `output_hidden_states`, for several architectures."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from stages.extract.capture import Capture, convert_states, find_non_finite, pad_batch
from stages.extract.target import TargetError, find_parts
from tiny_target import SHAPE

LAYERS = [-1, 0, 1, 2, 3]


def make_ids(lengths: list[int], *, vocab_size: int = 64) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, length).astype(np.int32) for length in lengths]


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=2, n_positions=64)
        return transformers.GPT2LMHeadModel(config).eval()
    config_class = getattr(transformers, f"{name}Config")
    return getattr(transformers, f"{name}ForCausalLM")(config_class(**SHAPE)).eval()


@pytest.mark.parametrize("name", ["Qwen3", "Llama", "Gemma2", "Mistral", "Olmo2", "gpt2"])
@pytest.mark.parametrize("lengths", [[9], [7, 7], [12, 5, 3]])
def test_states_equal_the_models_own(name: str, lengths: list[int]) -> None:
    model = make_model(name)
    ids = make_ids(lengths)
    captured = Capture(find_parts(model), layers=LAYERS, dtype=torch.float32)(ids)
    batch = pad_batch(ids)
    mask = None if len(set(lengths)) == 1 else batch.attention_mask
    assert (batch.real_places is None) == (mask is None)
    with torch.inference_mode():
        output = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        logits = model.get_output_embeddings()(captured.last_hidden_states)
    real = batch.attention_mask.bool()
    for place, layer in enumerate(LAYERS[:-1]):  # transformers' entry k+1 is block k's output, but for the last block
        assert torch.equal(captured.hidden_states[:, place], output.hidden_states[layer + 1][real]), layer
    assert torch.equal(captured.last_hidden_states, output.hidden_states[-1][real])
    assert not torch.equal(captured.hidden_states[:, -1], captured.last_hidden_states), (
        "the last block is before the norm"
    )
    softcap = getattr(model.config, "final_logit_softcapping", None)
    expected = torch.tanh(logits / softcap) * softcap if softcap else logits
    torch.testing.assert_close(expected, output.logits[real], rtol=1e-5, atol=1e-5)


def test_a_nested_text_stack_is_found() -> None:
    config = transformers.Gemma3Config(
        text_config=SHAPE | {"sliding_window": 8},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    parts = find_parts(model)
    assert parts.decoder is model.model.language_model
    assert len(parts.blocks) == SHAPE["num_hidden_layers"]


def test_a_model_without_blocks_and_norm_is_refused() -> None:
    model = make_model("Qwen3")
    del model.model.norm
    with pytest.raises(TargetError, match="found no stack of 4 blocks"):
        find_parts(model)


def test_hooks_are_gone_after_an_error() -> None:
    model = make_model("Qwen3")
    capture = Capture(find_parts(model), layers=LAYERS, dtype=torch.float32)
    with pytest.raises(TargetError, match="does not run on cpu: IndexError"):
        capture([np.array([999], dtype=np.int32)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_target_that_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("Qwen3")
    monkeypatch.setattr(model.model.layers[1].mlp, "down_proj", torch.nn.Linear(3, 3))
    with pytest.raises(TargetError, match=r"does not run on cpu: RuntimeError: mat1 and mat2 shapes") as caught:
        Capture(find_parts(model), layers=LAYERS, dtype=torch.float32)(make_ids([9]))
    assert "\n" not in str(caught.value)


def test_non_finite_states_are_found_with_their_first_layer() -> None:
    model = make_model("Qwen3")
    parts = find_parts(model)
    capture = Capture(parts, layers=LAYERS, dtype=torch.float32)
    ids = [np.array([1, 2, 3], np.int32), np.array([4, 5, 6, 7], np.int32), np.array([1], np.int32)]
    assert list(find_non_finite(capture(ids), layers=LAYERS)) == []
    with torch.no_grad():
        parts.embed_tokens.weight[6] = float("nan")
    found = list(find_non_finite(capture(ids), layers=LAYERS))
    assert found == [(1, -1, "non-finite state")]


def test_in_fp16_too_large_is_told_from_not_finite() -> None:
    states = torch.tensor([1.0, -7e4, 65_504.0, float("nan"), float("inf"), -float("inf")], dtype=torch.bfloat16)
    found = convert_states(states, torch.float16)
    assert found.isnan().tolist() == [False, False, False, True, True, True]
    assert found[1] == -float("inf")
    assert torch.equal(convert_states(states, torch.bfloat16).isnan(), states.isnan())


def test_states_that_are_not_one_a_token_are_refused() -> None:
    config = transformers.Gemma3nTextConfig(
        **(SHAPE | {"num_key_value_heads": 2}), vocab_size_per_layer_input=64, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 4, layer_types=["full_attention"] * 4,
    )  # fmt: skip
    parts = find_parts(transformers.Gemma3nForCausalLM(config).eval())
    with pytest.raises(TargetError, match=r"its blocks give \[4, 1, 9, 32\], expected one state of 32 values"):
        Capture(parts, layers=LAYERS, dtype=torch.float32)(make_ids([9]))


def test_a_block_that_is_passed_over_is_refused() -> None:
    """Llama 3.2 Vision's blocks of cross-attention do not run on text: their rows would be what memory held before."""
    config = transformers.MllamaConfig(
        text_config=SHAPE | {"cross_attention_layers": [1], "pad_token_id": 0},
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2,
                       "intermediate_size": 16, "vision_output_dim": 32, "image_size": 28, "patch_size": 14,
                       "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
    )  # fmt: skip
    parts = find_parts(transformers.MllamaForConditionalGeneration(config).eval())
    with pytest.raises(TargetError, match="block 1 did not run on text"):
        Capture(parts, layers=LAYERS, dtype=torch.float32)(make_ids([9]))
    Capture(parts, layers=[0, 2], dtype=torch.float32)(make_ids([9]))


def test_an_encoder_is_refused() -> None:
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **SHAPE},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"},
    )  # fmt: skip
    model = transformers.PaliGemmaForConditionalGeneration(config)
    with pytest.raises(TargetError, match=r"expected a decoder-only language model.*got attention to later tokens"):
        find_parts(model)


WRAPPERS = ["Qwen2_5_VL", "Qwen3VL", "Mistral3", "Gemma3", "Gemma4", "Llama4", "InternVL", "Llava"]


def make_wrapper(name: str) -> Any:
    torch.manual_seed(0)
    text = SHAPE | {"initializer_range": 0.2}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 14}  # fmt: skip
    patches = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    mrope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    texts: dict[str, dict[str, Any]] = {
        "Qwen2_5_VL": {"rope_parameters": mrope},
        "Qwen3VL": {"rope_parameters": mrope | {"mrope_interleaved": True}},
        "Mistral3": {"model_type": "mistral"},
        "Gemma3": {"sliding_window": 8},
        "Gemma4": {"sliding_window": 8, "global_head_dim": 32, "hidden_size_per_layer_input": 8,
                   "vocab_size_per_layer_input": 64},
        "Llama4": {"num_local_experts": 2, "intermediate_size_mlp": 48, "pad_token_id": 0},
        "InternVL": {"model_type": "qwen2"},
        "Llava": {"model_type": "llama"},
    }  # fmt: skip
    visions: dict[str, dict[str, Any]] = {
        "Qwen2_5_VL": patches,
        "Qwen3VL": patches | {"deepstack_visual_indexes": [0]},
        "Mistral3": tower | {"model_type": "pixtral"},
        "InternVL": tower | {"image_size": [28, 28], "patch_size": [14, 14]},
        "Llava": tower | {"model_type": "clip_vision_model"},
        "Llama4": tower | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    }
    vision = {"vision_config": visions[name]} if name in visions else {}
    if name == "Gemma3":
        vision = {"vision_config": tower}
    config = getattr(transformers, f"{name}Config")(text_config=text | texts[name], **vision)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("lengths", [[7, 7], [12, 5, 3]])
def test_the_text_stack_of_a_wrapper_gives_the_wrappers_states(name: str, lengths: list[int]) -> None:
    """Held against the whole model on each text alone, whose positions it works out itself."""
    model = make_wrapper(name)
    parts = find_parts(model)
    assert parts.decoder is not model
    ids = make_ids(lengths)
    captured = Capture(parts, layers=LAYERS, dtype=torch.float32)(ids)
    start = 0
    for text in ids:
        rows = slice(start, start + len(text))
        start += len(text)
        with torch.inference_mode():
            output = model(input_ids=torch.from_numpy(text)[None].long(), use_cache=False, output_hidden_states=True)
        for place, layer in enumerate(LAYERS[:-1]):
            own = output.hidden_states[layer + 1][0]
            torch.testing.assert_close(captured.hidden_states[rows, place], own, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(captured.last_hidden_states[rows], output.hidden_states[-1][0], rtol=1e-4, atol=1e-4)
