"""The feed of a training: the batches of a plain gather, bit for bit, from a thread that stays within its bounds."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from pipeline.stage_one import settings_of
from pipeline.stage_two import train_draft
from stages.extract.run import extract
from stages.train import feed as feed_module
from stages.train.anchors import choose_anchors
from stages.train.batches import StagingBuffer
from stages.train.feed import NUM_BUFFERS, BatchFeed, FedBatch, PlannedStep
from stages.train.loop import Stepper, plan_steps
from stages.train.metrics import read_metrics
from stages.train.order import plan_micro_batches, plan_schedule
from stages.train.settings import TrainSection
from storage import CacheCorruptError, CacheReader, push_cache
from storage.encodings import ENCODINGS
from storage_cache import LENGTHS, make_cache, make_header
from tiny_target import make_config

CPU = torch.device("cpu")
BUDGET = 15  # one sample, of 20 tokens, is longer
STATES = ("target_hidden_states", "target_last_hidden_states")


def settings(**changes: Any) -> TrainSection:
    return TrainSection(**{"global_batch_size": 3, "max_batch_tokens": BUDGET, "epochs": 3, "seed": 7} | changes)


def make_feed(reader: CacheReader, train: TrainSection, **changes: Any) -> BatchFeed:
    return BatchFeed(**{"reader": reader, "train": train, "num_anchors": 2, "device": CPU} | changes)


def steps_of(reader: CacheReader, train: TrainSection) -> Iterator[PlannedStep]:
    schedule = plan_schedule(train, num_samples=len(reader.split_indices("train")))
    return plan_steps(reader, train, schedule=schedule, start=0)


def plain_batches(reader: CacheReader, train: TrainSection, step: PlannedStep) -> list[dict[str, torch.Tensor]]:
    """All micro-batches of a step, each put together from the reader's samples."""
    lengths = reader.num_tokens[step.indices].tolist()
    batches = []
    for share in plan_micro_batches(lengths, max_batch_tokens=train.max_batch_tokens):
        samples = [reader[index] for index in step.indices[share.start : share.stop]]
        starts = [0, *itertools.accumulate(sample.num_tokens for sample in samples)]
        anchors = [
            start + choose_anchors(sample.loss_mask, 2, seed=train.seed, epoch=step.epoch, sample_id=sample.sample_id)
            for start, sample in zip(starts, samples, strict=False)
        ]
        batches.append(
            {
                "input_ids": torch.cat([sample.input_ids for sample in samples])[None].long(),
                "target_hidden_states": torch.cat([sample.hidden_states.flatten(1) for sample in samples])[None],
                "loss_mask": torch.cat([sample.loss_mask for sample in samples])[None],
                "target_last_hidden_states": torch.cat([sample.last_hidden_states for sample in samples])[None],
                "seq_lens": torch.tensor([[sample.num_tokens for sample in samples]]),
                "anchor_positions": torch.cat(anchors)[None],
            }
        )
    return batches


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].cpu(), tensor), name


