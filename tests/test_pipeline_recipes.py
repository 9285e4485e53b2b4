"""Recipes: runs that differ in their seed alone, compared by their means."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made_runs import Page, evaluate, make_run, read, report
from pipeline.report.compare import headline
from pipeline.report.figures import COLOURS, plan_styles
from pipeline.report.recipes import count_seeds, describe_recipes
from pipeline.sweep.record import write_trial


def make_recipes(folder: Path, *gains: tuple[float, ...], num_samples: int = 30) -> list[Path]:
    """A recipe for each tuple, its lr the number of it, with a seed for each gain."""
    return [
        make_run(
            folder / f"seed={seed},lr={lr}",
            evaluate(gain=gain, num_samples=num_samples),
            config={"lr": float(lr), "seed": seed},
        )
        for lr, of_seeds in enumerate(gains, start=1)
        for seed, gain in enumerate(of_seeds)
    ]


def test_recipes_are_compared_by_the_mean_over_their_seeds(tmp_path: Path) -> None:
    """The best run is of the worse recipe here: one lucky seed does not make a recipe."""
    comparison = read(*make_recipes(tmp_path, (0.06, 0.05, 0.07), (0.09, 0.00, 0.01)))
    assert comparison.best is not None
    assert comparison.best.name == "seed=0,lr=2"
    first, second = comparison.recipes
    assert [run.name for run in first.runs] == ["seed=0,lr=1", "seed=1,lr=1", "seed=2,lr=1"]
    assert first.name == "lr 1"
    assert first.tau == pytest.approx(np.mean([run.tau for run in first.runs]))
    assert first.difference is None
    assert second.difference is not None
    assert second.difference.mean == pytest.approx(first.tau - second.tau)
    assert second.difference.is_clear
    text = describe_recipes(comparison.recipes)
    assert text is not None
    assert re.fullmatch(
        r"Over seeds the best recipe is lr 1: mean tau [\d.]+ \(3 seeds, [\d.]+ to [\d.]+\)\. Next is lr 2: .* behind "
        r"\(paired difference 0\.0.*\), which is beyond the luck of these conversations, and their seeds overlap\.",
        text,
    )


def test_the_interval_of_recipes_is_that_of_the_mean_over_seeds_of_each_conversation(tmp_path: Path) -> None:
    comparison = read(*make_recipes(tmp_path, (0.06, 0.08), (0.0, 0.01)))
    one, other = ([run.evaluation for run in recipe.runs if run.evaluation] for recipe in comparison.recipes)
    gains = [
        (samples[0].num_blocks, sum(s.tau for s in samples[:2]) / 2 - sum(s.tau for s in samples[2:]) / 2)
        for samples in zip(*(found.samples for found in (*one, *other)), strict=True)
    ]
    rng, means = np.random.default_rng(5), []
    for _ in range(2000):
        drawn = [gains[index] for index in rng.integers(len(gains), size=len(gains))]
        means.append(sum(n * d for n, d in drawn) / sum(n for n, _ in drawn))
    found = comparison.recipes[1].difference
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.005)


def test_recipes_are_shown_in_the_terminal_and_on_the_page(tmp_path: Path) -> None:
    folders = make_recipes(tmp_path, (0.06, 0.05), (0.0, 0.02), (0.01,))
    ended = report(*folders)
    assert "recipes over their seeds" in ended.output
    assert "Over seeds the best recipe is lr 1" in " ".join(ended.output.split())
    assert "only more seeds tell" not in ended.output
    page = Page(tmp_path / "report.html")
    start = next(place for place, row in enumerate(page.rows) if "mean tau" in row)
    recipes = page.rows[start + 1 : start + 4]
    assert [row[0] for row in recipes] == ["1", "2", "3"]
    assert [row[2] == "best" for row in recipes] == [True, False, False]
    assert re.fullmatch(r"0: [\d.]{5}, 1: [\d.]{5}", recipes[0][3])
    assert (recipes[2][1], recipes[2][2]) == ("", "one seed")


def test_a_lucky_seed_alone_is_no_best_recipe(tmp_path: Path) -> None:
    """Its other seeds were given up, so its mean is that of the survivor."""
    folders = make_recipes(tmp_path, (0.06, 0.05, 0.05), (0.2,))
    for seed in (1, 2):
        folder = make_run(tmp_path / f"seed={seed},lr=2", None, config={"lr": 2.0, "seed": seed})
        write_trial(folder, {"state": "pruned", "reason": "its tau was low"})
        folders.append(folder)
    comparison = read(*folders)
    assert [recipe.name for recipe in comparison.recipes] == ["lr 1", "lr 2"]
    assert comparison.recipes[1].num_missing == 2
    assert comparison.recipes[1].difference is None
    assert count_seeds(comparison.recipes[1]) == "1 of 3"
    text = describe_recipes(comparison.recipes)
    assert text is not None
    assert text.startswith("Over its seeds lr 1 has mean tau ")
    assert "only more seeds tell" in headline(comparison), "the best run has one seed"


def test_a_seed_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    folders = make_recipes(tmp_path, (0.06, 0.05), (0.0, 0.01))
    twice = make_run(tmp_path / "z-copy", evaluate(gain=0.2), config={"lr": 1.0, "seed": 0})
    assert [recipe.taus for recipe in read(*folders, twice).recipes] == [
        recipe.taus for recipe in read(*folders).recipes
    ]


def test_keys_that_change_no_draft_make_no_recipe(tmp_path: Path) -> None:
    for seed, every in ((0, 100), (1, 200)):
        for lr in (0.001, 0.002):
            config = {"lr": lr, "seed": seed, "checkpoint_every": every}
            make_run(tmp_path / f"{seed},{lr}", evaluate(gain=lr), config=config)
    assert [recipe.name for recipe in read(tmp_path).recipes] == ["lr 0.002", "lr 0.001"]


def test_drafts_of_other_data_are_other_recipes(tmp_path: Path) -> None:
    """Measured on one cache, but trained from two."""
    for seed in (0, 1):
        for name in ("own", "theirs"):
            folder = make_run(tmp_path / f"{name}{seed}", evaluate(gain=0.02 + seed / 100), config={"seed": seed})
            with (folder / "config.toml").open("a") as file:
                file.write(f'[data]\nfiles = ["{name}.jsonl"]\n')
    assert [recipe.name for recipe in read(tmp_path).recipes] == ["files ['own.jsonl']", "files ['theirs.jsonl']"]


def test_several_seeds_of_one_config_are_summed_up(tmp_path: Path) -> None:
    comparison = read(*make_recipes(tmp_path, (0.05, 0.06, 0.07)))
    text = describe_recipes(comparison.recipes)
    assert text is not None
    assert re.fullmatch(r"Over its seeds this config has mean tau [\d.]+ \(3 seeds, [\d.]+ to [\d.]+\)\.", text)
    assert "only more seeds tell" not in headline(comparison)


def test_without_two_seeds_there_are_no_recipes(tmp_path: Path) -> None:
    comparison = read(*make_recipes(tmp_path, (0.05,), (0.0,)))
    assert comparison.recipes == ()
    assert describe_recipes(comparison.recipes) is None


@pytest.mark.parametrize(
    ("variants", "names"),
    [
        ([{}, {"lr": 0.002}, {"epochs": 2}], ["lr 0.001, epochs 1", "lr 0.002", "epochs 2"]),
        ([{}, {"lr": 0.002}, {"epochs": 2}, {"lr": 0.002, "epochs": 2}], [
            "lr 0.001, epochs 1", "lr 0.002, epochs 1", "lr 0.001, epochs 2", "lr 0.002, epochs 2",
        ]),
        ([{}, {"lr": 0.002}], ["lr 0.001", "lr 0.002"]),
        ([{}, {"lr": 0.00100004}], ["lr 0.001", "lr 0.00100004"]),
    ],
    ids=["variants of one", "a grid", "two", "look-alikes"],
)  # fmt: skip
def test_a_recipe_is_named_by_what_sets_it_apart(
    tmp_path: Path, variants: list[dict[str, Any]], names: list[str]
) -> None:
    for place, changes in enumerate(variants):
        for seed in (0, 1):
            config = {"epochs": 1, "seed": seed, **changes}
            make_run(tmp_path / f"{place}-{seed}", evaluate(gain=0.02 * (5 - place)), config=config)
    assert [recipe.name for recipe in read(tmp_path).recipes] == names


def test_recipes_of_few_conversations_have_no_difference(tmp_path: Path) -> None:
    comparison = read(*make_recipes(tmp_path, (0.05, 0.06), (0.0, 0.01), num_samples=4))
    assert [recipe.difference for recipe in comparison.recipes] == [None, None]
    text = describe_recipes(comparison.recipes)
    assert text is not None
    assert "behind" not in text


def test_the_seeds_of_a_recipe_share_a_colour_and_a_name(tmp_path: Path) -> None:
    comparison = read(*make_recipes(tmp_path, (0.06, 0.05), (0.0, 0.02), (0.01,)))
    styles = plan_styles(comparison.runs, recipes=comparison.recipes)
    colours = {run.name: styles[run.folder].colour for run in comparison.runs}
    assert [colours[f"seed={seed},lr=1"] for seed in (0, 1)] == [COLOURS[0]] * 2
    assert [colours[f"seed={seed},lr=2"] for seed in (0, 1)] == [COLOURS[1]] * 2
    assert colours["seed=0,lr=3"] not in COLOURS, "its seed's luck is not told from its recipe"
    assert sorted(style.label for style in styles.values() if style.label) == ["lr 1 (2 seeds)", "lr 2 (2 seeds)"]
