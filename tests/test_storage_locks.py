"""One policy for locks: held, busy, or not there; everything else is an error that says so."""

import errno
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.sweep import study
from stages.train import run as training
from stages.train.checkpoint import CheckpointError
from storage import CacheError, CacheReader, CacheWriteError, pull_cache
from storage.errors import CacheBusyError, CacheReadError
from storage.locks import exclusive, lock, locked_shard
from storage_cache import LENGTHS, check_samples, files_of, fill_cache, make_cache, plan_cache

NO_LOCKS = [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS]


def refuse(number: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", NO_LOCKS)
def test_work_goes_on_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    monkeypatch.setattr("storage.locks._warned", set())
    with caplog.at_level(logging.WARNING):
        cache = make_cache(tmp_path / "c")
        pull_cache(f"file://{cache}", tmp_path / "pulled")
        reader = CacheReader(f"file://{cache}", staging=tmp_path / "staged", staging_bytes=30_000)
        for _ in range(2):
            check_samples(reader, LENGTHS)
        reader.close()
        with training._exclusive(tmp_path / "run"):
            pass
        (tmp_path / "locks").mkdir()
        descriptor = study._lock(tmp_path / "locks" / "trial_0000")
    assert descriptor is not None
    os.close(descriptor)
    assert files_of(tmp_path / "pulled") == files_of(cache)
    warnings = [record.message for record in caplog.records if "has no locks" in record.message]
    assert len(warnings) == 1, "one line for a file system"


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EBADF, errno.EINVAL])
def test_a_lock_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    plan_cache(tmp_path / "c", LENGTHS)
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with pytest.raises(CacheReadError, match=f"cannot be locked: {os.strerror(number)}"):
        fill_cache(tmp_path / "c")
    with pytest.raises(CheckpointError, match="cannot be locked"), training._exclusive(tmp_path / "r"):
        pass
    with pytest.raises(CacheReadError, match="cannot be locked"):
        study._lock(tmp_path / "trial")


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EMFILE, CacheReadError, "cannot be opened to lock it: Too many open files"),
        (errno.EIO, CacheReadError, "cannot be opened to lock it"),
        (errno.EACCES, CacheWriteError, "cannot write: Permission denied"),
        (errno.EROFS, CacheWriteError, "cannot write: Read-only file system"),
    ],
)
def test_a_lock_that_cannot_be_opened_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[CacheError], message: str
) -> None:
    cache = make_cache(tmp_path / "c")
    real = os.open

    def fail(path: object, flags: int, *arguments: object, **options: object) -> int:
        if flags & os.O_RDWR and "samples" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(kind, match=message), locked_shard(cache, 0):
        pytest.fail("the lock was taken for a free one")


def test_held_and_busy(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with exclusive(file) as first, exclusive(file) as second:
        assert (first, second) == (True, False)
    with file.open("rb") as one, file.open("rb") as two:
        assert lock(one.fileno(), file, shared=True) == "held"
        assert lock(two.fileno(), file, shared=True) == "held"
        assert lock(two.fileno(), file) == "busy"
    cache = make_cache(tmp_path / "c")
    with locked_shard(cache, 1), pytest.raises(CacheBusyError), locked_shard(cache, 1):
        pass


def test_no_other_file_of_the_project_locks() -> None:
    """One home: whoever needs a lock takes it from there."""
    root = Path(study.__file__).parents[2]
    files = [path for folder in ("storage", "stages", "pipeline") for path in (root / folder).rglob("*.py")]
    assert [path.name for path in files if "fcntl" in path.read_text(encoding="utf-8")] == ["locks.py"]
