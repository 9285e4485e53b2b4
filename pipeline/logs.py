"""What is logged, and that libraries keep quiet: of the command line, and of the processes that it starts."""

import logging
import os
import textwrap
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from storage.progress import Position, position_of
from storage.text import plain

LIBRARIES = (
    "transformers", "huggingface_hub", "fsspec", "httpx", "httpx2", "openai", "torch", "aiobotocore", "botocore",
)  # fmt: skip
LINE_SECONDS = 10.0  # where there is no terminal, a line of progress that often


class PlainConsole(Console):
    """A console that shows every string as it is: no markup, nothing that a terminal obeys, no secrets."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, fit for a terminal; whatever is printed as a string passes here."""
        return super().render_str(plain(text), **(options | {"markup": False, "emoji": False}))


console = PlainConsole(soft_wrap=True)
"""Where commands print: one, so that what is printed and a live bar do not overwrite each other."""


def configure_logs(*, verbose: bool) -> None:
    """Messages to standard output; `verbose` shows debug messages, the libraries' own, and every line of progress."""
    has_bar = console.is_terminal and not verbose
    handler = ConsoleHandler(console, has_bar=has_bar)
    handler.setFormatter(PlainFormatter("%(message)s"))
    if not (has_bar or verbose):
        handler.addFilter(LinePacer())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    if not verbose:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for library in LIBRARIES:
            logging.getLogger(library).setLevel(logging.ERROR)
        _quiet_transformers()


class _PlainFormatter(logging.Formatter):
    """Messages name what files and users bring: shown without what a terminal obeys, and without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


class PlainFormatter(logging.Formatter):
    """Messages name what files and users bring: shown without what a terminal obeys, and without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, fit for a terminal and a file."""
        return plain(super().format(record))


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


class LinePacer(logging.Filter):
    """Thins out lines of progress: lets through the first of each work, one every `seconds`, and the last."""

    def __init__(self, *, seconds: float = LINE_SECONDS) -> None:
        super().__init__()
        self._seconds = seconds
        self._name: str | None = None
        self._passed_at = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be printed; one without a position always is."""
        position = position_of(record)
        if position is None:
            return True
        now = time.monotonic()
        if position.name == self._name and not position.is_end and now - self._passed_at < self._seconds:
            return False
        self._name, self._passed_at = position.name, now
        return True


class ConsoleHandler(logging.Handler):
    """Prints messages; on a terminal those that carry a position move a live bar instead."""

    def __init__(self, console: Console, *, has_bar: bool) -> None:
        super().__init__()
        self._console = console
        self._bar = _Bar(console) if has_bar else None

    def emit(self, record: logging.LogRecord) -> None:
        """Print or show one record."""
        try:
            line, position = self.format(record), position_of(record)
            if position is not None and self._bar is not None:
                self._bar.show(position, line)
            else:
                _print(self._console, line)
        except Exception:
            self.handleError(record)

    def clear(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        """Leave the terminal as it was, for good."""
        self.clear()
        super().close()


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True)


class _Bar(Progress):
    """A live bar for the work that reported last, with the line that it logs underneath, whatever the width."""

    def __init__(self, console: Console) -> None:
        self._line = ""
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
        super().__init__(*columns, console=console, transient=True)
        self._task: TaskID | None = None
        self._name: str | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, and the line in as many rows as it takes."""
        yield self.make_tasks_table(self.tasks)
        if self._line:
            yield Text("\n".join(textwrap.wrap(self._line, width=max(self.console.width - 1, 1))))

    def show(self, position: Position, line: str) -> None:
        """Move the bar, or begin another where the work is another; a finished one leaves its last line."""
        if self._task is None or position.name != self._name:
            self.clear()
            self._task = self.add_task(position.name, total=position.total)
            self._name = position.name
            self.start()
        self._line = " ".join(line.split())
        self.update(self._task, completed=position.done, total=position.total)
        if position.is_end:
            self.clear()
            _print(self.console, line)

    def clear(self) -> None:
        """Take the bar off the terminal."""
        if self._task is not None:
            self.stop()
            self.remove_task(self._task)
            self._task = None


def clear_bar() -> None:
    """Take a live bar off the terminal, before something else writes to it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, ConsoleHandler):
            handler.clear()
