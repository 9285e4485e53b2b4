"""The README.md of an exported draft: what it drafts for, what it was trained from, how well, and how to serve it."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import Qwen3Config

from pipeline.run_facts import HeldOut, RunFacts
from pipeline.serving_commands import ServedDraft, describe_serving
from stages.evaluate.calibration import CALIBRATION_FILE, Calibration
from stages.train.export import Form, ServedTarget

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ExportedDraft:
    """What is written beside the card; `name` is the folder's."""

    form: Form
    config: Qwen3Config
    dtype: str
    with_target_weights: bool
    target: ServedTarget | None
    name: str


def render_card(draft: ExportedDraft, facts: RunFacts) -> str:
    """The whole README.md, front matter first."""
    kind = _algorithm(draft.config)
    sections = [
        f"# {kind} draft for {_target_title(draft.target)}",
        f"A draft for speculative decoding: for each verify round of the target it proposes {draft.config.block_size} "
        f"tokens. It is of use with this target alone. Trained with dspark-offline {version('dspark-offline')} from "
        "cached hidden states of the target.",
        _section("Target", _table(_target_rows(draft, facts))),
        _section("Draft", _table(_draft_rows(draft))),
        _section("Training", _table(_training_rows(facts)) if facts.config else "Not known: exported without its run."),
        _section("Acceptance", _acceptance(facts.held_out, facts.calibration)),
        _section("Serving", _serving(draft, has_calibration=facts.calibration is not None)),
        _section(
            "Licence",
            "Not stated. Whoever publishes this draft decides, in view of the licences of the target and of the "
            "training data; add `license:` to the head of this file.",
        ),
    ]
    return f"---\n{_front_matter(draft).strip()}\n---\n\n" + "\n\n".join(sections) + "\n"


