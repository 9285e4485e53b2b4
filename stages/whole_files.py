"""Small files that are replaced whole or not at all."""

import os
import uuid
from pathlib import Path

from storage.text import redact


def write_whole(file: Path, data: str | bytes) -> None:
    """Write text as UTF-8 and without secrets, or bytes as they are; a crash leaves the old file or the new one.

    Raises OSError.
    """
    temp = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")  # process ids repeat in containers
    try:
        with temp.open("wb") as stream:
            stream.write(redact(data).encode("utf-8") if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        temp.replace(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error  # a full disk's has no name
    finally:
        temp.unlink(missing_ok=True)
