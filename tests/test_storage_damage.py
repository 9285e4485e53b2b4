"""Every kind of damage: verify names the file, and the reader raises a CacheError or returns the right rows."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import (
    CacheCorruptError,
    CacheError,
    CacheFormatError,
    CacheNotFoundError,
    CachePlan,
    CacheReader,
    verify_cache,
)
from storage.sealed import FORMAT_VERSION
from storage_cache import LENGTHS, check_samples, files_of, fill_cache, make_cache, make_header, plan_cache

EXCLUDED = (103,)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("pristine") / "c", exclude=EXCLUDED)


@pytest.fixture
def cache(tmp_path: Path, pristine: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "c"))


FILES = [
    "manifest.json",
    "index.parquet",
    "samples/00001.parquet",
    "target/config.json",
    "target/extra/head.bin",
    "commits/00001.json",
    "commits/00002.json",
    "shards/00001.zarr/zarr.json",
    "shards/00001.zarr/hidden_states/zarr.json",
    "shards/00001.zarr/hidden_states/c/0/0/0",
    "shards/00001.zarr/last_hidden_states/zarr.json",
    "shards/00001.zarr/last_hidden_states/c/0/0",
]


def read_all(cache: Path, **options: str) -> None:
    """The right rows or a CacheError, nothing else."""
    check_samples(CacheReader(cache, **options), LENGTHS, EXCLUDED)  # type: ignore[arg-type]


def is_read(name: str) -> bool:
    """Whether the reader needs the file: not target/, and not the group's metadata."""
    return not name.startswith("target/") and name != "shards/00001.zarr/zarr.json"


def expect_report(cache: Path, name: str) -> None:
    report = verify_cache(cache)
    assert not report.ok
    assert name in {problem.file for problem in report.problems} or (
        name.startswith("commits/") and report.missing_shards
    )


def read_damaged(cache: Path, name: str) -> None:
    for io in ("mmap", "pread"):
        if is_read(name):
            with pytest.raises(CacheError):
                read_all(cache, io=io)
        else:
            read_all(cache, io=io)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.4, 0.999])
