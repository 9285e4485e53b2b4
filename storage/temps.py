"""Temporary names and who owns them.

A name carries the machine, the process and the moment the process started, so that what a dead writer left is removed
and what a live one is writing never is. On another machine (or in another process namespace) life cannot be seen;
there a temporary is stale only when nothing in it has changed for a day.
"""

import functools
import hashlib
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from storage import layout

# A writer touches its temporary with every append; no forward pass takes a day (assumption).
FOREIGN_STALE_SECONDS = 24 * 3600


def temp_path(final: Path) -> Path:
    """A unique name beside ``final`` that nobody else uses."""
    pid = os.getpid()
    name = layout.temp_name(
        machine=_machine(), pid=pid, start=_process_start(pid) or 0, token=secrets.token_hex(4), final=final.name
    )
    return final.parent / name


def remove_stale_temps(directories: Iterable[Path], *, strict: bool = False) -> list[Path]:
    """Remove what dead writers left in these directories, and say what; others may do the same at the same time.

    What cannot be removed stays, and is an OSError where ``strict``.
    """
    removed = []
    for directory in directories:
        if not directory.is_dir():
            continue
        for entry in list(directory.iterdir()):
            if _is_stale(entry):
                remove_tree(entry, strict=strict)
                removed.append(entry)
    return removed


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that id."""
    return _process_start(pid) is not None


def remove_tree(path: Path, *, strict: bool = False) -> None:
    """Remove a file or a directory, whether or not somebody else is removing it too.

    What a directory refuses to give up stays, and is an OSError where ``strict``.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=_raise_refusal if strict else _ignore)
    elif os.path.lexists(path):  # a read-only disk refuses to remove also what is not there
        path.unlink(missing_ok=True)


def _raise_refusal(_: object, __: str, failure: tuple[type[BaseException], BaseException, object]) -> None:
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


def _ignore(*_: object) -> None: ...


def _is_stale(path: Path) -> bool:
    owner = layout.parse_temp(path.name)
    if owner is None:
        return False
    machine, pid, start = owner
    if machine == _machine():
        return _process_start(pid) != start
    return time.time() - _newest_change(path) > FOREIGN_STALE_SECONDS


def _newest_change(path: Path) -> float:
    """The latest modification time in a tree; now, if it is changing while we look."""
    try:
        return max(entry.lstat().st_mtime for entry in [path, *path.rglob("*")])
    except OSError:
        return time.time()


@functools.cache
def _machine() -> str:
    """Twelve digits that two processes share exactly when each can see the other's process id."""
    parts = [platform.node()]
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(source) if source.endswith("pid") else Path(source).read_text())
        except OSError:
            parts.append("")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _process_start(pid: int) -> int | None:
    """When a process started (clock ticks after boot; 0 where /proc does not say), None if it is not running."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except OSError:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0
