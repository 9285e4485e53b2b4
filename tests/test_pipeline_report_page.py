"""The page of a report and its plots."""

import base64
import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from made_runs import NASTY, PLOTS, Page, evaluate, make_run, report
from pipeline.report.figures import COLOURS, DPI, _axes, draw_plots, plan_styles
from pipeline.report.runs import Run, read_runs
from pipeline.report.words import readable
from pipeline.show import format_rate
from pipeline.sweep.record import write_trial
from stages.evaluate.evaluation import write_evaluation


def test_numbers_of_any_size_cost_no_page(tmp_path: Path) -> None:
    """Each damages one run of two; the page is written, and says what could not be drawn."""
    damaged = make_run(tmp_path / "damaged", evaluate())
    make_run(tmp_path / "sound", evaluate(gain=0.01))
    rows = [
        {"kind": "train", "step": step, "loss": loss, "seconds": math.inf}
        for step, loss in ((1, 1.7e308), (2, -1.7e308), (3, 10**400), (10**400, 1.0))
    ]
    (damaged / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (damaged / "config.toml").open("a") as file:
        file.write(f"huge = 0x{'f' * 6000}\n")
    numbers = json.loads((damaged / "evaluation.json").read_text())
    del numbers["crc32c"]  # as earlier versions wrote it
    numbers["scheduling"]["outlook"]["concurrencies"][0]["num_requests"] = 10**400
    (damaged / "evaluation.json").write_text(json.dumps(numbers))
    result = report(tmp_path)
    assert result.exit_code == 0, result.output
    assert "cannot be drawn: " in (tmp_path / "report.html").read_text()


def test_names_do_not_steer_a_terminal() -> None:
    assert readable("a\x1b[31mb\u202ec") == "a?[31mb?c"


def test_an_interval_that_leaves_tau_out_by_a_last_bit_is_drawn(tmp_path: Path) -> None:
    found = evaluate(num_samples=1)
    folder = make_run(tmp_path / "run", found.model_copy(update={"tau_low": np.nextafter(found.tau, 9.0)}))
    assert report(folder).exit_code == 0


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "small", evaluate(gain=0.0), config={"lr": 0.003})
    make_run(folder / "large", evaluate(gain=0.1), config={"lr": 0.0007, "seed": 5})
    return folder


def test_the_page_has_the_runs_and_every_plot_in_it(two_runs: Path) -> None:
    result = report(two_runs / "small", two_runs / "large")
    assert f"page: {two_runs / 'report.html'}" in result.output.replace("\n", "")
    page = Page(two_runs / "report.html")
    assert page.headline.startswith("Ship large: tau ")
    assert page.headline in " ".join(result.output.split())
    head, *rows = page.rows[:3]
    assert head[:4] == ["run", "tau", "95 % interval", "against the best, paired"]
    assert head[4:6] == ["train.lr", "train.seed"]
    large, small = read_runs([two_runs])
    for run, row, lr, seed in ((large, rows[0], "0.0007", "5"), (small, rows[1], "0.003", "0")):
        assert run.evaluation is not None
        assert row[0].split()[0] == run.name
        assert row[1] == f"{run.evaluation.tau:.3f}"
        assert row[2] == f"{run.evaluation.tau_low:.3f} to {run.evaluation.tau_high:.3f}"
        assert row[4:6] == [lr, seed]
    assert "ship this" in rows[0][0]
    assert re.fullmatch(r"-0\.\d+ \(-0\.\d+ to -0\.\d+\)", rows[1][3])
    ids = {attributes.get("id") for tag, attributes in page.tags if tag == "h2"}
    assert ids >= PLOTS
    assert len(page.images) == len(PLOTS)
    files = {file.stem: file.read_bytes() for file in (two_runs / "report").glob("*.png")}
    assert files.keys() == PLOTS
    for image in page.images:
        kind, _, data = (image["src"] or "").partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) in files.values()
        assert image["alt"]


