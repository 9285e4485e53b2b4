"""Every shard is held against the target run alone: what is wrong with a batch, a block, a norm or a scale shows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from pipeline.config import Config
from pipeline.stage_one import settings_of
from stages.extract import run
from stages.extract.capture import Capture
from stages.extract.target import TargetError, TargetParts, load_target
from storage import CacheWriter
from tiny_target import make_config, save_tiny_target

LoadTarget = Callable[..., TargetParts]


def extract(config: Config) -> run.ExtractResult:
    return run.extract(settings_of(config))


def with_fault(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[TargetParts], TargetParts | None]) -> None:
    def load(*arguments: Any, **options: Any) -> TargetParts:
        parts = load_target(*arguments, **options)
        return spoil(parts) or parts

    monkeypatch.setattr(run.targets, "load_target", load)


def leak_neighbours(parts: TargetParts) -> None:
    """As attention over whole rows does where a batch is packed, or over padding."""

    def leak(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.flatten(0, 1).mean(0)

    parts.blocks[1].mlp.register_forward_hook(leak)


def look_ahead(parts: TargetParts) -> None:
    def leak(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 2 * output.mean(1, keepdim=True)

    parts.blocks[1].mlp.register_forward_hook(leak)


def rope_by_the_longest(parts: TargetParts) -> None:
    """As `dynamic` does: frequencies follow the longest position of a call."""

    def turn(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        return (args[0], positions * (1 + positions.max() / 100)), {}

    parts.decoder.rotary_emb.register_forward_pre_hook(turn, with_kwargs=True)


def another_norm(parts: TargetParts) -> TargetParts:
    return TargetParts(**{**vars(parts), "final_norm": parts.blocks[-1].post_attention_layernorm})


def shifted_blocks(parts: TargetParts) -> TargetParts:
    return TargetParts(**{**vars(parts), "blocks": nn.ModuleList([*parts.blocks[1:], parts.blocks[-1]])})


@pytest.mark.parametrize("spoil", [leak_neighbours, look_ahead, rope_by_the_longest, another_norm, shifted_blocks])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_stops_the_run_before_anything_is_kept(
    spoil: Any, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, target__dtype=dtype, cache__layers=[0, 1, 2, 3])
    with_fault(monkeypatch, spoil)
    with pytest.raises(TargetError, match=r"self-check: .* row \d+ differs by .* \(relative\)"):
        extract(config)
    assert CacheWriter(config.cache.path).missing_shards() == [0]
    assert not list((config.cache.path / "shards").glob("*"))


def test_a_fault_of_a_later_shard_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, num_chats=120, cache__layers=[0, 1, 2, 3])
    calls = 0
    launch = Capture.launch

    def spoil(self: Capture, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        states = launch(self, batch)
        hidden = states.hidden_states.clone()
        hidden[:, 1] = hidden[:, 0]
        return replace(states, hidden_states=hidden) if calls > 15 else states

    monkeypatch.setattr(Capture, "launch", spoil)
    with pytest.raises(TargetError, match=r"self-check: layer 1 of "):
        extract(config)
    committed = CacheWriter(config.cache.path)
    assert committed.plan.num_shards > len(committed.missing_shards()) > 0


def test_a_logit_scale_that_the_config_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(parts: TargetParts) -> None:
        forward = parts.model.forward

        def scaled(*arguments: Any, **options: Any) -> Any:
            output = forward(*arguments, **options)
            output.logits = output.logits * 0.5
            return output

        parts.model.forward = scaled

    with_fault(monkeypatch, scale)
    with pytest.raises(TargetError, match=r"self-check: lm_head on the last state of .* differs by 1 "):
        extract(make_config(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
        ("FalconH1", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16,
                      "mamba_d_state": 8, "mamba_n_groups": 1}),
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 16}),
        ("GPTNeoX", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sound_targets_pass(name: str, changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_tiny_target(tmp_path / "target")
    target_config = getattr(transformers, f"{name}Config")(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024, initializer_range=0.3, eos_token_id=2, bos_token_id=None, pad_token_id=0,
        **changes,
    )  # fmt: skip
    getattr(transformers, f"{name}ForCausalLM")(target_config).save_pretrained(folder)
    attention = "eager" if name == "Gemma2" else "sdpa"
    config = make_config(tmp_path, target__dtype=dtype, target__attn_implementation=attention)
    assert extract(config).num_computed_shards
