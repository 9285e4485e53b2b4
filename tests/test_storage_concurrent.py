"""Eight readers of one cache at once, from threads, forked and spawned processes, while another process verifies it."""

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import CacheReader, verify_cache
from storage_cache import LENGTHS, check_samples, make_cache

NUM_READERS = 8
ROOT = Path(__file__).parent.parent
VERIFY = """
import sys, time
from storage import verify_cache
print("started", flush=True)
num_rounds = 0
while verify_cache(sys.argv[1], num_workers=2).ok and not time.sleep(0):
    num_rounds += 1
    print(num_rounds, flush=True)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("concurrent") / "c")


@pytest.fixture(scope="module")
def verifier(cache: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that verifies the cache again and again; it ends by itself only if it finds something wrong."""
    child = subprocess.Popen([sys.executable, "-c", VERIFY, str(cache)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "started\n"
        assert child.stdout.readline() == "1\n"
        yield child
        assert child.poll() is None, "the verifier found damage"
        child.kill()


def read(reader: CacheReader) -> None:
    """What each of the readers does; an assertion that fails ends its process with status 1."""
    for _ in range(5):
        check_samples(reader, LENGTHS)


def read_in_child(cache: Path | CacheReader, io: str, barrier: threading.Barrier) -> None:
    barrier.wait(120)
    read(cache if isinstance(cache, CacheReader) else CacheReader(cache, io=io))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # that is the point
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_in_processes(cache: Path, verifier: subprocess.Popen[str], method: str) -> None:
    """Half of them open the cache, half are given a reader that threads of the parent are using meanwhile."""
    context = multiprocessing.get_context(method)
    barrier = context.Barrier(NUM_READERS)
    shared = {io: CacheReader(cache, io=io) for io in ("mmap", "pread")}  # type: ignore[arg-type]
    children = [
        context.Process(target=read_in_child, args=(source, io, barrier))
        for io, reader in shared.items()
        for source in (cache, reader)
        for _ in range(NUM_READERS // 4)
    ]
    stop = threading.Event()

    def keep_reading(reader: CacheReader) -> None:
        while not stop.is_set():
            reader[0].hidden_states.sum()
            reader.close()

    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(keep_reading, reader) for reader in shared.values()]
        try:
            for child in children:
                child.start()
            for child in children:
                child.join(120)
        finally:
            stop.set()
        for future in busy:
            future.result()
    assert [child.exitcode for child in children] == [0] * NUM_READERS
    for reader in shared.values():
        read(reader)


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_readers_in_threads(cache: Path, verifier: subprocess.Popen[str], io: str) -> None:
    shared = CacheReader(cache, io=io)  # type: ignore[arg-type]
    barrier = threading.Barrier(NUM_READERS)

    def read_one(number: int) -> None:
        barrier.wait(60)
        read(shared if number % 2 else CacheReader(cache, io=io))  # type: ignore[arg-type]

    with ThreadPoolExecutor(NUM_READERS) as pool:
        assert list(pool.map(read_one, range(NUM_READERS))) == [None] * NUM_READERS


def test_the_report_is_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", LENGTHS * 3)
    for path in [
        *cache.glob("shards/*/*/c/**/0"),
        *cache.glob("target/*.json"),
        *cache.glob("samples/*[13579].parquet"),
    ]:
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    seen: dict[int, list[tuple[int, int]]] = {}
    threads = set()
    reports = []
    for num_workers in (1, 2, 8):
        steps = seen[num_workers] = []

        def progress(done: int, total: int, steps: list[tuple[int, int]] = steps) -> None:
            threads.add(threading.get_ident())
            steps.append((done, total))

        reports.append(verify_cache(cache, num_workers=num_workers, progress=progress))
    assert len(reports[0].problems) > 30
    assert all(report.problems == reports[0].problems for report in reports)
    assert all(report.num_checked_bytes == reports[0].num_checked_bytes for report in reports)
    assert [problem.shard for problem in reports[0].problems][1:] == sorted(
        problem.shard for problem in reports[0].problems if problem.shard is not None
    )
    num_shards = reports[0].num_shards
    assert all(steps == [(done, num_shards) for done in range(1, num_shards + 1)] for steps in seen.values())
    assert threads == {threading.get_ident()}


def test_an_interrupted_verification_ends_at_once(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", LENGTHS * 3)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_cache(cache, num_workers=2, progress=interrupt)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
