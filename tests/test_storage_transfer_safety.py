"""Nothing sound is given up: pulls, staged copies, repairs, and writers among links."""

import contextlib
import errno
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.report.page import write_page
from stages.errors import SettingError
from storage import (
    CacheCorruptError,
    CacheError,
    CachePlan,
    CacheReader,
    CacheReadError,
    CacheWriter,
    pull_cache,
    push_cache,
    repair_cache,
    verify_cache,
)
from storage.errors import CacheUsageError, CacheWriteError
from storage.plan import check_recorded
from storage_cache import LENGTHS, check_samples, files_of, fill_cache, make_cache, make_header, plan_cache

HIDDEN = "shards/00001.zarr/hidden_states/c/0/0/0"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "c")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("name", ["00001.json", "0"])
def test_a_shard_that_cannot_be_read_for_a_moment_is_left_alone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    url, copy = f"file://{cache}", tmp_path / "copy"
    pull_cache(url, copy)
    before, real = files_of(copy), os.open

    def fail(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if str(path) == name and "dir_fd" in options and flags & os.O_NOFOLLOW and not flags & os.O_DIRECTORY:
            raise OSError(number, os.strerror(number), name)
        return real(path, flags, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fail)
        with pytest.raises(CacheReadError, match="may be sound and is left as it is"):
            pull_cache(url, copy)
    assert files_of(copy) == before
    assert pull_cache(url, copy).num_present == 5


def test_a_damaged_shard_stays_until_the_new_copy_is_there(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, copy = f"file://{cache}", tmp_path / "copy"
    pull_cache(url, copy)
    os.truncate(copy / HIDDEN, 100)
    before = files_of(copy)
    moved = cache.rename(tmp_path / "away")
    (tmp_path / "c").mkdir()
    for name in ("manifest.json", "commits", "index.parquet"):
        (tmp_path / "c" / name).symlink_to(moved / name)
    with pytest.raises(CacheCorruptError):  # the store has the record and no data
        pull_cache(url, copy)
    assert files_of(copy) == before
    (tmp_path / "c" / "shards").symlink_to(moved / "shards")
    assert pull_cache(url, copy).num_copied == 1
    assert files_of(copy) == files_of(moved)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "name",
    [HIDDEN, "commits/00001.json", "samples/00001.parquet", "index.parquet", "manifest.json", "target/config.json"],
)
def test_a_staged_copy_heals(cache: Path, tmp_path: Path, name: str) -> None:
    staged = tmp_path / "s"
    reader = CacheReader(f"file://{cache}", staging=staged)
    check_samples(reader, LENGTHS)
    reader.check_target()
    reader.close()
    damage(reader.path / name)
    again = CacheReader(f"file://{cache}", staging=staged)
    check_samples(again, LENGTHS)
    again.check_target()
    assert files_of(again.path) == files_of(cache)


def test_a_copy_that_is_damaged_while_it_is_open_heals(cache: Path, tmp_path: Path) -> None:
    with CacheReader(f"file://{cache}", staging=tmp_path / "s", io="pread") as reader:
        [first] = np.flatnonzero(reader.shards == 1)[:1]
        reader._opened.open(1)
        damage(reader.path / HIDDEN)
        assert reader[first].sample_id == reader.sample_ids[first]
        check_samples(reader, LENGTHS)


def test_a_store_that_is_damaged_itself_is_an_error(cache: Path, tmp_path: Path) -> None:
    damage(cache / HIDDEN)
    with pytest.raises(CacheCorruptError, match="the store's copy is damaged"):
        list(CacheReader(f"file://{cache}", staging=tmp_path / "s"))


TRAIN = """
import sys
from collections.abc import Callable
from pathlib import Path
import numpy as np
from storage import CacheReader
url, folder, bound, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
reader = CacheReader(url, staging=folder, staging_bytes=bound)
for epoch in range(3):
    order = np.random.default_rng([seed, epoch]).permutation(len(reader))
    reader.plan_reads(order)
    for index in order:
        assert reader[index].sample_id == reader.sample_ids[index]
print("ended")
"""


def test_three_readers_share_room_for_two_shards(cache: Path, tmp_path: Path) -> None:
    sizes = [
        sum(file.stat().st_size for file in shard.rglob("*") if file.is_file())
        for shard in (cache / "shards").iterdir()
    ]
    bound = int(2.2 * (max(sizes) + 2_000))
    command = [sys.executable, "-c", TRAIN, f"file://{cache}", str(tmp_path / "s"), str(bound)]
    readers = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    for reader in readers:
        output, errors = reader.communicate(timeout=110)
        assert (reader.returncode, output) == (0, "ended\n"), errors


@pytest.mark.parametrize("name", ["shards", "commits", "samples", "target"])
def test_writers_follow_no_links(cache: Path, tmp_path: Path, name: str) -> None:
    plan_cache(tmp_path / "half", LENGTHS)
    fill_cache(tmp_path / "half", [0])
    elsewhere = (tmp_path / "half" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "half" / name).symlink_to(elsewhere)
    before = files_of(elsewhere)
    for write in (
        lambda: CacheWriter(tmp_path / "half"),
        lambda: pull_cache(f"file://{cache}", tmp_path / "half"),
        lambda: repair_cache(tmp_path / "half", verify_cache(cache)),
    ):
        with pytest.raises(CacheCorruptError, match=r"is a link|behind, a link"):
            write()
    assert files_of(elsewhere) == before


def test_a_shard_that_is_a_link_is_computed_again(cache: Path, tmp_path: Path) -> None:
    before = files_of(cache)
    elsewhere = (cache / "shards/00002.zarr").rename(tmp_path / "elsewhere")
    (cache / "shards/00002.zarr").symlink_to(elsewhere)
    kept = files_of(elsewhere)
    fill_cache(cache)
    assert files_of(elsewhere) == kept
    assert files_of(cache) == before
    assert not (cache / "shards/00002.zarr").is_symlink()


def test_a_report_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "curves.png").write_bytes(b"mine")
    (tmp_path / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingError, match="is a link"):
        write_page(None, tmp_path)  # type: ignore[arg-type] - refused before the runs are looked at
    assert (tmp_path / "elsewhere" / "curves.png").read_bytes() == b"mine"


