"""What a full or broken disk becomes: an error that names the file and says how to go on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.regeneration_record import RegenerationError


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a refusal of the system to write into RegenerationError."""
    try:
        yield
    except OSError as error:
        raise RegenerationError(
            f"{where}: cannot write: {error.strerror or error}; recorded answers are kept. Free some space or "
            "see to the disk, and run the same command again: it continues"
        ) from error
