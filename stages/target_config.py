"""What both stages read off a target's config: which layers are tapped where nobody names any, and its logits' form."""

from typing import Any

from stages.errors import SettingError

DEFAULT_MAX_LENGTH = 4096


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


def choose_max_length(wanted: int | None, target_config: Any) -> int:
    """Tokens a sample at most: what the config wants, or 4096 (the reference recipe) where the target has as many.

    Raises SettingError for more than the target has positions.
    """
    positions = getattr(target_config, "max_position_embeddings", None)
    if wanted is None:
        return min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    if positions and wanted > positions:
        raise SettingError(f"data.max_length: expected at most the target's {positions} positions, got {wanted}")
    return wanted


def logit_transform(target_config: Any) -> tuple[float | None, float | None]:
    """(scale, soft-cap) that the target applies to what `lm_head` gives; None where it applies none.

    Cohere's configs name `logit_scale`; Granite's divide by `logits_scaling`; Gemma's have `final_logit_softcapping`.
    """
    scale = getattr(target_config, "logit_scale", None)
    divisor = getattr(target_config, "logits_scaling", None)
    if scale is None and divisor:
        scale = 1.0 / divisor
    softcap = getattr(target_config, "final_logit_softcapping", None)
    return None if scale in (None, 1.0) else float(scale), None if softcap is None else float(softcap)
