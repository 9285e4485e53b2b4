"""`dspark export`: a draft or checkpoint read back, and written as servers load it, with a model card."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.model_card import ExportedDraft, is_hub_id, render_card
from pipeline.run_facts import RunFacts, read_run_facts
from stages.errors import SettingError
from stages.evaluate.calibration import CALIBRATION_FILE
from stages.evaluate.records import render_record
from stages.train.draft_folder import read_draft
from stages.train.export import (
    CARD_FILE,
    ExportError,
    Form,
    ServedTarget,
    dspark_fields,
    export_weights,
    speculators_fields,
    write_export,
)

logger = logging.getLogger(__name__)


def export_draft(
    checkpoint: Path,
    out: Path,
    *,
    form: Form,
    dtype: str,
    with_target_weights: bool = True,
    target: str | None = None,
) -> None:
    """Write the draft in `checkpoint` to the new folder `out`, whole or not at all, with its card and calibration.

    `target` is what servers load as the target: a hub id or a path; without it, `target.model` of the run's config.
    Raises SettingError for a folder without a draft, ExportError for a form that cannot express it and for the disk.
    """
    if out.exists():
        raise ExportError(f"{out}: exists already; name a new folder")
    facts = read_run_facts(checkpoint)
    served = _served_target(facts, name=target)
    model = read_draft(checkpoint)
    torch_dtype = getattr(torch, dtype)
    if form == "dspark":
        fields = dspark_fields(model.config, dtype=torch_dtype)
    elif served is None:
        raise SettingError(
            f"{checkpoint}: the speculators form names the target, and no config.toml of a run lies around this "
            "folder; add --target with the hub id or path that servers load"
        )
    else:
        if target is None and not is_hub_id(served.name):
            logger.warning(
                "%s: config.json names the target as %s, which servers elsewhere do not have; name it with --target as "
                "they load it",
                out,
                served.name,
            )
        fields = speculators_fields(model.config, target=served, dtype=torch_dtype)
    weights = export_weights(model, dtype=torch_dtype, with_target_weights=with_target_weights)
    exported = ExportedDraft(
        form=form,
        config=model.config,
        dtype=dtype,
        with_target_weights=with_target_weights,
        target=served,
        name=out.name,
    )
    calibration = facts.calibration
    if calibration is not None and len(calibration.temperatures) != model.block_size:
        logger.warning(
            "the export goes without the calibration of the confidence: it has %d temperatures for %d slots; dspark "
            "evaluate makes it anew",
            len(calibration.temperatures),
            model.block_size,
        )
        calibration = None
    texts = {CARD_FILE: render_card(exported, replace(facts, calibration=calibration))}
    if calibration is not None:
        texts[CALIBRATION_FILE] = render_record(calibration).decode("ascii")
    write_export(out, fields=fields, weights=weights, texts=texts)


def _served_target(facts: RunFacts, *, name: str | None) -> ServedTarget | None:
    """A name in the config may be a folder of the place where the run was made; a revision is the hub's alone."""
    if name is not None:
        return ServedTarget(name=name, architectures=facts.target_architectures, is_from_hub=True)
    if facts.config is None:
        return None
    target = facts.config.target
    is_from_hub = target.revision is not None
    return ServedTarget(name=target.model, architectures=facts.target_architectures, is_from_hub=is_from_hub)
