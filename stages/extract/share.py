"""Which shards one of several extractions of the same cache computes, and in which order. No rank waits for another."""

import re
from dataclasses import dataclass
from typing import Self

from stages.errors import SettingError
from stages.torchrun import read_ranks


@dataclass(frozen=True, kw_only=True)
class Share:
    """Rank `rank` of `world`. Where the ranks share a folder, each goes on with the others' shards after its own."""

    rank: int = 0
    world: int = 1
    is_folder_shared: bool = True

    @classmethod
    def of_torchrun(cls) -> Self:
        """What torchrun says in the environment; the only rank where it does not. Raises SettingError."""
        rank, world = read_ranks()
        return cls(rank=rank, world=world)

    @classmethod
    def parse_part(cls, part: str) -> Self:
        """`2/4`: the second of four machines that have a folder of their own each. Raises SettingError."""
        if cls.of_torchrun().world > 1:
            raise SettingError(
                "--part: is for machines that share no folder, without torchrun; its ranks share the work"
            )
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", part)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise SettingError(f"--part: expected I/N with 1 <= I <= N, for example 2/4, got {part!r}")
        return cls(rank=int(match[1]) - 1, world=int(match[2]), is_folder_shared=False)

    @property
    def plans(self) -> bool:
        """Whether this rank writes the plan where there is none; the others wait for it."""
        return self.rank == 0 or not self.is_folder_shared

    def plan_turns(self, missing: list[int]) -> list[int]:
        """The missing shards that this rank goes through: its own, rank, rank + world, ... first.

        Then those of the ranks after it, in case one of them has died: whoever holds a shard is left alone.
        """
        turns = sorted(missing, key=lambda shard: ((shard - self.rank) % self.world, shard))
        return turns if self.is_folder_shared else [shard for shard in turns if shard % self.world == self.rank]


ALONE = Share()
