"""The base of every config section. A section stands next to the code that it steers; `pipeline.config` joins them."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen, strictly typed table of the TOML config; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
