"""The shape of a target: what a draft of it, and the code around it, need of a config that others define.

Stage one reads it off the target's config and writes it into the cache as `target/shape.json`; stage two reads that
file. So a cache is trained from without the target's config class, which may be code of the model's repository, and
nothing in a cache's folder is ever run. Older caches have the target's own `config.json` alone: it is read as data.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from stages.errors import SettingError
from stages.target_config import NUM_LAYERS, first_layer, logit_transform, open_text_config, read_field

SHAPE_FILE, CONFIG_FILE = "shape.json", "config.json"

Size = Annotated[int, Field(ge=1)]
Id = Annotated[int, Field(ge=0)]

# Names under which configs give a size; the first is the one of most, the others are of code in model repositories.
_SIZES = {
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "hidden_size": ("hidden_size", "d_model", "n_embd"),
    "num_layers": NUM_LAYERS,
    "num_heads": ("num_attention_heads", "num_heads", "n_heads", "n_head"),
}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class TargetShape:
    """Sizes, rope and logits of a target's text stack; where layers differ, of the first sliding or else first one."""

    model_type: str
    vocab_size: Size
    hidden_size: Size
    num_layers: Size
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    intermediate_size: Size | None
    """Width of the MLP; None where the config has none, or several."""
    max_positions: Size | None
    rms_norm_eps: float | None
    initializer_range: float | None
    rope_parameters: dict[str, Any]
    """As transformers 5 writes them: flat, or one set for each kind of layer; empty where there is no rope."""
    sliding_window: Size | None
    logit_scale: float | None
    logit_softcap: float | None
    num_experts: Size | None
    num_active_experts: Size | None
    tie_word_embeddings: bool
    dtype: str | None
    bos_token_id: Id | None
    eos_token_id: Id | tuple[Id, ...] | None
    pad_token_id: int | None

    def render(self) -> str:
        """The text of `shape.json`."""
        return json.dumps(json.loads(_ADAPTER.dump_json(self)), indent=2, sort_keys=True) + "\n"

    @classmethod
    def parse(cls, text: str, *, where: str) -> Self:
        """What `render` wrote. Raises SettingError for anything else."""
        try:
            shape: Self = _ADAPTER.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise SettingError(f"{where}: {place}: {first['msg']}; it is no shape that this version wrote") from error
        return shape


_ADAPTER: TypeAdapter[Any] = TypeAdapter(TargetShape)


def parse_target_shape(config: Any) -> TargetShape:
    """The shape of a target from its transformers config, of any class; a nested one (`text_config`) is opened.

    Raises SettingError, naming the field, where a size that everything needs is missing.
    """
    text = open_text_config(config)
    layer = first_layer(text)
    model_type = str(read_field(text, "model_type") or "unknown")
    sizes = {name: _read_size(text if name == "num_layers" else layer, names, of=model_type)
             for name, names in _SIZES.items()}  # fmt: skip
    scale, softcap = logit_transform(text)
    eos = read_field(text, "eos_token_id")
    return TargetShape(
        model_type=model_type,
        **sizes,
        num_kv_heads=_common(read_field(layer, "num_key_value_heads", "num_kv_heads")) or sizes["num_heads"],
        head_dim=_common(read_field(layer, "head_dim")) or max(sizes["hidden_size"] // sizes["num_heads"], 1),
        intermediate_size=_only(read_field(layer, "intermediate_size")),
        max_positions=_only(read_field(text, "max_position_embeddings", "max_sequence_length", "seq_length")),
        rms_norm_eps=_number(read_field(text, "rms_norm_eps")),
        initializer_range=_number(read_field(text, "initializer_range")),
        rope_parameters=_read_rope(text),
        sliding_window=_only(read_field(layer, "sliding_window")),
        logit_scale=scale,
        logit_softcap=softcap,
        num_experts=_only(read_field(text, "num_local_experts", "num_experts", "n_routed_experts")),
        num_active_experts=_only(read_field(text, "num_experts_per_tok", "top_k_experts")),
        tie_word_embeddings=bool(read_field(text, "tie_word_embeddings")),
        dtype=str(dtype).removeprefix("torch.") if (dtype := read_field(text, "dtype", "torch_dtype")) else None,
        bos_token_id=_token(read_field(text, "bos_token_id")),
        eos_token_id=tuple(eos) if isinstance(eos, list) else _token(eos),
        pad_token_id=pad if isinstance(pad := read_field(text, "pad_token_id"), int) else None,
    )


def read_target_shape(target_dir: Path) -> TargetShape:
    """The shape of a cache's target by the files in its `target/`. Runs no code of theirs. Raises SettingError."""
    file = target_dir / SHAPE_FILE
    if file.is_file():
        return TargetShape.parse(file.read_text(encoding="utf-8"), where=str(file))
    return _read_config(target_dir / CONFIG_FILE)


def _read_config(file: Path) -> TargetShape:
    """The shape by a target's own config file: with the class of a model type that transformers has, else as it is."""
    from transformers import CONFIG_MAPPING

    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise SettingError(f"{file}: expected a JSON object, got {type(fields).__name__}")
        if fields.get("model_type") not in CONFIG_MAPPING:
            fields = open_text_config(fields)
        model_type = str(fields.get("model_type"))
        is_known = model_type in CONFIG_MAPPING
        return parse_target_shape(CONFIG_MAPPING[model_type].from_dict(fields) if is_known else fields)
    except SettingError:
        raise
    except Exception as error:  # validators of configs raise families of their own
        raise SettingError(f"{file}: this version of transformers cannot read it: {_first_line(error)}") from error


def _read_size(config: Any, names: tuple[str, ...], *, of: str) -> int:
    value = _common(read_field(config, *names))
    if value is None or value < 1:
        raise SettingError(
            f"{names[0]}: expected a positive number, got {read_field(config, *names)!r} in the config of a "
            f"{of} target; no draft can be built for a target without it"
        )
    return value


def _common(value: Any) -> int | None:
    """A number, or the most frequent of a list with one a layer."""
    if isinstance(value, list | tuple):
        return max((_only(item) or 0 for item in value), key=list(value).count, default=None)
    return _only(value)


def _only(value: Any) -> int | None:
    """A positive whole number, or that of which a list is made; None for anything else."""
    if isinstance(value, list | tuple) and len(set(map(str, value))) == 1:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _token(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _read_rope(config: Any) -> dict[str, Any]:
    """The rope in the form of transformers 5, in which code of model repositories does not give it."""
    rope = dict(read_field(config, "rope_parameters", "rope_scaling") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        return _json_safe({kind: value for kind, value in rope.items() if isinstance(value, dict)})
    theta = read_field(config, "rope_theta", "rotary_emb_base", "rope_base")
    if not rope and theta is None:
        return {}
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    factor = read_field(config, "partial_rotary_factor", "rotary_pct")
    original = read_field(config, "original_max_position_embeddings")
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", factor), (_ORIGINAL, original)):
        if value is not None and rope.get(key) is None:
            rope[key] = value
    return _json_safe(rope)


_ORIGINAL = "original_max_position_embeddings"


def _json_safe(fields: dict[str, Any]) -> dict[str, Any]:
    """What of `fields` JSON can say, as it reads it back."""
    loaded: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return loaded


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
