"""The draft's config: a `Qwen3Config` in the target's dimensions, with the fields that servers read.

Written by `build_draft_config`, read by `Qwen3DSparkModel` and, from `config.json`, by vLLM, SGLang and TensorRT-LLM.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, Qwen3Config

from stages.errors import SettingError
from stages.rope import draft_rope
from stages.target_config import check_layers, default_layers
from stages.target_shape import TargetShape, parse_target_shape

MARKOV_HEAD_TYPES = ("vanilla", "gated", "rnn")


def default_target_layer_ids(num_target_layers: int) -> list[int]:
    """Five ids spread evenly from 1 to N-3 (36 layers: 1, 9, 17, 25, 33); fewer, at least one, for a small target."""
    if num_target_layers < 1:
        raise SettingError(f"num_target_layers: expected at least 1, got {num_target_layers}")
    return list(default_layers(num_target_layers))


def build_draft_config(  # noqa: PLR0913 (one argument a field of the draft)
    target_config: PretrainedConfig | TargetShape,
    *,
    mask_token_id: int,
    num_draft_layers: int = 5,
    block_size: int = 7,
    target_layer_ids: Sequence[int] | None = None,
    num_anchors: int = 512,
    markov_rank: int = 256,
    markov_head_type: str = "vanilla",
    enable_confidence_head: bool = True,
    confidence_head_with_markov: bool = True,
    intermediate_size: int | None = None,
    max_length: int | None = None,
) -> Qwen3Config:
    """A draft config for any decoder target, by its shape or by its own config; a nested one (`text_config`) is opened.

    Dimensions, head size, rope, norm epsilon and vocabulary are the target's; logit scale and soft-cap too, where it
    has them. A rope that depends on the length of a text becomes that of `max_length` tokens, the longest text that
    states are taken of (None: as many as the target has positions); see `stages.rope`. `confidence_head_with_markov` is
    dropped with `markov_rank = 0`, where there is no embedding to see.

    Raises SettingError, naming the value, for settings that no draft of this target can have.
    """
    target = target_config if isinstance(target_config, TargetShape) else parse_target_shape(target_config)
    num_target_layers, vocab_size = target.num_layers, target.vocab_size
    layer_ids = tuple(default_target_layer_ids(num_target_layers) if target_layer_ids is None else target_layer_ids)
    check_layers(layer_ids, num_target_layers=num_target_layers, key="target_layer_ids")
    _check_at_least(1, num_draft_layers=num_draft_layers, block_size=block_size, num_anchors=num_anchors)
    _check_at_least(0, markov_rank=markov_rank)
    if markov_head_type not in MARKOV_HEAD_TYPES:
        raise SettingError(
            f"markov_head_type: expected one of {', '.join(MARKOV_HEAD_TYPES)}, got {markov_head_type!r}"
        )
    if not 0 <= mask_token_id < vocab_size:
        raise SettingError(
            f"mask_token_id: expected an id in the target's embedding, 0 to {vocab_size - 1}, got {mask_token_id}; "
            "choose an id that the tokenizer does not use"
        )
    return Qwen3Config(
        architectures=["Qwen3DSparkModel"],
        **_target_dimensions(target, intermediate_size=intermediate_size, max_length=max_length),
        num_hidden_layers=num_draft_layers,
        layer_types=["full_attention"] * num_draft_layers,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=num_draft_layers,
        attention_bias=False,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        use_cache=True,
        block_size=block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=list(layer_ids),
        num_target_layers=num_target_layers,
        num_anchors=num_anchors,
        markov_rank=markov_rank,
        markov_head_type=markov_head_type,
        enable_confidence_head=enable_confidence_head,
        confidence_head_with_markov=confidence_head_with_markov and markov_rank > 0,
        sample_from_anchor=True,
        **_logit_fields(target),
    )


def _target_dimensions(target: TargetShape, *, intermediate_size: int | None, max_length: int | None) -> dict[str, Any]:
    if target.head_dim % 2:
        raise SettingError(
            f"head_dim: expected an even number, since rope rotates pairs, got {target.head_dim} from the target"
        )
    width = target.intermediate_size if intermediate_size is None else intermediate_size
    if width is None or width < 1:
        raise SettingError(
            f"intermediate_size: expected a positive number, got {width!r}"
            + (" from the target; set draft.intermediate_size" if intermediate_size is None else "")
        )
    dtype = getattr(torch, target.dtype or "bfloat16", None)
    max_positions = target.max_positions or 32768
    return {
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": width,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "hidden_act": "silu",  # Qwen3's; servers accept no other
        "max_position_embeddings": max_positions,
        "initializer_range": target.initializer_range or 0.02,
        "rms_norm_eps": target.rms_norm_eps or 1e-6,
        "rope_parameters": draft_rope(
            _target_rope(target), head_dim=target.head_dim, max_positions=max_positions, max_length=max_length
        ),
        "dtype": dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": list(target.eos_token_id) if isinstance(target.eos_token_id, tuple) else target.eos_token_id,
        "pad_token_id": target.pad_token_id,
    }


def _target_rope(target: TargetShape) -> dict[str, Any]:
    """The target's rope; of a target with one for each layer type, that of full attention."""
    rope = target.rope_parameters
    return rope["full_attention"] if isinstance(rope.get("full_attention"), dict) else rope


def _logit_fields(target: TargetShape) -> dict[str, float]:
    """The target's logit scale and soft-cap as fields of the draft's config, where it has them."""
    fields = {"logit_scale": target.logit_scale, "final_logit_softcapping": target.logit_softcap}
    return {name: value for name, value in fields.items() if value is not None}


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise SettingError(f"{name}: expected at least {least}, got {value}")
