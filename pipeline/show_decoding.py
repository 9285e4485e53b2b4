"""What `dspark evaluate --decode` prints."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.decoding import Decoding
from pipeline.show import count_of, format_rate
from stages.evaluate.bootstrap import ENOUGH_GROUPS, Estimate
from stages.evaluate.cached import CacheEvaluation
from stages.evaluate.decode_report import CacheComparison, DecodingRun, Difference

NUM_LISTED = 5  # differing answers


def decoding(console: Console, result: Decoding, *, estimate: CacheEvaluation, file: Path) -> None:
    """Tables of the runs and of the comparison, and a line for each greedy answer that was not the target's."""
    title = "decoding with the real target"
    if result.confidence_threshold > 0:
        kind = "calibrated" if result.is_calibrated else "uncalibrated"
        title += f", blocks ended at a confidence of {result.confidence_threshold:g} ({kind})"
    table = Table("", title=title, title_justify="left", title_style="bold")
    for run in result.runs:
        table.add_column("greedy" if run.temperature == 0 else f"temperature {run.temperature:g}")
    columns = [
        _describe_run(run, device=f"{result.device}, {count_of(result.num_threads, 'thread')}") for run in result.runs
    ]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)
    for run in result.runs:
        for difference in run.differences[:NUM_LISTED]:
            console.print(_describe_difference(difference), markup=False, style="red")
    if result.num_skipped:
        console.print(f"{result.num_skipped} samples without a prompt were passed over")
    if result.comparison is not None:
        _comparison(console, result.comparison, result=result, estimate=estimate)
    else:
        console.print("not compared with the cache: that takes temperature 1, and whole blocks (no threshold)")
    console.print(f"numbers: {file}", markup=False)


def _describe_run(run: DecodingRun, *, device: str) -> dict[str, str]:
    speed = run.num_tokens / run.speculative_seconds / (run.num_plain_tokens / run.plain_seconds)
    rates = zip(run.accept_rate_per_pos, run.num_tested_per_pos, strict=True)
    return {
        "tokens a round": _interval(run.tokens_per_round),
        "expected from the distributions": _interval(run.expected_per_round),
        "acceptance by slot, of those tested": "  ".join(f"{rate:.3f}" if tested else "-" for rate, tested in rates),
        "prompts, tokens (a first one each before the rounds), rounds": f"{run.num_prompts:,}, {run.num_tokens:,}, "
        f"{run.num_rounds:,}",
        "drafted tokens a round": f"{run.num_drafted / run.num_rounds:.2f}",
        "tokens that differ from the target's own": "not compared: drawn anew"
        if run.num_differing_tokens is None
        else f"{run.num_differing_tokens:,} of {run.num_tokens:,}",
        "tokens a second, target alone": format_rate(run.num_plain_tokens / run.plain_seconds),
        "tokens a second, with the draft": f"{format_rate(run.num_tokens / run.speculative_seconds)} ({speed:.2f} x)",
        "timed on": f"{device}, eager, one prompt at a time",
    }


def _describe_difference(difference: Difference) -> str:
    gap = "" if difference.gap is None else f"; its two largest logits are {difference.gap:.2e} apart"
    return (
        f"sample {difference.sample_id}, token {difference.position}: the target alone says {difference.plain_token}, "
        f"speculative decoding {difference.speculative_token}{gap}"
    )


def _comparison(console: Console, comparison: CacheComparison, *, result: Decoding, estimate: CacheEvaluation) -> None:
    """From the cache's tau to decoding's, one difference in what is counted at a time."""
    sampled = next(run for run in result.runs if run.temperature == 1)
    table = Table("tokens a round at temperature 1", "", title="the cache's estimate against decoding")
    table.title_justify, table.title_style = "left", "bold"
    published = Estimate(value=estimate.tau, low=estimate.tau_low, high=estimate.tau_high)
    table.add_row(f"tau from the cache, {estimate.num_samples:,} conversations", _interval(published))
    table.add_section()
    table.add_row(f"these {comparison.num_answers:,} prompts' answers in the cache:")
    for step in comparison.steps:
        table.add_row(f"  {step.name}", _interval(step.estimate))
    table.add_section()
    table.add_row("decoded, expected from the distributions", _interval(sampled.expected_per_round))
    table.add_row("decoded, counted", _interval(sampled.tokens_per_round))
    table.add_row(
        f"expected minus replayed from the cache{_verdict(comparison)}", _interval(comparison.difference, sign="+")
    )
    table.add_section()
    table.add_row("the decoded answers themselves, replayed", _interval(comparison.replayed_decoded))
    table.add_row("counted minus that: zero but for luck", _interval(comparison.difference_decoded, sign="+"))
    console.print(table)
    if comparison.num_answers < ENOUGH_GROUPS:
        console.print(
            f"{comparison.num_answers} prompts are too few to tell: intervals of so few are too narrow; raise "
            "decode.num_prompts"
        )


def _verdict(comparison: CacheComparison) -> str:
    if comparison.num_answers < ENOUGH_GROUPS:
        return ""
    return ": they agree" if comparison.agrees else ": they [red]disagree[/red]"


def _interval(estimate: Estimate, *, sign: str = "") -> str:
    return f"{estimate.value:{sign}.3f}  ({estimate.low:{sign}.3f} to {estimate.high:{sign}.3f})"
