"""JSON records that notice any changed byte: one canonical form, a version, and a crc32c over themselves.

The manifest and the commit records are written and read through this file only.
"""

import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.errors import CacheCorruptError, CacheFormatError
from storage.files import crc32c_hex

FORMAT_VERSION: Final = 2  # of new caches
READABLE_VERSIONS = (1, 2)

Crc32c = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Immutable, strictly typed, closed: an unknown or a missing field is an error, never a default."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class SealedRecord(Record):
    """A record that is a file of its own, in the form of its ``format_version``."""

    format_version: Literal[1, 2]
    crc32c: Crc32c

    @classmethod
    def seal(cls, **fields: object) -> Self:
        """Make the record of these fields, its version among them, and give it its crc32c."""
        draft = cls.model_validate({**fields, "crc32c": "0" * 8})
        return draft.model_copy(update={"crc32c": _own_crc32c(draft.to_fields())})

    def to_fields(self) -> dict[str, Any]:
        """The JSON object that the file holds."""
        return self.model_dump(mode="json")

    @classmethod
    def parse_form(cls, data: bytes, *, format_version: int) -> Self:
        """The record of a file in the form of that version. Raises ValidationError."""
        return cls.model_validate_json(data)

    def render(self) -> bytes:
        """The one byte sequence that stands for this record: sorted keys, indent 1, ASCII, a newline at the end."""
        return (json.dumps(self.to_fields(), sort_keys=True, indent=1) + "\n").encode("ascii")

    @classmethod
    def parse(cls, data: bytes, *, where: str) -> Self:
        """Read a record back; ``where`` is the file, for messages. The version is looked at before anything else."""
        fields = _parse_object(data, where)
        version = _check_version(fields, where)
        if fields.get("crc32c") != _own_crc32c(fields):
            raise CacheCorruptError(f"{where}: its bytes do not match its own crc32c; the file was damaged or edited")
        try:
            record = cls.parse_form(data, format_version=version)
        except ValidationError as error:
            raise CacheFormatError(f"{where}: {describe(error)}") from error
        if record.render() != data:
            raise CacheCorruptError(f"{where}: is not in canonical form; the file was damaged or edited")
        return record


def canonical_json(value: object) -> bytes:
    """Compact JSON with sorted keys, ASCII only: what digests and checksums are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def describe(error: ValidationError) -> str:
    """The first three complaints, each with the field it is about."""
    lines = [f"{'.'.join(map(str, item['loc'])) or 'record'}: {item['msg']}" for item in error.errors()[:3]]
    return "; ".join(lines)


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CacheCorruptError(f"{where}: is not JSON; the file was damaged or edited") from error
    if not isinstance(fields, dict):
        raise CacheFormatError(f"{where}: expected a JSON object, got {type(fields).__name__}")
    return fields


def _check_version(fields: dict[str, Any], where: str) -> int:
    version = fields.get("format_version")
    if type(version) is int and version in READABLE_VERSIONS:
        return version
    readable = " and ".join(map(str, READABLE_VERSIONS))
    found = "has no format_version" if version is None else f"has format_version {version!r:.40}"
    raise CacheFormatError(
        f"{where}: {found}; this code reads versions {readable}; use the release that wrote the cache"
    )


def _own_crc32c(fields: dict[str, Any]) -> str | None:
    try:
        return crc32c_hex(canonical_json({key: value for key, value in fields.items() if key != "crc32c"}))
    except (ValueError, RecursionError):
        return None
