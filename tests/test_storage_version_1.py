"""Caches that were written in format version 1 stay what they are: read, verified, finished, compared.

`data/caches_v1.zip` was written by the last release of version 1. It holds a cache of every encoding: `storage_cache`'s
samples of LENGTHS, layers 1 and 3, hidden size 4, sample 101 excluded, two shards.
"""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr

from stages.train.run import describe_inputs
from stages.train.settings import DraftSection, ObjectiveSection, TrainSection
from storage import CacheError, CacheIdentityError, CachePlan, CacheReader, check_identity, verify_cache
from storage.commit import read_commit
from storage.files import crc32c_hex
from storage.sealed import canonical_json
from storage_cache import check_samples, files_of, fill_cache, make_cache, make_header, make_identity

ARCHIVE = Path(__file__).parent / "data" / "caches_v1.zip"
LENGTHS = [259, 30, 9, 7]
EXCLUDED = (101,)

# As the release of version 1 gave them: (digest of the identity, digest of the plan).
DIGESTS = {
    "bf16": (
        "a96612a4503a2fe6c425c376c2dff2cfa8bd955469650132fcfa21f8bd22e17d",
        "36343825a9448f781415eb2ca8799d1e426e97da19e9a7714e9cfd8524987083",
    ),
    "fp16": (
        "7a2865191ac7ddae664187cf8ebb4d424262811b003b72bca0c1cf909da65c38",
        "4184b5048754c2536b30e5697c46a32e31b7eca1aee9fe3d6d62bf0845be2c11",
    ),
    "fp32": (
        "7b61d2a67737d87ea0f626019d733f57217cdf853fdac23839065cbb8e87d006",
        "c5a04367dd07746b368a7439c1400004ac5838ae96be47024b90abe4232da51d",
    ),
    "bf16-lossless": (
        "01de5b1b4af00504b41f1afe7761b9b1f7a6ece54bef1d446bc5952f2e2905f5",
        "07bcc6001415a31180c0b355eda0393affd95fe9fe7219327e27d4061eeed9c7",
    ),
    "int8": (
        "084dd68b831333b2835490d7209ba48f25c0cf708e695d893ee0f4ea22f4aed4",
        "49135cd2a4e770fcb8fea4b3d663a073dc3de6c9ee0a22d93e30502920f6ca7e",
    ),
    "fp8": (
        "df1d20ba6483c020d1a2fa0d0114a18374577999b8a7a934e11950d850f95d8a",
        "d4b24a3f18b8050594c148c55d9f64f6236d05bd561a24f573605a4b35e0abf0",
    ),
}


@pytest.fixture(params=sorted(DIGESTS))
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cache(tmp_path: Path, encoding: str) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith(f"{encoding}/")])
    return tmp_path / encoding


def test_is_read_and_verified(cache: Path, encoding: str) -> None:
    reader = CacheReader(cache)
    check_samples(reader, LENGTHS, exclude=EXCLUDED)
    assert (reader.identity.digest(), reader.manifest.plan_digest) == DIGESTS[encoding]
    assert (reader.identity.max_samples, reader.identity.validation_digest) == (None, None)
    assert reader.manifest.render() == (cache / "manifest.json").read_bytes()
    assert verify_cache(cache).ok


def test_the_digest_is_that_of_the_fields_on_disk(cache: Path, encoding: str) -> None:
    fields = json.loads((cache / "manifest.json").read_bytes())["header"]["identity"]
    assert hashlib.sha256(canonical_json({"format_version": 1, **fields})).hexdigest() == DIGESTS[encoding][0]


def test_one_that_is_half_extracted_is_finished_in_its_own_form(cache: Path, encoding: str) -> None:
    before = files_of(cache)
    for name in ("shards/00001.zarr", "commits/00001.json"):
        shutil.rmtree(cache / name) if (cache / name).is_dir() else (cache / name).unlink()
    fill_cache(cache, exclude=EXCLUDED)
    found = files_of(cache)
    assert found.keys() == before.keys()
    assert json.loads(found["commits/00001.json"])["format_version"] == 1
    check_samples(CacheReader(cache), LENGTHS, exclude=EXCLUDED)
    assert verify_cache(cache).ok
    if encoding != "bf16-lossless":  # whose compressed bytes are those of a release of blosc
        assert found == before


