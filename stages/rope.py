"""One set of rotary frequencies for every call, chosen from configs alone.

`longrope` and `dynamic` ropes choose their frequencies by the longest position of a call, so that a token's state
depends on what else is computed with it. Here each rope is the one that it is for a text of `max_length` tokens, the
cache's longest (as servers choose longrope's set by the longest text that they serve, and keep to it):

longrope   the long factors where max_length is above `original_max_position_embeddings`, else the short ones
dynamic    the base of a text of max_length tokens: unscaled up to the target's own number of positions

`pin_rope` holds a loaded target to that. `draft_rope` gives a draft its target's rope in a form that every reader takes
alike, with nothing left to choose, and without keys that some readers obey and others ignore.
"""

import inspect
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stages.errors import SettingError
from stages.target_shape import TargetShape

KNOWN_KINDS = ("default", *ROPE_INIT_FUNCTIONS)
# Keys that transformers, vLLM and SGLang read alike, beside `rope_type` and `rope_theta`. No other key is written.
_SHARED_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
}

logger = logging.getLogger(__name__)


def depends_on_length(kind: object) -> bool:
    """Whether transformers chooses the frequencies of this rope type by the positions of a call."""
    return isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind)


def takes_long_factors(rope: dict[str, Any], max_length: int) -> bool:
    """Whether a longrope for texts of up to `max_length` tokens is the one of its long factors."""
    return max_length > int(rope["original_max_position_embeddings"])


def describe_rope(target: TargetShape, *, max_length: int) -> str:
    """Which frequencies a target whose rope depends on the length is held to; "" for any other target."""
    parts = []
    for rope in _ropes(target.rope_parameters):
        kind = rope.get("rope_type")
        if not depends_on_length(kind) or rope.get("alpha"):
            continue
        if kind == "longrope" and rope.get("original_max_position_embeddings"):
            which = "long" if takes_long_factors(rope, max_length) else "short"
            original = rope["original_max_position_embeddings"]
            parts.append(f"longrope with its {which} factors (max_length {max_length}, original positions {original})")
        else:
            parts.append(f"{kind} as for {max_length} tokens")
    return "; ".join(dict.fromkeys(parts))


def mixes_ropes(target: TargetShape, *, max_length: int) -> bool:
    """Whether transformers left alone computes texts of up to `max_length` tokens with more than one set."""
    own = target.max_positions or max_length
    return any(
        takes_long_factors(rope, max_length) if rope.get("rope_type") == "longrope" else max_length > own
        for rope in _ropes(target.rope_parameters)
        if depends_on_length(rope.get("rope_type")) and not rope.get("alpha")
    )


