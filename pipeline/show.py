"""What the command line prints: tables and the numbers at the end of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.logs import LINE_SECONDS, PlainConsole
from storage import ENCODINGS, CacheReader, RepairReport, TransferResult, VerifyReport
from storage.commit import MAKER
from storage.text import format_bytes, format_duration, plain, printable

if TYPE_CHECKING:  # what these import takes seconds
    from pipeline.inspection import EncodingLoss, Histogram, Inspection, StateSample
    from pipeline.regeneration_price import RegenerationPrice
    from stages.evaluate.evaluation import Evaluation, Scheduling
    from stages.extract.price import Price
    from stages.extract.run import ExtractResult
    from stages.extract.samples import SampleCounts

SHOWN_CONCURRENCIES = (1, 32, 256)
_LEFT: dict[str, Any] = {"title_justify": "left", "title_style": "bold"}


def price(console: Console, price: Price, counts: SampleCounts) -> None:
    """The price of an extraction."""
    table = _table("price of the cache")
    table.add_row("samples", f"{price.num_samples:,} of {counts.num_rows:,} rows")
    table.add_row("tokens", f"{price.num_tokens:,} ({price.num_supervised:,} supervised)")
    for split, number in sorted(counts.split_samples.items()):
        table.add_row(f"split {split}", _split_share(number, counts.split_tokens[split], counts.num_tokens))
    table.add_row("layers", f"{', '.join(map(str, price.layers))} and the last state")
    table.add_row("tokens a sample", f"{price.max_length:,} at most")
    table.add_row("bytes a token", f"{price.bytes_per_token:,}")
    table.add_row("states", format_bytes(price.num_bytes))
    table.add_row(
        "beside them", f"at most {format_bytes(price.num_overhead_bytes)}: padding of shards, tokens, the target's head"
    )
    table.add_row(
        "free disk", Text.assemble(format_bytes(price.num_free_bytes), ("" if price.fits else "  does not fit", "red"))
    )
    if price.hours:  # an import computes none
        table.add_row("forward passes", f"about {_hours(price.hours)} on this machine's {price.device}")
    console.print(table)
    tiers = Table("cache.encoding", title="the same states in every encoding", title_justify="left", title_style="bold")
    for title in ("bytes a token", "total", "of bf16", "error of a layer"):
        tiers.add_column(title, justify="right")
    exact = next(tier for tier in price.tiers if tier.encoding == "bf16").bytes_per_token
    for tier in price.tiers:
        sizes = (f"{tier.bytes_per_token:,}", format_bytes(tier.num_bytes), f"{tier.bytes_per_token / exact:.2f}")
        error = f"about {tier.known_error:.1%}" if tier.known_error else ""
        tiers.add_row(tier.encoding, *sizes, error, style="bold" if tier.encoding == price.encoding else None)
    console.print(tiers)
    console.print("  errors are those of SmolLM2-135M; extract measures and shows this target's", markup=False)
    for line in counts.describe():
        console.print(f"  {line}", markup=False)


def _split_share(num_samples: int, num_tokens: int, num_all_tokens: int) -> str:
    share = f"{num_tokens / num_all_tokens:.1%} of the tokens"
    return f"{count_of(num_samples, 'sample')}, {count_of(num_tokens, 'token')}, {share}"


def regeneration_price(console: Console, price: RegenerationPrice) -> None:
    """What the answers to prompts would cost."""
    table = _table("price of the answers: no row has one yet")
    table.add_row("prompts", f"{price.num_prompts:,}, {count_of(price.num_prompt_tokens, 'token')}")
    table.add_row("answers", f"at most {count_of(price.max_answer_tokens, 'token')}; regenerate.max_tokens bounds them")
    rate = f"assuming that decoding reaches {price.utilisation:.0%} of its matrix rate"
    table.add_row("time", f"at most about {_hours(price.hours)} on this machine's {price.device}, {rate}")
    for reason, count in price.unusable.items():
        table.add_row("left out", Text(printable(f"{count:,} x {reason}")))
    table.add_row("next", "dspark regenerate, with --local or --endpoint, then estimate again on its files")
    console.print(table)


def extraction(console: Console, result: ExtractResult) -> None:
    """What an extraction did."""
    plan = result.plan
    if result.num_missing_shards:
        console.print(
            f"{result.num_missing_shards} shards are missing yet: other ranks or parts compute them", markup=False
        )
    elif not result.num_computed_shards:
        console.print(f"cache {plan.path} is complete: reusing {result.num_shards} shards", markup=False)
    if not result.num_computed_shards:
        return
    rate = result.num_tokens / result.seconds
    states = plan.measure_states()
    size = f"{format_bytes(states + plan.plan_file_bytes())} on disk"
    if not result.num_missing_shards:
        size = f"{states / plan.manifest.plan.num_tokens:,.0f} bytes a token of states, with the plan {size}"
    console.print(
        f"cache {plan.path}: {result.num_computed_shards} of {result.num_shards} shards computed, "
        f"{result.num_tokens:,} tokens in {result.seconds:,.1f} s ({format_rate(rate)} tokens/s), {size}",
        markup=False,
    )
    summary = plan.manifest.plan
    for split, counts in summary.splits.items():
        share = _split_share(counts.num_samples, counts.num_tokens, summary.num_tokens)
        console.print(f"split {split}: {share}", markup=False)
    from pipeline.inspection import measure_loss

    if (loss := measure_loss(plan)) is not None:
        encoding_loss(console, loss)
    if result.num_excluded:
        console.print(f"{result.num_excluded} samples with non-finite states were quarantined", markup=False)


def encoding_loss(console: Console, loss: EncodingLoss) -> None:
    """What a lossy encoding loses in every stored layer and in the target's distribution, as the records say."""
    from pipeline.inspection import MAX_RELATIVE_ERROR

    table = Table("layer", title=f"lost by the encoding {loss.encoding}, as measured while it was written", **_LEFT)
    for title in ("relative error, median", "99 % below", "tokens"):
        table.add_column(title, justify="right")
    for error in loss.layers:
        style = "red" if error in loss.bad_layers else None
        values = (f"{error.median:.4f}", f"{error.p99:.4f}", f"{error.num_tokens:,}")
        table.add_row(_layer_name(error.layer), *values, style=style)
    unknown = "caches of format version 1 do not say what the encoding loses in a layer"
    if loss.encoding == "int8":
        unknown += "; their int8 lost 0.4 of some layers of SmolLM2-135M: extract anew for a layer with huge values"
    console.print(table if loss.layers else unknown)
    if (variation := loss.total_variation) is not None:
        console.print(
            f"total variation of the target's distribution {variation.mean:.4f} in the mean, 99 % below "
            f"{variation.p99:.4f}, at {variation.num_positions:,} positions",
            markup=False,
        )
    if loss.bad_layers:
        names = ", ".join(_layer_name(error.layer) for error in loss.bad_layers)
        console.print(
            f"warning: layers {names}: {loss.encoding} loses more than {MAX_RELATIVE_ERROR:.0%} of some states; "
            'cache.encoding = "bf16-lossless" or "bf16" loses nothing (in a new cache.path)',
            markup=False,
            style="red",
        )


