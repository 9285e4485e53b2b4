"""Every benchmark but the slow ones, or those that are named: `make bench`, `make bench ARGS="reading opening"`.

Each is a script of its own, which says what it measures against which baseline of the same run. Results go to
RESULTS.md by hand, with date and machine.
"""

import subprocess
import sys
from pathlib import Path

import torch

NAMES = ("encodings", "extraction", "growth", "opening", "packing", "reading", "step", "training")
SLOW = ("sweep", "real_target")  # ten trainings; three, and a package of 100 MB


def main() -> None:
    folder = Path(__file__).parent
    unknown = sorted(set(sys.argv[1:]) - {*NAMES, *SLOW})
    if unknown:
        sys.exit(f"unknown benchmarks {unknown}; there are {', '.join(NAMES + SLOW)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {sys.version.split()[0]}", flush=True)
    for name in sys.argv[1:] or NAMES:
        subprocess.run([sys.executable, str(folder / f"{name}.py")], cwd=folder.parent, check=True)


if __name__ == "__main__":
    main()
