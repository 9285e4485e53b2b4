"""The target with a KV cache that is cut back, against forwards without any cache."""

import random
from typing import Any

import pytest
import torch
import transformers

from stages.extract.cached_target import CachedTarget, check_cropping
from stages.extract.capture import Capture
from stages.extract.target import TargetError, find_parts
from tiny_target import SHAPE

LAYERS = [-1, 0, 2]
WIDE = SHAPE | {"initializer_range": 0.2}  # so that logits differ
SLIDING = {"sliding_window": 5}  # shorter than the sequences below


def make_model(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    if name == "GPT2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=2, n_positions=64)
        return transformers.GPT2LMHeadModel(config).eval()
    config = getattr(transformers, f"{name}Config")(**WIDE, **changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen3", {}),
        ("Llama", {}),
        ("GPT2", {}),
        ("Mistral", SLIDING),
        ("Gemma2", SLIDING | {"attn_implementation": "eager", "final_logit_softcapping": 3.0}),
        ("Qwen3", SLIDING | {"use_sliding_window": True, "max_window_layers": 2}),
    ],
)
def test_logits_and_states_equal_a_run_without_a_cache(name: str, changes: dict[str, Any]) -> None:
    model = make_model(name, **changes)
    parts = find_parts(model)
    target, capture = CachedTarget(parts, layers=LAYERS), Capture(parts, layers=LAYERS, dtype=torch.float32)
    rng = random.Random(0)
    tokens: list[int] = []
    states = torch.empty(0, 3 * 32)
    for _ in range(9):
        new = [rng.randrange(64) for _ in range(rng.randint(1, 5))]
        num_logits = rng.randint(1, len(new))
        step = target.extend(new, num_logits=num_logits)
        tokens += new
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -num_logits:]
        torch.testing.assert_close(step.logits, expected, rtol=1e-4, atol=1e-4)
        states = torch.cat([states, step.context])
        own = capture([torch.tensor(tokens, dtype=torch.int32).numpy()]).hidden_states.flatten(1)
        torch.testing.assert_close(states, own, rtol=1e-4, atol=1e-4)
        num_back = rng.randint(0, len(new) - 1)
        target.forget(num_back)
        tokens, states = tokens[: len(tokens) - num_back], states[: len(states) - num_back]
        assert target.num_tokens == len(tokens)
    check_cropping(parts, input_ids=tokens)


def test_without_cutting_back_the_next_logits_are_others() -> None:
    """What the test above relies on: tokens that stay in the cache do change what follows."""
    target = CachedTarget(find_parts(make_model("Qwen3")))
    target.extend([1, 2, 3], num_logits=1)
    target.extend([4, 5], num_logits=1)
    kept = target.extend([6], num_logits=1).logits
    target.reset()
    target.extend([1, 2, 3], num_logits=1)
    assert (target.extend([6], num_logits=1).logits - kept).abs().max() > 0.01


def test_a_recurrent_target_is_refused() -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        **WIDE,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    model = transformers.Qwen3NextForCausalLM(config).eval()
    with pytest.raises(TargetError, match=r"Qwen3NextForCausalLM.*cut back"):
        check_cropping(find_parts(model), input_ids=[1, 2, 3, 4])


def test_a_cache_that_only_looks_cut_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.DynamicCache, "crop", lambda *_: None)
    with pytest.raises(TargetError, match="cut back, logits differ by"):
        check_cropping(find_parts(make_model("Qwen3")), input_ids=[1, 2, 3, 4])
