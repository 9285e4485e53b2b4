"""Small files that are replaced whole or not at all."""

import os
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Write `text` as UTF-8, in a file beside it that then takes its name. Raises OSError."""
    temp = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temp.write_text(text, encoding="utf-8")
        temp.replace(file)
    finally:
        temp.unlink(missing_ok=True)
