"""Plans: what lies where, what is refused, and what an identity says when it differs."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from storage import (
    CacheExistsError,
    CacheIdentityError,
    CacheNotFoundError,
    CachePlan,
    CacheUsageError,
    PlannedSample,
    bytes_per_token,
    check_identity,
    plan_batches,
)
from storage.encodings import ENCODINGS
from storage.sharding import plan_shards
from storage_cache import LENGTHS, files_of, make_header, make_identity, make_samples, plan_cache


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_batches_are_contiguous_full_and_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert [row for batch in batches for row in batch] == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
        if batch.stop < len(lengths):
            assert (len(batch) + 1) * max(lengths[row] for row in [*batch, batch.stop]) > budget


def test_shards_fill_in_source_order_and_sort_longest_first() -> None:
    shards = list(plan_shards(make_samples(LENGTHS), make_header()))
    lengths = [[sample.num_tokens for sample in shard] for shard in shards]
    assert lengths == [[9, 7, 4], [12, 3], [20], [6, 5, 2], [11, 8]]
    ids = [sorted(sample.sample_id for sample in shard) for shard in shards]
    assert [sample_id for shard in ids for sample_id in shard] == list(range(100, 100 + len(LENGTHS)))


def test_plan_reads_back_what_was_written(tmp_path: Path) -> None:
    plan = plan_cache(tmp_path / "new" / "cache", LENGTHS)
    assert plan.manifest.plan.num_samples == len(LENGTHS)
    assert plan.manifest.plan.num_tokens == sum(LENGTHS)
    assert plan.manifest.plan.payload_bytes == sum(LENGTHS) * 64
    assert plan.manifest.plan.dropped == {"too few supervised tokens": 2}
    assert plan.manifest.plan.splits["validation"].num_samples == 2
    assert (plan.target_dir / "extra/head.bin").stat().st_size == 256
    expected = {sample.sample_id: sample for sample in make_samples(LENGTHS)}
    for shard in range(plan.num_shards):
        for sample in plan.read_samples(shard):
            source = expected.pop(sample.sample_id)
            assert np.array_equal(sample.input_ids, source.input_ids)
            assert np.array_equal(sample.loss_mask, source.loss_mask)
            assert (sample.source_file, sample.source_row) == (source.source_file, source.source_row)
            assert sample.split == source.split
    assert not expected


def test_bytes_per_token_of_the_reference_shape() -> None:
    sizes = {name: bytes_per_token(num_layers=5, hidden_size=2560, encoding=name) for name in ENCODINGS}
    assert sizes == {
        "bf16": 30720,
        "fp16": 30720,
        "fp32": 61440,
        "bf16-lossless": 30720,  # before compression
        "int8": 15360 + 2 * (5 * 2560 // 64 + 2560 // 256),
        "fp8": 15360 + 12,
    }


def test_planning_again_is_refused_and_leaves_the_cache_alone(tmp_path: Path) -> None:
    plan_cache(tmp_path / "c", LENGTHS)
    before = files_of(tmp_path / "c")
    with pytest.raises(CacheExistsError, match="already a planned cache"):
        plan_cache(tmp_path / "c", [3])
    assert files_of(tmp_path / "c") == before


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "precious.txt").write_text("x")
    with pytest.raises(CacheExistsError, match=r"not of an interrupted plan \(samples\)"):
        plan_cache(tmp_path, [3])
    assert (tmp_path / "samples" / "precious.txt").read_text() == "x"
    with pytest.raises(CacheExistsError, match="is a file"):
        plan_cache(tmp_path / "samples" / "precious.txt", [3])


def test_an_error_of_the_samples_leaves_no_plan_and_can_be_repeated(tmp_path: Path) -> None:
    def failing() -> object:
        yield from make_samples([3, 4])
        raise RuntimeError("bad row 3")

    with pytest.raises(RuntimeError, match="bad row 3"):
        CachePlan.write(tmp_path / "c", failing(), header=make_header())  # type: ignore[arg-type]
    with pytest.raises(CacheNotFoundError, match=r"manifest\.json: not found"):
        CachePlan.read(tmp_path / "c")
    plan_cache(tmp_path / "c", LENGTHS)
    plan_cache(tmp_path / "d", LENGTHS)
    assert files_of(tmp_path / "c") == files_of(tmp_path / "d")


def test_a_second_planner_is_kept_out(tmp_path: Path) -> None:
    def nested() -> object:
        with pytest.raises(CacheExistsError, match="another process is planning"):
            plan_cache(tmp_path / "c", [3])
        yield from make_samples([3])

    CachePlan.write(tmp_path / "c", nested(), header=make_header())  # type: ignore[arg-type]


def test_plan_of_nothing_and_repeated_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheUsageError, match="no sample is left"):
        plan_cache(tmp_path / "a", [])
    with pytest.raises(CacheUsageError, match="sample_id 100 occurs more than once"):
        CachePlan.write(tmp_path / "b", [*make_samples([2, 3]), *make_samples([4])], header=make_header())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.array([1, 97], np.int32)}, r"token ids must lie in \[0, 97\)"),
        ({"input_ids": np.array([1, -1], np.int32)}, r"token ids must lie in"),
        ({"input_ids": np.array([1, 2], np.int64)}, "must be int32"),
        ({"input_ids": np.array([], np.int32), "loss_mask": np.array([], np.uint8)}, "T > 0"),
        ({"loss_mask": np.array([0, 2], np.uint8)}, "of 0 and 1"),
        ({"loss_mask": np.array([0], np.uint8)}, "of the same shape"),
        ({"split": "test"}, "split must be one of"),
        ({"sample_id": -1}, "must not be negative"),
    ],
)
def test_samples_that_cannot_be_kept_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    sample: PlannedSample = dataclasses.replace(next(make_samples([2])), **change)  # type: ignore[arg-type]
    with pytest.raises(CacheUsageError, match=f"chats.jsonl, row 0.*{message}"):
        CachePlan.write(tmp_path / "c", [sample], header=make_header())


def test_longer_than_max_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheUsageError, match="more than max_length = 4"):
        plan_cache(tmp_path / "c", [5], make_header(max_length=4))


def test_a_link_in_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="link or a special file"):
        CachePlan.write(
            tmp_path / "c",
            make_samples([3]),
            header=make_header(),
            write_target=lambda target: os.symlink("/etc/hostname", target / "config.json"),
        )


def test_identity_names_each_field_that_differs() -> None:
    cache, wanted = make_identity(layers=(1, 2)), make_identity(layers=(1, 3), max_length=2048)
    assert cache.digest() == make_identity(layers=(1, 2)).digest() != wanted.digest()
    lines = ["layers: cache has (1, 2), this run has (1, 3)", "max_length: cache has 4096, this run has 2048"]
    assert cache.differences(wanted) == lines
    with pytest.raises(
        CacheIdentityError, match=r"(?s)runs/c: .*layers: cache has \(1, 2\).*max_length.*another cache"
    ):
        check_identity(cache, wanted, where="runs/c")
    check_identity(cache, cache, where="runs/c")


@pytest.mark.parametrize(
    "change", [{"layers": (3, 1)}, {"layers": ()}, {"layers": (-2,)}, {"encoding": "int4"}, {"other": 1}, {"dtype": 5}]
)
def test_identities_are_strict(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        make_identity(**change)


def test_layers_must_exist_in_the_target() -> None:
    with pytest.raises(ValidationError, match="reach past the target's 6 blocks"):
        make_header(layers=(1, 6))


def test_the_plan_keeps_one_shard_of_samples_in_memory(tmp_path: Path) -> None:
    """120 MB of tokens go through a planner that may not grow by more than 60 MB."""
    code = f"""
import sys, resource
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from storage import CachePlan, PlannedSample
from storage_cache import make_header
def samples():
    for row in range(600):
        yield PlannedSample(sample_id=row, source_file="f", source_row=row, split="train",
                            input_ids=np.full(40000, row % 97, np.int32), loss_mask=np.ones(40000, np.uint8))
list(zip(range(3), samples()))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
CachePlan.write({str(tmp_path / "c")!r}, samples(), header=make_header(max_length=40000, shard_bytes=64 * 400000))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 60_000, grown
"""
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