def transfer(console: Console, result: TransferResult, *, source: str | Path, destination: str | Path) -> None:
    """What a push or a pull did."""
    if result.num_missing:
        console.print(
            Text(plain(f"{source} is incomplete"), style="red")
            + f": {result.num_missing} of {result.num_shards} shards are not committed there; finish it and run this "
            "again"
        )
    if result.num_busy:
        console.print(f"{result.num_busy} shards are left to another process that is writing them", markup=False)
    console.print(
        f"{destination}: {result.num_copied} of {result.num_shards} shards copied, {result.num_present} were there, "
        f"{format_bytes(result.num_bytes)} in {result.seconds:,.1f} s",
        markup=False,
    )


def evaluation(
    console: Console, evaluation: Evaluation, *, draft_dir: Path, file: Path, cache: str | Path, token_bytes: int
) -> None:
    """What a draft reached on the held-out split."""
    table = _table("held-out acceptance, measured from the cache")
    table.add_row("tau", f"{evaluation.tau:.3f}  (95 % interval {evaluation.tau_low:.3f} to {evaluation.tau_high:.3f})")
    if evaluation.tau_greedy is not None:
        interval = f"{evaluation.tau_greedy_low:.3f} to {evaluation.tau_greedy_high:.3f}"
        table.add_row("tau, greedy draft", f"{evaluation.tau_greedy:.3f}  ({interval})")
    table.add_row("acceptance by slot", "  ".join(f"{rate:.3f}" for rate in evaluation.accept_rate_per_pos))
    table.add_row("top-1 agreement", f"{evaluation.top1_agreement:.3f}")
    table.add_row("cross-entropy", f"{evaluation.cross_entropy:.3f} nats")
    if evaluation.confidence_ece is not None:
        everything = f"on all {count_of(evaluation.num_samples, 'conversation')}, uncalibrated"
        table.add_row("confidence ECE", f"{evaluation.confidence_ece:.3f}  {everything}")
    if evaluation.scheduling is not None:
        _add_scheduling(table, evaluation.scheduling)
    table.add_row("measured on", f"{evaluation.num_samples:,} conversations, {evaluation.num_blocks:,} blocks")
    table.add_row("cache", f"{cache}, {token_bytes:,} bytes a token")
    table.add_row("draft", str(draft_dir))
    table.add_row("numbers", str(file))
    console.print(table)


