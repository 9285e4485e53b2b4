"""Config section of sweeps: `[sweep]`."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from stages.section import Section


class RangeTable(Section):
    """Values from `low` to `high`, both included; whole numbers if both are."""

    low: int | float
    high: int | float
    log: bool = False
    """Even on a logarithmic scale."""
    step: int | float | None = None
    """Distance of neighbouring values; none: any value."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not all(-math.inf < number < math.inf for number in (self.low, self.high, self.step or 0)):
            raise ValueError("low, high and step must be finite")
        if not self.low < self.high:
            raise ValueError("low must be below high")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs a low above 0, and no step")
        if self.step is not None and self.step <= 0:
            raise ValueError("step must be above 0")
        if self.is_whole and isinstance(self.step, float):
            raise ValueError("low and high are whole numbers, so step must be one; or write them with a point")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether the values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


def _form(values: Any) -> str:
    return "list" if isinstance(values, list) else "range"


Values = Annotated[
    Annotated[list[Any], Tag("list"), Field(min_length=1)] | Annotated[RangeTable, Tag("range")],
    Discriminator(_form),
]


class SweepSection(Section):
    """Several trainings over one cache: which values they try, in what order, and how they share a machine."""

    parameters: dict[str, Values] = Field(default={})
    """Config key -> list of values, or a range: `"train.lr" = {low = 1e-4, high = 3e-3, log = true}`. A section -> list
    of tables, for variants that differ in several keys: `draft = [{}, {markov_rank = 0}]`."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default={})
    """The same for lists alone; a config has one of the two."""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """Every combination of the lists, values drawn at random, or drawn near those of the best trials (Optuna's TPE)."""
    num_trials: int | None = Field(default=None, ge=1)
    """Trials of `random` and `tpe`. May be raised later; a grid has as many as it has combinations."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seeds the draws."""
    parallel: int = Field(default=1, ge=1)
    """Trials trained at once on this machine, each in a process of its own."""
    prune: bool = False
    """Give up a trial whose tau at a validation is below the median of the earlier ones at the same step."""
    prune_startup_trials: int = Field(default=4, ge=1)
    """Trials that must be complete before any is given up."""
    prune_warmup_steps: int = Field(default=0, ge=0)
    """No trial is given up before this step."""
    storage: str | None = None
    """SQLAlchemy URL of the data base in which the trials are shared by several machines, for example
    `postgresql+psycopg://host/sweeps`. Default: an SQLite file in `train.run_dir`."""
    name: str | None = Field(default=None, min_length=1)
    """The sweep's name in `storage`, and only there. Default: the name of the folder `train.run_dir`."""

    @field_validator("parameters", "grid", mode="before")
    @classmethod
    def _check_forms(cls, parameters: Any) -> Any:
        """Say what a value is not, before it is read as a range that lacks everything."""
        for key, values in parameters.items() if isinstance(parameters, dict) else ():
            expected = f"{key}: expected a list of values, or a table with low and high"
            if not isinstance(values, list | dict):
                raise ValueError(expected)
            if isinstance(values, dict) and not set(values) & set(RangeTable.model_fields):
                raise ValueError(f'{expected}; a key with a point stands in quotes, as "train.lr"')
        return parameters

    @model_validator(mode="after")
    def _check_sampler(self) -> Self:
        if bool(self.parameters) == bool(self.grid):
            raise ValueError("expected either parameters or grid, with at least one config key")
        ranges = [key for key, values in self.parameters.items() if isinstance(values, RangeTable)]
        if self.sampler == "grid" and ranges:
            raise ValueError(f'{", ".join(ranges)}: a grid needs lists; write sampler = "random" or "tpe" for ranges')
        if (self.sampler == "grid") != (self.num_trials is None):
            raise ValueError("num_trials is what random and tpe need, and what a grid must not have")
        return self

    @property
    def values(self) -> dict[str, list[Any] | RangeTable]:
        """What each key tries, however it was written."""
        return self.parameters or dict(self.grid)
