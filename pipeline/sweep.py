"""Several trainings over one fixed cache: every combination of the values that `[sweep.grid]` lists."""

import itertools
import json
from collections.abc import Iterator

from pipeline.config import Config, ConfigError, parse_config

SWEPT_SECTIONS = ("draft", "objective", "train")  # whatever else is changed would need another cache


def plan_trials(config: Config) -> Iterator[Config]:
    """One config a combination, each with a run folder of its own below `train.run_dir`, named after its values.

    The same combination always has the same folder, so a sweep that is started again finds its finished trials.
    Raises ConfigError without a grid, for a key that is no training knob, and for a value that does not fit.
    """
    if config.sweep is None:
        raise ConfigError('[sweep]: the config has none; write, for example, [sweep.grid] "train.seed" = [0, 1, 2]')
    grid = config.sweep.grid
    for key in grid:
        if key.partition(".")[0] not in SWEPT_SECTIONS or key == "train.run_dir":
            expected = ", ".join(SWEPT_SECTIONS)
            raise ConfigError(f"sweep.grid: {key} cannot vary over one cache; expected a key of {expected}")
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        tables = config.model_dump(mode="json", exclude_none=True, exclude={"sweep"})
        tables["train"]["run_dir"] = str(config.train.run_dir / _name(chosen))
        for key, value in chosen.items():
            section, _, field = key.partition(".")
            tables[section][field] = value
        yield parse_config(tables, where="sweep.grid")


def _name(chosen: dict[str, object]) -> str:
    """A folder's name: `markov_rank=64,seed=0`."""
    texts = (f"{key.partition('.')[2]}={json.dumps(value)}" for key, value in chosen.items())
    return ",".join(texts).replace('"', "").replace("/", "_").replace(" ", "")
