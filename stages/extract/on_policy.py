"""Whether the answers in the data are the target's own: what the manifests of regenerated conversations say."""

import json
import logging
from collections.abc import Iterable

from stages.regeneration_record import MANIFEST, RegenerationError, RegenerationManifest, find_manifests
from storage import CacheIdentity

TARGET_DIGESTS = ("target_config_digest", "target_weights_digest", "tokenizer_digest", "chat_template_digest")

logger = logging.getLogger(__name__)


def describe_regeneration(files: Iterable[str], *, identity: CacheIdentity) -> dict[str, str]:
    """What a cache's provenance says of regenerated files; nothing where there are none.

    Warns where the answers are another target's, or where the loss covers turns that were not regenerated. Raises
    RegenerationError for files that were changed, and for token ids of another tokenizer.
    """
    files = tuple(files)
    found = find_manifests(files)
    manifests = {manifest.identity.digest(): manifest for manifest in found.values()}
    for manifest in manifests.values():
        _warn(manifest, identity)
    described = [_describe(manifest) for manifest in manifests.values()]
    if not described:
        return {}
    return {
        "answers": "; ".join(map(_describe_answers, manifests.values())),
        "regeneration": f"{len(found)} of {len(files)} files: {json.dumps(described, sort_keys=True)}",
    }


def _describe(manifest: RegenerationManifest) -> dict[str, object]:
    """The settings that a reader of the cache wants to know; the digest stands for all of them."""
    fields = manifest.identity.model_dump(mode="json", exclude_none=True)
    shown = {name: value for name, value in fields.items() if not name.endswith("_digest")}
    return {**shown, "digest": manifest.identity.digest()}


def _describe_answers(manifest: RegenerationManifest) -> str:
    """How many answers there are, how many were cut, and how many conversations were tokenised from text."""
    counts = manifest.counts
    if counts is None or counts.num_unfinished is None:
        return "not counted by the version that made them"
    cut, is_kept = f"{counts.num_unfinished:,}", manifest.identity.truncated == "keep"
    fate = f"{cut} of them cut at their token limit" if is_kept else f"{cut} more were cut, and are left out"
    return f"{counts.num_turns:,}, {fate}; {counts.num_text or 0:,} of {counts.num_answered:,} conversations are text"


def _warn(manifest: RegenerationManifest, identity: CacheIdentity) -> None:
    said = manifest.identity
    differing = [name for name in TARGET_DIGESTS if _differs(getattr(said, name), getattr(identity, name))]
    if differing:
        logger.warning(
            "the answers of data.files were not made by this target as it is configured here: %s differ; "
            "acceptance on them is not acceptance on the target's own text",
            ", ".join(differing),
        )
    if "tokenizer_digest" in differing and manifest.has_ids:
        raise RegenerationError(
            "data.files hold token ids of another tokenizer than the target's; regenerate with this target, or remove "
            f"the columns input_ids and loss_mask and the {MANIFEST} beside the files, to take the text instead"
        )
    if said.turns == "last" and not manifest.is_all_ids and identity.supervise == "all":
        logger.warning(
            "only the last turns of data.files are the target's own (regenerate.turns = last), but the loss covers all "
            "of them; set data.supervise = last"
        )


def _differs(said: str | None, here: str) -> bool:
    """Unknown on either side (an endpoint's weights, an estimate's) is no difference."""
    return bool(said) and bool(here) and said != here
