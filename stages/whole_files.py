"""Small files that are replaced whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from storage.temps import remove_stale_temps, temp_path
from storage.text import redact_values


def write_whole(file: Path, data: str | bytes) -> None:
    """Write text as UTF-8, or bytes as they are; a crash leaves the old file or the new one.

    What a killed writer left beside the file is removed. Raises OSError.
    """
    temp = temp_path(file)
    try:
        remove_stale_temps([file.parent])
        with temp.open("wb") as stream:
            stream.write(data.encode("utf-8") if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        temp.replace(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error  # a full disk's has no name
    finally:
        temp.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    """Write what JSON can hold, without the secrets in its strings, as `write_whole` does."""
    write_whole(file, json.dumps(redact_values(value), indent=2) + "\n")
