"""The plots of a report, each drawn from what the runs hold, or left out with a reason."""

import io
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from pipeline.report.recipes import Recipe, count_seeds
from pipeline.report.runs import Run
from pipeline.report.words import break_name
from stages.evaluate.evaluation import Scheduling
from stages.evaluate.reliability import Bins

# Okabe and Ito's colours, which most colour-blind people can tell apart; without yellow, which white swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
FAINT = "#b0b0b0"
MAX_PANELS = 4
NAME_LENGTH = 48
MAX_STEP = 2**53  # beyond it, a step is no float
WIDTH, HEIGHT = 4.6, 3.4  # inches of a plot of one panel: its letters can be read on a page of 420 pixels, too
LEGEND_WIDTH, TICK_WIDTH = 44, 22  # characters of a line
DPI = 200

Styles = dict[Path, "Style"]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot, or why there is none."""

    key: str
    title: str
    text: str
    """What is drawn, in a sentence or two."""
    folders: tuple[str, ...]
    """Run folders that it is drawn from."""
    png: bytes | None
    missing: str | None


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a run is drawn, in all plots of a report alike."""

    colour: str
    line: str
    is_named: bool
    """Whether it has a colour of its own, or of its recipe."""
    label: str | None
    """Its line in the legends; None where another run of its recipe has it, and without a colour."""


def draw_plots(runs: Sequence[Run], *, recipes: Sequence[Recipe] = ()) -> list[Plot]:
    """All plots of a report; `runs` in the order of the table."""
    styles = plan_styles(runs, recipes=recipes)
    drawings = (_taus, _losses, _validations, _acceptance, _reliability, _thresholds, _outlook)
    return [_try(draw, runs, styles) for draw in drawings]


def _try(draw: Callable[[Sequence[Run], Styles], Plot], runs: Sequence[Run], styles: Styles) -> Plot:
    """The plot, or that its numbers cannot be drawn: those of a damaged file may be of any size."""
    try:
        with np.errstate(over="raise"):
            return draw(runs, styles)
    except (ArithmeticError, ValueError) as error:
        name = draw.__name__.strip("_")
        return Plot(key=name, title=name, text="", folders=(), png=None, missing=f"cannot be drawn: {error}")


def plan_styles(runs: Sequence[Run], *, recipes: Sequence[Recipe] = ()) -> Styles:
    """By folder: the first runs in colours, further ones faint; where there are recipes, the first recipes instead."""
    named = [
        (recipe.runs, f"{recipe.name or 'this config'} ({count_seeds(recipe)} seeds)")
        for recipe in recipes
        if recipe.is_repeated
    ]
    if not named:
        named = [((run,), run.name) for run in runs]
    styles = {}
    for colour, line, (alike, name) in zip(COLOURS, itertools.cycle(LINES), named, strict=False):
        for place, run in enumerate(alike):
            label = None if place else label_of(name, width=LEGEND_WIDTH)
            styles[run.folder] = Style(colour=colour, line=line, is_named=True, label=label)
    for place, run in enumerate(runs):
        line = LINES[place % len(LINES)]
        styles.setdefault(run.folder, Style(colour=FAINT, line=line, is_named=False, label=None))
    return styles


def _taus(runs: Sequence[Run], styles: Styles) -> Plot:
    measured = [run for run in runs if run.evaluation is not None]
    names = [label_of(run.name, width=TICK_WIDTH) for run in measured]
    lines = sum(1 + name.count("\n") for name in names)
    figure = Figure(figsize=(WIDTH, 1.0 + 0.12 * len(names) + 0.17 * lines), layout="constrained")
    axes = figure.subplots()
    for place, run in enumerate(measured):
        found = run.evaluation
        if found is not None:
            # Files of earlier versions may leave tau out of its interval by a last bit.
            span = [[max(0.0, found.tau - found.tau_low)], [max(0.0, found.tau_high - found.tau)]]
            axes.errorbar([found.tau], [place], xerr=span, fmt="o", capsize=3, color=styles[run.folder].colour)
    axes.set_yticks(range(len(measured)), names, fontsize=8)
    axes.set_ylim(max(len(measured), 1) - 0.5, -0.5)
    axes.set_xlabel("tau (tokens a verify round)")
    axes.grid(axis="x", alpha=0.3)
    text = "Mean and 95 % interval, bootstrap over held-out conversations."
    return _plot("tau", "tau", text, measured, figure, missing="no run has been evaluated")


