"""Trouble that may pass: of the machine at this moment, not of a trial's values. What it is, is decided here alone.

A trial that meets it is put back. The command tries it again, `MAX_ATTEMPTS` times in all in each process, after the
others and with a pause; what is left waits for the next command. It never counts as failed.
"""

import errno
import re
from collections.abc import Iterator

import torch

from stages.train.memory import MemoryShortError

MAX_ATTEMPTS = 3
PAUSE_SECONDS = 5.0

# No memory, no descriptors, no space, a device or a server that does not answer, somebody else in the way, no access.
# Not ENOENT and its like: a file that a trial names and that is not there is a fault of its values.
PASSING_NAMES = {
    "ENOMEM", "EMFILE", "ENFILE", "EAGAIN", "EINTR", "EBUSY", "ETXTBSY", "ENOLCK", "ENOSPC", "EDQUOT", "ENOBUFS",
    "EIO", "EREMOTEIO", "EROFS", "EACCES", "EPERM", "ESTALE", "EPIPE", "ECOMM", "EPROTO", "ENOTCONN", "ESHUTDOWN",
    "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH",
}  # fmt: skip
PASSING_ERRNOS = {number for number, name in errno.errorcode.items() if name in PASSING_NAMES}
MEMORY_ERRORS = (MemoryError, torch.OutOfMemoryError, MemoryShortError)
# How Python, torch and safetensors tell the same in errors that carry no number.
PASSING_TEXTS = re.compile(
    r"out of (?:shared )?memory|can(?:no|')t allocate memory|ALLOC_FAILED|too many open files|no space left on device"
    r"|can(?:no|')t start new thread|resource temporarily unavailable"
    r"|worker .*killed by signal: (?:bus error|killed)|worker .*exited unexpectedly|insufficient shared memory",
    re.IGNORECASE,
)
OS_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")


def may_pass(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is of the machine at this moment."""
    return any(_may_pass(cause) for cause in _causes(error))


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, MEMORY_ERRORS):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in PASSING_ERRNOS
    told = {int(number) for number in OS_ERROR_NUMBER.findall(str(error))}
    return bool(told & PASSING_ERRNOS) or (isinstance(error, RuntimeError) and bool(PASSING_TEXTS.search(str(error))))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
