"""Which run is the best, and by how much: paired differences between runs that were measured on the same blocks.

Intervals say how far the held-out conversations decide the matter. Another training seed would move tau too, which they
do not say, and the best of many runs is a little lucky: they are not corrected for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.runs import Run
from pipeline.report.words import Difference, join_names
from stages.evaluate.bootstrap import estimate_ratio
from stages.evaluate.calibration import Origin
from stages.evaluate.evaluation import Evaluation

# Assumption: below it, the bootstrap has so few conversations to draw from that its intervals are far too narrow; those
# of one have no width.
MIN_SAMPLES = 5

Measured = tuple[Origin, tuple[tuple[int, int], ...]]
"""What a run was measured on: whence its blocks are, and each sample's id and number of blocks."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs against the best; `differences` has those that can be held against it, by their folder."""

    runs: tuple[Run, ...]
    """The best tau first; those without an evaluation last."""
    groups: tuple[tuple[Run, ...], ...]
    """Evaluated runs by what they were measured on; the best run is the first of the first group."""
    differences: dict[str, Difference]

    @property
    def best(self) -> Run | None:
        """The run with the highest tau; None where no run has been evaluated."""
        return self.groups[0][0] if self.groups else None

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
        """The run to ship: the cheapest that cannot be told from the best; None where that is held against no other."""
        return min([self.best, *self.ties], key=cost_of) if self.best is not None and self.others else None


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
    differences = {}
    for (_, best), *others in list(groups.values())[:1]:
        found = {str(run.folder): paired_difference(best, evaluation) for run, evaluation in others}
        differences = {folder: difference for folder, difference in found.items() if difference is not None}
    return Comparison(
        runs=tuple(ordered),
        groups=tuple(tuple(run for run, _ in group) for group in groups.values()),
        differences=differences,
    )


def measured_on(evaluation: Evaluation) -> Measured:
    """Equal where two runs were scored on the same blocks of the same conversations."""
    return evaluation.origin, tuple((sample.sample_id, sample.num_blocks) for sample in evaluation.samples)


def paired_difference(one: Evaluation, other: Evaluation) -> Difference | None:
    """tau of `one` minus tau of `other`, resampling conversations.

    None where they were scored on other blocks, whose taus say nothing of each other, or on fewer than MIN_SAMPLES.
    """
    if measured_on(one) != measured_on(other) or len(one.samples) < MIN_SAMPLES:
        return None
    pairs = list(zip(one.samples, other.samples, strict=True))
    blocks = np.array([first.num_blocks for first, _ in pairs])
    gains = np.array([first.tau - second.tau for first, second in pairs]) * blocks
    found = estimate_ratio(gains, blocks)
    return Difference(mean=found.value, low=found.low, high=found.high)


def headline(comparison: Comparison) -> str:
    """One or two sentences: which draft to ship, and why."""
    best, choice, others = comparison.best, comparison.choice, comparison.others
    if best is None:
        return "No run has been evaluated, so there is nothing to compare: run dspark evaluate."
    if choice is None:
        return f"{best.name} has {_describe_tau(best)}; nothing to compare it with, since {_why_alone(comparison)}."
    if not comparison.ties:
        ahead = comparison.differences[str(others[0].folder)]
        return (
            f"Ship {best.name}: {_describe_tau(best)}, {ahead.mean:.3f} above the next, {others[0].name} (paired "
            f"difference {ahead.low:.3f} to {ahead.high:.3f}), which is beyond the luck of these conversations; how "
            "far a training seed moves it, only more seeds tell."
        )
    if choice is best:
        names = join_names([run.name for run in comparison.ties])
        return (
            f"Ship {best.name}: {_describe_tau(best)}, the highest, but not beyond chance above {names}. None of those "
            f"has fewer trained parameters ({_describe_size(best)})."
        )
    behind = comparison.differences[str(choice.folder)]
    return (
        f"Ship {choice.name}: {_describe_tau(choice)}, with the fewest trained parameters of those that cannot be told "
        f"from the best ({_describe_size(choice)}). The highest tau has {best.name}, by {behind.mean:.3f}, which is "
        f"not beyond chance (paired difference {behind.low:.3f} to {behind.high:.3f})."
    )


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
        return f"{_count(count, 'conversation')} cannot tell runs apart (it takes {MIN_SAMPLES} at least)"
    if len(comparison.groups) > 1:
        return "the others were measured on other blocks"
    return "there is no other evaluated run"


def _describe_blocks(run: Run) -> str:
    found = run.evaluation
    if found is None:
        raise AssertionError("only evaluated runs are in groups")
    blocks = sum(sample.num_blocks for sample in found.samples)
    origin = found.origin
    return (
        f"{_count(len(found.samples), 'conversation')}, {_count(blocks, 'block')}, cache {origin.cache_digest[:12]}, "
        f"evaluate.num_anchors {origin.num_anchors}, evaluate.seed {origin.seed}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _describe_tau(run: Run) -> str:
    found = run.evaluation
    return "" if found is None else f"tau {found.tau:.3f} (95 % interval {found.tau_low:.3f} to {found.tau_high:.3f})"


def _describe_size(run: Run) -> str:
    return "draft gone" if run.num_parameters is None else f"{run.num_parameters:,}"
