"""Many rows in several processes: the same samples and counts as in one, and a death that is told."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.stage_one import settings_of
from stages.extract import ordered, run
from stages.extract.ordered import WorkerError, map_ordered
from stages.extract.rows import MAX_DEPTH, TOO_DEEP, DataError
from stages.extract.samples import SampleCounts
from tiny_target import make_chats, make_config, write_jsonl


def negate(item: int) -> int:
    if item < 0:
        raise DataError(f"item {item}")
    return -item


def die(item: int) -> int:
    if item == 5000:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.parametrize("count", [0, 1, ordered.MIN_ITEMS - 1, ordered.MIN_ITEMS, ordered.MIN_ITEMS + 1, 10_000])
def test_results_are_in_order(count: int) -> None:
    assert list(map_ordered(negate, range(count), num_processes=3)) == [-item for item in range(count)]


def test_errors_come_out_as_themselves_and_in_their_place() -> None:
    results = map_ordered(negate, [*range(4500), -7, *range(4500)], num_processes=2)
    assert [next(results) for _ in range(4352)] == [-item for item in range(4352)]  # whole chunks before the bad one
    with pytest.raises(DataError, match="item -7"):
        list(results)


def test_rows_nested_deeply_come_out_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python sends no object of some hundreds of levels to another process."""
    monkeypatch.setattr(ordered, "MIN_ITEMS", 4)
    chats = [json.dumps(chat | {"more": "HERE"}) for chat in make_chats(12)]
    depths = {2: MAX_DEPTH - 1, 5: MAX_DEPTH, 6: 500, 7: 50_000}  # below the row itself
    for row, depth in depths.items():
        chats[row] = chats[row].replace('"HERE"', "[" * depth + "]" * depth)
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    outcomes = []
    for num_processes in (1, 2):
        config = make_config(tmp_path, data__num_processes=num_processes, data__max_bad_fraction=0.5)
        settings, counts = settings_of(config), SampleCounts()
        samples = list(run.iterate_samples(run.describe_inputs(settings), settings, counts=counts))
        outcomes.append(([sample.source_row for sample in samples], counts.all_reasons()))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] == ([0, 1, 2, 3, 4, 8, 9, 10, 11], {f"bad row: {TOO_DEEP}": 3})


def test_a_killed_process_is_an_error_and_no_hang() -> None:
    with pytest.raises(WorkerError, match="was killed"):
        list(map_ordered(die, range(9000), num_processes=2))


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """What they inherited is let go of: the lock of a plan, for one."""
    lock = tmp_path / "lock"
    code = (
        "import fcntl, os, sys, time; from stages.extract.ordered import map_ordered\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "for item in map_ordered(abs, iter(range(10**9)), num_processes=2):\n"
        "    if item == 5000: print('working', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, env=environment)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"working\n"
        process.kill()
    with lock.open("r+") as file:
        for _ in range(100):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)
    pytest.fail("a process lives on and holds the lock")


def test_samples_do_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "MIN_ITEMS", 64)
    rows: list[Any] = make_chats(400)
    rows[7] = {"messages": []}
    rows[300] = {"nothing": 1}
    found = []
    for count in (1, 3):
        config = make_config(tmp_path, data__num_processes=count, data__max_length=60)
        write_jsonl(Path(config.data.files[0]), rows)
        settings = settings_of(config)
        counts = SampleCounts()
        inputs = run.describe_inputs(settings)
        samples = list(run.iterate_samples(inputs, settings, counts=counts))
        found.append(([(s.sample_id, s.source_row, s.input_ids.tolist(), s.split) for s in samples], counts))
    assert found[0] == found[1]
    assert [sample for sample, *_ in found[0][0]][-1] == 399
    assert found[0][1].num_bad == 2
    assert found[0][1].num_truncated > 0
