"""What a cache is made of and from: the identity, the header and the manifest.

Written once by ``CachePlan.write``, as the last file of the plan; read by everything else; never rewritten.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from storage import layout
from storage.bounds import MAX_LAYERS, MAX_RECORD_BYTES, MAX_TOKEN_BYTES, find_excess
from storage.encodings import Encoding, parse_encoding
from storage.errors import CacheFormatError, CacheIdentityError, CacheNotFoundError
from storage.files import read_inside
from storage.sealed import Count, Crc32c, Record, SealedRecord, Sha256, canonical_json

SHA256_DIGITS = 64

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

LAYER_CONVENTION = (
    "Layer id k is the output of decoder block k, counted from 0, before any final norm; -1 is the embedding output."
)
LAST_STATE_CONVENTION = (
    "last_hidden_states is taken after the final norm: exactly what the target's lm_head multiplies."
)


def _parse_layers(layers: tuple[int, ...]) -> tuple[int, ...]:
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"expected {MAX_LAYERS} layers at most, got {len(layers)}")
    if not layers or layers[0] < -1 or list(layers) != sorted(set(layers)):
        raise ValueError(f"expected ascending layer ids from -1 on, each once, got {layers}")
    return layers


class _IdentityFields(Record):
    """What the identities of all versions hold."""

    target_config_digest: str
    target_weights_digest: str
    tokenizer_digest: str
    chat_template_digest: str
    data_digest: str
    layers: Annotated[tuple[int, ...], AfterValidator(_parse_layers)]
    encoding: str
    dtype: str
    attn_implementation: str
    max_length: Annotated[int, Field(ge=1)]
    overlong: Literal["truncate", "drop"]
    supervise: Literal["all", "last"]
    min_supervised_tokens: Count
    validation_fraction: Annotated[float, Field(ge=0, le=1)]
    max_batch_tokens: Annotated[int, Field(ge=1)]
    shard_bytes: Annotated[int, Field(ge=1)]


class CacheIdentity(_IdentityFields):
    """Everything that changes the bytes of a cache, and nothing else.

    ``format_version`` is that of the cache: it says what the encoding's name means. ``max_samples``: the first rows of
    the data that are taken, None for all. ``validation_digest``: of what names the validation split's rows, None where
    ``validation_fraction`` alone decides.
    """

    format_version: Literal[1, 2]
    max_samples: Annotated[int, Field(ge=1)] | None
    validation_digest: str | None

    @model_validator(mode="after")
    def _check_encoding(self) -> Self:
        parse_encoding(self.encoding, format_version=self.format_version)
        return self

    @property
    def imported_from(self) -> str | None:
        """The format of the cache that this one was imported from; None if the states were extracted."""
        name, colon, _ = self.data_digest.partition(":")
        return name if colon else None

    def digest(self) -> str:
        """Hexadecimal sha256 over the format version and every field that this version has."""
        left_out = _FIELDS_OF_2 if self.format_version == 1 else set()
        return hashlib.sha256(canonical_json(self.model_dump(mode="json", exclude=left_out))).hexdigest()

    def differences(self, other: "CacheIdentity") -> list[str]:
        """One line for each field in which this cache's identity is not the one that a run wants.

        The format version is none of them: a cache of an older one is used as it is.
        """
        return [
            f"{name}: cache has {_shorten(getattr(self, name))}, this run has {_shorten(getattr(other, name))}"
            for name in type(self).model_fields
            if name != "format_version" and getattr(self, name) != getattr(other, name)
        ]


_FIELDS_OF_2 = {"max_samples", "validation_digest"}


def _shorten(value: object) -> str:
    """A digest's first digits; anything else whole."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == SHA256_DIGITS else repr(value)


def check_identity(cache_identity: CacheIdentity, wanted: CacheIdentity, *, where: str | Path) -> None:
    """Refuse a cache that was made from other inputs, naming each field that differs."""
    differences = cache_identity.differences(wanted)
    if differences:
        lines = "".join(f"\n  {line}" for line in differences)
        advice = "Set these back, or name another cache directory and extract again."
        if cache_identity.imported_from and not wanted.imported_from:
            advice = (
                f"It was imported from {cache_identity.imported_from}, so it cannot be extracted: import continues it, "
                "train reads it; name another cache directory to extract."
            )
        raise CacheIdentityError(f"{where}: the cache was made from other inputs:{lines}\n{advice}")


class _HeaderFields(Record):
    """What the headers of all versions hold."""

    hidden_size: Annotated[int, Field(ge=1)]
    num_target_layers: Annotated[int, Field(ge=1)]
    vocab_size: Annotated[int, Field(ge=1)]
    logit_scale: float | None
    logit_softcap: float | None
    provenance: dict[str, str]


