"""The base of every config section. A section stands next to the code that it steers; `pipeline.config` joins them."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen, strictly typed table of the TOML config; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def parse_layer_ids(layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Validator of a key that lists target layers. Whether the target has them shows once the target is known."""
    if layers is not None and (not layers or list(layers) != sorted(set(layers)) or layers[0] < -1):
        raise ValueError("expected ascending, distinct layer ids from -1 up")
    return layers
