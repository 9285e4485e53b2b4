"""Layer ids: which target layers are tapped where nobody names any. Both stages read it."""

from stages.errors import SettingError


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
