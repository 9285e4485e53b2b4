"""Caches that other projects made: DeepSpec's target cache, version 2, and speculators' folder of hidden states.

Each is given as rows of token ids, as a data file is, and as states that are read a row at a time. Nothing in the files
is trusted: names, sizes, offsets, shapes and dtypes are checked before they are used, and nothing is unpickled.

Shape suffixes: T tokens, L layers, D hidden; S = L + 1 slots, the last of them the final state.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from stages.errors import SettingError, StageError
from stages.extract.rows import BadRowError, Row, digest_files
from stages.section import parse_layer_ids

MAX_SHOWN_CHARACTERS = 80  # of a foreign file's value in a message


class PeerCacheError(StageError, ValueError):
    """The source is damaged, of another version, or not what its format says."""


@dataclass(frozen=True, kw_only=True)
class PeerStates:
    """A row's states as the source has them: floating-point tensors [T, L, D] and [T, D], and its ids [T]."""

    input_ids: np.ndarray
    hidden_states: torch.Tensor
    last_hidden_states: torch.Tensor


class PeerCache(Protocol):
    """What an import needs of a source. `layers` are in our numbering, `layer_offset` leads back to the source's."""

    name: ClassVar[str]
    layer_offset: ClassVar[int]
    last_is_normed: ClassVar[bool]
    """Whether the last state was taken after the target's final norm."""
    path: Path
    layers: tuple[int, ...]
    hidden_size: int

    def digest(self) -> str:
        """sha256 of what tells this source from another, read in seconds."""

    def rows(self) -> Iterator[Row]:
        """Every row with `input_ids` and `loss_mask`, or with the reason why it cannot be used."""

    def read_states(self, row: int) -> PeerStates:
        """The states of a row that `rows` gave out without an error. Raises BadRowError."""


class _Record(BaseModel):
    """Part of a foreign JSON file: what is named here is checked strictly, the rest is the source's own affair."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


def _parse_file_name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII) or set(name) == {"."}:
        raise ValueError("expected the plain name of a file in the folder")
    return name


FileName = Annotated[str, AfterValidator(_parse_file_name)]


class _Shard(_Record):
    shard_id: int
    file_name: FileName


class _DeepSpecManifest(_Record):
    version: Literal[2]  # first: a message about another version must not name a field that it lacks
    num_samples: Annotated[int, Field(ge=1)]
    num_shards: int
    target_layer_ids: Annotated[tuple[int, ...], AfterValidator(parse_layer_ids)]
    hidden_dtype: Literal["bfloat16"]
    token_dtype: Literal["int32"]
    mask_dtype: Literal["uint8"]
    index_record_size: Literal[56]
    hidden_size: Annotated[int, Field(ge=1)]
    shards: tuple[_Shard, ...]


class DeepSpecCache:
    """DeepSpec's target cache, version 2: layer ids and last state are as ours.

    Every sample is one run of bytes in a shard: input_ids int32 [T], attention_mask and loss_mask uint8 [T],
    hidden states bfloat16 [T, L*D] and [T, D]. Raises PeerCacheError.
    """

    name: ClassVar[str] = "deepspec"
    layer_offset: ClassVar[int] = 0
    last_is_normed: ClassVar[bool] = True

    _INDEX: ClassVar[np.dtype[Any]] = np.dtype(
        [("sample_id", "<u8"), ("shard_id", "<u4"), ("seq_len", "<u4"), ("offsets", "<u8", 5)]
    )

    def __init__(self, path: Path) -> None:
        manifest_file, self._index_file = path / "manifest.json", path / "samples.idx"
        manifest = _read_record(manifest_file, _DeepSpecManifest)
        index_bytes = _read_file(self._index_file)
        if len(index_bytes) != manifest.num_samples * self._INDEX.itemsize:
            raise PeerCacheError(
                f"{self._index_file}: expected {manifest.num_samples} records of {self._INDEX.itemsize} bytes, as "
                f"{manifest_file.name} says, got {len(index_bytes)} bytes; the file is cut short or of another cache"
            )
        if [shard.shard_id for shard in manifest.shards] != list(range(manifest.num_shards)):
            raise PeerCacheError(f"{manifest_file}: expected shard ids 0 to {manifest.num_shards - 1} in order")
        self.path = path
        self.layers = manifest.target_layer_ids
        self.hidden_size = manifest.hidden_size
        self._records = np.frombuffer(index_bytes, self._INDEX)
        self._shards = [(path / shard.file_name, _file_size(path / shard.file_name)) for shard in manifest.shards]
        # Bytes a token of the five tensors, in their order in the file.
        self._widths = (4, 1, 1, 2 * len(self.layers) * self.hidden_size, 2 * self.hidden_size)

    def digest(self) -> str:
        """sha256 of manifest, index and the shards' sizes."""
        digest = hashlib.sha256(_read_file(self.path / "manifest.json"))
        digest.update(self._records.tobytes())
        digest.update(str([size for _, size in self._shards]).encode())
        return digest.hexdigest()

    def rows(self) -> Iterator[Row]:
        """The samples in the index's order."""
        for row in range(len(self._records)):
            yield _make_row(self._index_file, row, self._read_tokens)

    def read_states(self, row: int) -> PeerStates:
        """See PeerCache."""
        parts = self._read_parts(row, 5)
        states = [torch.from_numpy(part.view("<u2")).view(torch.bfloat16) for part in parts[3:]]
        return PeerStates(
            input_ids=parts[0].view("<i4"),
            hidden_states=states[0].view(-1, len(self.layers), self.hidden_size),
            last_hidden_states=states[1].view(-1, self.hidden_size),
        )

    def _read_tokens(self, row: int) -> dict[str, np.ndarray]:
        ids, attention_mask, loss_mask = self._read_parts(row, 3)
        if not (attention_mask == 1).all():
            raise BadRowError("attention_mask is not all one, so the sample is padded")
        return {"input_ids": ids.view("<i4"), "loss_mask": loss_mask}

    def _read_parts(self, row: int, count: int) -> list[np.ndarray]:
        """Bytes of the first `count` tensors of a sample. Raises BadRowError where the index cannot be right."""
        _, shard, num_tokens, offsets = self._records[row].tolist()
        if shard >= len(self._shards):
            raise BadRowError("its shard is not in the manifest")
        file, size = self._shards[shard]
        edges = list(accumulate((width * num_tokens for width in self._widths), initial=int(offsets[0])))
        if edges[:-1] != list(offsets):
            raise BadRowError("its offsets are not those of tensors back to back")
        if edges[-1] > size:
            raise BadRowError(f"its tensors end past the end of {file.name}, which is cut short or of another index")
        num_bytes = edges[count] - edges[0]
        data = np.fromfile(file, np.uint8, count=num_bytes, offset=edges[0])
        if len(data) < num_bytes:
            raise BadRowError(f"{file.name} ends before it")
        return np.split(data, [edge - edges[0] for edge in edges[1:count]])


