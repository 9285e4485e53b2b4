"""`dspark report`: a table in the terminal and a page with the plots."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.compare import Comparison, compare_runs, headline
from pipeline.report.page import format_difference, format_value, write_page
from pipeline.report.runs import common_folder, differing_keys, read_runs


def report(paths: Sequence[Path], *, out: Path | None, console: Console) -> None:
    """Compare the runs in the folders, and write the page. Raises SettingError."""
    comparison = compare_runs(read_runs(paths))
    print_table(comparison, console=console)
    folder = out or (paths[0] if len(paths) == 1 else common_folder([run.folder for run in comparison.runs]))
    page = write_page(comparison, folder)
    console.print(f"page: {page}", markup=False)


def print_table(comparison: Comparison, *, console: Console) -> None:
    """Runs with the best tau first, and the sentence that says what to make of them."""
    table = Table(
        "tau", "95 % interval", "against the best", "accept by slot", "top-1", "ECE", title="held-out acceptance"
    )
    table.add_column("run", overflow="fold")
    keys = differing_keys(comparison.runs)
    for run in comparison.runs:
        found = run.evaluation
        values = ", ".join(f"{key.partition('.')[2]} {format_value(run.config.get(key))}" for key in keys)
        name = Text(f"{run.name}\n{values}" if values else run.name)
        if found is None:
            table.add_row("none", "", "", "", "", "", name.append(f"\n{run.problem}", style="yellow"))
            continue
        rates, ece = found.accept_rate_per_pos, found.confidence_ece
        table.add_row(
            f"{found.tau:.3f}",
            f"{found.tau_low:.3f} to {found.tau_high:.3f}",
            format_difference(comparison.difference(run)),
            f"{rates[0]:.2f} .. {rates[-1]:.2f}",
            f"{found.top1_agreement:.3f}",
            "" if ece is None else f"{ece:.3f}",
            name,
        )
    console.print(table)
    console.print(headline(comparison), markup=False, style="bold")
