"""The comparison as the terminal shows it."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.compare import Comparison, describe_groups, headline
from pipeline.report.runs import differing_keys
from pipeline.report.words import format_difference, format_value


def print_table(comparison: Comparison, *, console: Console) -> None:
    """Runs with the best tau first, and the sentence that says what to make of them."""
    table = Table("tau (95 % interval)", "against the best", title="held-out acceptance")
    table.add_column("run", overflow="fold")
    keys = differing_keys(comparison.runs)
    for run in comparison.runs:
        found, name = run.evaluation, Text(run.name)
        if not run.trial and keys:  # a trial's folder is named after its values
            values = (f"{key.partition('.')[2]} {format_value(run.config.get(key))}" for key in keys)
            name.append(f"\n{', '.join(values)}", style="dim")
        if found is None:
            name.append(f"\n{run.problem}", style="yellow")
            table.add_row("none", "", name)
            continue
        table.add_row(
            f"{found.tau:.3f} ({found.tau_low:.3f} to {found.tau_high:.3f})",
            format_difference(comparison.difference(run)),
            name,
        )
    console.print(table)
    console.print(headline(comparison), markup=False, style="bold")
    groups = describe_groups(comparison)
    if groups is not None:
        console.print(groups, markup=False)
