"""A shard's file that is cut while it is open: an error, never a SIGBUS."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import to_toml
from stages.train.metrics import read_metrics
from storage import CacheCorruptError, CacheReader
from storage_cache import make_cache, make_header
from tiny_target import make_config

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


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_shard_that_is_cut_under_a_training(cached: Path, tmp_path: Path, io: str) -> None:
    cache, run_dir = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(cached / "cache", cache)
    steps = {"train__max_steps": 1_000_000, "train__epochs": 1_000_000, "train__checkpoint_every": 1_000_000}
    config = make_config(cached, cache__path=cache, cache__io=io, train__run_dir=run_dir, **steps)
    (tmp_path / "config.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "pipeline.cli", "train", str(tmp_path / "config.toml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    training = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 180
        while not any(row["step"] >= 10 for row in read_metrics(run_dir)):  # two epochs: every chunk was touched
            assert training.poll() is None, training.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for shard in cache.glob("shards/*.zarr"):
            os.truncate(shard / HIDDEN, 100)
        output, _ = training.communicate(timeout=180)
    finally:
        training.kill()
        training.wait()
    assert training.returncode == 1, (training.returncode, output)  # -7 were SIGBUS
    assert re.search(r"Error: .*hidden_states/c/0/0/0: has 100 bytes.*dspark verify --repair", output, re.DOTALL), (
        output
    )
    assert "Traceback" not in output
