"""`report.html`: one page without anything from elsewhere, its plots inside it and beside it as PNG files.

The page is made anew from the runs each time; deleting it and its folder loses nothing.
"""

import base64
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.report.compare import Comparison, describe_gain, describe_groups, headline
from pipeline.report.facts import describe_facts
from pipeline.report.figures import Plot, draw_plots
from pipeline.report.recipes import SEED, Recipe, describe_recipes
from pipeline.report.runs import Run, differing_keys
from pipeline.report.words import describe_seconds, format_difference, format_value, readable
from pipeline.show import format_bytes
from stages.whole_files import write_whole

PAGE = "report.html"
PLOTS = "report"
TEMPLATE = "page.html.j2"


def write_page(comparison: Comparison, out: Path) -> Path:
    """Write `report.html` and `report/*.png` into the folder `out`; the page's path."""
    plots = draw_plots(comparison.runs, recipes=comparison.recipes)
    (out / PLOTS).mkdir(parents=True, exist_ok=True)
    for plot in plots:
        file = out / PLOTS / f"{plot.key}.png"
        if plot.png is None:
            file.unlink(missing_ok=True)  # of an earlier report
        else:
            write_whole(file, plot.png)
    write_whole(out / PAGE, readable(render_page(comparison, plots)))
    return out / PAGE


def render_page(comparison: Comparison, plots: list[Plot]) -> str:
    """The page's HTML; every text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["breakable"] = breakable
    keys = differing_keys(comparison.runs)
    return environment.get_template(TEMPLATE).render(
        title=_title(comparison),
        headline=headline(comparison),
        gain=describe_gain(comparison),
        facts=describe_facts(comparison.runs),
        is_comparing=comparison.is_comparing,
        groups=describe_groups(comparison),
        over_seeds=describe_recipes(comparison.recipes),
        recipe_keys=list(comparison.recipes[0].values) if comparison.recipes else [],
        recipes=[_recipe(recipe, is_best=recipe is comparison.recipes[0]) for recipe in comparison.recipes],
        keys=keys,
        rows=[_row(run, comparison, keys) for run in comparison.runs],
        plots=[_describe_plot(plot) for plot in plots],
        costs=[_cost(run) for run in comparison.runs],
    )


def _title(comparison: Comparison) -> str:
    if comparison.is_comparing:
        return "Drafts compared"
    return f"Draft {comparison.runs[0].name}" if len(comparison.runs) == 1 else "Drafts"


def breakable(text: str) -> Markup:
    """The text, escaped, with places where a long run name may be broken."""
    return Markup("<wbr>").join(re.split(r"(?<=[,/=_])", text))


def _row(run: Run, comparison: Comparison, keys: list[str]) -> dict[str, Any]:
    found = run.evaluation
    row: dict[str, Any] = {
        "name": run.name,
        "folder": str(run.folder),
        "values": [format_value(run.config.get(key)) for key in keys],
        "is_best": run is comparison.best,
        "is_choice": run is comparison.choice,
        "problem": run.problem,
        "measured": None,
    }
    if found is not None:
        difference = comparison.difference(run)
        row["measured"] = {
            "tau": f"{found.tau:.3f}",
            "greedy": "" if found.tau_greedy is None else f"{found.tau_greedy:.3f}",
            "interval": f"{found.tau_low:.3f} to {found.tau_high:.3f}",
            "behind": format_difference(difference) or ("best" if row["is_best"] else "not comparable"),
            "is_tied": difference is not None and not difference.is_clear,
            "accept": f"{found.accept_rate_per_pos[0]:.3f} … {found.accept_rate_per_pos[-1]:.3f}",
            "top1": f"{found.top1_agreement:.3f}",
            "ece": "" if found.confidence_ece is None else f"{found.confidence_ece:.3f}",
            "samples": f"{found.num_samples:,}",
        }
    return row


def _recipe(recipe: Recipe, *, is_best: bool) -> dict[str, Any]:
    difference = recipe.difference
    seeds = [format_value(run.config.get(SEED)) for run in recipe.runs]
    sizes = [f"{run.num_parameters:,}" for run in recipe.runs if run.num_parameters is not None]
    return {
        "values": [format_value(value) for value in recipe.values.values()],
        "tau": f"{recipe.tau:.3f}" if recipe.is_repeated else "",
        "taus": ", ".join(f"{seed}: {tau:.3f}" for seed, tau in zip(seeds, recipe.taus, strict=True)),
        "missing": recipe.num_missing,
        "behind": "best" if is_best else format_difference(difference) or ("" if recipe.is_repeated else "one seed"),
        "is_tied": difference is not None and not difference.is_clear,
        "parameters": sizes[0] if sizes else "",
    }


def _cost(run: Run) -> dict[str, str]:
    origin = run.trial.get("origin")
    return {
        "name": run.name,
        "seconds": describe_seconds(run.seconds) if run.train_rows else "",
        "steps": f"{run.num_steps:,}" if run.train_rows else "",
        "parameters": "" if run.num_parameters is None else f"{run.num_parameters:,}",
        "draft": "" if run.draft_bytes is None else format_bytes(run.draft_bytes),
        "cache": "not at hand" if run.cache_bytes is None else format_bytes(run.cache_bytes),
        "cache_path": str(run.config.get("cache.path", "")),
        "revision": str(origin.get("revision") or "")[:12] if isinstance(origin, dict) else "",
        "state": str(run.trial.get("state", "")),
    }


def _describe_plot(plot: Plot) -> dict[str, Any]:
    image = None if plot.png is None else "data:image/png;base64," + base64.b64encode(plot.png).decode("ascii")
    return {
        "key": plot.key, "title": plot.title, "text": plot.text, "image": image,
        "missing": plot.missing, "folders": plot.folders,
    }  # fmt: skip
