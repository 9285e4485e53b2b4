"""Small files that are replaced whole or not at all."""

import os
from pathlib import Path


def write_whole(file: Path, data: str | bytes) -> None:
    """Write text as UTF-8, or bytes; a crash leaves the old file or the new one. Raises OSError."""
    temp = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temp.open("wb") as stream:
            stream.write(data.encode("utf-8") if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        temp.replace(file)
    finally:
        temp.unlink(missing_ok=True)
