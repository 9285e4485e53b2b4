"""Captured states held bit for bit against transformers' own `output_hidden_states`, for several architectures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from stages.extract.capture import Capture, convert_states, find_non_finite, pad_batch
from stages.extract.self_check import check_batching, check_head
from stages.extract.settings import TargetSection
from stages.extract.target import TargetError, TargetParts, find_parts, load_target
from tiny_target import NUM_LAYERS, SHAPE, save_tiny_target

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
    with pytest.raises(IndexError):
        capture([np.array([999], dtype=np.int32)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


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


def load(tmp_path: Path) -> tuple[TargetParts, Capture]:
    folder = save_tiny_target(tmp_path / "target")
    parts = load_target(folder, target=TargetSection(model=str(folder)), device=torch.device("cpu"))
    return parts, Capture(parts, layers=range(NUM_LAYERS), dtype=torch.bfloat16)


def test_self_checks_pass_on_a_sound_target(tmp_path: Path) -> None:
    parts, capture = load(tmp_path)
    ids = make_ids([40, 9, 23], vocab_size=4000)
    check_head(capture, parts=parts, input_ids=ids[0])
    check_batching(capture, input_ids=ids)


def test_self_check_notices_a_wrong_final_norm(tmp_path: Path) -> None:
    parts, _ = load(tmp_path)
    wrong = TargetParts(**{**vars(parts), "final_norm": parts.blocks[-1].mlp})
    capture = Capture(wrong, layers=range(NUM_LAYERS), dtype=torch.bfloat16)
    with pytest.raises(TargetError, match="self-check: lm_head"):
        check_head(capture, parts=wrong, input_ids=make_ids([200], vocab_size=4000)[0])


def test_self_check_notices_a_target_that_sees_padding(tmp_path: Path) -> None:
    parts, capture = load(tmp_path)

    def leak(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.mean(1, keepdim=True)

    parts.blocks[0].mlp.register_forward_hook(leak)
    with pytest.raises(TargetError, match="does not ignore padding"):
        check_batching(capture, input_ids=make_ids([200, 9], vocab_size=4000))
