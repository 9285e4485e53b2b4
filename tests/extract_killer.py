"""Kills real extractions, at random times and at named points, and reports as JSON what each kill left on disk.

    python extract_killer.py FOLDER      FOLDER: with the target and the chats of `make_config`

Everything is imported once and an extraction is a fork, so that a kill costs no import; nothing is computed before it.

A random kill has a phase and a delay. The phase is told by what lies on disk, never by a clock, so that kills fall into
planning and between commits on a machine of any speed; only the delay within it is of a length measured here.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

# What an extraction would import or build once a process, and every fork anew:
import fsspec.implementations.local  # noqa: F401
import transformers.convert_slow_tokenizer
import transformers.models.auto.tokenization_auto  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from pipeline.stage_one import settings_of
from stages.extract import price, run
from stages.extract.share import Share
from storage import layout
from storage.faults import FAULT_VARIABLE, PLAN_FAULTS, SHARD_FAULTS
from storage_cache import files_of
from tiny_target import make_config

SEED = 20260721
KILLS_PER_WORLD = 25
MIN_PLANNING = 3  # kills a world that must leave no plan
MIN_INCOMPLETE = 8  # kills a world that must leave some shards committed and some not
MAX_ATTEMPTS = 100  # a world; some 30 are enough
SHARD_BYTES = 110_000  # below what a config may ask for: a dozen shards of two inner chunks in a fraction of a second
PLANNED = 2  # phases: 0 nothing is there, 1 a plan is begun, PLANNED + n the plan is there and so are n commits
MAX_AHEAD = 4  # the phases among which a kill's is chosen, so that a cache grows over some kills
POLL_SECONDS = 0.0005
Report = dict[str, Any]


def settings_for(folder: Path) -> run.Settings:
    settings = settings_of(make_config(folder))
    return replace(settings, cache=settings.cache.model_copy(update={"shard_bytes": SHARD_BYTES}))


def start(settings: run.Settings, share: Share, fault: str = "", *, barrier: Barrier | None = None) -> int:
    """Fork an extraction; its process id. At the barrier, ranks that have opened the cache wait for the others."""
    if child := os.fork():
        return child
    os.dup2(2, 1)
    os.environ[FAULT_VARIABLE] = fault
    if barrier is not None:
        wait_before_writing(barrier)
    status = 1
    try:
        run.extract(settings, share=share)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait_before_writing(barrier: Barrier) -> None:
    commit_shards = run.commit_shards

    def commit_together(*arguments: Any, **options: Any) -> list[int]:
        barrier.wait(120)
        return commit_shards(*arguments, **options)

    run.commit_shards = commit_together


def start_all(settings: run.Settings, world: int) -> list[int]:
    return [start(settings, Share(rank=rank, world=world)) for rank in range(world)]


def end_of(child: int) -> int:
    """Wait for a child; its status, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_over(child: int) -> bool:
    """Whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def is_planned(cache: Path) -> bool:
    return (cache / layout.MANIFEST).exists()


def commits_of(cache: Path) -> set[str]:
    return {path.stem for path in cache.glob(f"{layout.COMMITS}/*.json") if not path.name.startswith(".")}


def phase_of(cache: Path) -> int:
    if is_planned(cache):
        return PLANNED + len(commits_of(cache))
    return int((cache / layout.PARTIAL_MANIFEST).exists())


def state_of(cache: Path, dead: list[int]) -> Report:
    """What lies in a cache in which no process is at work just now."""
    temps = [(path, owner) for path in cache.glob("*/.tmp-*") if (owner := layout.parse_temp(path.name))]
    payload = [file for path, owner in temps if owner[1] in dead for file in path.glob("*/c/**/0") if file.is_file()]
    commits = commits_of(cache)
    shards = {path.stem for path in cache.glob(f"{layout.SHARDS}/*.zarr") if not path.name.startswith(".")}
    return {
        "partial_plan": (cache / layout.PARTIAL_MANIFEST).exists(),
        "planned": is_planned(cache),
        "shard_temps": sum(path.parent.name == layout.SHARDS for path, _ in temps),
        "commit_temps": sum(path.parent.name == layout.COMMITS for path, _ in temps),
        "dead_writers": len({owner[1] for _, owner in temps if owner[1] in dead}),
        "temp_bytes": sum(file.stat().st_size for file in payload),
        "commits": len(commits),
        "unrecorded": len(shards - commits),
        "num_shards": len(list(cache.glob(f"{layout.SAMPLES}/*.parquet"))),
    }


class Killer:
    """Kills extractions of one cache and finishes them."""

    def __init__(self, folder: Path) -> None:
        self.settings = settings_for(folder)
        self.cache = self.settings.cache.folder
        self.planned = folder / "planned"  # what a kill at `plan.committed` leaves
        self.random = random.Random(SEED)
        self.begins = self._measure()
        self.num_shards = len(commits_of(self.cache))
        self.expected = files_of(self.cache)

    def clear(self, *, planned: bool = False) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)
        if planned:
            shutil.copytree(self.planned, self.cache)

    def finish(self, world: int) -> Report:
        """Extract undisturbed, with one worker where the plan is missing; what differs from the undisturbed cache."""
        statuses = [end_of(child) for child in start_all(self.settings, world if is_planned(self.cache) else 1)]
        found = files_of(self.cache)
        names = sorted(found.keys() | self.expected.keys())
        return {
            "statuses": statuses,
            "differing": [name for name in names if found.get(name) != self.expected.get(name)],
        }

    def kill_at_random(self, world: int, *, in_planning: bool) -> Report:
        """One kill of one or all of some workers; the others, if any, go on to their end."""
        phase, delay = self._choose_moment(in_planning=in_planning)
        victims = self.random.choice([[rank] for rank in range(world)] + [list(range(world))] * world)
        children = start_all(self.settings, world)
        self._wait_until(phase, delay, children)
        dead = [children[rank] for rank in victims]
        others = [child for child in children if child not in dead]
        for child in dead:
            os.kill(child, signal.SIGKILL)
        ended = [end_of(child) for child in dead]
        for child in others:
            os.kill(child, signal.SIGSTOP)
            os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        report = {"phase": phase, "delay": delay, "victims": victims, "ended": ended, **state_of(self.cache, dead)}
        for child in others:
            # Without rank 0 nobody plans, and the others would wait for ever.
            os.kill(child, signal.SIGCONT if report["planned"] or 0 not in victims else signal.SIGKILL)
        return report | {"others_ended": [end_of(child) for child in others]}

    def kill_at_point(self, fault: str) -> Report:
        """Rank 0 dies at a point of planning, or each of two ranks at a point of its first shard."""
        is_plan = fault in PLAN_FAULTS
        self.clear(planned=not is_plan)
        world = 1 if is_plan else 2
        # Who opens a cache removes what the dead have left there: no rank may die before all have opened it.
        barrier = multiprocessing.Barrier(world)
        children = [
            start(self.settings, Share(rank=rank, world=world), fault, barrier=barrier) for rank in range(world)
        ]
        ended = [end_of(child) for child in children]
        report = {"ended": ended, **state_of(self.cache, children)}
        if fault == "plan.committed":
            shutil.copytree(self.cache, self.planned)
        return report | self.finish(world=2)

    def episodes(self, world: int) -> Report:
        """Kills of growing caches, each finished after some; a third is killed in planning, a third begins with it."""
        kills: list[Report] = []
        finishes: list[Report] = []
        num_attempts = 0
        while not is_enough(kills) and num_attempts < MAX_ATTEMPTS:
            self.clear(planned=len(finishes) % 3 == 2)
            for turn in range(self.random.randint(3, 5)):
                if phase_of(self.cache) == PLANNED + self.num_shards:
                    break
                num_attempts += 1
                report = self.kill_at_random(world, in_planning=turn == 0 and len(finishes) % 3 == 0)
                if is_kill(report):
                    kills.append(report)
            finishes.append(self.finish(world))
        return {"kills": kills, "finishes": finishes, "num_attempts": num_attempts}

    def _measure(self) -> list[float]:
        """When each phase of an undisturbed extraction begins, and last when it ends; leaves its cache."""
        for _ in range(2):  # the first run pays for cold files
            self.clear()
            started = time.monotonic()
            child = start(self.settings, Share())
            begins: list[float] = []
            has_ended = False
            while not has_ended:
                has_ended = is_over(child)
                num_begun = phase_of(self.cache) + 1
                begins += [time.monotonic() - started] * (num_begun - len(begins))
                time.sleep(POLL_SECONDS)
            begins.append(time.monotonic() - started)
            if end_of(child) != 0:
                raise RuntimeError("the undisturbed extraction has failed")
        return begins

    def _choose_moment(self, *, in_planning: bool) -> tuple[int, float]:
        """The present phase or one to come, and how many seconds of it are to pass."""
        present = phase_of(self.cache)
        first, last = (0, PLANNED) if in_planning else (max(present, PLANNED), PLANNED + self.num_shards)
        phase = self.random.randrange(first, min(first + MAX_AHEAD, last))
        if phase == present:  # begins with the process, which first has to come to where the last one was
            return phase, self.random.uniform(0, self.begins[min(phase, PLANNED) + 1])
        return phase, self.random.uniform(0, self.begins[phase + 1] - self.begins[phase])

    def _wait_until(self, phase: int, delay: float, children: list[int]) -> None:
        """Let that much of the phase pass, or all of it where it is shorter than that, or all children end."""
        begun = None
        while not all(is_over(child) for child in children) and (present := phase_of(self.cache)) <= phase:
            if begun is None and present == phase:
                begun = time.monotonic()
            if begun is not None and time.monotonic() - begun >= delay:
                return
            time.sleep(POLL_SECONDS)


def is_kill(report: Report) -> bool:
    """Whether a victim was still at work."""
    return -signal.SIGKILL in report["ended"]


def is_enough(kills: list[Report]) -> bool:
    return (
        len(kills) >= KILLS_PER_WORLD
        and sum(not kill["planned"] for kill in kills) >= MIN_PLANNING
        and sum(0 < kill["commits"] < kill["num_shards"] for kill in kills) >= MIN_INCOMPLETE
    )


def main() -> None:
    get_checkpoint_conversion_mapping("qwen3")
    price.measure_matrix_rate = lambda *_: 1e9  # else a third of an extraction, to print an estimate
    killer = Killer(Path(sys.argv[1]))
    points = {fault: killer.kill_at_point(fault) for fault in [*PLAN_FAULTS, *SHARD_FAULTS]}
    worlds = {world: killer.episodes(world) for world in (1, 2)}
    json.dump({"points": points, "worlds": worlds}, sys.stdout)


if __name__ == "__main__":
    main()
