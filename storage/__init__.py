"""The cache on disk: its plan, its writer, its reader, its verifier. FORMAT.md is the normative description."""

from storage.commit import CommitRecord, LossyCommitRecord, LossyCommitRecordV1, list_commits, read_commit
from storage.encodings import ENCODINGS, INNER_TOKENS, bytes_per_token
from storage.errors import (
    CacheBusyError,
    CacheCorruptError,
    CacheError,
    CacheExistsError,
    CacheFormatError,
    CacheIdentityError,
    CacheIncompleteError,
    CacheNotFoundError,
    CacheReadError,
    CacheSpaceError,
    CacheUsageError,
    CacheWriteError,
)
from storage.manifest import CacheHeader, CacheIdentity, Manifest, Split, check_identity
from storage.plan import CachePlan
from storage.reader import CacheReader, Sample
from storage.repair import RepairReport, repair_cache
from storage.samples import PlannedSample
from storage.sealed import FORMAT_VERSION
from storage.sharding import plan_batches
from storage.transfer import TransferResult, pull_cache, push_cache
from storage.verify import Problem, VerifyReport, verify_cache
from storage.writer import CacheWriter, ShardWriter

__all__ = [
    "CacheReader",
    "CacheWriter",
    "CachePlan",
    "verify_cache",
    "push_cache",
    "pull_cache",
    "TransferResult",
    "repair_cache",
    "Sample",
    "ShardWriter",
    "PlannedSample",
    "CacheHeader",
    "CacheIdentity",
    "Manifest",
    "Split",
    "VerifyReport",
    "Problem",
    "ENCODINGS",
    "FORMAT_VERSION",
    "INNER_TOKENS",
    "RepairReport",
    "CommitRecord",
    "LossyCommitRecord",
    "LossyCommitRecordV1",
    "list_commits",
    "read_commit",
    "bytes_per_token",
    "check_identity",
    "plan_batches",
    "CacheError",
    "CacheBusyError",
    "CacheCorruptError",
    "CacheExistsError",
    "CacheFormatError",
    "CacheIdentityError",
    "CacheIncompleteError",
    "CacheNotFoundError",
    "CacheReadError",
    "CacheSpaceError",
    "CacheUsageError",
    "CacheWriteError",
]