def test_int8_has_a_scale_per_channel_and_chunk(tmp_path: Path) -> None:
    """Decoded here with numpy alone."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith("int8/")])
    group = zarr.open_group(tmp_path / "int8/shards/00000.zarr", mode="r")
    values, scales = group["hidden_states"][:], group["hidden_states_scale"][:].view(ml_dtypes.bfloat16)
    assert (values.shape, scales.shape) == ((289, 2, 4), (2, 2, 4))
    scales = np.repeat(scales.astype(np.float32), 256, axis=0)[:289]
    decoded = (values * scales).astype(ml_dtypes.bfloat16)
    reader = CacheReader(tmp_path / "int8")
    sample = next(sample for sample in reader if sample.sample_id == 100)
    assert np.array_equal(sample.hidden_states.view(torch.uint16).numpy(), decoded[:259].view(np.uint16))


def test_a_config_of_the_same_values_is_the_same_identity(cache: Path, encoding: str) -> None:
    """`int8` too: what the name means there is the cache's business."""
    identity = CachePlan.read(cache).manifest.identity
    wanted = make_identity(encoding=encoding, layers=(1, 3), shard_bytes=identity.shard_bytes)
    assert wanted.format_version == 2
    check_identity(identity, wanted, where=cache)
    for change in ({"max_samples": 5}, {"validation_digest": "v0"}, {"layers": (1,)}):
        with pytest.raises(CacheIdentityError, match=rf"{next(iter(change))}: cache has"):
            check_identity(identity, wanted.model_copy(update=change), where=cache)


@pytest.mark.parametrize("version", [1, 2])
def test_a_record_of_the_other_version_is_refused(cache: Path, encoding: str, version: int, tmp_path: Path) -> None:
    """In the form of that version, with a right checksum."""
    if version == 2:
        cache = make_cache(tmp_path / "new", LENGTHS, make_header(encoding=encoding, shard_bytes=1 << 20))
    planned = CachePlan.read(cache).planned_shard(0)
    fields = json.loads((cache / "commits/00000.json").read_bytes())
    fields["format_version"] = 3 - fields["format_version"]
    if encoding in ("int8", "fp8"):
        fields = {**fields, "relative_error": [[]] * planned.num_states} if version == 1 else fields
        fields = {name: value for name, value in fields.items() if version == 1 or name != "relative_error"}
    del fields["crc32c"]
    fields["crc32c"] = crc32c_hex(canonical_json(fields))
    (cache / "commits/00000.json").write_text(json.dumps(fields, sort_keys=True, indent=1) + "\n")
    message = "relative_error: " if encoding in ("int8", "fp8") else "format_version [12], planned [12]"
    with pytest.raises(CacheError, match=message):
        read_commit(planned, has_marker=version == 1)
    assert not verify_cache(cache).ok


def test_a_manifest_of_version_1_has_no_field_of_version_2(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    for change in ({}, {"mask_token_id": None}):
        fields = json.loads((cache / "manifest.json").read_bytes())
        fields["header"] |= change
        fields["format_version"] = 1
        if change:
            for name in ("format_version", "max_samples", "validation_digest"):
                del fields["header"]["identity"][name]
        del fields["crc32c"]
        fields["crc32c"] = crc32c_hex(canonical_json(fields))
        (tmp_path / "manifest.json").write_text(json.dumps(fields, sort_keys=True, indent=1) + "\n")
        message = r"header\.mask_token_id: Input should be" if change else r"identity\.format_version: Extra inputs"
        with pytest.raises(CacheError, match=message):
            CachePlan.read(tmp_path)


def test_a_training_that_was_begun_on_one_is_continued(cache: Path, encoding: str) -> None:
    """What its checkpoints say it was made from is what is compared: fields of version 2 count as null."""
    fields = json.loads((cache / "manifest.json").read_bytes())["header"]["identity"]
    saved = {"cache.identity": DIGESTS[encoding][0], **{f"cache.{name}": value for name, value in fields.items()}}
    now = describe_inputs(CacheReader(cache), draft=DraftSection(), objective=ObjectiveSection(), train=TrainSection())
    cached = {key: value for key, value in now.items() if key.startswith("cache.") and key != "cache.plan"}
    assert {key: value for key, value in cached.items() if value != saved.get(key)} == {}
    assert saved.keys() <= cached.keys()
