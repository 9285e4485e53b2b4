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

SEED = "train.seed"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Evaluated runs of one config, a seed each, measured on the same blocks."""

    name: str
    """What sets it apart, as `markov_rank 0`; for the recipe that most others are variants of, all its values."""
    values: dict[str, Any]
    """Config keys that tell the recipes of a report apart."""
    runs: tuple[Run, ...]
    """In the order of their seeds."""
    difference: Difference | None = None
    """How far its mean over seeds is behind the best recipe's; None for that one, and of too few conversations."""

    @property
    def taus(self) -> list[float]:
        """Of its runs."""
        return [run.tau for run in self.runs]

    @property
    def tau(self) -> float:
        """The mean over seeds."""
        return math.fsum(self.taus) / len(self.runs)


def plan_recipes(runs: Sequence[Run]) -> tuple[Recipe, ...]:
    """The recipes among runs that were measured on the same blocks, the best mean first.

    Empty where no recipe was trained with two seeds, so that each run speaks for itself, and where there is but one.
    """
    known = [run for run in runs if run.config]  # without a config, nothing tells what it was made of
    keys = [key for key in differing_keys(known) if key != SEED]
    groups: dict[str, list[Run]] = {}
    for run in known:
        groups.setdefault(json.dumps([run.config.get(key) for key in keys], default=str), []).append(run)
    if len(groups) < 2 or all(len({_seed(run) for run in group}) < 2 for group in groups.values()):
        return ()
    points = [{key: group[0].config.get(key) for key in keys} for group in groups.values()]
    recipes = [
        Recipe(name=name, values=values, runs=tuple(sorted(group, key=_seed)))
        for name, values, group in zip(_plan_names(points), points, groups.values(), strict=True)
    ]
    best, *others = sorted(recipes, key=lambda recipe: -recipe.tau)
    return best, *(
        replace(other, difference=paired_difference(_evaluations(best), _evaluations(other))) for other in others
    )


def _plan_names(points: Sequence[dict[str, Any]]) -> list[str]:
    """Of each point the values that more than half of them do not have; all of its values where there are none."""
    texts = [{key: format_value(value) for key, value in point.items()} for point in points]
    usual = {}
    for key in points[0]:
        text, count = Counter(point[key] for point in texts).most_common(1)[0]
        usual[key] = text if 2 * count > len(texts) else None
    own = [{key: text for key, text in point.items() if text != usual[key]} or point for point in texts]
    return [", ".join(f"{key.partition('.')[2]} {text}" for key, text in point.items()) for point in own]


def describe_recipes(recipes: Sequence[Recipe]) -> str | None:
    """Which recipe is the best over its seeds, and by how much; None where there are none to compare."""
    if not recipes:
        return None
    best, second = recipes[:2]
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


def _describe_taus(recipe: Recipe) -> str:
    if len(recipe.runs) == 1:
        return f"{recipe.tau:.3f} (one run)"
    return f"{recipe.tau:.3f} ({len(recipe.runs)} runs, {min(recipe.taus):.3f} to {max(recipe.taus):.3f})"


def _evaluations(recipe: Recipe) -> list[Evaluation]:
    return [run.evaluation for run in recipe.runs if run.evaluation is not None]


def _seed(run: Run) -> tuple[int, str]:
    """Its seed for sorting, whatever the file has for one."""
    text = str(run.config.get(SEED))
    return len(text), text
