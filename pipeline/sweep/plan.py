"""What a sweep will train: its parameters, the points that are known beforehand, and the config of a trial. No disk.

A point maps config keys to values, or a section to a table of its keys: variants that differ in several of them. Optuna
knows each key's values as numbers or, for a list, as JSON texts: so a list of layers can be one of them, and 1 and 1.0
stay apart.
"""

import hashlib
import itertools
import json
from collections import Counter
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.config import Config, ConfigError, parse_config
from pipeline.sweep.settings import RangeTable, SweepSection
from stages.train.run import FREE_TRAIN_KEYS

SWEPT_SECTIONS = ("draft", "objective", "train")  # whatever else is changed would need another cache
# Which machine and which folder, and how often there is something to look at.
UNSWEPT_KEYS = {f"train.{key}" for key in FREE_TRAIN_KEYS}
# May differ between two commands on the same sweep: they decide who trains a trial, not what it is.
FREE_SWEEP_KEYS = {"parallel", "storage", "name", "num_trials"}
NAME_LENGTH = 120  # of a folder; file systems take 255 bytes

Point = dict[str, Any]


def sweep_section(config: Config) -> SweepSection:
    """The config's `[sweep]`. Raises ConfigError without one, and for a key that is no training knob or set twice."""
    if config.sweep is None:
        raise ConfigError('[sweep]: the config has none; write, for example, [sweep.grid] "train.seed" = [0, 1, 2]')
    varied_by: dict[str, str] = {}
    for key, values in config.sweep.values.items():
        for swept in _swept_keys(key, values):
            if varied_by.setdefault(swept, key) != key:
                raise ConfigError(
                    f"sweep: {swept} is set by both {varied_by[swept]} and {key}; leave it in one of them"
                )
            if swept.partition(".")[0] not in SWEPT_SECTIONS or swept in UNSWEPT_KEYS:
                raise ConfigError(
                    f"sweep: {swept} cannot vary over one cache; expected a key of {', '.join(SWEPT_SECTIONS)} that "
                    "changes what is trained"
                )
        if isinstance(values, list) and len({json.dumps(value) for value in values}) < len(values):
            texts = Counter(json.dumps(value) for value in values)
            raise ConfigError(f"sweep: {key} has a value twice: {texts.most_common(1)[0][0]}")
    return config.sweep


def _swept_keys(key: str, values: list[Any] | RangeTable) -> list[str]:
    """The config keys that a parameter varies. Raises ConfigError."""
    if "." in key.strip("."):
        return [key]
    if key not in Config.model_fields:
        raise ConfigError(
            f'sweep: {key}: expected a section and a key with a point between, as "train.lr", or one of the sections '
            f"{', '.join(SWEPT_SECTIONS)}"
        )
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ConfigError(f"sweep: {key} is a section: expected a list of tables, such as [{{}}, {{ num_layers = 2 }}]")
    return sorted({f"{key}.{field}" for table in values for field in table}) or [f"{key}."]


def plan_distributions(sweep: SweepSection) -> dict[str, BaseDistribution]:
    """Each key's values as Optuna knows them."""
    return {key: _distribution(values) for key, values in sweep.values.items()}


def _distribution(values: list[Any] | RangeTable) -> BaseDistribution:
    if isinstance(values, list):
        return CategoricalDistribution([json.dumps(value) for value in values])
    if values.is_whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=int(values.step or 1))
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def plan_params(sweep: SweepSection) -> list[dict[str, Any]]:
    """Optuna's parameters of every trial, by its number; empty ones for `tpe`, which draws them when a trial starts.

    A function of the section alone. A larger `num_trials` has those of a smaller one first.
    """
    distributions = plan_distributions(sweep)
    if sweep.sampler == "grid":
        choices = [values.choices for values in distributions.values() if isinstance(values, CategoricalDistribution)]
        return [dict(zip(distributions, chosen, strict=True)) for chosen in itertools.product(*choices)]
    num_trials = sweep.num_trials or 0
    if sweep.sampler == "tpe":
        return [{} for _ in range(num_trials)]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=sweep.seed))
    return [study.ask(distributions).params for _ in range(num_trials)]


