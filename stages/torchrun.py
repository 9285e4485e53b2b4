"""What torchrun says in the environment of the processes that it starts."""

import os

from stages.errors import SettingError


def read_ranks() -> tuple[int, int]:
    """Number of this process, and how many there are: 0 and 1 where torchrun started none. Raises SettingError."""
    rank, world = (os.environ.get(name) or default for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise SettingError(
            f"RANK = {rank!r} and WORLD_SIZE = {world!r} in the environment: expected 0 <= RANK < WORLD_SIZE"
        )
    return int(rank), int(world)


def read_local_rank() -> int | None:
    """Number of this process among those of its machine; None where torchrun did not start it. Raises SettingError."""
    text = os.environ.get("LOCAL_RANK")
    if not text:
        return None
    if not text.isdecimal():
        raise SettingError(f"LOCAL_RANK = {text!r} in the environment: expected a number of at least 0")
    return int(text)