def test_a_flipped_bit_is_found(cache: Path, name: str, place: float) -> None:
    data = bytearray((cache / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (cache / name).write_bytes(data)
    expect_report(cache, name)
    if "/c/0/0" not in name or place == 0:  # padding and footer are none of the reader's business
        read_damaged(cache, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_a_truncated_file_is_found(cache: Path, name: str, keep: float) -> None:
    data = (cache / name).read_bytes()
    (cache / name).write_bytes(data[: int(keep * len(data)) if keep >= 0 else -1])
    expect_report(cache, name)
    read_damaged(cache, name)


@pytest.mark.parametrize("name", FILES)
def test_a_longer_file_is_found(cache: Path, name: str) -> None:
    with (cache / name).open("ab") as file:
        file.write(b"\n")
    expect_report(cache, name)
    read_damaged(cache, name)


@pytest.mark.parametrize("name", [*FILES, "commits/00001.excluded"])
def test_a_deleted_file_is_found(cache: Path, name: str) -> None:
    (cache / name).unlink()
    expect_report(cache, "commits/00001.json" if name.endswith("excluded") else name)
    read_damaged(cache, name)


@pytest.mark.parametrize("name", [*FILES, "shards", "shards/00001.zarr", "commits", "samples"])
def test_a_link_in_place_of_a_file_is_refused(cache: Path, tmp_path: Path, name: str) -> None:
    (cache / name).rename(tmp_path / "elsewhere")
    (cache / name).symlink_to(tmp_path / "elsewhere")
    assert not verify_cache(cache).ok
    if name != "target":
        read_damaged(cache, name)


def test_a_pipe_in_place_of_a_file_does_not_hang(cache: Path) -> None:
    name = "shards/00001.zarr/hidden_states/c/0/0/0"
    (cache / name).unlink()
    os.mkfifo(cache / name)
    expect_report(cache, name)
    read_damaged(cache, name)


def swap(cache: Path, first: str, second: str) -> None:
    (cache / first).rename(cache / "swap")
    (cache / second).rename(cache / first)
    (cache / "swap").rename(cache / second)


@pytest.mark.parametrize(
    "pattern",
    ["shards/0000{}.zarr", "commits/0000{}.json", "samples/0000{}.parquet", "shards/0000{}.zarr/hidden_states/c/0/0/0"],
)
def test_swapped_shards_are_found(tmp_path: Path, pattern: str) -> None:
    """Shards of the same shape, so that only content can tell them apart."""
    cache = make_cache(tmp_path / "c", [20, 20, 20])
    swap(cache, pattern.format(0), pattern.format(1))
    problems = verify_cache(cache).problems
    assert {problem.file[: len(pattern) - 1] for problem in problems} >= {pattern.format(0), pattern.format(1)} or any(
        problem.shard in (0, 1) for problem in problems
    )
    with pytest.raises(CacheError):
        check_samples(CacheReader(cache), [20, 20, 20])


def test_everything_of_two_shards_swapped_is_found(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", [20, 20])
    swap(cache, "shards/00000.zarr", "shards/00001.zarr")
    swap(cache, "commits/00000.json", "commits/00001.json")
    assert not verify_cache(cache).ok
    with pytest.raises(
        CacheFormatError, match=r"is of another shard or plan: shard 1, planned 0; run `dspark verify --repair`"
    ):
        CacheReader(cache)[0]


def test_a_commit_of_an_older_plan_is_found(tmp_path: Path) -> None:
    """The same tokens under another configuration: sizes agree, the plan digest does not."""
    old = make_cache(tmp_path / "old", LENGTHS, make_header(layers=(-1, 1, 2)))
    new = tmp_path / "new"
    plan_cache(new, LENGTHS)
    fill_cache(new)
    for name in ("commits/00003.json", "shards/00003.zarr"):
        target = new / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        shutil.copytree(old / name, target) if (old / name).is_dir() else shutil.copy(old / name, target)
    expect_report(new, "commits/00003.json")
    with pytest.raises(CacheFormatError, match="plan_digest"):
        check_samples(CacheReader(new), LENGTHS)


def test_deleting_the_record_repairs_a_damaged_shard(cache: Path) -> None:
    before = files_of(cache)
    payload = cache / "shards/00001.zarr/hidden_states/c/0/0/0"
    with payload.open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(CacheCorruptError, match=r"inner chunk 0 .*run `dspark verify --repair` on the cache"):
        read_all(cache)
    report = verify_cache(cache)
    (problem,) = report.problems
    assert (problem.shard, problem.array) == (1, "hidden_states")
    assert "inner chunk 0 has crc32c" in str(problem)
    (cache / "commits/00001.json").unlink()
    fill_cache(cache, exclude=EXCLUDED)
    assert files_of(cache) == before


def test_quick_verification_trusts_sizes(cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    with (cache / "shards/00001.zarr/hidden_states/c/0/0/0").open("r+b") as file:
        file.write(b"damage")
    assert verify_cache(cache, quick=True, progress=lambda *state: seen.append(state)).ok
    assert seen == [(done, 5) for done in range(1, 6)]
    read_size = CacheReader(cache, checks="size")
    assert len(read_size) == len(LENGTHS) - 1


def test_verification_counts_every_byte(cache: Path) -> None:
    report = verify_cache(cache)
    assert report.ok
    assert report.num_checked_bytes == sum(map(len, files_of(cache).values()))


@pytest.mark.parametrize(
    ("name", "file", "what"),
    [
        ("notes.txt", "notes.txt", "not part of the cache"),
        ("shards/00001.zarr/hidden_states/c/0/0/1", "shards/00001.zarr/hidden_states/c/0/0/1", "not part"),
        (
            "shards/.tmp-000000000000-1-2-00000000-00001.zarr/x",
            "shards/.tmp-000000000000-1-2-00000000-00001.zarr",
            "temporary of a writer",
        ),
        ("commits/00009.json", "commits/00009.json", "not part of the cache"),
        ("target/new.bin", "target/new.bin", "not part of the cache"),
    ],
)
def test_strangers_are_reported(cache: Path, name: str, file: str | None, what: str) -> None:
    (cache / name).parent.mkdir(exist_ok=True)
    (cache / name).write_text("x")
    (problem,) = verify_cache(cache).problems
    assert problem.file == (file or name)
    assert what in problem.what


def test_a_shard_without_its_record_is_reported_once(cache: Path) -> None:
    (cache / "commits/00002.json").unlink()
    report = verify_cache(cache)
    assert report.missing_shards == (2,)
    assert [problem.file for problem in report.problems] == ["shards/00002.zarr"]


def reseal(cache: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Edit the manifest and give it a right checksum: what a hostile or a careless author would do."""
    from storage.files import crc32c_hex
    from storage.sealed import canonical_json

    path = cache / "manifest.json"
    fields = json.loads(path.read_bytes())
    change(fields)
    fields.pop("crc32c", None)
    fields["crc32c"] = crc32c_hex(canonical_json(fields))
    path.write_text(json.dumps(fields, sort_keys=True, indent=1) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("format_version"), "has no format_version; this code reads versions 1 and 2"),
        (lambda m: m.update(format_version=FORMAT_VERSION + 1), "has format_version 3; this code reads versions 1"),
        (lambda m: m.update(format_version=True), "has format_version True"),
        (lambda m: m.update(surprise=1), "surprise: Extra inputs"),
        (lambda m: m.update(format_version=1), "identity.format_version: Extra inputs"),
        (lambda m: m["header"]["identity"].update(format_version=1), "the identity is of version 1, not 2"),
        (lambda m: m["header"]["identity"].pop("max_samples"), "max_samples: Field required"),
        (lambda m: m.pop("plan_digest"), "plan_digest: Field required"),
        (lambda m: m["header"].update(hidden_size="8"), "header.hidden_size: Input should be a valid integer"),
        (lambda m: m["header"].update(hidden_size=1 << 40), "metadata|bytes|planned"),
        (lambda m: m["files"].update({"../x": m["files"]["index.parquet"]}), "not a plain path"),
        (lambda m: m["files"].update({"/etc/passwd": m["files"]["index.parquet"]}), "is none of|not a plain path"),
        (lambda m: m["files"].update({"target/../../x": m["files"]["index.parquet"]}), "not a plain path"),
        (lambda m: m["files"].update({"samples/1.parquet": m["files"]["index.parquet"]}), "is none of"),
        (lambda m: m["files"].pop("samples/00002.parquet"), "do not name the index and 5 samples files"),
        (lambda m: m["plan"].update(num_shards=1 << 60), "do not name the index"),
        (lambda m: m["plan"].update(num_tokens=1), "token counts"),
        (lambda m: m["header"]["identity"].update(encoding="int4"), "encoding 'int4' is not one"),
        (lambda m: m.update(layer_convention="Layer id k is the input of block k."), "other conventions"),
    ],
)
def test_a_manifest_of_another_form_is_refused(cache: Path, change: Callable[[dict], object], message: str) -> None:
    reseal(cache, change)
    with pytest.raises(CacheError, match=message):
        read_all(cache)
    assert not verify_cache(cache).ok


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":' * 100_000, "\xff", "null", "9" * 5000])
def test_a_manifest_that_is_no_record_is_refused(cache: Path, text: str) -> None:
    (cache / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CacheError, match=r"manifest\.json: "):
        CacheReader(cache)
    assert [problem.file for problem in verify_cache(cache).problems] == ["manifest.json"]


def test_a_path_without_a_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(CacheNotFoundError, match="not a directory"):
            CachePlan.read(path)
        with pytest.raises(CacheNotFoundError, match="not a directory"):
            verify_cache(path)
    with pytest.raises(FileNotFoundError, match="not a planned cache"):
        CacheReader(tmp_path)