def test_the_page_needs_nothing_from_elsewhere(two_runs: Path, tmp_path: Path) -> None:
    report(two_runs, out=tmp_path)
    page = Page(tmp_path / "report.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in (tmp_path / "report.html").read_text()


def test_every_plot_names_its_runs(two_runs: Path, tmp_path: Path) -> None:
    report(two_runs, out=tmp_path)
    text = (tmp_path / "report.html").read_text()
    for start, end in pairwise(
        [*(text.index(f'<h2 id="{plot.key}"') for plot in draw_plots(read_runs([two_runs]))), -1]
    ):
        for name in ("small", "large"):
            assert f"<li>{two_runs / name}</li>" in text[start:end]


def test_what_a_user_or_a_file_chose_is_escaped(tmp_path: Path) -> None:
    base = tmp_path / "runs"
    hostile = make_run(base / NASTY.replace("/", "-"), evaluate(gain=0.1), config={"seed": NASTY})
    make_run(base / "_hidden\nname", evaluate(), config={"seed": "x"})
    failed = make_run(base / "failed", None)
    write_trial(failed, {"state": "failed", "reason": NASTY, "origin": {"revision": NASTY}})
    assert report(base).exit_code == 0
    page = Page(base / "report.html")
    text = (base / "report.html").read_text()
    assert "<script" not in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert hostile.name in page.headline
    assert any(NASTY in cell for row in page.rows for cell in row)


def test_plots_without_data_are_left_out_with_a_reason(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", evaluate())
    assert report(folder).exit_code == 0
    assert len(list((folder / "report").glob("*.png"))) == len(PLOTS)
    write_evaluation(folder / "evaluation.json", evaluate(confidence=False))
    (folder / "metrics.jsonl").unlink()
    assert report(folder).exit_code == 0
    assert {file.stem for file in (folder / "report").glob("*.png")} == {"tau", "acceptance"}
    text = (folder / "report.html").read_text()
    assert text.count("Left out: no evaluated run has a confidence head") == 3
    assert "Left out: no run has metrics.jsonl." in text
    assert "Left out: no run was validated while it trained." in text


def test_a_report_is_made_anew_and_deleting_it_loses_nothing(two_runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(two_runs, copy, ignore=shutil.ignore_patterns("report*"))
    before = sorted(path for path in copy.rglob("*") if path.is_file())
    report(copy)
    page = (copy / "report.html").read_bytes()
    assert [file.name for file in (copy / "report").iterdir() if not file.name.endswith(".png")] == []
    report(copy)
    assert (copy / "report.html").read_bytes() == page
    shutil.rmtree(copy / "report")
    (copy / "report.html").unlink()
    assert sorted(path for path in copy.rglob("*") if path.is_file()) == before
    report(copy)
    assert (copy / "report.html").read_bytes() == page


def _fake_runs(count: int) -> list[Run]:
    return [
        Run(
            folder=Path(f"run{index}"), name=f"run{index}", config={}, evaluation=None, problem=None,
            train_rows=({"step": 1, "loss": float(index), "seconds": 1.0}, {"step": 2, "loss": 1.0, "seconds": 1.0}),
            validation_rows=(), trial={}, num_parameters=None, draft_bytes=None, cache_bytes=None,
        )
        for index in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("steps", [[1, 2, 3], [2], [700], [0, 3], [999_999, 1_000_001], list(range(1, 801))])
def test_steps_are_whole_numbers(steps: list[int]) -> None:
    figure, axes = _axes("optimizer steps", "loss")
    axes.plot(steps, [1.0] * len(steps), marker="o")
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    shown = [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert shown
    assert all(re.fullmatch(r"\d{1,3}(,\d{3})*", text.replace("\N{MINUS SIGN}", "")) for text in shown), shown
    assert len(set(shown)) == len(shown)
    assert axes.xaxis.get_offset_text().get_text() == ""


def test_plots_can_be_read_on_a_narrow_page(two_runs: Path, tmp_path: Path) -> None:
    """On a page of 420 pixels, less its margins, the smallest letters (8 points) are at least 9 pixels tall."""
    report(two_runs, out=tmp_path)
    for file in (tmp_path / "report").glob("*.png"):
        with Image.open(file) as image:
            assert 8 * DPI / 72 * (420 - 32) / image.width >= 9, file.name
            assert image.width >= 2 * (420 - 32), "sharp on a screen of two pixels a point"
    style = (tmp_path / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert re.search(r"figure img \{[^}]*width: 100%;[^}]*height: auto;", style)
    assert "max-width: none" not in style
    assert "@media (max-width" not in style


def test_many_runs_are_drawn_and_the_first_have_colours(tmp_path: Path) -> None:
    runs = _fake_runs(40)
    styles = plan_styles(runs)
    assert [styles[run.folder].is_named for run in runs] == [True] * len(COLOURS) + [False] * (40 - len(COLOURS))
    (loss,) = (plot for plot in draw_plots(runs) if plot.key == "loss")
    assert loss.png is not None
    file = tmp_path / "loss.png"
    file.write_bytes(loss.png)
    with Image.open(file) as image:
        colours = {pixel for _, pixel in image.convert("RGB").getcolors(maxcolors=1_000_000) or []}
    for colour in COLOURS:
        assert tuple(bytes.fromhex(colour[1:])) in colours


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (26710.2, "26,710"), (10.4, "10"), (9.96, "10"), (9.94, "9.9"), (1.44, "1.4"), (1.0, "1.0"), (0.964, "0.96"),
        (0.0312, "0.031"), (0.0, "0"),
    ],
)  # fmt: skip
def test_rates_below_ten_have_two_digits(rate: float, text: str) -> None:
    assert format_rate(rate) == text
