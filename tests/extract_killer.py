"""Kills real extractions, at random times and at named points, and reports as JSON what each kill left on disk.

    python extract_killer.py FOLDER      FOLDER: with the target and the chats of `make_config`

Everything is imported once and an extraction is a fork, so that a kill costs no import; nothing is computed before it.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.stage_one import settings_of
from stages.extract import run
from stages.extract.share import Share
from storage import layout
from storage.faults import FAULT_VARIABLE, PLAN_FAULTS, SHARD_FAULTS
from storage_cache import files_of
from tiny_target import make_config

SEED = 20260721
KILLS_PER_WORLD = 25
SHARD_BYTES = 110_000  # below what a config may ask for: a dozen shards of two inner chunks in a fraction of a second
PHASES = (".", layout.PARTIAL_MANIFEST, layout.MANIFEST)  # a phase begins when its file is there
Report = dict[str, Any]


def settings_for(folder: Path) -> run.Settings:
    settings = settings_of(make_config(folder))
    return replace(settings, cache=settings.cache.model_copy(update={"shard_bytes": SHARD_BYTES}))


def start(settings: run.Settings, share: Share, fault: str = "") -> int:
    """Fork an extraction; its process id."""
    if child := os.fork():
        return child
    os.dup2(2, 1)
    os.environ[FAULT_VARIABLE] = fault
    status = 1
    try:
        run.extract(settings, share=share)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def start_all(settings: run.Settings, world: int, fault: str = "") -> list[int]:
    return [start(settings, Share(rank=rank, world=world), fault) for rank in range(world)]


def end_of(child: int) -> int:
    """Wait for a child; its status, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_over(child: int) -> bool:
    """Whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def is_planned(cache: Path) -> bool:
    return (cache / layout.MANIFEST).exists()


def is_begun(cache: Path, phase: int) -> bool:
    return phase == 0 or is_planned(cache) or (cache / PHASES[phase]).exists()


def state_of(cache: Path, dead: list[int]) -> Report:
    """What lies in a cache in which no process is at work just now."""
    temps = [(path, owner) for path in cache.glob("*/.tmp-*") if (owner := layout.parse_temp(path.name))]
    payload = [file for path, owner in temps if owner[1] in dead for file in path.glob("*/c/**/0") if file.is_file()]
    commits = {path.stem for path in cache.glob(f"{layout.COMMITS}/*.json") if not path.name.startswith(".")}
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
        self.begins, self.seconds = self._measure()
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

    def kill_at_random(self, world: int) -> Report:
        """One kill of one or all of some workers; the others, if any, go on to their end."""
        moment = self.random.uniform(0, self.seconds)
        victims = self.random.choice([[rank] for rank in range(world)] + [list(range(world))] * (world - 1))
        children = start_all(self.settings, world)
        self._wait_until(moment, children)
        dead = [children[rank] for rank in victims]
        others = [child for child in children if child not in dead]
        for child in dead:
            os.kill(child, signal.SIGKILL)
        ended = [end_of(child) for child in dead]
        for child in others:
            os.kill(child, signal.SIGSTOP)
            os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        report = {"world": world, "moment": moment, "victims": victims, "ended": ended, **state_of(self.cache, dead)}
        for child in others:
            # Without rank 0 nobody plans, and the others would wait for ever.
            os.kill(child, signal.SIGCONT if report["planned"] or 0 not in victims else signal.SIGKILL)
        return report | {"others_ended": [end_of(child) for child in others]}

    def kill_at_point(self, fault: str) -> Report:
        """Rank 0 dies at a point of planning, or each of two ranks at a point of its first shard."""
        is_plan = fault in PLAN_FAULTS
        self.clear(planned=not is_plan)
        children = start_all(self.settings, 1 if is_plan else 2, fault)
        ended = [end_of(child) for child in children]
        report = {"ended": ended, **state_of(self.cache, children)}
        if fault == "plan.committed":
            shutil.copytree(self.cache, self.planned)
        return report | self.finish(world=2)

    def episodes(self, world: int) -> Report:
        """Kills of growing caches, each finished after some; every third one begins with the plan."""
        kills: list[Report] = []
        finishes: list[Report] = []
        while sum(is_kill(kill) for kill in kills) < KILLS_PER_WORLD:
            self.clear(planned=len(finishes) % 3 == 2)
            for _ in range(self.random.randint(3, 5)):
                kills.append(self.kill_at_random(world))
                if not is_kill(kills[-1]):
                    break
            finishes.append(self.finish(world))
        return {"kills": [kill for kill in kills if is_kill(kill)], "finishes": finishes}

    def _measure(self) -> tuple[list[float], float]:
        """When each phase of an undisturbed extraction begins, and how long all of it takes; leaves its cache."""
        for _ in range(2):  # the first run pays for cold files
            self.clear()
            started = time.monotonic()
            child = start(self.settings, Share())
            begins: list[float] = []
            while not is_over(child):
                if len(begins) < len(PHASES) and is_begun(self.cache, len(begins)):
                    begins.append(time.monotonic() - started)
                time.sleep(0.0005)
            seconds = time.monotonic() - started
            if end_of(child) != 0:
                raise RuntimeError("the undisturbed extraction has failed")
        return begins, seconds

    def _wait_until(self, moment: float, children: list[int]) -> None:
        """Let that much of an extraction pass, counted from the begin of its phase, or all children end."""
        phase = max(phase for phase, begin in enumerate(self.begins) if begin <= moment or phase == 0)
        begun = None
        while not all(is_over(child) for child in children):
            if begun is None and is_begun(self.cache, phase):
                begun = time.monotonic()
            if begun is not None and time.monotonic() - begun >= moment - self.begins[phase]:
                return
            time.sleep(0.0005)


def is_kill(report: Report) -> bool:
    """Whether a victim was still at work."""
    return -signal.SIGKILL in report["ended"]


def main() -> None:
    killer = Killer(Path(sys.argv[1]))
    points = {fault: killer.kill_at_point(fault) for fault in [*PLAN_FAULTS, *SHARD_FAULTS]}
    worlds = {world: killer.episodes(world) for world in (1, 2)}
    json.dump({"points": points, "worlds": worlds}, sys.stdout)


if __name__ == "__main__":
    main()