def assert_fed(feed: BatchFeed, expected: list[list[dict[str, torch.Tensor]]]) -> None:
    """The feed gives what every `feed.world`-th of these batches is, and one without a sample where they run out."""
    fed = feed.run(steps_of(feed.reader, feed.train))
    for number, (batches, (step, own)) in enumerate(zip(expected, fed, strict=True)):
        assert step.step == number
        mine = batches[feed.rank :: feed.world]
        num_batches = -(-len(batches) // feed.world)
        count = 0
        for count, batch in enumerate(own, start=1):
            assert (batch.number, batch.num_batches) == (count, num_batches)
            assert batch.is_last == (count == num_batches)
            if count <= len(mine):
                assert_same(batch.arguments, mine[count - 1])
            else:
                assert batch.planned.indices == ()
                assert not any(batch.arguments[name].any() for name in (*STATES, "loss_mask"))
        assert count == num_batches


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batch-feed"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert feed_threads() == []


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("layers", [None, (-1, 2), (-1, 1, 4)], ids=["all", "strided", "picked"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_batches_are_those_of_a_plain_gather(tmp_path: Path, encoding: str, layers: tuple[int, ...] | None) -> None:
    """Over three epochs of three steps each, the last of them short; by one rank and by two."""
    make_cache(tmp_path, header=make_header(encoding=encoding, layers=(-1, 1, 2, 4)))
    reader, train = CacheReader(tmp_path, layers=layers), settings()
    expected = [plain_batches(reader, train, step) for step in steps_of(reader, train)]
    assert [len(batches) > 1 for batches in expected].count(True) > 3
    assert sum(len(batches) for batches in expected) > 3 * NUM_BUFFERS
    assert_fed(make_feed(reader, train), expected)
    for rank in range(2):
        assert_fed(make_feed(reader, train, rank=rank, world=2), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_on_a_gpu_are_those_of_a_plain_gather(cache: Path) -> None:
    reader, train = CacheReader(cache), settings(epochs=50)
    expected = [plain_batches(reader, train, step) for step in steps_of(reader, train)]
    assert_fed(make_feed(reader, train, device=torch.device("cuda")), expected)


def test_the_plan_of_a_step_is_what_is_fed(cache: Path) -> None:
    reader, train = CacheReader(cache), settings()
    feed = make_feed(reader, train)
    for step, batches in feed.run(steps_of(reader, train)):
        planned = feed.plan(step)
        fed = [batch.planned for batch in batches]
        assert [batch.sample_ids for batch in fed] == [batch.sample_ids for batch in planned]
        assert sum((batch.indices for batch in fed), ()) == tuple(step.indices.tolist())
        assert all(torch.equal(a.anchor_positions, b.anchor_positions) for a, b in zip(fed, planned, strict=True))


def test_buffers_are_reused_and_bounded(cache: Path) -> None:
    """Sixty steps in three buffers of the budget, which the one longer sample makes as long as itself."""
    reader, train = CacheReader(cache), settings(epochs=20)
    assert max(LENGTHS) > BUDGET
    storages: dict[str, dict[int, int]] = {name: {} for name in STATES}
    num_batches = 0
    for _, batches in make_feed(reader, train).run(steps_of(reader, train)):
        for batch in batches:
            num_batches += 1
            for name in STATES:
                storage = batch.arguments[name].untyped_storage()
                storages[name][storage.data_ptr()] = storage.nbytes()
    assert num_batches > 60
    for name, row_values in zip(STATES, (3 * 8, 8), strict=True):
        assert set(storages[name].values()) <= {tokens * row_values * 2 for tokens in (BUDGET, max(LENGTHS))}
        assert len(storages[name]) <= 2 * NUM_BUFFERS, "each is allocated once, and once more to grow"


def test_a_budget_without_bound_takes_the_memory_of_the_longest_step(cache: Path) -> None:
    reader, train = CacheReader(cache), settings(global_batch_size=2, max_batch_tokens=10**15)
    longest = np.sort(reader.num_tokens[reader.split_indices("train")])[-2:]
    assert make_feed(reader, train).buffer_tokens == longest.sum()
    for _, batches in make_feed(reader, train).run(steps_of(reader, train)):
        for batch in batches:
            assert batch.arguments[STATES[0]].untyped_storage().nbytes() == longest.sum() * 3 * 8 * 2


def test_the_thread_is_ahead_by_its_buffers_and_no_more(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first batch is in use the others are filled, also with those of the next step and the next epoch."""
    reader, train = CacheReader(cache), settings(global_batch_size=8, max_batch_tokens=1000)
    gathered = []
    original = StagingBuffer.gather

    def gather(self: StagingBuffer, batch: Any) -> Any:
        arguments = original(self, batch)
        gathered.append(batch)
        return arguments

    monkeypatch.setattr(StagingBuffer, "gather", gather)
    fed = make_feed(reader, train).run(steps_of(reader, train))
    _, batches = next(fed)
    first = next(batches)
    assert first.is_last, "one batch a step"
    wait_for(lambda: len(gathered) == NUM_BUFFERS)
    time.sleep(0.05)
    assert len(gathered) == NUM_BUFFERS
    assert_same(first.arguments, plain_batches(reader, train, next(steps_of(reader, train)))[0])
    next(fed)
    wait_for(lambda: len(gathered) == NUM_BUFFERS + 1)
    fed.close()


def test_batches_that_were_not_asked_for_are_passed_over(cache: Path) -> None:
    reader, train = CacheReader(cache), settings()
    steps = [step.step for step, _ in make_feed(reader, train).run(steps_of(reader, train))]
    assert steps == list(range(9))


def test_damage_is_raised_at_its_step(tmp_path: Path) -> None:
    """Every step before is whole, and so are the batches before in the step itself."""
    make_cache(tmp_path)
    reader, train = CacheReader(tmp_path), settings(max_batch_tokens=1)
    steps = list(steps_of(reader, train))
    reads = [(step.step, number, int(reader.shards[i])) for step in steps for number, i in enumerate(step.indices, 1)]
    last_shard = list(dict.fromkeys(shard for *_, shard in reads))[-1]
    before = list(itertools.takewhile(lambda read: read[2] != last_shard, reads))
    assert before[-1][0] > 0, "there is a step before"
    payload = tmp_path / "shards" / f"{last_shard:05d}.zarr" / "hidden_states/c/0/0/0"
    data = bytearray(payload.read_bytes())
    data[5] ^= 1
    payload.write_bytes(data)
    seen: list[tuple[int, int]] = []

    def consume() -> None:
        for step, batches in make_feed(reader, train).run(iter(steps)):
            for batch in batches:
                seen.append((step.step, batch.number))
                time.sleep(0.01)  # the thread meets the damage long before

    with pytest.raises(CacheCorruptError, match=rf"{last_shard:05d}\.zarr.*inner chunk 0"):
        consume()
    assert seen == [(step, number) for step, number, _ in before]


def test_an_error_of_the_plan_comes_behind_the_steps_before(cache: Path) -> None:
    reader, train = CacheReader(cache), settings()

    def failing() -> Iterator[PlannedStep]:
        yield from itertools.islice(steps_of(reader, train), 2)
        raise ZeroDivisionError("of the plan")

    fed = make_feed(reader, train).run(failing())
    for number in range(2):
        step, batches = next(fed)
        assert step.step == number
        assert list(batches)[-1].is_last
    with pytest.raises(ZeroDivisionError, match="of the plan"):
        next(fed)


@pytest.mark.parametrize("when", ["at once", "in a step", "between steps"])
def test_leaving_early_ends_the_thread(cache: Path, when: str) -> None:
    reader, train = CacheReader(cache), settings(epochs=50)
    fed = make_feed(reader, train).run(steps_of(reader, train))
    if when != "at once":
        _, batches = next(fed)
        next(batches)
        assert len(feed_threads()) == 1
        if when == "between steps":
            next(fed)
    fed.close()
    assert feed_threads() == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_a_step_ends_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    config = make_config(tmp_path)
    extract(settings_of(config))

    def step(self: Stepper, batches: Iterator[FedBatch], **_: Any) -> None:
        next(batches)
        raise kind("in the step")

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(kind, match="in the step") as raised:
        train_draft(config)
    assert feed_threads() == [], "even while the error, and with it every frame, is alive"
    del raised


def test_a_read_that_hangs_does_not_hold_up_the_end(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader, train = CacheReader(cache), settings(max_batch_tokens=1)
    num_reads, hangs, goes_on = itertools.count(), threading.Event(), threading.Event()
    original = CacheReader.__getitem__

    def read(self: CacheReader, index: Any) -> Any:
        if next(num_reads) > 0:
            hangs.set()
            goes_on.wait()
        return original(self, index)

    monkeypatch.setattr(CacheReader, "__getitem__", read)
    monkeypatch.setattr(feed_module, "JOIN_SECONDS", 0.05)
    fed = make_feed(reader, train).run(steps_of(reader, train))
    next(fed)
    assert hangs.wait(10)
    fed.close()
    assert "a read of the cache is still going on" in caplog.text
    (thread,) = feed_threads()
    assert thread.daemon, "the process can end"
    goes_on.set()
    thread.join(10)


def test_only_its_own_thread_computes_alone(cache: Path) -> None:
    """The number of threads that torch gives a new thread is one for the process; the feed must leave it as it was."""
    reader, train = CacheReader(cache), settings(epochs=50)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        fed = make_feed(reader, train).run(steps_of(reader, train))
        next(fed)
        found: list[int] = []
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert (torch.get_num_threads(), found) == (3, [3])
        fed.close()
    finally:
        torch.set_num_threads(before)


def test_waiting_is_what_the_step_stood_still(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, train = CacheReader(cache), settings()
    original = StagingBuffer.gather

    def gather(self: StagingBuffer, batch: Any) -> Any:
        time.sleep(0.05)
        return original(self, batch)

    monkeypatch.setattr(StagingBuffer, "gather", gather)

    def waited(step_seconds: float) -> list[float]:
        found = []
        for _, batches in make_feed(reader, train).run(steps_of(reader, train)):
            for batch in batches:
                found.append(batch.waited_seconds)
                time.sleep(step_seconds)
        return found

    assert np.median(waited(0.0)) > 0.03
    assert np.median(waited(0.1)) < 0.01


def test_the_share_of_waiting_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path)
    extract(settings_of(config))
    original = StagingBuffer.gather

    def gather(self: StagingBuffer, batch: Any) -> Any:
        time.sleep(0.3)
        return original(self, batch)

    monkeypatch.setattr(StagingBuffer, "gather", gather)
    caplog.set_level("INFO")
    train_draft(config)
    rows = [row for row in read_metrics(config.train.run_dir) if row["kind"] == "train"]
    for row in rows:
        assert row["wait_share"] == row["waited_seconds"] / row["seconds"]
        assert 0 <= row["wait_share"] <= 1
    assert max(row["wait_share"] for row in rows) > 0.3
    assert f"wait {rows[-1]['wait_share']:4.0%}  ETA" in caplog.text


def test_a_cache_in_a_store_feeds_the_same(tmp_path: Path) -> None:
    """In a folder with room for three of five shards, while validation reads others from the main thread."""
    make_cache(tmp_path / "local")
    url = f"memory://feed-{tmp_path.name}"
    push_cache(tmp_path / "local", url)
    local = CacheReader(tmp_path / "local")
    shards = (tmp_path / "local" / "shards").iterdir()
    sizes = [sum(file.stat().st_size for file in shard.rglob("*") if file.is_file()) for shard in shards]
    assert len(sizes) == 5
    train = settings(shuffle_window=2, epochs=6)
    expected = [plain_batches(local, train, step) for step in steps_of(local, train)]
    held_out = local.split_indices("validation")
    with CacheReader(url, staging=tmp_path / "staging", staging_bytes=int(3.5 * max(sizes))) as remote:
        feed = make_feed(remote, train)
        for wanted, (_, batches) in zip(expected, feed.run(steps_of(remote, train)), strict=True):
            for batch, arguments in zip(batches, wanted, strict=True):
                assert_same(batch.arguments, arguments)
            for index in held_out:
                assert torch.equal(remote[index].hidden_states, local[index].hidden_states)
    fsspec.filesystem("memory").rm(url.removeprefix("memory:/"), recursive=True)


def wait_for(condition: Any, *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)
