"""A shard's file that is cut while it is open: an error, never a SIGBUS."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage import CacheCorruptError, CacheReader
from storage_cache import make_cache, make_header

HIDDEN, LAST = "hidden_states/c/0/0/0", "last_hidden_states/c/0/0"

READ_CUT = """
import os, sys
from storage import CacheError, CacheReader
path, name, touched, io = sys.argv[1:]
reader = CacheReader(path, io=io)
first = reader[0]
float(first.hidden_states.float().sum())
if touched == "touched":
    for sample in reader:
        float(sample.hidden_states.float().sum() + sample.last_hidden_states.float().sum())
os.truncate(f"{path}/shards/00000.zarr/{name}", 100)
num_refused = 0
for index in range(len(reader)):
    try:
        sample = reader[index]
        float(sample.hidden_states.float().sum() + sample.last_hidden_states.float().sum())
    except CacheError as error:
        assert "has 100 bytes" in str(error), error
        num_refused += 1
print(num_refused)
"""


@pytest.mark.parametrize("encoding", ["bf16", "bf16-lossless", "int8"])
@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("name", [HIDDEN, LAST])
@pytest.mark.parametrize("touched", ["touched", "untouched"])
def test_a_shard_that_is_cut_under_a_reader(tmp_path: Path, encoding: str, io: str, name: str, touched: str) -> None:
    header = make_header(hidden_size=64, encoding=encoding, shard_bytes=1 << 24)
    cache = make_cache(tmp_path / "c", [300, 300, 300], header)
    command = [sys.executable, "-c", READ_CUT, str(cache), name, touched, io]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)  # -7 were SIGBUS
    assert int(done.stdout) == 3


def test_a_shard_that_grows_under_a_reader_is_refused_too(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    reader = CacheReader(cache, io="mmap")
    reader[0]
    with (cache / "shards/00000.zarr" / HIDDEN).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CacheCorruptError, match="when it was opened"):
        reader[0]


def test_a_checked_chunk_is_a_view_and_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "c")
    reader = CacheReader(cache, io="mmap")
    reader[0]
    calls: list[int] = []
    monkeypatch.setattr(os, "preadv", lambda *arguments: calls.append(1) or 0)
    reader[0]
    assert not calls