def test_verify_reports_what_it_cannot_look_into(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "shards" / "secret").mkdir()
    (cache / "shards" / "secret" / "file").write_text("x")
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    report = verify_cache(cache)
    assert not report.ok
    assert [str(problem) for problem in report.problems] == ["shards/secret: cannot be looked into: Permission denied"]


def test_repair_says_removed_of_what_is_gone_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "commits/00002.json").unlink()
    report = verify_cache(cache)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", refuse)
        patched.setattr(os, "unlink", refuse)
        with pytest.raises(CacheWriteError, match="Read-only file system"):
            repair_cache(cache, report)
    assert repair_cache(cache, report).removed == ("shards/00002.zarr",)


def test_a_web_server_that_lists_nothing(cache: Path, tmp_path: Path) -> None:
    class Unlisted(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(cache))

        def list_directory(self, path: Any) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unlisted) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        check_samples(CacheReader(url, staging=tmp_path / "s"), LENGTHS)
        assert pull_cache(url, tmp_path / "pulled").num_copied == 5
        server.shutdown()


@pytest.mark.parametrize("name", [HIDDEN, "commits/00001.json"])
def test_the_remedy_that_is_told_mends_a_pulled_copy_and_an_extracted_cache(
    cache: Path, tmp_path: Path, name: str
) -> None:
    remedy = r"run `dspark verify --repair` on the cache, then .* made the cache here \(extract, import or pull\) again"
    copy = tmp_path / "copy"
    pull_cache(f"file://{cache}", copy)
    before = files_of(cache)
    makers: dict[Path, Callable[[], object]] = {
        copy: lambda: pull_cache(f"file://{cache}", copy), cache: lambda: fill_cache(cache),
    }  # fmt: skip
    for damaged, make_again in makers.items():
        damage(damaged / name)
        with pytest.raises(CacheCorruptError, match=remedy):
            list(CacheReader(damaged))
        assert repair_cache(damaged, verify_cache(damaged)).dropped_shards == (1,)
        make_again()
        assert files_of(damaged) == before


