"""Runs code in forks of one process that has imported everything, each killed at its fault point.

A process a kill would cost an import of some seconds. Nothing runs before the forks, so that they inherit no thread.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from storage.faults import FAULT_VARIABLE

TESTS = Path(__file__).parent
KILLED = -signal.SIGKILL
FORKS = """
import importlib, json, os, sys
import s3fs, storage_cache
body, cases, *modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
body = compile(body, "<body>", "exec")
for fault, *arguments in json.loads(cases):
    if os.fork() == 0:
        os.environ["{variable}"] = fault
        sys.argv[1:] = arguments
        exec(body, {{}})
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def kill_at_faults(code: str, cases: Sequence[Sequence[str]], *, imports: Sequence[str] = ()) -> None:
    """Run the code for each (fault point, *arguments), these in `sys.argv[1:]`; every process must die at its point.

    `imports` are the modules that the code needs beside the storage package.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    command = [sys.executable, "-c", FORKS.format(variable=FAULT_VARIABLE), code, json.dumps(cases), *imports]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    ended = [int(line) for line in output.split()]
    assert ended == [KILLED] * len(cases), dict(zip([case[0] for case in cases], ended, strict=True))
