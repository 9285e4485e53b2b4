"""Opening a cache of 100,000 samples in 1,000 shards, in a process that has the imports behind it; and one of ten times
the bytes."""

import statistics
from pathlib import Path

from common import make_cache, make_cold, scratch_folder, seconds

from storage import CacheReader

SAMPLES, SHARDS, TOKENS = 100_000, 1_000, 4


def main() -> None:
    with scratch_folder() as folder:
        for hidden in (8, 80):
            path = Path(folder) / str(hidden)
            make_cache(
                path,
                [TOKENS] * SAMPLES,
                hidden_size=hidden,
                num_layers=1,
                encoding="bf16",
                shard_bytes=SAMPLES // SHARDS * TOKENS * hidden * 2 * 2,
            )
            payload = sum(file.stat().st_size for file in (path / "shards").rglob("*") if file.is_file())
            make_cold(path)
            cold = seconds(lambda path=path: CacheReader(path))
            warm = statistics.median(seconds(lambda path=path: CacheReader(path)) for _ in range(5))
            reader = CacheReader(path)
            assert (len(reader), reader.manifest.plan.num_shards) == (SAMPLES, SHARDS)
            print(f"opening {payload / 1e6:7.1f} MB of shards: cold {cold:.3f} s, warm {warm:.3f} s", flush=True)


if __name__ == "__main__":
    main()