def _losses(runs: Sequence[Run], styles: Styles) -> Plot:
    trained = [run for run in runs if run.train_rows]
    figure, axes = _axes("optimizer steps", "loss (weighted sum of its terms)")
    _draw_lines(axes, trained, styles, lambda run: _smooth(run.train_rows, "loss"))
    _cut_start(axes)
    text = (
        "Training loss, averaged over up to a fiftieth of the steps. The frame holds what comes after the first tenth "
        "of the steps, so that curves can be told apart."
    )
    return _plot("loss", "Training loss", text, trained, figure, missing="no run has metrics.jsonl")


def _validations(runs: Sequence[Run], styles: Styles) -> Plot:
    measured = [run for run in runs if run.validation_rows]
    figure, axes = _axes("optimizer steps", "tau (tokens a verify round)")
    _draw_lines(axes, measured, styles, lambda run: _column(run.validation_rows, "tau"), marker="o")
    text = "tau on the held-out split during the training; a curve that ends early belongs to a run that was given up."
    return _plot(
        "validation", "Validation tau", text, measured, figure, missing="no run was validated while it trained"
    )


def _acceptance(runs: Sequence[Run], styles: Styles) -> Plot:
    measured = [run for run in runs if run.evaluation is not None]
    figure, axes = _axes("slot of the block (1 is behind the anchor)", "accepted, if all before it are")

    def curve(run: Run) -> tuple[list[float], list[float]]:
        found = run.evaluation
        if found is None:
            return [], []
        rates = zip(found.conditional_accept_per_pos, found.num_blocks_per_pos, strict=True)
        points = [(float(slot), rate) for slot, (rate, count) in enumerate(rates, start=1) if count]
        return [slot for slot, _ in points], [rate for _, rate in points]

    _draw_lines(axes, measured, styles, curve, marker="o")
    for run in measured:
        style = styles[run.folder]
        if run.evaluation is not None and style.label is not None:
            slots, _ = curve(run)
            low = run.evaluation.conditional_accept_low_per_pos[: len(slots)]
            high = run.evaluation.conditional_accept_high_per_pos[: len(slots)]
            axes.fill_between(slots, low, high, color=style.colour, alpha=0.12, linewidth=0)
    text = (
        "Conditional acceptance by position: of the rounds whose earlier slots were all accepted, the share that "
        "accepts this one too. Bands: 95 % intervals; of a recipe, that of its first seed."
    )
    return _plot("acceptance", "Acceptance by position", text, measured, figure, missing="no run has been evaluated")


def _reliability(runs: Sequence[Run], styles: Styles) -> Plot:
    shown = _with_scheduling(runs)[:MAX_PANELS]
    figure = Figure(figsize=(WIDTH, 2.8 * max(len(shown), 1)), layout="constrained")
    grid = figure.subplots(max(len(shown), 1), 2, squeeze=False)
    for (slots, prefixes), (run, scheduling) in zip(grid, shown, strict=False):
        before, after = scheduling.reliability_before, scheduling.reliability_after
        _draw_bins(slots, before.confidence, after.confidence)
        _draw_bins(prefixes, before.survival, after.survival)
        slots.set_title(label_of(run.name, width=LEGEND_WIDTH), fontsize=9, loc="left")
        slots.set_xlabel("confidence of a slot")
        slots.set_ylabel("accept rate")
        prefixes.set_xlabel("product of confidences\nup to a slot")
        prefixes.set_ylabel("accepted up to the slot")
    if shown:
        grid[0][0].legend(fontsize=8, loc="upper left")
    text = (
        "Predicted against observed, 15 bins; larger dots hold more slots, and on the diagonal the confidence can be "
        f"believed. Measured on conversations that the temperatures were not fitted on. {_first_panels(shown)}"
    )
    return _plot(
        "reliability", "Reliability before and after calibration", text, [run for run, _ in shown], figure,
        missing=_WITHOUT_SCHEDULING,
    )  # fmt: skip


