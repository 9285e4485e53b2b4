"""The comparison as the terminal shows it."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.compare import Comparison, describe_gain, describe_groups, headline
from pipeline.report.recipes import Recipe, count_seeds, describe_recipes
from pipeline.report.runs import differing_keys
from pipeline.report.words import break_name, format_difference, format_value

NUMBER_WIDTH = 57  # characters that the columns before the names take, spaces between them too
MIN_NAME_WIDTH = 20


def print_table(comparison: Comparison, *, console: Console) -> None:
    """Runs with the best tau first, recipes over their seeds, and the sentences that say what to make of them."""
    console.print(_runs(comparison, name_width=max(console.width - NUMBER_WIDTH, MIN_NAME_WIDTH)))
    if comparison.recipes:
        console.print(_recipes(comparison.recipes))
    console.print(headline(comparison), markup=False, style="bold")
    for text in (describe_gain(comparison), describe_recipes(comparison.recipes), describe_groups(comparison)):
        if text is not None:
            console.print(text, markup=False)


def _runs(comparison: Comparison, *, name_width: int) -> Table:
    against = ["against the best"] if comparison.is_comparing else []
    table = _table("held-out acceptance", "tau (95 % interval)", *against)
    table.add_column("run", overflow="fold")
    keys = differing_keys(comparison.runs)
    for run in comparison.runs:
        found, name = run.evaluation, Text(break_name(run.name, width=name_width))
        if not run.trial and keys:  # a trial's folder is named after its values
            values = (f"{key.partition('.')[2]} {format_value(run.config.get(key))}" for key in keys)
            name.append(f"\n{', '.join(values)}", style="dim")
        if found is None:
            name.append(f"\n{run.problem}", style="yellow")
            table.add_row("none", *("" for _ in against), name)
            continue
        difference = (
            "best" if run is comparison.best else format_difference(comparison.difference(run)) or "not comparable"
        )
        tau = f"{found.tau:.3f} ({found.tau_low:.3f} to {found.tau_high:.3f})"
        table.add_row(tau, *(difference for _ in against), name)
    return table


def _recipes(recipes: tuple[Recipe, ...]) -> Table:
    is_alone = len(recipes) == 1
    table = _table("recipes over their seeds", "mean tau", "seeds", *([] if is_alone else ["against the best"]))
    table.add_column("recipe", overflow="fold")
    for recipe in recipes:
        ends = f": {min(recipe.taus):.3f} to {max(recipe.taus):.3f}" if recipe.is_repeated else ""
        seeds = f"{count_seeds(recipe)}{ends}"
        mean = f"{recipe.tau:.3f}" if recipe.is_repeated else ""
        against = "best" if recipe is recipes[0] else format_difference(recipe.difference)
        table.add_row(mean, seeds, *([] if is_alone else [against]), Text(recipe.name or "this config"))
    return table


def _table(title: str, *numbers: str) -> Table:
    """A table whose columns of numbers are not broken."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for name in numbers:
        table.add_column(name, no_wrap=True)
    return table