class CacheHeader(_HeaderFields):
    """What the extractor knows about a cache before the first sample: the input of a plan.

    ``mask_token_id`` is None where the target's tokenizer has no token for it: extraction needs none.
    """

    identity: CacheIdentity
    mask_token_id: Count | None

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.identity.layers[-1] >= self.num_target_layers:
            raise ValueError(f"layers {self.identity.layers} reach past the target's {self.num_target_layers} blocks")
        if self.token_bytes > MAX_TOKEN_BYTES:
            raise ValueError(f"a token takes {self.token_bytes} bytes, expected {MAX_TOKEN_BYTES} at most")
        return self

    @property
    def encoding(self) -> Encoding:
        """How the states are stored."""
        return parse_encoding(self.identity.encoding, format_version=self.identity.format_version)

    @property
    def token_bytes(self) -> int:
        """Payload bytes of one token."""
        return self.encoding.bytes_per_token(num_layers=len(self.identity.layers), hidden_size=self.hidden_size)


class FileRecord(Record):
    """What a file of the plan must be."""

    num_bytes: Count
    crc32c: Crc32c


class SplitCounts(Record):
    """Totals of one split."""

    num_samples: Count
    num_tokens: Count
    num_supervised: Count


class PlanSummary(Record):
    """Totals of the plan; ``payload_bytes`` counts states only, without padding and metadata."""

    num_samples: Count
    num_tokens: Count
    num_supervised: Count
    num_shards: Annotated[int, Field(ge=1)]
    payload_bytes: Count
    splits: dict[Split, SplitCounts]
    dropped: dict[str, Count]


class _ManifestFields(SealedRecord):
    """What the manifests of all versions hold."""

    format: Literal["dspark-cache"]
    layer_convention: str
    last_state_convention: str
    plan: PlanSummary
    plan_digest: Sha256
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        names = {layout.parse_plan_file(name) for name in self.files}
        samples = {layout.samples_name(shard) for shard in range(min(self.plan.num_shards, len(names)))}
        others = {name for name in names if not name.startswith(f"{layout.TARGET}/")}
        if others != samples | {layout.INDEX} or len(samples) != self.plan.num_shards:
            raise ValueError(f"files do not name the index and {self.plan.num_shards} samples files")
        return self


class Manifest(_ManifestFields):
    """``manifest.json``. One of version 1 is written as it was; in memory it says what version 1 meant."""

    header: CacheHeader

    @model_validator(mode="after")
    def _check_version(self) -> Self:
        if self.identity.format_version != self.format_version:
            raise ValueError(f"the identity is of version {self.identity.format_version}, not {self.format_version}")
        return self

    @property
    def identity(self) -> CacheIdentity:
        """What the cache is keyed on."""
        return self.header.identity

    def to_fields(self) -> dict[str, Any]:
        """The JSON object that the file holds."""
        fields = super().to_fields()
        if self.format_version == 1:
            for name in ("format_version", *_FIELDS_OF_2):
                del fields["header"]["identity"][name]
        return fields

    @classmethod
    def parse_form(cls, data: bytes, *, format_version: int) -> Self:
        """The manifest of a file of that version."""
        if format_version != 1:
            return cls.model_validate_json(data)
        fields = _ManifestV1.model_validate_json(data).model_dump()
        # Version 1 took all rows, and split them by `validation_fraction` alone.
        fields["header"]["identity"] |= {"format_version": 1, "max_samples": None, "validation_digest": None}
        return cls.model_validate(fields)


class _HeaderV1(_HeaderFields):
    identity: _IdentityFields
    mask_token_id: Count


class _ManifestV1(_ManifestFields):
    header: _HeaderV1


def digest_plan(identity: CacheIdentity, token_digests: list[str]) -> str:
    """sha256 over the identity and each shard's token digest, in order: equal exactly if the payload must be equal."""
    lines = ["dspark-cache plan", identity.digest(), *token_digests]
    return hashlib.sha256("\n".join(lines).encode("ascii")).hexdigest()


def seal_manifest(
    header: CacheHeader, plan: PlanSummary, *, plan_digest: str, files: Mapping[str, FileRecord]
) -> Manifest:
    """The manifest of a finished plan."""
    return Manifest.seal(
        format_version=header.identity.format_version,
        format="dspark-cache",
        layer_convention=LAYER_CONVENTION,
        last_state_convention=LAST_STATE_CONVENTION,
        header=header,
        plan=plan,
        plan_digest=plan_digest,
        files=dict(files),
    )


def read_manifest(root: Path) -> Manifest:
    """Read and check ``manifest.json``; the error says whether there is no cache, or none that is readable."""
    where = root / layout.MANIFEST
    if not root.is_dir():
        raise CacheNotFoundError(f"{root}: is not a directory, so no cache is here; run extract, or check the path")
    try:
        data = read_inside(root, layout.MANIFEST, max_bytes=MAX_RECORD_BYTES)
    except FileNotFoundError as error:
        raise CacheNotFoundError(
            f"{where}: not found, so this is not a planned cache; run extract, or check the path"
        ) from error
    return parse_manifest(data, where=str(where))


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """A manifest that states the conventions which this code keeps; ``where`` is the file, for messages."""
    manifest = Manifest.parse(data, where=where)
    conventions = (manifest.layer_convention, manifest.last_state_convention)
    if conventions != (LAYER_CONVENTION, LAST_STATE_CONVENTION):
        raise CacheFormatError(f"{where}: states other conventions than this code keeps: {conventions}")
    if excess := find_excess(manifest):
        raise CacheFormatError(f"{where}: {'; '.join(excess)}; no plan has that, so this cache is damaged or hostile")
    return manifest
