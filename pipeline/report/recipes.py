"""Recipes: runs that differ in nothing but the training seed, so that a draft is told from the luck of its seed."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.report.pairing import Difference, paired_difference
from pipeline.report.runs import Run, differing_keys
from pipeline.report.words import format_value
from stages.evaluate.evaluation import Evaluation
from stages.train.run import FREE_TRAIN_KEYS

SEED = "train.seed"
# What a draft is made of. Runs that are compared were measured on one cache, but may have been trained from others.
RECIPE_SECTIONS = {"target", "data", "cache", "draft", "objective", "train"}
FREE_KEYS = {
    *(f"train.{key}" for key in FREE_TRAIN_KEYS),
    "cache.io", "cache.checks", "cache.staging_bytes", "data.num_processes", "data.max_bad_fraction",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Evaluated runs of one config, a seed each, measured on the same blocks."""

    name: str
    """What sets it apart, as `markov_rank 0`; for the recipe that most others are variants of, all its values."""
    values: dict[str, Any]
    """Config keys that tell the recipes of a report apart."""
    runs: tuple[Run, ...]
    """In the order of their seeds; a seed that is there twice counts once, the first by name."""
    evaluations: tuple[Evaluation, ...]
    """Of these runs."""
    num_missing: int
    """Further seeds whose runs have no evaluation: given up, failed or unfinished ones."""
    difference: Difference | None = None
    """How far its mean over seeds is behind the best recipe's; None for that one, a single run, few conversations."""

    @property
    def taus(self) -> list[float]:
        """Of its runs."""
        return [evaluation.tau for evaluation in self.evaluations]

    @property
    def tau(self) -> float:
        """The mean over seeds."""
        return math.fsum(self.taus) / len(self.taus)

    @property
    def is_repeated(self) -> bool:
        """Whether it was trained with several seeds; the mean of one says nothing of seeds."""
        return len(self.runs) > 1


def plan_recipes(measured: Sequence[tuple[Run, Evaluation]], *, runs: Sequence[Run]) -> tuple[Recipe, ...]:
    """The recipes among runs that were measured on the same blocks: those with several seeds first, by their means.

    `runs` are all of the report. Empty where no recipe was trained with two seeds, so that each run speaks for itself.
    """
    known = [run for run in runs if run.config]  # without a config, nothing tells what it was made of
    keys = [key for key in differing_keys(known) if _makes_a_recipe(key)]
    groups: dict[str, dict[str, tuple[Run, Evaluation]]] = {}
    for run, evaluation in sorted(measured, key=lambda pair: pair[0].name):
        if run.config:
            groups.setdefault(_identify(run, keys), {}).setdefault(_seed(run), (run, evaluation))
    if all(len(seeds) < 2 for seeds in groups.values()):
        return ()
    missing = {(_identify(run, keys), _seed(run)) for run in known if run.evaluation is None}
    points = [
        {key: run.config.get(key) for key in keys} for (run, _), *_ in (seeds.values() for seeds in groups.values())
    ]
    recipes = []
    for name, values, (identity, seeds) in zip(_plan_names(points), points, groups.items(), strict=True):
        pairs = [seeds[seed] for seed in sorted(seeds, key=lambda seed: (len(seed), seed))]
        recipes.append(
            Recipe(
                name=name,
                values=values,
                runs=tuple(run for run, _ in pairs),
                evaluations=tuple(evaluation for _, evaluation in pairs),
                num_missing=len({seed for other, seed in missing if other == identity} - set(seeds)),
            )
        )
    best, *others = sorted(recipes, key=lambda recipe: (not recipe.is_repeated, -recipe.tau))
    return best, *(
        replace(other, difference=paired_difference(best.evaluations, other.evaluations) if other.is_repeated else None)
        for other in others
    )


def describe_recipes(recipes: Sequence[Recipe]) -> str | None:
    """Which recipe is the best over its seeds, and by how much; None where none has several."""
    repeated = [recipe for recipe in recipes if recipe.is_repeated]
    if not repeated:
        return None
    best = repeated[0]
    if len(repeated) == 1:
        return f"Over its seeds {best.name or 'this config'} has mean tau {_describe_taus(best)}."
    second = repeated[1]
    text = (
        f"Over seeds the best recipe is {best.name}: mean tau {_describe_taus(best)}. Next is {second.name}: "
        f"{_describe_taus(second)}"
    )
    behind = second.difference
    if behind is None:
        return f"{text}."
    luck = "which is beyond" if behind.is_clear else "which is not beyond"
    seeds = "" if min(best.taus) > max(second.taus) else ", and their seeds overlap"
    return (
        f"{text}, {behind.mean:.3f} behind (paired difference {behind.low:.3f} to {behind.high:.3f}), {luck} the luck "
        f"of these conversations{seeds}."
    )


def count_seeds(recipe: Recipe) -> str:
    """As `3`, or `2 of 3` where some have no evaluation."""
    count = len(recipe.runs)
    return f"{count} of {count + recipe.num_missing}" if recipe.num_missing else f"{count}"


def _describe_taus(recipe: Recipe) -> str:
    return f"{recipe.tau:.3f} ({count_seeds(recipe)} seeds, {min(recipe.taus):.3f} to {max(recipe.taus):.3f})"


def _makes_a_recipe(key: str) -> bool:
    return key.partition(".")[0] in RECIPE_SECTIONS and key != SEED and key not in FREE_KEYS


def _plan_names(points: Sequence[dict[str, Any]]) -> list[str]:
    """Of each point the values that more than half of them do not have; all of its values where there are none."""
    texts = [{key: format_value(value) for key, value in point.items()} for point in points]
    if len({json.dumps(text) for text in texts}) < len(points):  # floats that four digits do not tell apart
        texts = [{key: str(value) for key, value in point.items()} for point in points]
    usual = {}
    for key in points[0]:
        text, count = Counter(point[key] for point in texts).most_common(1)[0]
        usual[key] = text if 2 * count > len(texts) else None
    own = [{key: text for key, text in point.items() if text != usual[key]} or point for point in texts]
    return [", ".join(f"{key.partition('.')[2]} {text}" for key, text in point.items()) for point in own]


def _identify(run: Run, keys: Sequence[str]) -> str:
    return json.dumps([run.config.get(key) for key in keys], default=str)


def _seed(run: Run) -> str:
    return str(run.config.get(SEED))
