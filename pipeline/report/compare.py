"""Which run is the best, and by how much: paired differences between runs that were measured on the same blocks.

Intervals say how far the held-out conversations decide the matter. Another training seed would move tau too, which they
do not say; where there are several seeds, recipes.py does. The best of many runs is a little lucky: intervals are not
corrected for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.pairing import MIN_SAMPLES, Difference, Measured, measured_on, paired_difference
from pipeline.report.recipes import Recipe, plan_recipes
from pipeline.report.runs import Run
from pipeline.report.words import join_names, readable
from pipeline.show import count_of
from stages.evaluate.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs against the best; `differences` has those that can be held against it, by their folder."""

    runs: tuple[Run, ...]
    """The best tau first; those without an evaluation last."""
    groups: tuple[tuple[Run, ...], ...]
    """Evaluated runs by what they were measured on; the best run is the first of the first group."""
    differences: dict[str, Difference]
    recipes: tuple[Recipe, ...] = ()
    """What was trained with several seeds, over them; of the first group."""

    targets: tuple[str, ...] = ()
    """`target.model` of the runs, where it is not one: then nothing is compared."""

    @property
    def best(self) -> Run | None:
        """The run with the highest tau; None where no run has been evaluated."""
        return self.groups[0][0] if self.groups else None

    @property
    def is_comparing(self) -> bool:
        """Whether there is anything that the best run, or the best recipe, is held against."""
        return bool(self.differences) or len(self.recipes) > 1

    def difference(self, run: Run) -> Difference | None:
        """How far the run is behind the best one; None for that one, and where they cannot be compared."""
        return self.differences.get(str(run.folder))

    @property
    def others(self) -> list[Run]:
        """Runs that can be compared with the best one."""
        return [run for run in self.runs if self.difference(run) is not None]

    @property
    def ties(self) -> list[Run]:
        """Those of them that cannot be told from it."""
        return [run for run in self.others if not self.differences[str(run.folder)].is_clear]

    @property
    def choice(self) -> Run | None:
        """The run to ship: the cheapest that cannot be told from the best, of those that are faster than no draft.

        None where the best is held against no other, and where none is faster.
        """
        if self.best is None or not self.others:
            return None
        return min((run for run in (self.best, *self.ties) if not run.is_useless), key=cost_of, default=None)


