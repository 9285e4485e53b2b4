"""What the weights of a draft mean beyond their shapes: the fields that two drafts must share to share weights."""

from collections.abc import Callable
from typing import Any

from transformers import Qwen3Config

from stages.train.model import BIAS_IN_SCALE, one_rope


def _read(name: str, default: Any = None) -> Callable[[Qwen3Config], Any]:
    def read(config: Qwen3Config) -> Any:
        value = getattr(config, name, None)
        return default if value is None else value

    return read


# Each field as it counts: what a missing one means is that.
_FIELDS: dict[str, Callable[[Qwen3Config], Any]] = {
    "target_layer_ids": lambda config: list(config.target_layer_ids or ()),
    "mask_token_id": _read("mask_token_id"),
    "sample_from_anchor": _read("sample_from_anchor", True),
    "is_causal": _read("is_causal", False),
    "layer_types": lambda config: sorted(set(config.layer_types or ["full_attention"])),
    "sliding_window": _read("sliding_window"),
    "rope_parameters": one_rope,
    "num_attention_heads": _read("num_attention_heads"),
    "num_key_value_heads": _read("num_key_value_heads"),
    "head_dim": _read("head_dim"),
    "attention_bias": _read("attention_bias", False),
    "hidden_act": _read("hidden_act"),
    "rms_norm_eps": _read("rms_norm_eps"),
    "logit_scale": _read("logit_scale", 1.0),
    "final_logit_softcapping": _read("final_logit_softcapping"),
    BIAS_IN_SCALE: _read(BIAS_IN_SCALE, False),
}


def differences(old: Qwen3Config, new: Qwen3Config) -> list[str]:
    """A line for each field by which weights of a draft of `old` mean something else in one of `new`."""
    lines = []
    for name, read in _FIELDS.items():
        before, after = read(old), read(new)
        if before != after:
            lines.append(f"  {name}: it has {before}, this draft {after}")
    return lines