def _add_scheduling(table: Table, scheduling: Scheduling) -> None:
    """Calibration before and after, and what scheduling by it would yield at a few concurrencies of a known server."""
    calibration, outlook = scheduling.calibration, scheduling.outlook
    before, after = calibration.before, calibration.after
    table.add_row(
        "calibration",
        f"fitted on {count_of(calibration.num_fitted_samples, 'conversation')}, measured on "
        f"{calibration.num_measured_samples:,} others: ECE {before.ece:.3f} -> {after.ece:.3f}, of prefixes "
        f"{before.survival_ece:.3f} -> {after.survival_ece:.3f}, AUC {_auc(before.auc)} -> {_auc(after.auc)}",
    )
    if calibration.kept_slots:
        slots = ", ".join(str(slot + 1) for slot in calibration.kept_slots)
        table.add_row(
            "", f"temperature 1 at slots {slots}: too few conversations have them for the error to fall beyond noise"
        )
    if outlook.throughput.file is None:
        return
    table.add_row("outlook", f"{outlook.throughput.label}, on those others")
    for row in outlook.concurrencies:
        if row.num_requests in SHOWN_CONCURRENCIES:
            best = f"best fixed length {row.best_length}" if row.best_length else "no draft"
            fixed = f"{best}: {format_rate(row.fixed[row.best_length].tokens_per_second)}"
            against = f", against no draft {row.gain_on_no_draft:+.1%}" if row.best_length else ""
            table.add_row(
                count_of(row.num_requests, "request"),
                f"scheduled {format_rate(row.scheduled.tokens_per_second)} tokens/s, "
                f"{fixed} ({row.gain:+.1%}){against}",
            )