def test_a_damaged_index_of_inner_chunks_is_told_before_its_remedy(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", header=make_header(encoding="bf16-lossless"))
    payload = cache / HIDDEN
    payload.write_bytes(payload.read_bytes()[:-1] + bytes([payload.read_bytes()[-1] ^ 1]))
    with pytest.raises(CacheCorruptError, match=rf"{HIDDEN}: the index of inner chunks is damaged; run `dspark verify"):
        list(CacheReader(cache))


@pytest.mark.parametrize("name", ["samples/00001.parquet", "index.parquet", "target/config.json"])
def test_of_a_damaged_plan_a_copy_is_asked_for(cache: Path, name: str) -> None:
    damage(cache / name)

    def read() -> None:
        reader = CacheReader(cache)
        reader.check_target()
        list(reader)

    with pytest.raises(CacheCorruptError, match=rf"{name}: .*put it back from a copy of the cache, or make the cache"):
        read()


class Endless(http.server.SimpleHTTPRequestHandler):
    """Says what size each file has, and sends one of them without end, or one byte more than asked."""

    folder: Path
    name: str
    num_sent = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, directory=str(self.folder))

    def do_GET(self) -> None:
        if not self.path.endswith(self.name):
            super().do_GET()
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while type(self).num_sent < 1 << 28:
                self.wfile.write(bytes(1 << 16))
                type(self).num_sent += 1 << 16

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize("name", ["manifest.json", "commits/00001.json", "index.parquet", HIDDEN])
def test_a_web_server_that_never_ends_is_cut_short(cache: Path, tmp_path: Path, name: str) -> None:
    handler = type("Handler", (Endless,), {"folder": cache, "name": name})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(CacheError, match=rf"{name}: (has|gave) more than \d+ bytes"):
            pull_cache(url, tmp_path / "pulled")
        server.shutdown()
    assert handler.num_sent < 1 << 27, "far from all that it would send"


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["manifest.json", "commits/00001.json", "index.parquet", HIDDEN])
def test_a_local_address_has_regular_files_only(cache: Path, tmp_path: Path, name: str, kind: str) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(cache, whole)
    (cache / name).unlink()
    os.mkfifo(cache / name) if kind == "pipe" else (cache / name).symlink_to("/dev/zero")
    with pytest.raises(CacheCorruptError, match=f"{name}: is not a regular file"):
        pull_cache(f"file://{cache}", tmp_path / "pulled")
    refusal = pytest.raises(CacheCorruptError, match=f"{name}: is not a regular file")
    with refusal if name in ("manifest.json", HIDDEN) else contextlib.nullcontext():  # a record is removed first
        push_cache(whole, f"file://{cache}")


def test_what_has_grown_is_not_read(cache: Path, tmp_path: Path) -> None:
    for name in ("target/config.json", "samples/00001.parquet"):
        num_bytes = (cache / name).stat().st_size
        os.truncate(cache / name, 15 << 40)  # to read it would take hours
        with pytest.raises(CacheCorruptError, match=rf"{name}: has {15 << 40} bytes, expected {num_bytes}; the file"):
            push_cache(cache, f"file://{tmp_path / 'there'}")
        with pytest.raises(CacheCorruptError, match=rf"{name}: has {15 << 40} bytes, expected {num_bytes}; the file"):
            check_recorded(cache, name, CachePlan.read(cache).manifest)
        os.truncate(cache / name, num_bytes)


def read_staged(cache: Path, folder: Path, *, bound: int | None = None) -> None:
    with CacheReader(f"file://{cache}", staging=folder, staging_bytes=bound) as reader:
        check_samples(reader, LENGTHS)


@pytest.mark.parametrize("suffix", ["", ".shards"])
@pytest.mark.parametrize("kind", ["pipe", "link", "file"])
def test_what_lies_in_the_way_of_the_staging_is_said(cache: Path, tmp_path: Path, suffix: str, kind: str) -> None:
    read_staged(cache, tmp_path / "s")
    key = next(path.name for path in (tmp_path / "s").iterdir() if path.is_dir() and not path.suffix)
    place = tmp_path / "s" / f"{key}{suffix}"
    shutil.rmtree(place)
    {"pipe": os.mkfifo, "link": lambda path: path.symlink_to("/nonexistent/x"), "file": Path.touch}[kind](place)
    with pytest.raises(CacheUsageError, match=rf"{place}: cannot be a folder .* set cache\.staging to another folder"):
        read_staged(cache, tmp_path / "s")


@pytest.mark.parametrize("is_evicted", [False, True])
def test_a_folder_in_place_of_a_staged_record_is_replaced(cache: Path, tmp_path: Path, is_evicted: bool) -> None:
    read_staged(cache, tmp_path / "s")
    record = next((tmp_path / "s").glob("*/commits/00000.json"))
    record.unlink()
    record.mkdir()
    (record / "x").touch()
    read_staged(cache, tmp_path / "s", bound=30_000 if is_evicted else None)
    read_staged(cache, tmp_path / "s")
    assert record.is_file()


@pytest.mark.parametrize("kind", ["pipe", "empty", "negative"])
def test_a_charge_that_is_no_number_is_said(cache: Path, tmp_path: Path, kind: str) -> None:
    read_staged(cache, tmp_path / "s")
    charge = next((tmp_path / "s").glob("*.shards/00000.bytes"))
    charge.unlink()
    {"pipe": os.mkfifo, "empty": Path.touch, "negative": lambda path: path.write_text("-5")}[kind](charge)
    next((tmp_path / "s").glob("*/commits/00001.json")).unlink()  # is fetched again, which counts space
    with pytest.raises(CacheCorruptError, match=r"00000\.bytes: is (no number of bytes|not a regular file)"):
        read_staged(cache, tmp_path / "s")
