"""Named points of the write protocol at which a test may kill the process, to prove what a crash leaves behind."""

import os
import signal

FAULT_VARIABLE = "DSPARK_FAULT"

PLAN_FAULTS = (
    "plan.started",  # the partial manifest marks the directory as ours
    "plan.samples",  # one samples file is written
    "plan.target",  # the files of target/ are written
    "plan.index",  # the index is written
    "plan.manifest",  # the manifest is written under its partial name
    "plan.committed",  # the manifest has its name
)
SHARD_FAULTS = (
    "shard.opened",  # the temporary directory exists
    "shard.appended",  # some rows are written
    "shard.written",  # every row and the index footer are written
    "shard.synced",  # files and directories are on disk
    "shard.renamed",  # the shard has its name, the parent directory is not yet synced
    "shard.published",  # the parent directory is synced
    "commit.marker",  # the marker of excluded samples is published
    "commit.written",  # the record is written under a temporary name
    "commit.renamed",  # the record has its name
)
FETCH_FAULTS = (
    "fetch.plan",  # a file of the plan is copied from the store
    "fetch.opened",  # the temporary directory of a shard exists
    "fetch.array",  # one array is copied and its bytes are the committed ones
    "fetch.synced",  # files and directories of the shard are on disk
    "fetch.renamed",  # the shard has its name, the parent directory is not yet synced
    "fetch.marker",  # the marker of excluded samples is as it should be
    "fetch.commit",  # the record is written under a temporary name
    "fetch.committed",  # the record has its name
)
PULL_FAULTS = ("plan.started", "plan.manifest", "plan.committed", *FETCH_FAULTS)
PUSH_FAULTS = (
    "push.plan",  # the files of the plan are in the store, the manifest is not
    "push.array",  # one array of a shard is in the store
    "push.data",  # everything of a shard but its record is in the store
)
STAGING_FAULTS = (
    *FETCH_FAULTS,
    "staging.manifest",  # the manifest is written under a temporary name
    "staging.charge",  # what a shard will take is written under a temporary name
    "staging.charged",  # what a shard will take is counted, nothing of it is fetched
    "staging.evicting",  # a shard has lost its record, its files are still there
)


def fault_point(name: str) -> None:
    """SIGKILL this process if ``DSPARK_FAULT`` is ``name``; do nothing otherwise."""
    if os.environ.get(FAULT_VARIABLE) == name:
        os.kill(os.getpid(), signal.SIGKILL)
