"""Stage one, killed at fifty random times and at every named point, by itself and as one of two workers.

The kills are `extract_killer.py`'s, in a process of its own; here their report is read.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from extract_killer import KILLS_PER_WORLD, MIN_INCOMPLETE, MIN_PLANNING
from storage.faults import PLAN_FAULTS, SHARD_FAULTS
from tiny_target import make_config

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kills")
    make_config(folder, num_chats=40)
    log = folder / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    with log.open("wb") as errors:
        command = [sys.executable, str(TESTS / "extract_killer.py"), str(folder)]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=500)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the extractions too
    assert process.returncode == 0, log.read_text()[-4_000:]
    return dict(json.loads(output))


def check_finish(finish: dict[str, Any]) -> None:
    assert set(finish["statuses"]) == {0}
    assert not finish["differing"], "the finished cache must be byte-identical, without temporaries"


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_times_and_finished_is_byte_identical(report: dict[str, Any], world: int) -> None:
    kills, finishes = (report["worlds"][str(world)][name] for name in ("kills", "finishes"))
    assert len(kills) >= KILLS_PER_WORLD
    assert len(finishes) >= KILLS_PER_WORLD // 6
    for finish in finishes:
        check_finish(finish)
    for kill in kills:  # a worker that lives on is not disturbed, unless it would wait for ever for the plan
        waits_for_plan = not kill["planned"] and 0 in kill["victims"]
        assert set(kill["others_ended"]) <= {KILLED if waits_for_plan else 0}


def test_the_kills_left_partial_state(report: dict[str, Any]) -> None:
    kills = [kill for world in ("1", "2") for kill in report["worlds"][world]["kills"]]
    assert any(kill["partial_plan"] for kill in kills)
    assert any(kill["temp_bytes"] for kill in kills)
    for world in ("1", "2"):
        kills_of_world = report["worlds"][world]["kills"]
        num_planned = sum(kill["planned"] for kill in kills_of_world)
        assert len(kills_of_world) - num_planned >= MIN_PLANNING
        assert num_planned > len(kills_of_world) // 2
        assert sum(0 < kill["commits"] < kill["num_shards"] for kill in kills_of_world) >= MIN_INCOMPLETE
    assert all(kill["num_shards"] >= 10 for kill in kills if kill["planned"])


@pytest.mark.parametrize("fault", PLAN_FAULTS)
def test_killed_at_a_point_of_planning(report: dict[str, Any], fault: str) -> None:
    left = report["points"][fault]
    assert left["ended"] == [KILLED]
    assert left["planned"] == (fault == "plan.committed")
    assert left["partial_plan"] != left["planned"]
    assert (left["num_shards"] > 0) == (fault != "plan.started")
    check_finish(left)


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_both_workers_killed_at_a_point_of_a_shard(report: dict[str, Any], fault: str) -> None:
    """Each dies at its first shard; what has no name yet is a temporary, what has no commit does not count."""
    left = report["points"][fault]
    assert left["ended"] == [KILLED, KILLED]
    is_named = SHARD_FAULTS.index(fault) >= SHARD_FAULTS.index("shard.renamed")
    is_committed = fault == "commit.renamed"
    assert left["commits"] == (2 if is_committed else 0)
    assert left["unrecorded"] == (2 if is_named and not is_committed else 0)
    assert left["commit_temps"] == (2 if fault == "commit.written" else 0)
    if not is_named:
        assert left["shard_temps"] >= left["dead_writers"] == 2
    if fault in ("shard.appended", "shard.written", "shard.synced"):
        assert left["temp_bytes"] > 0
    check_finish(left)
