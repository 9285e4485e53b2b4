"""What both stages read off a config that others define, and what is chosen by it where nobody names anything."""

from typing import Any

from stages.errors import SettingError

DEFAULT_MAX_LENGTH = 4096
NESTED_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
SCALE_FIELDS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere's, Muse's, Falcon-H1's
MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # model types that multiply by `logits_scaling`, by which Granite's divide


def default_layers(num_target_layers: int) -> tuple[int, ...]:
    """Five ids spread evenly from 1 to N-3 (the reference recipe: 1, 9, 17, 25, 33 of 36), fewer for a small target."""
    last = max(num_target_layers - 3, 1)
    spread = {round(1 + step * (last - 1) / 4) for step in range(5)}
    return tuple(sorted(layer for layer in spread if layer < num_target_layers)) or (0,)


def check_layers(layers: tuple[int, ...], *, num_target_layers: int, key: str) -> None:
    """Raises SettingError unless `layers` are ascending, distinct ids of a target with that many layers.

    `key` is the config key that the message names.
    """
    if not layers or list(layers) != sorted(set(layers)):
        raise SettingError(f"{key}: expected ascending, distinct layer ids, got {list(layers)}")
    wrong = [layer for layer in layers if not -1 <= layer < num_target_layers]
    if wrong:
        raise SettingError(
            f"{key}: {wrong} out of range; the target has {num_target_layers} layers, "
            f"so ids run from -1 (embeddings) to {num_target_layers - 1}"
        )


def choose_max_length(wanted: int | None, max_positions: int | None) -> int:
    """Tokens a sample at most: what the config wants, or 4096 (the reference recipe) where the target has as many.

    Raises SettingError for more than the target has positions.
    """
    if wanted is None:
        return min(DEFAULT_MAX_LENGTH, max_positions or DEFAULT_MAX_LENGTH)
    if max_positions and wanted > max_positions:
        raise SettingError(f"data.max_length: expected at most the target's {max_positions} positions, got {wanted}")
    return wanted


def read_field(config: Any, *names: str) -> Any:
    """The first of these fields that a config, or a dict of its fields, has and that is not None.

    Configs raise families of their own for fields that they compute or that differ between layers.
    """
    for name in names:
        try:
            value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        except Exception:
            value = None
        if value is not None:
            return value
    return None


def open_text_config(config: Any) -> Any:
    """The config of the text stack; of a stack whose layers differ, that of its first sliding or else first layer."""
    try:
        text = config if isinstance(config, dict) else config.get_text_config(decoder=True)
    except Exception as error:  # several candidates, or code of a model's repository
        raise SettingError(f"{_name(config)}: its config does not say which part writes text: {error}") from error
    nested = read_field(text, *NESTED_TEXT_CONFIGS)
    return text if nested is None or read_field(text, *NUM_LAYERS) is not None else open_text_config(nested)


def first_layer(config: Any) -> Any:
    """`config` itself, or, where its layers have fields of their own, what it is for the first sliding or first layer.

    Gemma 4's full-attention layers have wider heads than its sliding ones, of which there are more.
    """
    if not read_field(config, "is_heterogeneous"):
        return config
    kinds = list(read_field(config, "layer_types") or ())
    return config.per_layer_config[kinds.index("sliding_attention") if "sliding_attention" in kinds else 0]


def logit_transform(target_config: Any) -> tuple[float | None, float | None]:
    """(scale, soft-cap) that the target applies to what `lm_head` gives; None where it applies none.

    Cohere's configs name `logit_scale`; Granite's divide by `logits_scaling`; Gemma's have `final_logit_softcapping`.
    """
    scale, divisor = read_field(target_config, *SCALE_FIELDS), read_field(target_config, "logits_scaling")
    if scale is None and divisor:
        multiplies = _name(target_config).startswith(MULTIPLIES_BY_DIVISOR)
        scale = divisor if multiplies else 1.0 / divisor
    softcap = read_field(target_config, "final_logit_softcapping")
    return None if scale in (None, 1.0) else float(scale), None if softcap is None else float(softcap)


def _name(config: Any) -> str:
    return str(read_field(config, "model_type") or type(config).__name__)
