"""`dspark report`: a table in the terminal and a page with the plots."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline.report.compare import compare_runs
from pipeline.report.page import write_page
from pipeline.report.runs import common_folder, read_runs
from pipeline.report.table import print_table
from pipeline.report.words import readable
from pipeline.sweep.data_base import STUDY_FILE
from stages.errors import SettingError


def report(paths: Sequence[Path], *, out: Path | None, console: Console) -> None:
    """Compare the runs in the folders, and write the page. Raises SettingError."""
    comparison = compare_runs(read_runs(paths))
    folder = out or (paths[0] if len(paths) == 1 else common_folder([run.folder for run in comparison.runs]))
    if out is None and len(paths) > 1 and (folder / STUDY_FILE).exists():
        raise SettingError(f"{folder}: is a sweep, whose own report this would replace; name another folder with --out")
    print_table(comparison, console=console)
    page = write_page(comparison, folder)
    console.print(readable(f"page: {page}"), markup=False)
