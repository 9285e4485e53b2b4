"""Stage one on 1x, 4x and 16x the tokens, each in a process of its own: time a token and peak memory.

The embedded conversations, repeated; shards of 16 MB, so that even 1x has several.
"""

import gzip
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from common import embedded, scratch_folder

ROWS = 720


def main() -> None:
    if len(sys.argv) > 1:
        extract(Path(sys.argv[1]))
        return
    from pipeline.embedded import CONVERSATIONS_FILE

    rows = gzip.decompress(CONVERSATIONS_FILE.read_bytes()).decode().splitlines(keepends=True)[:ROWS]
    print("growth       tokens   plan us/token   shards us/token   peak memory MB")
    for times in (1, 4, 16):
        with scratch_folder() as folder:
            (Path(folder) / "rows.jsonl").write_text("".join(rows) * times)
            found = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, check=True)
            print(f"  {times:3}x {found.stdout.strip()}", flush=True)


def extract(folder: Path) -> None:
    import logging

    from pipeline.stage_one import settings_of
    from stages.extract import run

    lines: list[logging.LogRecord] = []
    logging.getLogger("stages").setLevel(logging.INFO)
    logging.getLogger("stages").addHandler(handler := logging.Handler())
    handler.emit = lines.append  # type: ignore[method-assign]
    config = embedded(folder, f"data.files=['{folder}/rows.jsonl']", "cache.shard_bytes=16000000")
    started = time.time()
    result = run.extract(settings_of(config))
    shards = [line.created for line in lines if re.match("shard ", line.getMessage())]
    first = result.plan.planned_shard(0).num_tokens  # its end is where the shards' clock starts
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    plan = (config.cache.path / "manifest.json").stat().st_mtime - started
    a_token = (shards[-1] - shards[0]) / (result.num_tokens - first)
    print(f"{result.num_tokens:10,d} {plan / result.num_tokens * 1e6:14.1f} {a_token * 1e6:17.1f} {peak:16,.0f}")


if __name__ == "__main__":
    main()
