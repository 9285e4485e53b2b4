"""The data base of a sweep: a file in its folder, or one that machines share; and what is said when it cannot be used.

A disk, another process or a flipped byte may refuse any call, each in an error of its own: SQLAlchemy's, Optuna's, or
that of the JSON in a row. All of them come out of here as one that names the data base and says what to do.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import optuna
import sqlalchemy
from optuna.storages import RDBStorage

from pipeline.sweep.settings import SweepSection
from stages.errors import SettingError, StageError
from storage.errors import CacheError

STUDY_FILE = "study.db"
# Writers of an SQLite file wait for each other; each write takes milliseconds.
BUSY_SECONDS = 60.0
# Between two attempts at a shared data base; to make its tables takes less (assumption).
RETRY_SECONDS = 2.0

# What Optuna and SQLAlchemy make of a data base whose file or rows are damaged, or that refuses.
_ERRORS = (
    optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, RuntimeError, ImportError,
    ValueError, LookupError, TypeError, AttributeError, AssertionError,
)  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")


class StudyError(SettingError):
    """The data base of a sweep cannot be used, or its content is damaged. No fault of a trial's values."""


class HasStudy(Protocol):
    """What a method must belong to for `naming_study`."""

    @property
    def sweep(self) -> SweepSection: ...
    @property
    def folder(self) -> Path: ...


S = TypeVar("S", bound=HasStudy)


def naming_study(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """The method, its errors as `study_errors` makes them."""

    @wraps(method)
    def named(self: S, /, *arguments: P.args, **options: P.kwargs) -> R:
        with study_errors(self.sweep, self.folder):
            return method(self, *arguments, **options)

    return named


@contextmanager
def study_errors(sweep: SweepSection, folder: Path) -> Iterator[None]:
    """Turn what a data base that refuses, or that is damaged, brings about into a StudyError that names it."""
    try:
        yield
    except (StageError, CacheError):
        raise
    except _ERRORS as error:
        cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else None
        reason = f"{type(error).__name__}: {f'{cause or error} '.splitlines()[0].strip():.300}"
        if sweep.storage is not None:
            reason = _without_secret(reason, sweep.storage)
            raise StudyError(
                f"sweep.storage: cannot be used as the data base of a sweep ({reason}); expected an SQLAlchemy URL "
                "whose driver is installed, of a data base that answers, or none for a file in the sweep's "
                "folder. If another machine began in the same moment, start again"
            ) from error
        raise StudyError(
            f"{folder / STUDY_FILE}: cannot be used as the data base of a sweep ({reason}). If the disk is full, or "
            "another process holds the file, see to it and run the same command again. If the file is damaged, put a "
            "copy back, or move it away: the trials' folders keep their checkpoints and, in trial.json and "
            "evaluation.json, their results, and the same command takes up from there what it numbers alike"
        ) from error


def open_storage(sweep: SweepSection, folder: Path) -> RDBStorage:
    """Connect, and make the tables of a new one. Raises SettingError."""
    with study_errors(sweep, folder):
        return _connect_own(folder / STUDY_FILE) if sweep.storage is None else _connect_shared(sweep.storage)


def _connect_own(file: Path) -> RDBStorage:
    # Not by its URL: of SQLAlchemy's versions some take `?` and `%` in one for syntax, and Optuna takes `{` so.
    connect = partial(sqlite3.connect, file, timeout=BUSY_SECONDS, check_same_thread=False)
    return RDBStorage(f"sqlite:///{STUDY_FILE}", engine_kwargs={"creator": connect})


def _connect_shared(url: str) -> RDBStorage:
    """Once more where the data base refuses: another machine may have made the tables in the same moment."""
    try:
        sqlalchemy.make_url(url)
    except (ValueError, sqlalchemy.exc.ArgumentError):  # they quote the URL, or the part that they take for a port
        raise SettingError(
            "sweep.storage: cannot be used as the data base of a sweep: it is no SQLAlchemy URL; expected "
            "dialect://user:password@host:port/name with a number for a port, and %-escapes for : / @ in a password"
        ) from None
    arguments: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}} if url.startswith("sqlite") else {}
    try:
        return RDBStorage(url, engine_kwargs=arguments)
    except sqlalchemy.exc.DBAPIError:
        time.sleep(RETRY_SECONDS)
        return RDBStorage(url, engine_kwargs=arguments)


def _without_secret(text: str, url: str) -> str:
    password = sqlalchemy.make_url(url).password
    text = text.replace(url, "sweep.storage")
    return text.replace(str(password), "***") if password else text