def pin_rope(model: nn.Module, *, max_length: int) -> None:
    """Hold the rotary embeddings of a loaded target to the frequencies of a text of `max_length` tokens.

    Each is shown one position more than it is asked for, the last of such a text, whose part of the answer is dropped:
    whatever chooses by the longest position of a call then always chooses the same, for every architecture.
    """

    def lengthen(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": _with_last(kwargs["position_ids"], max_length)}
        states, positions, *rest = args
        return (states, _with_last(positions, max_length), *rest), kwargs

    def cut(_module: nn.Module, _args: Any, output: Any) -> Any:
        return output[..., :-1, :] if isinstance(output, torch.Tensor) else tuple(part[..., :-1, :] for part in output)

    for module in model.modules():
        if _looks_at_length(module):
            module.register_forward_pre_hook(lengthen, with_kwargs=True)
            module.register_forward_hook(cut)


def _looks_at_length(module: nn.Module) -> bool:
    """Rotary embeddings of transformers name their kind; those of remote code are told by class and config."""
    kinds = getattr(module, "rope_type", None)
    if kinds is None and "Rotary" in type(module).__name__:
        if "position_ids" not in inspect.signature(module.forward).parameters:
            return False
        kinds = [rope.get("rope_type") for rope in _ropes(getattr(module, "config", None))]
    elif isinstance(kinds, dict):
        kinds = kinds.values()
    else:
        kinds = [kinds]
    return any(depends_on_length(kind) for kind in kinds)


def _with_last(positions: torch.Tensor, max_length: int) -> torch.Tensor:
    """`positions [..., T]` and one more, that of the last token of the longest text: [..., T + 1]."""
    return torch.cat([positions, positions.new_full((*positions.shape[:-1], 1), max_length - 1)], dim=-1)


def draft_rope(
    rope: dict[str, Any], *, head_dim: int, max_positions: int, max_length: int | None = None
) -> dict[str, Any]:
    """A draft's `rope_parameters`, from those of its target, which has `max_positions` positions.

    The draft rotates whole heads of `head_dim` numbers by the positions of text. `max_length` None: `max_positions`.
    What no plain kind says exactly is written as a longrope whose two sets are one and the same.

    Raises SettingError for a kind that is not known, and for factors that do not belong to the heads.
    """
    kind, theta = rope.get("rope_type") or "default", rope.get("rope_theta") or 10000.0
    rope, length = rope | {"rope_theta": theta}, max_length or max_positions
    if kind not in (*KNOWN_KINDS, "mrope"):
        raise SettingError(
            f"rope_type: expected one of {', '.join(KNOWN_KINDS)}, got {kind!r} from the target; no "
            "draft of it can be built"
        )
    if kind == "dynamic":
        stretch = rope.get("alpha") or _dynamic_stretch(rope, length=length, max_positions=max_positions)
        return _plain(theta if stretch == 1 else theta * stretch ** (head_dim / (head_dim - 2)))
    if kind == "longrope":
        return _fixed_longrope(rope, head_dim=head_dim, max_positions=max_positions, length=length)
    if kind == "yarn":
        return _fixed_yarn(rope, head_dim=head_dim, max_positions=max_positions)
    if kind == "proportional":  # of whole heads it is linear
        kind = "linear" if rope.get("factor", 1.0) != 1.0 else "default"
    if kind in _SHARED_KEYS:
        return _plain(theta, kind, rope)
    return _plain(theta)  # default, and mrope, whose sections agree on text


def _plain(theta: float, kind: str = "default", rope: dict[str, Any] | None = None) -> dict[str, Any]:
    given = {key: rope.get(key) for key in _SHARED_KEYS.get(kind, ())} if rope else {}
    keys = {key: value for key, value in given.items() if value or value is False}  # transformers reads 0 as absent
    return {"rope_type": kind, "rope_theta": theta, **keys}


def _dynamic_stretch(rope: dict[str, Any], *, length: int, max_positions: int) -> float:
    """What the base grows by, to the power of d / (d - 2): 1 up to the target's own positions."""
    factor = float(rope.get("factor") or 1.0)
    return factor * max(length, max_positions) / max_positions - (factor - 1)


def _fixed_longrope(rope: dict[str, Any], *, head_dim: int, max_positions: int, length: int) -> dict[str, Any]:
    which = "long" if takes_long_factors(rope, length) else "short"
    factors, original = list(rope[f"{which}_factor"]), int(rope["original_max_position_embeddings"])
    if len(factors) != head_dim // 2:
        if len(factors) == int(head_dim * (rope.get("partial_rotary_factor") or 1.0)) // 2:
            logger.info("the target's longrope turns a part of each head; the draft turns whole heads, by plain rope")
            return _plain(rope["rope_theta"])
        raise SettingError(f"rope: expected {head_dim // 2} {which} factors, got {len(factors)} from the target")
    usual = _longrope_attention(max_positions / original, original)
    given = rope.get("attention_factor") or rope.get(f"{which}_mscale")
    factor = rope.get("factor")
    attention = float(given or (_longrope_attention(factor, original) if factor else usual))
    return _explicit(rope["rope_theta"], factors, original=original, attention=attention, usual=usual)


def _longrope_attention(factor: float, original: int) -> float:
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _fixed_yarn(rope: dict[str, Any], *, head_dim: int, max_positions: int) -> dict[str, Any]:
    """Yarn as it is, where its attention factor is the usual one: no two readers agree on how to name another."""
    original = int(rope["original_max_position_embeddings"])
    factor = rope.get("factor") or max_positions / original
    written = _plain(rope["rope_theta"], "yarn", {**rope, "factor": factor})
    usual = _yarn_attention(factor)
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    attention = rope.get("attention_factor")
    if attention is None:
        attention = (
            _yarn_attention(factor, mscale) / _yarn_attention(factor, mscale_all) if mscale and mscale_all else usual
        )
    if math.isclose(attention, usual, rel_tol=1e-6):
        return written
    config = Qwen3Config(head_dim=head_dim, max_position_embeddings=max_positions, rope_parameters=written)
    frequencies, _ = ROPE_INIT_FUNCTIONS["yarn"](config)
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factors = (plain / frequencies.double()).tolist()
    return _explicit(
        rope["rope_theta"], factors, original=original, attention=float(attention),
        usual=_longrope_attention(max_positions / original, original),
    )  # fmt: skip


def _yarn_attention(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _explicit(theta: float, factors: list[float], *, original: int, attention: float, usual: float) -> dict[str, Any]:
    """A longrope with one set of factors under both names; `usual` is the attention factor of readers told of none."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": theta,
        "original_max_position_embeddings": original,
        "short_factor": factors,
        "long_factor": list(factors),
        "attention_factor": attention,  # transformers
    }
    if not math.isclose(attention, usual, rel_tol=1e-6):
        rope |= {"short_mscale": attention, "long_mscale": attention}  # vLLM and SGLang
    return rope


def _ropes(rope: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The target's ropes: one, or one for each layer type."""
    rope = rope or {}
    nested = [part for part in rope.values() if isinstance(part, dict)]
    yield from nested or [rope]
