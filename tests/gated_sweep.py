"""`dspark` whose processes each wait, with the first trial that they take, until another has taken one too.

In the environment, `GATE` is a folder in which each says so. Processes that are spawned run this file's head again.
"""

import os
import time
from pathlib import Path
from typing import Any

from pipeline.cli import main
from pipeline.sweep.desk import Desk

PATIENCE_SECONDS = 170.0

_claim = Desk.claim


def claim(self: Desk, *arguments: Any, **named: Any) -> Any:
    claimed = _claim(self, *arguments, **named)
    gate = Path(os.environ["GATE"])
    if claimed is not None:
        (gate / str(os.getpid())).touch()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while claimed is not None and len(list(gate.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    return claimed


Desk.claim = claim  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