def cost_of(run: Run) -> tuple[float, float]:
    """What decides between runs that cannot be told apart: parameters that a draft pass reads, then the higher tau."""
    return (float("inf") if run.num_parameters is None else run.num_parameters, -run.tau)


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Hold the run with the highest tau against every run that was measured on the same blocks."""
    ordered = sorted(runs, key=lambda run: -run.tau)
    groups: dict[Measured, list[tuple[Run, Evaluation]]] = {}
    for run in ordered:
        if run.evaluation is not None:
            groups.setdefault(measured_on(run.evaluation), []).append((run, run.evaluation))
    differences: dict[str, Difference] = {}
    targets = _differing_targets([[run for run, _ in group] for group in groups.values()])
    for (_, best), *others in list(groups.values())[:1] if not targets else []:
        found = {str(run.folder): paired_difference([best], [evaluation]) for run, evaluation in others}
        differences = {folder: difference for folder, difference in found.items() if difference is not None}
    first: list[tuple[Run, Evaluation]] = next(iter(groups.values()), [])
    return Comparison(
        runs=tuple(ordered),
        groups=tuple(tuple(run for run, _ in group) for group in groups.values()),
        differences=differences,
        recipes=() if targets else plan_recipes(first, runs=ordered),
        targets=targets,
    )


def _differing_targets(groups: Sequence[Sequence[Run]]) -> tuple[str, ...]:
    """What `target.model` says, where runs that were measured on different blocks name different targets."""
    names = [{_target_of(run) for run in group} - {""} for group in groups]
    known = [own for own in names if own]
    is_one = all(one & other for place, one in enumerate(known) for other in known[:place])
    return () if is_one else tuple(sorted(set().union(*known)))


def headline(comparison: Comparison) -> str:
    """One or two sentences: which draft to ship, and why."""
    best, choice = comparison.best, comparison.choice
    if best is None:
        return "No run has been evaluated, so there is nothing to compare: run dspark evaluate."
    if comparison.targets:
        return f"Drafts of different targets ({join_names(comparison.targets)}) are not compared: name the runs of one."
    if not comparison.others:
        return f"{best.name} has {_describe_tau(best)}; nothing to compare it with, since {_why_alone(comparison)}."
    if choice is None:
        return f"{best.name} has the highest tau, {_describe_tau(best)}, but gains nothing against no draft."
    return _advise(comparison, best=best, choice=choice)


def _advise(comparison: Comparison, *, best: Run, choice: Run) -> str:
    if not comparison.ties:
        others = comparison.others
        ahead = comparison.differences[str(others[0].folder)]
        return (
            f"Ship {best.name}: {_describe_tau(best)}, {ahead.mean:.3f} above the next, {others[0].name} (paired "
            f"difference {ahead.low:.3f} to {ahead.high:.3f}), which is beyond the luck of these "
            f"{_count_conversations(best)}{_describe_seeds(comparison, best)}."
        )
    if choice is best:
        names = join_names([run.name for run in comparison.ties])
        has_cheaper = any(cost_of(run) < cost_of(best) for run in comparison.ties)
        return (
            f"Ship {best.name}: {_describe_tau(best)}, the highest, but not beyond chance above {names}. None of those "
            f"has fewer trained parameters ({_describe_size(best)})"
            + (" and gains anything against no draft." if has_cheaper else ".")
        )
    behind = comparison.differences[str(choice.folder)]
    return (
        f"Ship {choice.name}: {_describe_tau(choice)}, with the fewest trained parameters of those that cannot be told "
        f"from the best ({_describe_size(choice)}). The highest tau has {best.name}, by {behind.mean:.3f}, which is "
        f"not beyond chance (paired difference {behind.low:.3f} to {behind.high:.3f})."
    )


def describe_gain(comparison: Comparison) -> str | None:
    """What the chosen run's, or else the best run's, own outlook says against no draft; None without an outlook."""
    run = comparison.choice or comparison.best
    scheduling = run.evaluation.scheduling if run is not None and run.evaluation is not None else None
    if run is None or scheduling is None or not scheduling.outlook.concurrencies or comparison.targets:
        return None
    rows, label = scheduling.outlook.concurrencies, readable(scheduling.outlook.throughput.label)
    if run.is_useless:
        return f"Against no draft: {run.name} is not faster at any number of requests (simulated, {label})."
    shown = dict.fromkeys((rows[0], rows[-1]))
    gains = " and ".join(f"{row.gain_on_no_draft:+.0%} at {count_of(row.num_requests, 'request')}" for row in shown)
    return f"Against no draft: {run.name} gives {gains} in tokens a second (simulated, {label})."


def _describe_seeds(comparison: Comparison, best: Run) -> str:
    """What is known of the luck of the best run's seed."""
    of_best = [recipe for recipe in comparison.recipes if recipe.is_repeated and best in recipe.runs]
    if not of_best:
        return "; how far a training seed moves it, only more seeds tell"
    return "" if of_best[0] is comparison.recipes[0] else "; over seeds, another recipe is better"


def _count_conversations(run: Run) -> str:
    return count_of(0 if run.evaluation is None else len(run.evaluation.samples), "conversation")


def describe_groups(comparison: Comparison) -> str | None:
    """Which runs were measured on what; None where all were measured on the same."""
    if len(comparison.groups) < 2:
        return None
    parts = [f"{join_names([run.name for run in group])} ({_describe_blocks(group[0])})" for group in comparison.groups]
    return f"Not comparable, since measured on different blocks: {'; '.join(parts)}."


def _why_alone(comparison: Comparison) -> str:
    """Why there is no run that the best one is held against."""
    first = comparison.groups[0]
    if len(first) > 1 and first[0].evaluation is not None:
        count = len(first[0].evaluation.samples)
        return f"{count_of(count, 'conversation')} cannot tell runs apart (it takes {MIN_SAMPLES} at least)"
    if len(comparison.groups) > 1:
        return "the others were measured on other blocks"
    return "there is no other evaluated run"


def _target_of(run: Run) -> str:
    return str(run.config.get("target.model") or "")


def _describe_blocks(run: Run) -> str:
    found = run.evaluation
    if found is None:
        raise AssertionError("only evaluated runs are in groups")
    blocks = sum(sample.num_blocks for sample in found.samples)
    origin = found.origin
    target = f"target {readable(_target_of(run))}, " if _target_of(run) else ""
    sizes = f"{count_of(len(found.samples), 'conversation')}, {count_of(blocks, 'block')}"
    return (
        f"{sizes}, {target}cache {origin.cache_digest[:12]}, "
        f"evaluate.num_anchors {origin.num_anchors}, evaluate.seed {origin.seed}"
    )


def _describe_tau(run: Run) -> str:
    found = run.evaluation
    return "" if found is None else f"tau {found.tau:.3f} (95 % interval {found.tau_low:.3f} to {found.tau_high:.3f})"


def _describe_size(run: Run) -> str:
    return "draft gone" if run.num_parameters is None else f"{run.num_parameters:,}"