class _DataFile(_Record):
    filename: FileName


class _DatasetState(_Record):
    data_files: Annotated[tuple[_DataFile, ...], Field(alias="_data_files")]


class SpeculatorsCache:
    """speculators' folder: `hs_<row>.safetensors` beside the Arrow dataset that has the rows.

    A file has hidden_states [T, S, D], or the same in e4m3 with hidden_states_scales float32 [T, 1, 1], and token_ids
    [T]. Layer i is the input of block i, so ours is one less; the last slot is the state before the final norm.
    `layers` are in the source's numbering, since the files do not name them. Raises PeerCacheError or SettingError.
    """

    name: ClassVar[str] = "speculators"
    layer_offset: ClassVar[int] = 1
    last_is_normed: ClassVar[bool] = False

    def __init__(self, path: Path, *, dataset: Path, layers: tuple[int, ...]) -> None:
        self.path = path
        try:
            self.layers = parse_layer_ids(tuple(layer - self.layer_offset for layer in layers)) or ()
        except ValueError as error:
            raise SettingError(f"--layers: expected ascending, distinct ids from 0 up, got {list(layers)}") from error
        self._dataset = dataset
        state = _read_record(dataset / "state.json", _DatasetState)
        self._data_files = [dataset / file.filename for file in state.data_files]
        self._sizes = dict(sorted(_list_sizes(path, re.compile(r"hs_(0|[1-9]\d{0,17})\.safetensors", re.ASCII))))
        if not self._sizes:
            raise PeerCacheError(f"{path}: has no hs_<row>.safetensors; give the folder of hidden states")
        self.hidden_size = self._read_width(next(iter(self._sizes)))

    def digest(self) -> str:
        """sha256 of the dataset's bytes and of the names and sizes of the files of states."""
        listing = "".join(f"\nhs_{row} {size}" for row, size in self._sizes.items())
        return hashlib.sha256((digest_files(map(str, self._data_files)) + listing).encode()).hexdigest()

    def rows(self) -> Iterator[Row]:
        """The dataset's rows. Raises PeerCacheError at the end if there are states of rows that it does not have."""
        num_rows = 0
        for columns in self._read_columns():
            for value in columns:
                yield _make_row(self._dataset, num_rows, lambda row, value=value: self._check_tokens(row, value))
                num_rows += 1
        if max(self._sizes) >= num_rows:
            raise PeerCacheError(
                f"{self.path}: has hs_{max(self._sizes)}.safetensors, but {self._dataset} has {num_rows} rows; "
                "the states are of another dataset, or a file of the dataset is cut short"
            )

    def read_states(self, row: int) -> PeerStates:
        """See PeerCache."""
        with self._open(row) as tensors:
            states_TSD = tensors.get_tensor("hidden_states")
            if states_TSD.dtype == torch.float8_e4m3fn:
                states_TSD = states_TSD.float() * tensors.get_tensor("hidden_states_scales")
            ids = tensors.get_tensor("token_ids").numpy()
        return PeerStates(input_ids=ids, hidden_states=states_TSD[:, :-1], last_hidden_states=states_TSD[:, -1])

    def _read_columns(self) -> Iterator[Iterator[dict[str, np.ndarray | None]]]:
        """For each batch of the dataset its rows, each with the two columns."""
        names = ["input_ids", "loss_mask"]
        for file in self._data_files:
            try:
                with pa.memory_map(str(file)) as stream, pa.ipc.open_stream(stream) as batches:
                    for batch in batches:
                        chosen = batch.select(names)
                        chosen.validate(full=True)  # offsets of lists, which Arrow trusts otherwise
                        yield (
                            {name: _list_values(scalar) for name, scalar in zip(names, row, strict=True)}
                            for row in zip(*chosen.columns, strict=True)
                        )
            except (pa.ArrowException, OSError, KeyError) as error:
                raise PeerCacheError(
                    f"{file}: not a readable Arrow stream with {' and '.join(names)}: {error}"
                ) from error

    def _check_tokens(self, row: int, value: dict[str, np.ndarray | None]) -> dict[str, np.ndarray | None]:
        with self._open(row) as tensors:
            ids = value["input_ids"]
            if ids is None or not np.array_equal(tensors.get_tensor("token_ids").numpy(), ids):
                raise BadRowError("token_ids of its hs_<row>.safetensors are not the dataset's input_ids")
        return value

    @contextmanager
    def _open(self, row: int) -> Iterator[Any]:
        """The file of a row, its header checked. Raises BadRowError."""
        if row not in self._sizes:
            raise BadRowError("has no hs_<row>.safetensors")
        try:
            with safe_open(self.path / f"hs_{row}.safetensors", framework="pt") as tensors:
                self._check_header(tensors)
                yield tensors
        except (SafetensorError, OSError) as error:
            raise BadRowError(f"its hs_<row>.safetensors cannot be read: {error}") from error

    def _check_header(self, tensors: Any) -> None:
        found = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in found.items()}
        dtypes = {name: tensor.get_dtype() for name, tensor in found.items()}
        num_tokens = (shapes.get("token_ids") or (0,))[0]
        num_slots = len(self.layers) + 1
        rules = {
            "token_ids is not of integers [T]": dtypes.get("token_ids") in ("I64", "I32")
            and shapes["token_ids"] == (num_tokens,),
            f"hidden_states is not [T, {num_slots}, {self.hidden_size}]": shapes.get("hidden_states")
            == (num_tokens, num_slots, self.hidden_size),
            "hidden_states is not of bf16, fp16, fp32 or scaled e4m3": dtypes.get("hidden_states")
            in ("BF16", "F16", "F32")
            or (
                dtypes.get("hidden_states") == "F8_E4M3"
                and dtypes.get("hidden_states_scales") == "F32"
                and shapes["hidden_states_scales"] == (num_tokens, 1, 1)
            ),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise BadRowError(f"hs_<row>.safetensors: {'; '.join(broken)}")

    def _read_width(self, row: int) -> int:
        """D of the first file, whose slots must be those of `--layers`."""
        file, num_slots = self.path / f"hs_{row}.safetensors", len(self.layers) + 1
        try:
            with safe_open(file, framework="pt") as tensors:
                shape = tensors.get_slice("hidden_states").get_shape()
        except (SafetensorError, OSError) as error:
            raise PeerCacheError(f"{file}: cannot be read: {error}; delete it to leave its row out") from error
        if len(shape) != 3 or shape[1] != num_slots:
            raise PeerCacheError(
                f"{file}: hidden_states are {shape}, expected [T, {num_slots}, D]: {num_slots - 1} layers, as --layers "
                "names, and the final state, which --layers does not name"
            )
        return int(shape[2])


def _make_row(file: Path, row: int, read: Any) -> Row:
    try:
        return Row(file=str(file), row=row, value=read(row))
    except BadRowError as error:
        return Row(file=str(file), row=row, value=None, error=str(error))


def _list_values(scalar: Any) -> np.ndarray | None:
    """A list of Arrow as an array; None for a null and for what is no list, which is a bad row."""
    values = getattr(scalar, "values", None)
    return None if values is None else values.to_numpy(zero_copy_only=False)


def _list_sizes(folder: Path, name: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """(row, bytes) of every file whose name matches."""
    for file in folder.iterdir():
        if match := name.fullmatch(file.name):
            yield int(match[1]), _file_size(file)


def _file_size(file: Path) -> int:
    if not file.is_file():
        raise PeerCacheError(f"{file}: no such file; the source is not complete")
    return file.stat().st_size


def _read_file(file: Path) -> bytes:
    _file_size(file)
    return file.read_bytes()


_Parsed = TypeVar("_Parsed", bound=_Record)


def _read_record(file: Path, kind: type[_Parsed]) -> _Parsed:
    try:
        return kind.model_validate_json(_read_file(file))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        message = problem["msg"].removeprefix("Value error, ")
        got = repr(problem["input"])[:MAX_SHOWN_CHARACTERS]
        raise PeerCacheError(f"{file}: {where}: {message}, got {got}") from error
