"""The eight trials of configs/sweep.toml, killed twice and ending with their report, against trainings alone.

The trials differ in learning rate and seed, so they cost alike. The baseline is `dspark train` of the same config
without its evaluation, from the start of the process to its end, once before and once after the sweep: eight times
their mean. The sweep's time is that of all its processes together; evaluations, report and the work that the kills
(SIGKILL) cost are in it. Options are passed on to every command: `--set train.max_steps=80` for a try.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from common import ROOT, scratch_folder

from pipeline.sweep.record import read_trial
from stages.train.metrics import read_metrics

NUM_TRIALS = 8
KILLED_AT = (0.3, 0.65)  # of all steps
RUN_DIR = Path("runs/embedded/sweep")
POLL_SECONDS = 2.0


def main() -> None:
    with scratch_folder() as name:
        folder = Path(name)
        time_command(folder, "extract")
        alone = [time_command(folder, "train", "--no-evaluate", "--set", "train.run_dir='runs/before'")]
        num_steps = NUM_TRIALS * count_steps(folder / "runs")
        total = 0.0
        for share in (*KILLED_AT, None):
            spent, was_killed = time_sweep(folder, kill_at=None if share is None else int(share * num_steps))
            assert was_killed == (share is not None), "the sweep ended before it could be killed"
            end, steps = "killed" if was_killed else "ended", count_steps(folder / RUN_DIR)
            print(f"process {end} after {spent:.1f} s, at {steps} steps", flush=True)
            total += spent
        alone.append(time_command(folder, "train", "--no-evaluate", "--set", "train.run_dir='runs/after'"))
        trials = [record for path in (folder / RUN_DIR).iterdir() if (record := read_trial(path)) is not None]
        assert [record["state"] for record in trials] == ["complete"] * NUM_TRIALS
        assert (folder / RUN_DIR / "report.html").is_file()
        baseline = NUM_TRIALS * statistics.mean(alone)
        print(f"a training alone: {alone[0]:.1f} s before, {alone[1]:.1f} s after; eight: {baseline:.1f} s")
        print(f"sweep: {total:.1f} s, ratio {total / baseline:.3f}")


def command(*arguments: str) -> list[str]:
    verb, *others = arguments
    return [sys.executable, "-m", "pipeline.cli", verb, str(ROOT / "configs" / "sweep.toml"), *others, *sys.argv[1:]]


def time_command(folder: Path, *arguments: str) -> float:
    started = time.perf_counter()
    with (folder / "log.txt").open("ab") as log:
        subprocess.run(command(*arguments), cwd=folder, env=environment(), stdout=log, check=True)
    return time.perf_counter() - started


def time_sweep(folder: Path, *, kill_at: int | None) -> tuple[float, bool]:
    """Seconds of one process, and whether it was killed, once all trials together had done `kill_at` steps."""
    started = time.perf_counter()
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command("sweep"), cwd=folder, env=environment(), stdout=log, start_new_session=True)
        while process.poll() is None:
            if kill_at is not None and count_steps(folder / RUN_DIR) >= kill_at:
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
    spent = time.perf_counter() - started
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"the sweep ended with status {process.returncode}: {(folder / 'log.txt').read_text()[-2000:]}")
    return spent, process.returncode != 0


def count_steps(runs: Path) -> int:
    rows = (row for file in runs.glob("*/metrics.jsonl") for row in read_metrics(file.parent))
    return sum(row["kind"] == "train" for row in rows)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    main()
