"""Reading a complete cache: a sequence of samples whose states are views of mapped files.

A cache at an fsspec address is read through a staging folder (see staging.py): whole shards are fetched, then mapped as
if they were local. ``plan_reads`` has them fetched ahead of use.

Opening reads the manifest, the index and the names in commits/. A shard's record, tokens and files are opened when its
first sample is asked for, in each process on its own, so a reader survives fork, spawn, pickling and threads; nothing
is ever written, and any number of readers may use one cache.
"""

import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch

from storage import layout
from storage.bounds import MAX_TARGET_TEXT_BYTES
from storage.commit import CommitRecord, PlannedShard, list_commits, read_commit
from storage.errors import CacheCorruptError, CacheFormatError, CacheIncompleteError, CacheUsageError
from storage.manifest import SPLITS, CacheIdentity, Manifest, Split
from storage.mounts import is_network_path
from storage.open_shards import OpenShards
from storage.plan import CachePlan, check_recorded
from storage.remote import is_remote
from storage.staging import StagedCache
from storage.text import redact

Io = Literal["auto", "mmap", "pread"]
Checks = Literal["touch", "size"]

NUM_AHEAD = 4  # shards of a remote cache that are fetched before they are read: a shuffle window of the default size


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One sample of T tokens with the target's states for L layers of size D.

    Tensors of states may be views of a private mapping: writing to them never reaches the file, but is seen by later
    reads of the same rows in this process.
    """

    input_ids: torch.Tensor  # [T] int32
    loss_mask: torch.Tensor  # [T] uint8
    hidden_states: torch.Tensor  # [T, L, D]
    last_hidden_states: torch.Tensor  # [T, D]
    num_tokens: int
    sample_id: int
    split: Split


class CacheReader(Sequence[Sample]):
    """The samples of a complete cache in plan order, without the excluded ones.

    ``layers``: stored layer ids to return, ascending (default: all). ``io``: map files, read them with large requests,
    or choose by file system. ``checks``: "touch" compares each inner chunk's crc32c when this process first needs it,
    "size" trusts file sizes. ``path`` may be an fsspec address; ``staging`` is then the local folder that shards are
    fetched into (default: in the user's cache directory) and ``staging_bytes`` the bound of their total size (default:
    32 GB). ``partial``: give the samples of the committed shards, where others are missing.
    Raises CacheNotFoundError, CacheIncompleteError or another CacheError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layers: Iterable[int] | None = None,
        io: Io = "auto",
        checks: Checks = "touch",
        staging: Path | None = None,
        staging_bytes: int | None = None,
        partial: bool = False,
    ) -> None:
        if io not in ("auto", "mmap", "pread") or checks not in ("touch", "size"):
            raise CacheUsageError(f"io is auto, mmap or pread, got {io!r}; checks is touch or size, got {checks!r}")
        self._staged: StagedCache | None = None
        if is_remote(path):
            self._staged = StagedCache(os.fspath(path), staging=staging, staging_bytes=staging_bytes)
            self._plan = self._staged.plan
        else:
            self._plan = CachePlan.read(Path(path).absolute())  # a pickled reader may open elsewhere
        self._source = (os.fspath(path) if self._staged else self._plan.path, staging, staging_bytes)
        self._layers = _parse_layers(layers, self._plan)
        places = {layer: place for place, layer in enumerate(self.identity.layers)}
        self._selection = _plan_selection([places[layer] for layer in self._layers])
        self._io: Io = io
        self._checks: Checks = checks
        self._partial = partial
        listed = self._staged.list_commits() if self._staged else list_commits(self._plan.path)
        commits, markers = _check_commits(self._plan, listed, where=self.place, partial=partial)
        markers = commits & markers
        read_record = self._staged.read_commit if self._staged else _read_excluding
        self._rows = _kept_rows(self._plan, commits, markers, read_record)
        mapped = io == "mmap" or (io == "auto" and not is_network_path(self._plan.path))
        self._opened = OpenShards(self._plan, self._staged, markers=markers, mapped=mapped, check=checks == "touch")

    def with_layers(self, layers: Iterable[int] | None) -> Self:
        """A reader of other layers of the same cache, with shards of its own; manifest and index are not read again."""
        other = object.__new__(type(self))  # not a copy, which goes by __reduce__ and opens the cache anew
        other.__dict__.update(self.__dict__)
        other._layers = _parse_layers(layers, self._plan)
        other._selection = _plan_selection([self.identity.layers.index(layer) for layer in other._layers])
        other._opened = self._opened.renewed()
        return other

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Sample:  # type: ignore[override]
        row, shard, tokens = self._locate(index)
        opened = self._opened.open(shard)
        columns = self._plan.index
        try:
            hidden_TLD, last_TD = (states.read(tokens.start, tokens.stop) for states in (opened.hidden, opened.last))
        except (CacheCorruptError, CacheFormatError):
            if self._staged is None:
                raise
            opened = self._opened.heal(shard, self._staged)
            hidden_TLD, last_TD = (states.read(tokens.start, tokens.stop) for states in (opened.hidden, opened.last))
        sample = Sample(
            input_ids=torch.from_numpy(opened.tokens.input_ids[tokens].copy()),
            loss_mask=torch.from_numpy(opened.tokens.loss_mask[tokens].copy()),
            hidden_states=self._select(hidden_TLD),
            last_hidden_states=last_TD,
            num_tokens=tokens.stop - tokens.start,
            sample_id=int(columns.sample_ids[row]),
            split=SPLITS[columns.split_codes[row]],
        )
        self._opened.count_read(row, shard)
        return sample

    def read_tokens(self, index: SupportsIndex) -> tuple[torch.Tensor, torch.Tensor]:
        """``input_ids`` [T] int32 and ``loss_mask`` [T] uint8 of a sample, without touching its states."""
        _, shard, rows = self._locate(index)
        tokens = self._opened.open_tokens(shard)
        return torch.from_numpy(tokens.input_ids[rows].copy()), torch.from_numpy(tokens.loss_mask[rows].copy())

    def plan_reads(self, indices: npt.NDArray[np.int64], *, num_ahead: int = NUM_AHEAD) -> None:
        """Say which samples will be read next, in this order, and each once: a remote cache fetches ahead of them.

        A thread of this process has up to ``num_ahead`` shards staged before their first sample is asked for, and no
        shard is given up before its last one was. Its errors are raised where the next shard is opened. A later call
        replaces the plan; for a local cache there is nothing to do.
        """
        self._opened.plan_reads(self._rows[indices], num_ahead=num_ahead)

    def _locate(self, index: SupportsIndex) -> tuple[int, int, slice]:
        """Row of the index, the shard, and the sample's token rows in it."""
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"sample {position} of a cache with {len(self)} samples")
        columns = self._plan.index
        row = int(self._rows[position])
        start = int(columns.token_offsets[row])
        return row, int(columns.shards[row]), slice(start, start + int(columns.num_tokens[row]))

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        path, *staging = self._source
        return type(self), (path, self._layers, self._io, self._checks, *staging, self._partial)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything open in this process; the reader opens again when it is used again."""
        self._opened.close()

    @property
    def path(self) -> Path:
        """The cache directory; of a remote cache, its place in the staging folder."""
        return self._plan.path

    @property
    def place(self) -> Path | str:
        """The cache directory or the address that the reader was opened with, without a login."""
        return redact(place) if isinstance(place := self._source[0], str) else place

    @property
    def is_remote(self) -> bool:
        """Whether the cache lies at an address and is staged."""
        return self._staged is not None

    @property
    def manifest(self) -> Manifest:
        """The manifest, with totals of the plan (excluded samples included)."""
        return self._plan.manifest

    @property
    def identity(self) -> CacheIdentity:
        """What the cache is keyed on."""
        return self.manifest.identity

    @property
    def target_dir(self) -> Path:
        """The target's config, tokenizer and head."""
        return self._plan.target_dir

    def check_target(self, *needed: str) -> Path:
        """``target_dir``, once every file in it has matched the manifest; the ``needed`` ones must be among them."""
        files = [name for name in self.manifest.files if name.startswith(f"{layout.TARGET}/")]
        missing = sorted({f"{layout.TARGET}/{name}" for name in needed} - set(files))
        if missing:
            raise CacheFormatError(
                f"{self.path / layout.MANIFEST}: names no {', '.join(missing)}; extract the cache again with its target"
            )
        for name in files:
            if not name.endswith(".safetensors") and self.manifest.files[name].num_bytes > MAX_TARGET_TEXT_BYTES:
                raise CacheFormatError(
                    f"{self.path / name}: is larger than {MAX_TARGET_TEXT_BYTES} bytes; it is not read"
                )
            self._check_file(name)
        return self.target_dir

    def _check_file(self, name: str) -> None:
        if self._staged is not None:
            self._staged.fetch_file(name)
        try:
            check_recorded(self.path, name, self.manifest)
        except CacheCorruptError:
            if self._staged is None:
                raise
            self._staged.fetch_file(name, again=True)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer ids along axis 1 of ``hidden_states``."""
        return self._layers

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.manifest.header.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the states that are read."""
        return self.manifest.header.encoding.torch_dtype

    @property
    def sample_ids(self) -> npt.NDArray[np.int64]:
        """Sample id of each sample [len(self)]; the columns below are aligned with it."""
        return self._plan.index.sample_ids[self._rows]

    @property
    def num_tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of each sample."""
        return self._plan.index.num_tokens[self._rows]

    @property
    def num_supervised(self) -> npt.NDArray[np.int32]:
        """Supervised tokens of each sample."""
        return self._plan.index.num_supervised[self._rows]

    @property
    def shards(self) -> npt.NDArray[np.int32]:
        """The shard that each sample lies in."""
        return self._plan.index.shards[self._rows]

    @property
    def splits(self) -> npt.NDArray[np.str_]:
        """The split of each sample, "train" or "validation"."""
        return np.array(SPLITS)[self._plan.index.split_codes[self._rows]]

    def split_indices(self, split: Split) -> npt.NDArray[np.int64]:
        """Indices into this sequence of the samples of one split, ascending."""
        if split not in SPLITS:
            raise CacheUsageError(f"split is one of {SPLITS}, got {split!r}")
        return np.flatnonzero(self._plan.index.split_codes[self._rows] == SPLITS.index(split))

    def _select(self, hidden_TLD: torch.Tensor) -> torch.Tensor:
        """Keep the wanted layers: a view where their places are evenly spaced, else a copy."""
        if isinstance(self._selection, slice):
            return hidden_TLD[:, self._selection]
        return hidden_TLD.index_select(1, self._selection)


def _parse_layers(layers: Iterable[int] | None, plan: CachePlan) -> tuple[int, ...]:
    stored = plan.header.identity.layers
    if layers is None:
        return stored
    wanted = tuple(operator.index(layer) for layer in layers)
    if not wanted or list(wanted) != sorted(set(wanted)) or not set(wanted) <= set(stored):
        raise CacheUsageError(f"{plan.path}: layers must be ascending and among the stored {stored}, got {wanted}")
    return wanted


def _plan_selection(places: Sequence[int]) -> slice | torch.Tensor:
    step = places[1] - places[0] if len(places) > 1 else 1
    if list(places) == list(range(places[0], places[-1] + 1, step)):
        return slice(places[0], places[-1] + 1, step)
    return torch.tensor(places)


def _check_commits(
    plan: CachePlan, listed: tuple[set[int], set[int]], *, where: str | Path, partial: bool
) -> tuple[set[int], set[int]]:
    """Shards that are committed, and that have a marker; an error for a shard that is not planned, or is missing."""
    commits, markers = listed
    missing = sorted(set(range(plan.num_shards)) - commits)
    if missing and not partial:
        raise CacheIncompleteError(
            f"{where}: {len(missing)} of {plan.num_shards} shards are missing (first: {missing[0]}); run the same "
            "extract (or import, or pull) command again to finish it"
            + (", then push it again" if is_remote(where) else "")
        )
    foreign = sorted((commits | markers) - set(range(plan.num_shards)))
    if foreign:
        raise CacheCorruptError(f"{where}: has records of shards that are not planned: {foreign[:5]}; delete them")
    return commits, markers


def _read_excluding(planned: PlannedShard) -> CommitRecord:
    return read_commit(planned, has_marker=True)


def _kept_rows(
    plan: CachePlan, commits: set[int], markers: set[int], read_record: Callable[[PlannedShard], CommitRecord]
) -> npt.NDArray[np.int64]:
    """Rows of the index whose samples are in a committed shard and not excluded."""
    committed = np.zeros(plan.num_shards, dtype=np.bool_)
    committed[sorted(commits)] = True
    kept = committed[plan.index.shards]
    for shard in sorted(markers):
        record = read_record(plan.planned_shard(shard))
        rows = plan.index.shard_rows(shard)
        kept[rows.start : rows.stop] &= ~np.isin(plan.index.sample_ids[rows.start : rows.stop], excluded_ids(record))
    return np.flatnonzero(kept)


def excluded_ids(record: CommitRecord) -> npt.NDArray[np.int64]:
    """Sample ids that a record excludes."""
    return np.array([sample.sample_id for sample in record.excluded], dtype=np.int64)
