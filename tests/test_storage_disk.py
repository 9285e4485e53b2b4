"""Disks that are full, read-only, forbidden or broken: one clear error, committed shards intact, and resume works."""

import contextlib
import errno
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from full_disk import limited_file_size
from pipeline.cli import main
from pipeline.config import to_toml
from storage import (
    CachePlan,
    CacheReader,
    CacheReadError,
    CacheSpaceError,
    CacheWriteError,
    repair_cache,
    verify_cache,
    writer,
)
from storage_cache import LENGTHS, check_samples, files_of, fill_cache, make_cache, make_header, plan_cache
from tiny_target import make_config

NOBODY = 65534
HEADER = make_header(hidden_size=1024, shard_bytes=20 * 4 * 1024 * 2)  # 2 MiB a shard, padding included


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory. Skips where this process may not mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """This process without root's rights."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to give its rights up for a moment")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def check_resumed(path: Path, reference: Path) -> None:
    """What was committed stays; the same command finishes the cache."""
    assert not list(path.rglob(".tmp-*"))
    for problem in verify_cache(path).problems:
        raise AssertionError(problem)
    committed = {name: data for name, data in files_of(path).items() if name.startswith(("shards/", "commits/"))}
    fill_cache(path)
    expected = files_of(reference)
    assert committed.items() <= expected.items()
    assert files_of(path) == expected
    check_samples(CacheReader(path), LENGTHS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("reference") / "c", LENGTHS, HEADER)


def test_a_disk_that_fills_up(tmp_path: Path, reference: Path) -> None:
    """Room for two shards of five; then the disk grows, and the same command goes on."""
    with mounted(tmp_path / "disk", "size=6m") as disk:
        path = disk / "c"
        plan_cache(path, LENGTHS, HEADER)
        with pytest.raises(CacheSpaceError, match=r"cannot write: No space left on device; free some space"):
            fill_cache(path)
        missing = verify_cache(path).missing_shards
        assert 0 < len(missing) < 5
        subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
        check_resumed(path, reference)


def test_a_disk_that_fills_up_while_planning(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        path = disk / "c"
        with pytest.raises(CacheSpaceError, match="No space left on device; free some space"):
            plan_cache(path, LENGTHS * 200)
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert CachePlan.read(plan_cache(path, LENGTHS * 200).path).num_shards > 100


def test_a_limit_on_the_size_of_a_file(tmp_path: Path, reference: Path) -> None:
    path = tmp_path / "c"
    plan_cache(path, LENGTHS, HEADER)
    fill_cache(path, [0])
    with limited_file_size(1_000_000), pytest.raises(CacheSpaceError, match="cannot write: File too large"):
        fill_cache(path)
    check_resumed(path, reference)


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
def test_a_disk_that_fails(tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """No disk here fails on demand, so the system call is made to."""
    path = tmp_path / "c"
    plan_cache(path, LENGTHS, HEADER)
    fill_cache(path, [0])

    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def compute() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            fill_cache(path)

    with pytest.raises((CacheWriteError, CacheReadError), match="Input/output error"):
        compute()
    check_resumed(path, reference)


def test_a_read_only_disk(tmp_path: Path, reference: Path) -> None:
    """Writing is refused in one sentence; reading and verifying need no write at all."""
    with mounted(tmp_path / "disk", "size=32m") as disk:
        path, other = disk / "c", Path(shutil.copytree(reference, disk / "other"))
        plan_cache(path, LENGTHS, HEADER)
        fill_cache(path, [0])
        payload = other / "shards/00003.zarr/last_hidden_states/c/0/0"
        payload.write_bytes(payload.read_bytes()[:-1] + b"?")
        with read_only(disk):
            with pytest.raises(CacheWriteError, match="cannot write: Read-only file system; see to the disk"):
                fill_cache(path)
            with pytest.raises(CacheWriteError, match="cannot write: Read-only file system"):
                plan_cache(disk / "new", LENGTHS)
            report = verify_cache(other)
            assert report.bad_shards == (3,)
            with pytest.raises(CacheWriteError, match="cannot write: Read-only file system"):
                repair_cache(other, report)
            check_samples(CacheReader(other), LENGTHS)  # the damage is in the index, which the reader does not need
        check_resumed(path, reference)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are private."""
    folder = Path(tempfile.mkdtemp(prefix="dspark-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_the_folder_of_another_user(open_folder: Path, reference: Path) -> None:
    path = open_folder / "c"
    plan_cache(path, LENGTHS, HEADER)
    fill_cache(path, [0])
    with as_nobody():
        with pytest.raises(CacheWriteError, match="cannot write: Permission denied"):
            fill_cache(path)
        with pytest.raises(CacheWriteError, match="cannot write: Permission denied"):
            plan_cache(open_folder / "new", LENGTHS)
        assert verify_cache(path).problems == ()
    check_resumed(path, reference)
    payload = path / "shards/00001.zarr/hidden_states/c/0/0/0"
    payload.chmod(0o600)
    with as_nobody():
        report = verify_cache(path)
        assert [(problem.shard, problem.kind) for problem in report.problems] == [(1, "unreadable")]
        with pytest.raises(
            CacheReadError, match=r"not repaired: shards/00001\.zarr/.* cannot be read and may be sound"
        ):
            repair_cache(path, report)
        with pytest.raises(CacheReadError, match="cannot open: Permission denied"):
            check_samples(CacheReader(path), LENGTHS)


@pytest.mark.parametrize(
    "name",
    ["shards", "commits", "."],
)
def test_a_folder_that_goes_away_while_a_shard_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "c"
    plan_cache(path, LENGTHS, HEADER)

    def remove(point: str) -> None:
        if point == "shard.appended":
            shutil.rmtree(path / name, ignore_errors=True)

    monkeypatch.setattr(writer, "fault_point", remove)
    with pytest.raises(CacheWriteError, match="cannot write: No such file or directory"):
        fill_cache(path)


def test_extract_on_disks_that_refuse(tmp_path: Path) -> None:
    """The real command: one line and status 1, committed shards intact, and the same command finishes."""
    with mounted(tmp_path / "disk", "size=256m") as disk:
        cache, file = disk / "cache", tmp_path / "config.toml"
        file.write_text(to_toml(make_config(tmp_path, num_chats=60, cache__path=str(cache))))
        with limited_file_size(700_000):
            assert "cannot write: File too large" in refuse("extract", file)
        assert verify_cache(cache).missing_shards
        assert verify_cache(cache).problems == ()
        assert dspark("extract", file).exit_code == 0
        before = files_of(cache)
        assert verify_cache(cache).ok
        (cache / "commits/00000.json").unlink()
        with read_only(disk):
            assert "cannot write: Read-only file system" in refuse("extract", file)
        assert dspark("extract", file).exit_code == 0
        assert files_of(cache) == before


def test_a_target_that_does_not_fit(tmp_path: Path) -> None:
    """The head is written by another library, which has errors of its own."""
    file = tmp_path / "config.toml"
    file.write_text(to_toml(make_config(tmp_path)))
    with limited_file_size(400_000):
        assert "head.safetensors: cannot write: " in refuse("extract", file)
    assert dspark("extract", file).exit_code == 0
    assert verify_cache(tmp_path / "cache").ok


def dspark(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refuse(*arguments: object) -> str:
    """The one line that says why; a traceback would be an exception other than SystemExit."""
    result = dspark(*arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    message = result.output[result.output.index("Error: ") :].rstrip("\n")
    assert "\n" not in message
    return message