def _auc(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr, a line every ten seconds elsewhere; gives a function of (done, total)."""
    console = PlainConsole(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    started = reported = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)

        def show(done: int, total: int) -> None:
            nonlocal reported
            progress.update(task, completed=done, total=total)
            now = time.monotonic()
            if not console.is_terminal and done and now - reported >= LINE_SECONDS:
                reported = now
                eta = format_duration((now - started) * (total - done) / done)
                console.print(f"{title} {done:,}/{total:,}  ETA {eta}")

        yield show


def verify_report(console: Console, report: VerifyReport) -> None:
    """The problems, or that there are none."""
    for problem in report.problems:
        console.print(printable(str(problem)), markup=False, style="red")
    problems, missing = count_of(len(report.problems), "problem"), count_of(len(report.missing_shards), "shard")
    verdict = "whole" if report.ok else f"{problems}, {missing} missing"
    checked = f"{format_bytes(report.num_checked_bytes)} checked in {report.seconds:,.1f} s"
    console.print(f"{count_of(report.num_shards, 'shard')}, {checked}: {verdict}", markup=False)


def repair_report(console: Console, repair: RepairReport) -> None:
    """What was dropped and removed, and what to do next."""
    for name in repair.removed:
        console.print(f"removed {printable(name)}", markup=False)
    if repair.busy_shards:
        console.print(f"left alone, a writer holds them: shards {_some(repair.busy_shards)}", markup=False)
    if repair.removed and not repair.dropped_shards:
        console.print(f"run {MAKER} again to make what is missing")
    if repair.dropped_shards:
        console.print(f"dropped shards {_some(repair.dropped_shards)}; run {MAKER} again to make them", markup=False)
    if repair == RepairReport(dropped_shards=(), busy_shards=(), removed=()):
        console.print("nothing to repair")


def report_to_json(report: VerifyReport, repair: RepairReport | None = None) -> dict[str, Any]:
    """The report as plain JSON values."""
    fields = {**asdict(report), "ok": report.ok, "bad_shards": report.bad_shards}
    return fields if repair is None else {**fields, "repair": asdict(repair)}


def remote_cache(console: Console, reader: CacheReader) -> None:
    """What the plan says of a cache at an address: identity, sizes, lengths and mask coverage."""
    with reader:
        manifest, lengths = reader.manifest, reader.num_tokens
        table = _table(f"cache {reader.place}")
        for name, value in manifest.identity.model_dump().items():
            table.add_row(name, str(value)[:12] if name.endswith("_digest") else str(value))
        for name, value in sorted(manifest.header.provenance.items()):
            table.add_row(f"made from: {name}", value)
        plan = manifest.plan
        table.add_row("samples", f"{plan.num_samples:,} planned, {len(reader):,} readable, {plan.num_shards:,} shards")
        for split, counts in plan.splits.items():
            table.add_row(f"split {split}", f"{counts.num_samples:,} samples, {counts.num_tokens:,} tokens")
        table.add_row("tokens", f"{plan.num_tokens:,}, {plan.num_supervised / plan.num_tokens:.1%} supervised")
        table.add_row("payload", f"{format_bytes(plan.payload_bytes)}, {manifest.header.token_bytes:,} bytes a token")
        if len(lengths):  # no shard need be there yet
            quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]).astype(int)
            table.add_row("tokens a sample", "min {} | 25 % {} | median {} | 75 % {} | max {}".format(*quantiles))
        for reason, count in plan.dropped.items():
            table.add_row("left out or cut", f"{count:,} x {reason}")
    console.print(table)


def cache(console: Console, found: Inspection) -> None:
    """Identity, sizes, lengths, mask coverage, norms, frequent tokens and exclusions of a cache."""
    console.print(_cache_summary(found))
    if found.loss is not None:
        encoding_loss(console, found.loss)
    console.print(_histogram_table("tokens a sample", found.lengths))
    console.print(_histogram_table("supervised tokens a sample", found.supervised))
    console.print(_histogram_table("supervised share of a sample", found.mask_shares, is_share=True))
    console.print(_norms_table(found.states))
    for error in found.states.errors:
        console.print(error, markup=False, style="red")
    table = Table("id", "count", "text", title=f"most frequent of {found.num_counted_tokens:,} tokens", **_LEFT)
    for token in found.frequent_tokens:
        table.add_row(str(token.token_id), f"{token.count:,}", Text("" if token.text is None else repr(token.text)))
    console.print(table)
    if found.num_excluded:
        title = f"excluded: {found.num_excluded:,} samples" + (
            f", the first {len(found.exclusions)}" if len(found.exclusions) < found.num_excluded else ""
        )
        table = Table("sample", "source", "layer", "reason", title=title, **_LEFT)
        for item in found.exclusions:
            source = Text(printable(f"{item.source_file} row {item.source_row}"))
            table.add_row(str(item.sample_id), source, _layer_name(item.layer), Text(printable(item.reason)))
        console.print(table)


def _cache_summary(found: Inspection) -> Table:
    table = _table(printable(f"cache {found.path}"))
    state = "complete" if found.is_complete else "incomplete, extract computes the rest"
    table.add_row("committed", f"{found.num_committed_shards:,} of {found.num_shards:,} shards: {state}")
    for name, value in found.identity.items():
        table.add_row(name, Text(printable(str(value)[:12] if name.endswith("_digest") else str(value))))
    for name, value in sorted(found.provenance.items()):
        table.add_row(Text(printable(f"made from: {name}")), Text(printable(value)))
    table.add_row("samples", f"{found.num_samples:,} planned, {found.num_excluded:,} excluded")
    for split, counts in found.splits.items():
        table.add_row(f"split {split}", f"{counts['num_samples']:,} samples, {counts['num_tokens']:,} tokens")
    table.add_row("tokens", f"{found.num_tokens:,}, {found.num_supervised / found.num_tokens:.1%} supervised")
    is_compressed = ENCODINGS[found.identity["encoding"]].compressed
    table.add_row(
        "states uncompressed" if is_compressed else "states when complete",
        f"{format_bytes(found.payload_bytes)}, {found.payload_bytes_per_token:,} bytes a token",
    )
    on_disk = ("about " if found.is_estimated else "") + format_bytes(found.num_committed_bytes)
    if found.num_committed_tokens:
        on_disk += f", {found.num_committed_bytes / found.num_committed_tokens:,.0f} bytes a token with padding"
    table.add_row("states on disk", on_disk)
    table.add_row("plan on disk", format_bytes(found.plan_file_bytes))
    quantiles = "min {:,} | 25 % {:,} | median {:,} | 75 % {:,} | max {:,}".format(*found.length_quantiles)
    table.add_row("tokens a sample", quantiles)
    for reason, count in found.dropped.items():
        table.add_row("left out or cut", Text(printable(f"{count:,} x {reason}")))
    return table


def _histogram_table(title: str, histogram: Histogram, *, is_share: bool = False) -> Table:
    table = Table(title=title, show_header=False, **_LEFT)
    last, most = len(histogram.counts) - 1, max(histogram.counts)
    for place, count in enumerate(histogram.counts):
        low, high = histogram.edges[place : place + 2]
        if is_share:
            label = f"{low:.0%} to {high:.0%}"
        else:  # whole numbers, so the bin ends one below its edge; the last has its edge too
            top = high if place == last and low == high else high - 1
            label = f"{low:,.0f}" if low == top else f"{low:,.0f} to {top:,.0f}"
        table.add_row(label, f"{count:,}", _bar(count / most))
    return table


def _bar(share: float) -> str:
    """Up to thirty blocks, in eighths."""
    eighths = round(share * 30 * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _norms_table(states: StateSample) -> Table:
    title = f"L2 norms of {states.num_tokens:,} tokens of {states.num_samples:,} committed samples"
    table = Table("layer", "mean", "max", "", title=title, **_LEFT)
    for norms in states.layers:
        flags = [f"{norms.num_non_finite:,} not finite"] * (norms.num_non_finite > 0)
        flags += [f"{norms.num_zero:,} zero"] * (norms.num_zero > 0)
        values = ["" if value is None else f"{value:,.3f}" for value in (norms.mean, norms.max)]
        table.add_row(_layer_name(norms.layer), *values, Text(", ".join(flags), style="red"))
    return table


def _layer_name(layer: int | None) -> str:
    return "last state" if layer is None else str(layer)


def _some(shards: Sequence[int]) -> str:
    return ", ".join(map(str, shards[:10])) + (f" and {len(shards) - 10} more" if len(shards) > 10 else "")


class _PlainTable(Table):
    """A table whose texts are what they are: no markup, nothing that a terminal obeys, no secrets."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; a string is shown as it is."""
        super().add_row(*(Text(plain(cell)) if isinstance(cell, str) else cell for cell in cells), **options)


def _table(title: str) -> Table:
    table = _PlainTable(title=Text(plain(title), style="bold"), show_header=False, title_justify="left")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def count_of(number: int, noun: str) -> str:
    """As `1 shard`, `2 shards`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_rate(rate: float) -> str:
    """Whole from 10 on; below, two digits, since 1.4 and 0.6 are not alike."""
    if round(rate, 1) >= 10 or rate == 0:
        return f"{rate:,.0f}"
    return f"{rate:.1f}" if rate >= 1 else f"{rate:#.2g}"


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:,.1f} minutes" if hours * 60 >= 1 else f"{max(hours * 3600, 1):,.0f} seconds"