def _thresholds(runs: Sequence[Run], styles: Styles) -> Plot:
    shown = _with_scheduling(runs)
    figure = Figure(figsize=(WIDTH, 2 * HEIGHT), layout="constrained")
    accepted, verified = figure.subplots(2, 1)
    for run, scheduling in shown:
        curve, raw = scheduling.thresholds_after, scheduling.thresholds_before
        look = _look(styles[run.folder])
        accepted.plot(curve.threshold, curve.accepted, **look)
        accepted.plot(raw.threshold, raw.accepted, color=look["color"], alpha=0.35, linewidth=1)
        verified.plot(curve.verified, curve.accepted, **look)
    accepted.set_xlabel("threshold on the product of confidences")
    accepted.set_ylabel("draft tokens accepted a round")
    verified.set_xlabel("draft tokens verified a round")
    verified.set_ylabel("draft tokens accepted a round")
    for axes in (accepted, verified):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    _add_legend(accepted)
    text = (
        "What a round accepts if it verifies only slots whose predicted survival reaches a threshold; above "
        "calibrated, and faint as it was before. The bonus token is not counted."
    )
    return _plot(
        "thresholds", "Accepted tokens against threshold", text, [run for run, _ in shown], figure,
        missing=_WITHOUT_SCHEDULING,
    )  # fmt: skip


def _outlook(runs: Sequence[Run], styles: Styles) -> Plot:
    shown = [(run, found) for run, found in _with_scheduling(runs) if found.outlook.concurrencies]
    figure = Figure(figsize=(WIDTH, 2 * HEIGHT), layout="constrained")
    speed, gain = figure.subplots(2, 1)
    for run, scheduling in shown:
        rows, style = scheduling.outlook.concurrencies, styles[run.folder]
        requests = [row.num_requests for row in rows]
        look = {**_look(style), "linestyle": "-"}
        speed.plot(requests, [row.scheduled.tokens_per_second for row in rows], **look)
        best = [row.fixed[row.best_length].tokens_per_second for row in rows]
        speed.plot(requests, best, color=style.colour, linestyle=":", alpha=0.8)
        gain.plot(requests, [100 * row.gain_on_no_draft for row in rows], color=style.colour, marker="o", markersize=4)
        alone = [row.fixed[0].tokens_per_second for row in rows]
        gain.plot(
            requests, [100 * (fixed / none - 1) for fixed, none in zip(best, alone, strict=True)],
            color=style.colour, linestyle=":", alpha=0.8,
        )  # fmt: skip
    for axes in (speed, gain):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("concurrent requests")
        axes.grid(alpha=0.3)
    if shown:
        speed.set_yscale("log")
    speed.set_ylabel("tokens a second")
    gain.set_ylabel("gain against no draft (%)")
    _add_legend(speed)
    labels = sorted({found.outlook.throughput.label for _, found in shown})
    text = (
        "Simulated: verify lengths scheduled by calibrated confidence (solid) and the best fixed length (dotted), "
        f"by {', '.join(labels)}."
    )
    return _plot(
        "outlook", "Scheduling outlook by concurrency", text, [run for run, _ in shown], figure,
        missing=_WITHOUT_SCHEDULING,
    )  # fmt: skip


_WITHOUT_SCHEDULING = "no evaluated run has a confidence head and the conversations to calibrate it"