def is_hub_id(name: str) -> bool:
    """Whether a target's name looks like that of a Hugging Face repository, and is no path here."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _front_matter(draft: ExportedDraft) -> str:
    target = draft.target
    hub_id = target.name if target is not None and target.is_from_hub and is_hub_id(target.name) else None
    data = ModelCardData(
        base_model=hub_id,
        library_name="speculators" if draft.form == "speculators" else "transformers",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "draft-model", _algorithm(draft.config).lower()],
    )
    return str(data.to_yaml())


def _algorithm(config: Qwen3Config) -> str:
    return "DSpark" if config.markov_rank > 0 else "DFlash"


def _target_title(target: ServedTarget | None) -> str:
    """A hub id as it is, of a path the last part: where it lay means nothing to others."""
    if target is None:
        return "a target that is not named"
    return target.name if is_hub_id(target.name) else Path(target.name).name


def _target_rows(draft: ExportedDraft, facts: RunFacts) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("name", _target_title(draft.target))]
    if draft.target is not None and draft.target.architectures:
        rows.append(("architecture", ", ".join(draft.target.architectures)))
    if facts.config is not None and facts.config.target.revision:
        rows.append(("revision", facts.config.target.revision))
    config = draft.config
    rows += [
        ("blocks", config.num_target_layers),
        ("hidden size", config.hidden_size),
        ("vocabulary", config.vocab_size),
    ]
    if facts.manifest is not None:
        identity = facts.manifest.identity
        rows += [
            ("config digest", identity.target_config_digest),
            ("weights digest", identity.target_weights_digest or "not known"),
            ("tokenizer digest", identity.tokenizer_digest),
            ("chat template digest", identity.chat_template_digest),
        ]
    return rows


def _draft_rows(draft: ExportedDraft) -> list[tuple[str, object]]:
    config = draft.config
    head = f"{config.markov_head_type}, rank {config.markov_rank}" if config.markov_rank > 0 else "none"
    confidence = "none"
    if config.enable_confidence_head:
        confidence = "sees state and previous token" if config.confidence_head_with_markov else "sees the state alone"
    layers = ", ".join(str(layer) for layer in config.target_layer_ids)
    return [
        ("form", draft.form),
        ("weights", draft.dtype),
        ("target's embedding and head", "included" if draft.with_target_weights else "left out"),
        ("layers", config.num_hidden_layers),
        ("block size", config.block_size),
        ("target layers", f"{layers} (k: output of block k, counted from 0; -1: embeddings)"),
        ("mask token id", config.mask_token_id),
        ("Markov head", head),
        ("confidence head", confidence),
        ("rope", json.dumps(config.rope_parameters, sort_keys=True)),
        ("slot 0", "predicts the token after the anchor (`sample_from_anchor`)"),
    ]


def _training_rows(facts: RunFacts) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    if facts.step is not None:
        rows.append(("optimizer steps", f"{facts.step:,}"))
    if facts.config is not None:
        train, objective = facts.config.train, facts.config.objective
        rows += [
            ("conversations a step", f"{train.global_batch_size:,}"),
            ("learning rate", train.lr),
            ("computed in", train.dtype),
            ("seed", train.seed),
            (
                "loss",
                f"{objective.ce_loss_alpha} x cross-entropy + {objective.l1_loss_alpha} x L1 + "
                f"{objective.confidence_head_alpha} x confidence",
            ),
        ]
    if facts.manifest is not None:
        plan, identity = facts.manifest.plan, facts.manifest.identity
        counts = plan.splits.get("train")
        if counts is not None:
            rows.append(("training data", f"{counts.num_samples:,} conversations, {counts.num_tokens:,} tokens"))
        rows += [
            ("data digest", identity.data_digest),
            (
                "states",
                f"{identity.encoding}, from a target in {identity.dtype}, at most {identity.max_length:,} tokens",
            ),
        ]
    if facts.cache_digest is not None:
        rows.append(("cache identity", facts.cache_digest))
    return rows


def _acceptance(held_out: HeldOut | None, calibration: Calibration | None) -> str:
    parts = []
    if held_out is None:
        parts.append("tau was not measured, or is not known to be of these weights.")
    else:
        parts.append(_table(_acceptance_rows(held_out)))
        parts.append(
            "tau is the expected number of tokens of a verify round at temperature 1, the bonus token included. It is "
            "of a draft that samples; *greedy draft* is of one that takes its most likely token while the target "
            "samples. Measured on held-out conversations from the cached states, with the tokens before each slot "
            "given; not by a server."
        )
    if calibration is not None:
        before, after = calibration.before.ece, calibration.after.ece
        parts.append(
            f"`{CALIBRATION_FILE}` has a temperature for each slot: the calibrated confidence of slot k is "
            f"sigmoid(logit / `temperatures[k]`). Its calibration error is {after:.3f}, without them {before:.3f}. "
            "SGLang reads the file as it is."
        )
    return "\n\n".join(parts)


def _acceptance_rows(held_out: HeldOut) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("tau", f"{held_out.tau:.3f} (95 % interval {held_out.tau_low:.3f} to {held_out.tau_high:.3f})"),
        ("acceptance by slot", " ".join(f"{rate:.3f}" for rate in held_out.accept_rate_per_pos)),
    ]
    if held_out.tau_greedy is not None:
        interval = f"{held_out.tau_greedy_low:.3f} to {held_out.tau_greedy_high:.3f}"
        rows.append(("tau, greedy draft", f"{held_out.tau_greedy:.3f} (95 % interval {interval})"))
    if held_out.greedy_accept_rate_per_pos is not None:
        rates = " ".join(f"{rate:.3f}" for rate in held_out.greedy_accept_rate_per_pos)
        rows.append(("acceptance by slot, greedy draft", rates))
    rows.append(("measured on", f"{held_out.num_samples:,} conversations, {held_out.num_blocks:,} blocks"))
    return rows


def _serving(draft: ExportedDraft, *, has_calibration: bool) -> str:
    """A command for each server that takes the draft, and what is known of it there."""
    title = "TARGET" if draft.target is None else _target_title(draft.target)
    stands_for = [] if is_hub_id(title) else [f"`{title}` stands for the target's folder or hub id."]
    served = ServedDraft(
        form=draft.form,
        config=draft.config,
        target=title,
        folder=f"./{draft.name}",
        has_calibration=has_calibration,
    )
    return "\n\n".join([*describe_serving(served), *stands_for])


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}"


def _table(rows: Iterable[tuple[str, object]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
