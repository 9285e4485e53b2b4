"""`regeneration.json`: what the conversations beside it were made by. Regeneration writes it, extraction reads it.

It is no part of a cache's identity, which covers the bytes of the conversations; it says where those came from.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from typing import Any, Literal

import fsspec
from pydantic import Field, ValidationError

from stages.bounded_files import MAX_RECORD_BYTES
from stages.errors import StageError
from storage.sealed import Record, canonical_json

MANIFEST = "regeneration.json"

logger = logging.getLogger(__name__)


class RegenerationError(StageError, ValueError):
    """Regenerated conversations cannot be made, continued or believed."""


class RegenerationIdentity(Record):
    """Everything that decides what is asked and how answers are sampled; a folder holds answers of one identity.

    None where a field says nothing: `served_model` and `extra_body` are an endpoint's, the last four a local target's.
    """

    backend: Literal["endpoint", "local"]
    prompts_digest: str
    num_prompts: int
    turns: Literal["all", "last"]
    temperature: float
    top_p: float
    max_tokens: int | None
    max_length: int
    truncated: Literal["drop", "keep"]
    seed: int
    chat_template_kwargs: dict[str, Any]
    target_config_digest: str
    tokenizer_digest: str
    chat_template_digest: str
    served_model: str | None = None
    extra_body: dict[str, Any] | None = None
    target_weights_digest: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    batch_size: int | None = None

    def digest(self) -> str:
        """Hexadecimal sha256 over every field."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    def differences(self, other: "RegenerationIdentity") -> list[str]:
        """One line for each field in which the folder's identity is not the one that a run wants."""
        return [
            f"{name}: the folder has {getattr(self, name)!r}, this run has {getattr(other, name)!r}"
            for name in type(self).model_fields
            if getattr(self, name) != getattr(other, name)
        ]


class RegenerationCounts(Record):
    """What became of the prompts; `dropped` and `failed` by reason.

    `num_truncated`: kept answers that did not end; `num_cut`: conversations that end before their last turn, since that
    could not be answered; `num_prompt_mismatches`: answers whose prompt was another at the endpoint than here.
    `num_unfinished`: answers that did not end within their tokens, kept or not; `num_text`: conversations with an
    answer that is known as text alone, all others are token ids as they were sampled; `num_id_rows`: rows of token ids.
    These are None in files of earlier versions, whose rows are all text.
    """

    num_answered: int
    num_turns: int
    num_tokens: int
    num_truncated: int
    num_cut: int
    num_prompt_mismatches: int
    num_unfinished: int | None = None
    num_text: int | None = None
    num_id_rows: int | None = None
    dropped: dict[str, int]
    failed: dict[str, int]


class RegenerationManifest(Record):
    """The whole file. `counts` and `files` (name -> bytes) are filled in when every prompt has been asked."""

    format: Literal["dspark-regeneration"] = "dspark-regeneration"
    format_version: Literal[1] = 1
    identity: RegenerationIdentity
    provenance: dict[str, str]
    counts: RegenerationCounts | None = None
    files: dict[str, int] = Field(default_factory=dict)

    @property
    def has_ids(self) -> bool:
        """Whether some row is token ids."""
        return self.counts is not None and bool(self.counts.num_id_rows)

    @property
    def is_all_ids(self) -> bool:
        """Whether every row is, so that its own mask says what is supervised."""
        return self.counts is not None and self.counts.num_text == 0

    def render(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


def parse_manifest(data: bytes, *, where: str) -> RegenerationManifest:
    """Raises RegenerationError for anything that is no manifest of this version."""
    try:
        return RegenerationManifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise RegenerationError(
            f"{where}: {key}: {first['msg']}; expected a regeneration manifest of version 1; put the file back, or "
            "regenerate into a new folder"
        ) from error


def find_manifests(files: Iterable[str]) -> dict[str, RegenerationManifest]:
    """File -> manifest, for those files that lie beside one and are named by it.

    Raises RegenerationError for a file that has another size than its manifest says.
    """
    found: dict[str, RegenerationManifest] = {}
    beside: dict[str, RegenerationManifest | None] = {}
    for file in files:
        system, path = fsspec.url_to_fs(file)
        folder, _, name = path.rpartition("/")
        place = f"{folder}/{MANIFEST}" if folder else MANIFEST
        address = system.unstrip_protocol(place)
        if address not in beside:
            beside[address] = _read_beside(system, place)
        manifest = beside[address]
        if manifest is None or name not in manifest.files:
            continue
        size = system.size(path)
        if size is not None and size != manifest.files[name]:
            raise RegenerationError(
                f"{file}: has {size:,} bytes, but {MANIFEST} beside it says {manifest.files[name]:,}; put the file "
                "back, or move it away from that manifest if it was changed on purpose"
            )
        found[file] = manifest
    return found


def _read_beside(system: Any, path: str) -> RegenerationManifest | None:
    try:
        size = system.size(path)
        data = b"" if size is not None and size > MAX_RECORD_BYTES else system.cat_file(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # each store has families of its own, and some call "denied" what is not there
        logger.warning("%s cannot be read, so it is not known whether the target wrote these answers: %s", path, error)
        return None
    if size is not None and size > MAX_RECORD_BYTES:
        raise RegenerationError(
            f"{path}: has {size:,} bytes, expected {MAX_RECORD_BYTES:,} at most; put the file back, or move it away"
        )
    return parse_manifest(data, where=path)