def label_of(name: str, *, length: int = NAME_LENGTH, width: int = NAME_LENGTH) -> str:
    """The name as matplotlib takes it: no mathematics, and no underscore first, which hides a line.

    `length` is that of the whole, `width` that of a line, both in characters.
    """
    name = "".join(char if char.isprintable() else "?" for char in name)
    name = name if len(name) <= length else f"{name[: length // 2]}…{name[-(length // 2) :]}"
    lines = break_name("./" + name if name.startswith("_") else name, width=width).split("\n")
    parts = [line[start : start + width] for line in lines for start in range(0, max(len(line), 1), width)]
    return "\n".join(parts).replace("$", r"\$")


def _with_scheduling(runs: Sequence[Run]) -> list[tuple[Run, Scheduling]]:
    return [(run, run.evaluation.scheduling) for run in runs if run.evaluation and run.evaluation.scheduling]


def _first_panels(shown: Sequence[Any]) -> str:
    return f"The first {MAX_PANELS} runs at most." if len(shown) == MAX_PANELS else ""


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    return figure, axes


def _draw_lines(
    axes: Axes,
    runs: Sequence[Run],
    styles: Styles,
    curve: Callable[[Run], tuple[list[float], list[float]]],
    *,
    marker: str | None = None,
) -> None:
    """A line a run, the first on top, and a legend below."""
    for place, run in enumerate(runs):
        style = styles[run.folder]
        axes.plot(
            *curve(run), marker=marker, markersize=4, zorder=3 - place / (len(runs) + 1),
            linewidth=1.5 if style.is_named else 0.8, **_look(style),
        )  # fmt: skip
    _add_legend(axes)


def _cut_start(axes: Axes) -> None:
    """Fit the frame to what comes after the first tenth of the x axis, and to the last point of every line."""
    lines = [
        line_N2[np.isfinite(line_N2).all(axis=1)] for line_N2 in (np.asarray(line.get_xydata()) for line in axes.lines)
    ]
    start = max((line_N2[-1, 0] for line_N2 in lines if len(line_N2)), default=0.0) / 10
    shown = [y for line_N2 in lines for y in (*line_N2[line_N2[:, 0] > start, 1], *line_N2[-1:, 1])]
    if shown and max(shown) > min(shown):
        margin = 0.05 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - margin, max(shown) + margin)


def _look(style: Style) -> dict[str, Any]:
    """What matplotlib needs to draw the run; a faint one is not named."""
    look: dict[str, Any] = {"color": style.colour, "linestyle": style.line}
    return look | ({"label": style.label} if style.label is not None else {})


def _draw_bins(axes: Axes, before: Bins, after: Bins) -> None:
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    for bins, colour, marker, label in ((before, COLOURS[1], "s", "before"), (after, COLOURS[0], "o", "after")):
        kept = [place for place, count in enumerate(bins.count) if count]
        most = max(bins.count, default=1) or 1
        axes.scatter(
            [bins.mean_predicted[place] for place in kept],
            [bins.mean_observed[place] for place in kept],
            s=[12 + 70 * bins.count[place] / most for place in kept],
            color=colour, marker=marker, alpha=0.7, label=label,
        )  # fmt: skip
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)


def _add_legend(axes: Axes) -> None:
    """The names of the lines below the whole figure, where they hide none."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(handles, labels, fontsize=8, loc="outside lower center")


def _column(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), float)]
    points = [(float(step), value) for step, value in points if math.isfinite(value) and step < MAX_STEP]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Means over neighbouring steps: about fifty points, whatever the number of steps."""
    steps, values = _column(rows, key)
    width = max(1, math.ceil(len(values) / 50))
    starts = range(0, len(values), width)
    means = [math.fsum(values[start : start + width]) / len(values[start : start + width]) for start in starts]
    return [steps[min(start + width, len(steps)) - 1] for start in starts], means


def _plot(key: str, title: str, text: str, runs: Sequence[Run], figure: Figure, *, missing: str) -> Plot:
    folders = tuple(str(run.folder) for run in runs)
    if not runs:
        return Plot(key=key, title=title, text=text, folders=(), png=None, missing=missing)
    return Plot(key=key, title=title, text=text, folders=folders, png=_render(figure), missing=None)


def _render(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands for the letter
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