def point_of(sweep: SweepSection, params: dict[str, Any]) -> Point:
    """The config values that Optuna's parameters stand for."""
    return {
        key: json.loads(params[key]) if isinstance(values, list) else params[key]
        for key, values in sweep.values.items()
    }


def trial_config(config: Config, point: Point, *, number: int) -> Config:
    """The config of one trial, with a run folder of its own below `train.run_dir`. Raises ConfigError."""
    sweep = config.sweep
    if sweep is None:
        raise AssertionError("a trial is one of a sweep")
    tables = config.model_dump(mode="json", exclude_none=True, exclude_unset=True, exclude={"sweep"})
    name = name_trial(sweep, point, number=number)
    tables.setdefault("train", {})["run_dir"] = str(config.train.run_dir / name)
    for key, value in point.items():
        section, _, field = key.partition(".")
        tables.setdefault(section, {}).update({field: value} if field else value)
    return parse_config(tables, where="sweep")


def name_trial(sweep: SweepSection, point: Point, *, number: int) -> str:
    """A folder's name, which no other trial has: `markov_rank=64,seed=0`, but for a grid behind the number from 1."""
    texts = [f"{key.rpartition('.')[2]}={_label(value, among=sweep.values[key])}" for key, value in point.items()]
    name = ",".join(texts if sweep.sampler == "grid" else [f"{number + 1:04d}", *texts])
    return name if len(name) <= NAME_LENGTH else f"{name[:NAME_LENGTH]}-{_digest(name)}"


def _label(value: Any, *, among: list[Any] | RangeTable) -> str:
    """The value in a folder's name; with a digest where others of its list look the same there."""
    text = _short(value)
    look_alikes = [other for other in among if _short(other) == text] if isinstance(among, list) else []
    return f"{text}-{_digest(json.dumps(value))}" if len(look_alikes) > 1 else text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _short(value: Any) -> str:
    text = _round(value)
    for character, instead in {'"': "", " ": "", "/": "_", ",": "_"}.items():
        text = text.replace(character, instead)
    return text


def _round(value: Any) -> str:
    if isinstance(value, dict):
        return "+".join(f"{key}={_round(item)}" for key, item in value.items()) or "as-it-is"
    if isinstance(value, list):
        return "_".join(_round(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) and float(f"{value:.4g}") != value else json.dumps(value)


def check_points(config: Config) -> None:
    """Check what can be checked before the first training: every combination of a grid, else each value by itself.

    Raises ConfigError.
    """
    sweep = sweep_section(config)
    if sweep.sampler == "grid":
        points = [point_of(sweep, params) for params in plan_params(sweep)]
    else:
        ends = {
            key: values if isinstance(values, list) else [values.low, values.high]
            for key, values in sweep.values.items()
        }
        points = [{key: value} for key, values in ends.items() for value in values]
    for number, point in enumerate(points):
        trial_config(config, point, number=number)


def describe_sweep(config: Config) -> dict[str, str]:
    """What two commands must have in common to work on one sweep, as texts: its values, and all that stays the same."""
    sweep = sweep_section(config)
    tables = config.model_dump(mode="json", include={"draft", "objective", "train", "evaluate"})
    swept = sweep.values
    described = {
        f"{section}.{key}": value
        for section, table in tables.items()
        for key, value in table.items()
        if f"{section}.{key}" not in swept and (section != "train" or key not in FREE_TRAIN_KEYS)
    }
    described["train.validate_every"] = config.train.validate_every  # where trials are compared, if they are pruned
    knobs = sweep.model_dump(mode="json", exclude={*FREE_SWEEP_KEYS, "parameters", "grid"})
    described |= {f"sweep.{key}": value for key, value in knobs.items()}
    described |= {
        f"sweep.parameters.{key}": values if isinstance(values, list) else values.model_dump(mode="json")
        for key, values in swept.items()
    }
    return {key: json.dumps(value) for key, value in described.items()}
