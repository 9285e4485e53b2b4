"""Files at an fsspec address (``s3://``, ``gs://``, ``file://``, ...): small reads, large ones in pieces, uploads.

Knows nothing of what a cache holds. Credentials and endpoints are the file system's own affair: its environment
variables and fsspec's config files. A file system is opened in each process on its own, since none survives a fork.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from storage.errors import (
    CacheCorruptError,
    CacheError,
    CacheFormatError,
    CacheNotFoundError,
    CacheReadError,
    CacheUsageError,
)
from storage.files import disk_errors, sync_file
from storage.text import HIDDEN, redact, remember_secrets

# Bytes of one request: long enough to hide its latency, short enough that four of them in flight take little memory.
PIECE_BYTES = 16 << 20
NUM_CONNECTIONS = 4  # of one file; a single stream of an object store stays far below what a network card takes
NUM_ATTEMPTS = 3  # beside what the file system retries on its own
PAUSE_SECONDS = 0.5  # before the second attempt; doubles

T = TypeVar("T")

logger = logging.getLogger(__name__)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an fsspec address."""
    return "://" in os.fspath(path)


class RemoteStore:
    """A directory at an address. Every method may raise CacheReadError; what is missing is a CacheNotFoundError."""

    def __init__(self, url: str) -> None:
        remember_secrets(url)
        if not is_remote(url):
            raise CacheUsageError(
                f"{redact(url)}: is no address; expected one such as s3://bucket/cache or file:///mnt/cache"
            )
        if f"://{HIDDEN}@" in url:
            raise CacheUsageError(f"{url}: its login was hidden when it was saved; give the address again, as by --set")
        self._address = url.rstrip("/")
        self.url = redact(self._address)  # for messages
        self._pid = -1
        self._opened: tuple[Any, str] | None = None

    def where(self, name: str) -> str:
        """The address of a file, for messages."""
        return f"{self.url}/{name}"

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """All bytes of a small file. Raises CacheFormatError where it is larger, or may be."""
        size = self._find_size(name)
        if size is not None and size > max_bytes:
            raise CacheFormatError(
                f"{self.where(name)}: has {size} bytes, expected {max_bytes} at most; it is not read"
            )
        if size == 0:
            return b""
        data = self._attempt(name, lambda system, path: _read_range(system, path, 0, max_bytes + 1))
        if len(data) > max_bytes:  # the size is what a server says
            raise CacheFormatError(f"{self.where(name)}: has more than {max_bytes} bytes; it is not read")
        return data

    def size(self, name: str) -> int:
        """Bytes of a file, as the store says; 0 where it does not. Raises CacheCorruptError for no regular file."""
        return self._find_size(name) or 0

    def _find_size(self, name: str) -> int | None:
        info = self._attempt(name, lambda system, path: system.info(path))
        if self._is_local and info["type"] != "file":
            raise CacheCorruptError(f"{self.where(name)}: is not a regular file")
        return None if info["size"] is None else int(info["size"])

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        try:
            self.size(name)
        except CacheNotFoundError:
            return False
        return True

    @property
    def _is_local(self) -> bool:
        return self._address.startswith(("file://", "local://"))

    @property
    def may_not_list(self) -> bool:
        """Whether it is a web server, whose directories nobody need be able to list."""
        return self._address.startswith(("http://", "https://"))

    def list_names(self, directory: str) -> list[str]:
        """Names in a directory, none where there is no such directory."""
        try:
            paths = self._attempt(directory, lambda system, path: list(system.ls(path, detail=False)))
        except CacheNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def fetch(self, name: str, path: Path, *, num_bytes: int) -> None:
        """Copy a file that must have ``num_bytes`` to the new file ``path`` and sync it. Raises CacheCorruptError."""
        found = self.size(name)
        if found != num_bytes:
            raise CacheCorruptError(f"{self.where(name)}: has {found} bytes, expected {num_bytes}")
        with disk_errors(path), path.open("xb", buffering=0) as file:

            def fetch_piece(start: int) -> None:
                stop = min(start + PIECE_BYTES, num_bytes)
                data = self._attempt(name, lambda system, source: _read_range(system, source, start, stop))
                if len(data) != stop - start:
                    raise CacheReadError(
                        f"{self.where(name)}: gave {_count(data, stop - start)} bytes from {start} to {stop}"
                    )
                while data:
                    written = os.pwrite(file.fileno(), data, start)
                    start, data = start + written, data[written:]

            with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
                for _ in pool.map(fetch_piece, range(0, num_bytes, PIECE_BYTES)):
                    pass
        sync_file(path)

    def put(self, path: Path, name: str) -> None:
        """Upload a file and compare the size of what arrived."""
        self._check_place(name)
        self._attempt(name, lambda system, target: system.put_file(str(path), target))
        expected, found = path.stat().st_size, self.size(name)
        if found != expected:
            raise CacheCorruptError(f"{self.where(name)}: {found} bytes arrived of {expected}; push again")

    def write(self, name: str, data: bytes) -> None:
        """Upload a small file."""
        self._check_place(name)
        self._attempt(name, lambda system, target: system.pipe_file(target, data))

    def _check_place(self, name: str) -> None:
        """Refuse to write into a pipe or a device. Raises CacheCorruptError."""
        if self._is_local:
            with contextlib.suppress(CacheNotFoundError):
                self.size(name)

    def remove(self, name: str) -> None:
        """Delete a file, which may be gone already."""
        with contextlib.suppress(CacheNotFoundError):
            self._attempt(name, lambda system, path: system.rm_file(path))

    def _attempt(self, name: str, action: Callable[[Any, str], T]) -> T:
        """Do something with a file, again after a while where the store may only be disturbed."""
        where = self.where(name)
        for pause in [PAUSE_SECONDS * 2**attempt for attempt in range(NUM_ATTEMPTS - 1)] + [None]:
            try:
                system, root = self._connect()
                return action(system, f"{root}/{name}")
            except CacheError:
                raise
            except FileNotFoundError as error:
                raise CacheNotFoundError(f"{where}: not found; check the address") from error
            except (PermissionError, ImportError, ValueError) as error:  # which no second attempt would change
                raise CacheReadError(f"{where}: {_describe(error)}; check address and access") from error
            except Exception as error:  # each file system has errors of its own, which need not be an OSError
                if pause is None:
                    raise CacheReadError(
                        f"{where}: {_describe(error)}; after {NUM_ATTEMPTS} attempts. Check that the "
                        "store can be reached, and run the same command again: it goes on from where it was"
                    ) from error
                logger.info("%s: %s, trying again", where, type(error).__name__)
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _connect(self) -> tuple[Any, str]:
        """This process' file system, which remembers no listings, and the path of the directory in it."""
        if self._opened is None or self._pid != os.getpid():
            options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
            if self._is_local:
                options["auto_mkdir"] = True
            self._opened = fsspec.core.url_to_fs(self._address, **options)
            self._pid = os.getpid()
        return self._opened


def _read_range(system: Any, path: str, start: int, stop: int) -> bytes:
    """Bytes of a file from ``start`` to ``stop``; of a web server, which may send without end, at most one more."""
    if "http" not in system.protocol:  # a request or a file that ends
        return bytes(system.cat_file(path, start=start, end=stop))
    asked = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
    headers = {**system.kwargs.get("headers", {}), **asked}
    pieces, missing = [], stop - start + 1
    # Neither size is used: 0 is for a stream, and with a size none is asked for.
    with system.open(path, "rb", block_size=0, size=1, headers=headers) as stream:
        while missing > 0 and (piece := stream.read(missing)):
            pieces.append(piece)
            missing -= len(piece)
    return b"".join(pieces)


def _count(data: bytes, expected: int) -> str:
    return f"more than {expected}" if len(data) > expected else str(len(data))


def _describe(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}")
