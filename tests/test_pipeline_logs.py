"""How progress is shown: a live bar on a terminal, a line every ten seconds elsewhere."""

import io
import logging

import pytest
from rich.console import Console

from pipeline import logs
from pipeline.logs import ConsoleHandler, LinePacer, PlainConsole
from storage import progress
from storage.progress import Meter, Position, log_position, position_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock as the pacer reads it: set its one element."""
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    return now


def make_logger(handler: logging.Handler) -> logging.Logger:
    logger = logging.Logger("test")
    logger.addHandler(handler)
    return logger


def at(done: int, *, name: str = "train", total: int = 100, eta_seconds: float = 5.0) -> Position:
    return Position(name=name, done=done, total=total, eta_seconds=eta_seconds)


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_elsewhere_a_line_every_ten_seconds_first_and_last_always(clock: list[float]) -> None:
    console = PlainConsole(file=io.StringIO(), width=80)
    handler = ConsoleHandler(console, has_bar=False)
    handler.addFilter(LinePacer())
    logger = make_logger(handler)
    for step in range(1, 101):
        clock[0] = 100.0 + step  # a step a second
        log_position(logger, at(step), f"step {step}")
    expected = [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert lines_of(console) == [f"step {step}" for step in expected]


def test_messages_and_other_work_are_not_thinned_out(clock: list[float]) -> None:
    console = PlainConsole(file=io.StringIO(), width=20)
    handler = ConsoleHandler(console, has_bar=False)
    handler.addFilter(LinePacer())
    logger = make_logger(handler)
    log_position(logger, at(1), "step 1")
    log_position(logger, at(2), "step 2")
    logger.warning("a message of more than %d characters [bold]stays[/bold] one line", 20)
    log_position(logger, at(1, name="pull"), "shard 1")
    message = "a message of more than 20 characters [bold]stays[/bold] one line"
    assert lines_of(console) == ["step 1", message, "shard 1"]


def test_on_a_terminal_a_live_bar_that_leaves_the_last_line() -> None:
    console = PlainConsole(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    handler = ConsoleHandler(console, has_bar=True)
    logger = make_logger(handler)
    log_position(logger, at(40), "step 40  loss [1.5]  and " + "more " * 30 + "THEEND")
    logger.info("a message beside the bar")
    handler._bar.refresh()  # type: ignore[union-attr]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("train", "40/100", "loss [1.5]", "THEEND"):
        assert part in shown
    assert "a message beside the bar" in shown
    log_position(logger, at(100), "step 100  the end")
    handler.close()
    assert lines_of(console)[-1].strip().endswith("step 100  the end")
    assert shown.count("\x1b[?25l") == 1, "the cursor is hidden once"
    assert console.file.getvalue().count("\x1b[?25h") == 1, "and comes back"  # type: ignore[attr-defined]


def test_a_meter_says_nothing_of_short_work_and_then_where_it_stands(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [50.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    meter = Meter(logging.getLogger("metered"), "measuring", total=10, unit="conversations")
    caplog.set_level(logging.INFO)
    now[0] += 1
    meter.advance(2)
    assert not caplog.records
    now[0] += 3
    meter.advance(2)
    (record,) = caplog.records
    assert record.getMessage() == "measuring 4/10 conversations  1.0 a second  ETA 00:00:06"
    assert position_of(record) == Position(name="measuring", done=4, total=10, eta_seconds=6.0)


def test_work_of_unknown_size_has_a_count_and_no_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = PlainConsole(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    logger = make_logger(ConsoleHandler(console, has_bar=True))
    meter = Meter(logger, "planning", total=None, unit="rows")
    now[0] = 4.0
    meter.advance(6000)
    logger.handlers[0]._bar.refresh()  # type: ignore[attr-defined]
    logger.handlers[0].close()
    assert "planning 6,000 rows 1,500.0 a second" in " ".join(lines_of(console))
    assert "ETA" not in " ".join(lines_of(console))
