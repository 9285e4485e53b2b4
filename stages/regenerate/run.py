"""A regeneration from end to end: prompts and a back end in, a folder of conversations by the target out."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.regenerate.journal import Journal
from stages.regenerate.prompts import Prompt
from stages.regenerate.publish import (
    FAILURES,
    JOURNAL,
    is_published,
    prepare_folder,
    publish,
    read_manifest,
)
from stages.regenerate.work import Backend, Work
from stages.regeneration_record import RegenerationError, RegenerationManifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RegenerationResult:
    """What a run did. `manifest` has no counts, and nothing is published, if it was stopped before the end.

    `num_recorded` rows got an outcome in this run; `num_open` have none yet.
    """

    folder: Path
    manifest: RegenerationManifest
    num_recorded: int
    num_open: int
    was_stopped: bool


def regenerate(
    folder: Path,
    *,
    manifest: RegenerationManifest,
    prompts: Callable[[], Iterable[Prompt]],
    backend: Callable[[], Backend],
    is_stopped: Callable[[], bool],
) -> RegenerationResult:
    """Ask for every prompt without an answer, then publish; the same call continues after any interruption.

    `prompts` gives all of them in the order of their rows; `backend` is made only if something is to be asked. Rows
    that failed before are asked again. Raises RegenerationError.
    """
    prepare_folder(folder, manifest)
    num_total = manifest.identity.num_prompts
    with Journal(folder / JOURNAL) as journal:
        work = Work(journal, num_total=num_total, is_stopped=is_stopped)
        logger.info("%s: %d conversations, %d of them done already", folder, num_total, journal.num_finished)
        if journal.num_finished < num_total:
            backend()(prompts(), work)
        num_open = num_total - journal.num_known
        published = read_manifest(folder) or manifest
        if not num_open and (work.num_recorded or not is_published(folder, published)):
            published = publish(folder, journal.outcomes(), manifest=manifest)
    if published.counts is not None and not published.counts.num_answered:
        raise RegenerationError(f"{folder}: no conversation was answered; the causes are in {folder / FAILURES}")
    return RegenerationResult(
        folder=folder,
        manifest=published,
        num_recorded=work.num_recorded,
        num_open=num_open,
        was_stopped=is_stopped() and num_open > 0,
    )
