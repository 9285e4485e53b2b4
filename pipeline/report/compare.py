"""Which run is the best, and by how much: paired differences over the conversations that two runs were measured on.

Intervals say how far the held-out conversations decide the matter. Another training seed would move tau too, which they
do not say, and the best of many runs is a little lucky: they are not corrected for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.runs import Run
from pipeline.report.words import Difference, describe_seconds
from stages.evaluate.bootstrap import bootstrap_ratio
from stages.evaluate.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs against the best; `differences` has those that were measured on the same blocks, by their folder."""

    runs: tuple[Run, ...]
    """The best tau first; those without an evaluation last."""
    best: Run | None
    differences: dict[str, Difference]

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
        """The run to ship: the cheapest that cannot be told from the best."""
        return None if self.best is None else min([self.best, *self.ties], key=cost_of)


def cost_of(run: Run) -> tuple[float, float]:
    """What decides between runs of equal tau: parameters that a draft pass reads, then seconds of training."""
    return (float("inf") if run.num_parameters is None else run.num_parameters, run.seconds)


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Hold every evaluated run against the one with the highest tau."""
    ordered = sorted(runs, key=lambda run: -run.tau)
    best = ordered[0] if ordered and ordered[0].evaluation is not None else None
    differences = {}
    if best is not None and best.evaluation is not None:
        for run in ordered[1:]:
            found = None if run.evaluation is None else paired_difference(best.evaluation, run.evaluation)
            if found is not None:
                differences[str(run.folder)] = found
    return Comparison(runs=tuple(ordered), best=best, differences=differences)


def paired_difference(one: Evaluation, other: Evaluation) -> Difference | None:
    """tau of `one` minus tau of `other`, resampling conversations; None where they were scored on other blocks."""
    if one.origin != other.origin:
        return None
    first = {sample.sample_id: sample for sample in one.samples}
    second = {sample.sample_id: sample for sample in other.samples}
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    # Both have the same blocks in a conversation, since anchors are a function of the origin and the sample.
    blocks = np.array([first[sample_id].num_blocks for sample_id in common])
    gains = np.array([first[sample_id].tau - second[sample_id].tau for sample_id in common]) * blocks
    low, high = bootstrap_ratio(gains, blocks, groups=np.array(common))
    return Difference(mean=float(gains.sum() / blocks.sum()), low=low, high=high)


def headline(comparison: Comparison) -> str:
    """One or two sentences: which draft to ship, and why."""
    best, choice = comparison.best, comparison.choice
    if best is None or choice is None:
        return "No run has been evaluated, so there is nothing to compare: run dspark evaluate."
    others = comparison.others
    if not others:
        apart = any(run.evaluation is not None for run in comparison.runs[1:])
        why = "the others were measured on other blocks" if apart else "there is no other evaluated run"
        return f"{best.name} has {_describe_tau(best)}; nothing to compare it with, since {why}."
    if not comparison.ties:
        ahead = comparison.differences[str(others[0].folder)]
        return (
            f"Ship {best.name}: {_describe_tau(best)}, {ahead.mean:.3f} above the next, {others[0].name} (paired "
            f"difference {ahead.low:.3f} to {ahead.high:.3f}), which is beyond chance."
        )
    tied = [run for run in (best, *comparison.ties) if run is not choice]
    names = ", ".join(run.name for run in tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
    cheapest = f"the cheapest of those that cannot be told from the best ({describe_cost(choice)})"
    if choice is best:
        return (
            f"Ship {best.name}: {_describe_tau(best)}, the highest, but not beyond chance above {names}. It is also "
            f"{cheapest}."
        )
    behind = comparison.differences[str(choice.folder)]
    return (
        f"Ship {choice.name}: {_describe_tau(choice)}, {cheapest}. The highest tau has {best.name}, by "
        f"{behind.mean:.3f}, which is not beyond chance (paired difference {behind.low:.3f} to {behind.high:.3f})."
    )


def _describe_tau(run: Run) -> str:
    found = run.evaluation
    return "" if found is None else f"tau {found.tau:.3f} (95 % interval {found.tau_low:.3f} to {found.tau_high:.3f})"


def describe_cost(run: Run) -> str:
    """Parameters and training time, in words."""
    parameters = "draft gone" if run.num_parameters is None else f"{run.num_parameters:,} trained parameters"
    return f"{parameters}, {describe_seconds(run.seconds)} of training"
