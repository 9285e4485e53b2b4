"""Config sections of stage one: `[target]`, `[data]`, `[cache]`, `[extract]`."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, field_validator, model_validator

from stages.errors import SettingError
from stages.section import Section, parse_layer_ids


def _parse_files(files: Any) -> Any:
    """One file may be written without the list around it."""
    return (files,) if isinstance(files, str) else tuple(files) if isinstance(files, list) else files


def _parse_place(place: Any) -> Path | str:
    """A path, or an address kept as it is written."""
    if not isinstance(place, str | Path):
        raise ValueError("expected a path or an address")
    return place if "://" in str(place) else Path(place)


class TargetSection(Section):
    """The frozen model whose states are cached."""

    model: str
    """A local folder, a Hugging Face repository id, or `embedded`."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face repository."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype that the target computes in."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """The attention of transformers; part of the cache's identity, since it changes the last bits."""
    device_map: str | None = None
    """Passed to transformers for a target larger than one GPU, for example `auto`."""
    trust_remote_code: bool = False
    """Run Python code that the model repository carries."""


class DataSection(Section):
    """The conversations."""

    files: Annotated[tuple[str, ...], BeforeValidator(_parse_files)] = Field(min_length=1)
    """JSONL (also .gz) or Parquet files: paths, globs, `hf://` or `s3://` addresses, or `embedded`."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens a sample at most. Default: 4096, or the target's positions where it has fewer."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """What happens to a sample longer than `max_length`; both are counted."""
    supervise: Literal["all", "last"] = "all"
    """Which assistant turns the loss mask covers."""
    min_supervised_tokens: int = Field(default=14, ge=2)
    """Samples with fewer supervised tokens are dropped and counted. Two tokens make one anchor."""
    max_samples: int | None = Field(default=None, ge=1)
    """So many samples of `files` and no more: the first that can be used, in the order of files and rows."""
    validation_fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of prompts held out, by a hash of the prompt's tokens: equal prompts are on one side of the split. A row's
    own column `split` (train, validation) goes before it. With `validation_files`: 0."""
    validation_files: Annotated[tuple[str, ...], BeforeValidator(_parse_files)] = ()
    """Files, named as in `files`, that are held out whole. Rows of `files` with a prompt of theirs are dropped."""
    max_bad_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of unreadable rows above which the run stops."""
    num_processes: int | None = Field(default=None, ge=1)
    """Processes that tokenise many rows. Default: one a core. The samples do not depend on it."""
    chat_template: Path | None = None
    """A Jinja file that replaces the tokenizer's own chat template."""

    @model_validator(mode="before")
    @classmethod
    def _hold_out_by_files(cls, tables: Any) -> Any:
        """Files that are named for validation take the place of the default share."""
        is_named = isinstance(tables, dict) and tables.get("validation_files")
        return {"validation_fraction": 0.0} | tables if is_named else tables

    @model_validator(mode="after")
    def _check_held_out(self) -> Self:
        if self.validation_files and self.validation_fraction:
            raise ValueError("validation_fraction must be 0, or not set, where validation_files are named")
        return self


class CacheSection(Section):
    """Where the states lie and which of them."""

    path: Annotated[Path | str, PlainValidator(_parse_place)]
    """The cache's folder, or, where it is only read, an fsspec address such as `s3://bucket/cache`."""
    staging: Path | None = None
    """Local folder that shards of a cache at an address are fetched into. Default: in the user's cache directory."""
    staging_bytes: int | None = Field(default=None, ge=1)
    """Bytes of staged shards at most, of all caches in the folder. Default: 32 GB; two shuffle windows should fit."""
    layers: tuple[int, ...] | None = None
    """Target layers to store, ascending: k is block k's output, -1 the embeddings. Default: five, from 1 to N-3."""
    encoding: Literal["bf16", "fp16", "fp32", "bf16-lossless", "int8", "fp8"] = "bf16"
    """How states are stored: exactly; compressed without loss (0.7 of the bytes); or one byte a value (half)."""
    shard_bytes: int = Field(default=512_000_000, ge=1_000_000)
    """Payload of one shard in bytes, about: the unit of resume, and of memory while extracting."""
    io: Literal["auto", "mmap", "pread"] = "auto"
    """How training reads: mapped on local disks, large reads on network filesystems."""
    checks: Literal["touch", "size"] = "touch"
    """`touch` verifies each chunk's crc32c when it is first read; `size` trusts file sizes."""

    _ascending = field_validator("layers")(parse_layer_ids)

    @property
    def folder(self) -> Path:
        """Where stage one writes. Raises SettingError for an address."""
        if isinstance(self.path, Path):
            return self.path
        raise SettingError(
            f"cache.path = {self.path!r}: extract writes to a local folder; name one, then dspark push it there"
        )


class ExtractSection(Section):
    """How stage one runs."""

    max_batch_tokens: int = Field(default=16384, ge=1)
    """Padded tokens of one forward pass; fixed by the plan, since batch composition changes the last bits."""
    max_quarantined_fraction: float = Field(default=0.001, ge=0.0, le=1.0)
    """Share of samples with non-finite states above which the run stops."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`."""
