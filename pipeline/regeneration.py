"""On-policy data as the command line makes it: the config's conversations, answered by the config's target."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from pipeline.config import Config
from stages.device import choose_device
from stages.errors import SettingError
from stages.extract import digests
from stages.extract import target as targets
from stages.extract.conversations import parse_chat
from stages.extract.model_files import locate_target
from stages.extract.rows import BadRowError, DataError, Row, find_files, read_rows
from stages.extract.samples import HELD_OUT, split_by_row
from stages.extract.settings import DataSection
from stages.regenerate.prompts import NoTurnError, Prompt, PromptDigest, plan_prompt
from stages.regenerate.publish import FAILURES
from stages.regenerate.render import PromptRenderer
from stages.regenerate.run import RegenerationResult
from stages.regenerate.run import regenerate as run_regeneration
from stages.regenerate.settings import RegenerateSection
from stages.regenerate.work import Backend
from stages.regeneration_record import MANIFEST, RegenerationIdentity, RegenerationManifest
from stages.signals import ask_on_signals
from stages.target_config import choose_max_length
from stages.target_shape import parse_target_shape
from storage.text import redact

NOTICE = "answers on their way are waited for, ten seconds at most, or what a batch has finished is kept"
NUM_REASONS_SHOWN = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What both back ends need of the config's target: its files, its tokenizer, and how long a sample may be."""

    folder: Path
    config: Any
    tokenizer: Any
    max_length: int

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return targets.eos_token_ids(self.folder, self.config) | ({self.tokenizer.eos_token_id} - {None})

    def renderer(self, section: RegenerateSection) -> PromptRenderer:
        return PromptRenderer(self.tokenizer, variables=section.chat_template_kwargs)


def with_options(config: Config, *, out: Path | None, concurrency: int | None) -> Config:
    """The config with what the command line names in place of its own."""
    options = {"path": out, "concurrency": concurrency}
    changed = {key: value for key, value in options.items() if value is not None}
    return config.model_copy(update={"regenerate": config.regenerate.model_copy(update=changed)})


def regenerate(
    config: Config, *, endpoint: str | None, is_local: bool, is_stopped: Callable[[], bool] | None = None
) -> RegenerationResult:
    """Answer the conversations of `data.files` and `data.validation_files`; the same call continues.

    SIGTERM and Ctrl-C stop it, and so does `is_stopped`. Raises StageError of some family.
    """
    if (endpoint is None) != is_local:
        raise SettingError("name one back end: --endpoint URL for a server, or --local to run the target here")
    section, folder = config.regenerate, config.regenerate.path
    if folder is None:
        raise SettingError("no folder for the answers; give --out, or regenerate.path in the config")
    asked = describe_target(config)
    prompts = partial(read_prompts, name_files(config.data), section=section)
    manifest = RegenerationManifest(
        identity=_identify(config, asked, digest=_digest_prompts(prompts, config), is_local=is_local),
        provenance={
            "target": redact(config.target.model),
            "data": redact(" ".join((*config.data.files, *config.data.validation_files))),
            "transformers": transformers.__version__,
        },
    )
    stops: list[str] = []
    with ask_on_signals(stops.append, notice=NOTICE):
        return run_regeneration(
            folder,
            manifest=manifest,
            prompts=prompts,
            backend=partial(_open_local, config, asked)
            if endpoint is None
            else partial(_open, endpoint, config, asked),
            is_stopped=lambda: bool(stops) or (is_stopped is not None and is_stopped()),
        )


def name_files(data: DataSection) -> DataSection:
    """The section with its files named one by one. Raises DataError."""
    files, validation_files = find_files(data.files, data.validation_files)
    return data.model_copy(update={"files": files, "validation_files": validation_files})


def read_prompts(data: DataSection, *, section: RegenerateSection, bad: Counter[str] | None = None) -> Iterator[Prompt]:
    """Every conversation of the files, those of validation first, as in extraction; `data` names them one by one.

    Of `files`, the first `data.max_samples` that can be answered.

    Rows without one are counted in `bad`, by reason, and so, as HELD_OUT, are those of `files` with a prompt of the
    files of validation.
    """
    bad = Counter() if bad is None else bad
    held_out: set[bytes] = set()
    num_taken = 0
    for number, row in enumerate(read_rows((*data.validation_files, *data.files))):
        try:
            prompt = _parse_prompt(number, row, data=data, section=section)
        except (BadRowError, NoTurnError) as error:
            bad[str(error)] += 1
            continue
        if row.file in data.validation_files:
            held_out.add(prompt.digest_question())
        elif held_out and prompt.digest_question() in held_out:
            bad[HELD_OUT] += 1
            continue
        yield prompt
        num_taken += row.file not in data.validation_files
        if num_taken == data.max_samples:
            return


def _parse_prompt(number: int, row: Row, *, data: DataSection, section: RegenerateSection) -> Prompt:
    if row.value is None:
        raise BadRowError(row.error or "unreadable")
    chat = parse_chat(row.value)
    if chat is None:
        raise BadRowError("no column messages or conversations, so nothing that could be answered")
    split = split_by_row(row, data) or ("train" if data.validation_files else None)
    source = f"{redact(row.file)} row {row.row}"
    messages = [
        message | ({"weight": 0} if index in chat.unsupervised else {}) for index, message in enumerate(chat.messages)
    ]  # a turn that is kept stays out of the loss
    return plan_prompt(number, messages, turns=section.turns, tools=chat.tools, source=source, split=split)


def _digest_prompts(prompts: Callable[..., Iterator[Prompt]], config: Config) -> PromptDigest:
    """One pass over all rows. Raises DataError when too many of them are bad, or none is left."""
    bad: Counter[str] = Counter()
    digest = PromptDigest()
    for prompt in prompts(bad=bad):
        digest.add(prompt)
    reasons = "".join(f"\n  {count:,} x {reason}" for reason, count in bad.most_common())
    num_bad, num_rows = bad.total() - bad[HELD_OUT], bad.total() + digest.num_prompts
    if num_bad > config.data.max_bad_fraction * num_rows:
        raise DataError(
            f"{num_bad:,} of {num_rows:,} rows hold no conversation to answer, more than "
            f"data.max_bad_fraction = {config.data.max_bad_fraction}; mend them or raise the limit{reasons}"
        )
    if not digest.num_prompts:
        raise DataError(f"data.files: no row at all in {' '.join(config.data.files)}")
    if bad:
        logger.warning("%s rows are left out:%s", f"{bad.total():,}", reasons)
    return digest


def describe_target(config: Config) -> Asked:
    """What the answers depend on, without weights. Raises StageError of some family."""
    folder = locate_target(config.target)
    target_config = targets.load_config(folder, trust_remote_code=config.target.trust_remote_code)
    return Asked(
        folder=folder,
        config=target_config,
        tokenizer=targets.load_tokenizer(folder, target=config.target, chat_template=config.data.chat_template),
        max_length=choose_max_length(config.data.max_length, parse_target_shape(target_config).max_positions),
    )


def _identify(config: Config, asked: Asked, *, digest: PromptDigest, is_local: bool) -> RegenerationIdentity:
    section, target = config.regenerate, config.target
    shared = section.model_dump(
        include={"turns", "temperature", "top_p", "max_tokens", "truncated", "seed", "chat_template_kwargs"}
    )
    own: dict[str, Any] = {"served_model": _served_model(config), "extra_body": section.extra_body}
    if is_local:
        own = {
            "target_weights_digest": digests.digest_weights(asked.folder),
            "dtype": target.dtype,
            "attn_implementation": target.attn_implementation,
            "batch_size": section.batch_size,
        }
    return RegenerationIdentity(
        backend="local" if is_local else "endpoint",
        prompts_digest=digest.hexdigest(),
        num_prompts=digest.num_prompts,
        max_length=asked.max_length,
        target_config_digest=digests.digest_config(asked.config),
        tokenizer_digest=digests.digest_tokenizer(asked.tokenizer),
        chat_template_digest=digests.digest_chat_template(asked.tokenizer),
        **shared,
        **own,
    )


def _served_model(config: Config) -> str:
    return config.regenerate.served_model or config.target.model


def _open(url: str, config: Config, asked: Asked) -> Backend:
    from stages.regenerate.endpoint import Endpoint, open_client, run_endpoint

    section = config.regenerate
    endpoint = Endpoint(
        client=open_client(url, section=section),
        model=_served_model(config),
        section=section,
        max_length=asked.max_length,
        renderer=asked.renderer(section),
        end_ids=asked.end_ids,
    )
    return partial(run_endpoint, endpoint)


def _open_local(config: Config, asked: Asked) -> Backend:
    from stages.regenerate.local import LocalTarget, run_local

    device = choose_device(config.extract.device)
    parts = targets.load_target(asked.folder, target=config.target, device=device, max_length=asked.max_length)
    if not asked.end_ids:
        raise SettingError(f"{asked.folder}: neither config nor tokenizer name an end-of-turn token")
    target = LocalTarget(
        model=parts.model,
        device=parts.device,
        renderer=asked.renderer(config.regenerate),
        end_ids=asked.end_ids,
        section=config.regenerate,
        max_length=asked.max_length,
    )
    return partial(run_local, target)


def show_result(console: Console, result: RegenerationResult) -> None:
    """What a regeneration did, and how to go on."""
    counts = result.manifest.counts
    if result.num_open or counts is None:
        console.print(
            f"stopped: {result.num_recorded:,} rows done by this run, {result.num_open:,} open; run the same command "
            "again to continue",
            markup=False,
        )
        return
    table = Table(title="regenerated", show_header=False, title_justify="left", title_style="bold")
    total = result.manifest.identity.num_prompts
    if not result.num_recorded:
        table.add_row("asked", "nothing: every conversation has an outcome already")
    table.add_row("conversations", f"{counts.num_answered:,} of {total:,}, {counts.num_turns:,} turns")
    table.add_row("tokens", f"{counts.num_tokens:,}")
    for reasons, title in ((counts.dropped, "dropped"), (counts.failed, "failed")):
        for reason, count in Counter(reasons).most_common(NUM_REASONS_SHOWN):
            table.add_row(title, f"{count:,} x {reason}", style="red" if title == "failed" else None)
    if counts.num_cut:
        table.add_row("ended early", f"{counts.num_cut:,} conversations, at a turn that could not be answered")
    if counts.num_unfinished:
        fate = "kept" if result.manifest.identity.truncated == "keep" else "left out"
        table.add_row("cut", f"{counts.num_unfinished:,} answers that did not end within their tokens, {fate}")
    table.add_row("files", f"{result.folder}/conversations-*.jsonl, {MANIFEST} beside them")
    console.print(table)
    for line in _advise(result):
        console.print(line, markup=False)


def _advise(result: RegenerationResult) -> Iterator[str]:
    counts = result.manifest.counts
    if counts is not None and (counts.failed or counts.dropped):
        yield f"every row without a conversation: {result.folder / FAILURES}"
    if counts is not None and counts.failed:
        yield "run the same command again to ask for the failed ones once more"
    if counts is not None and counts.num_prompt_mismatches:
        yield (
            f"{counts.num_prompt_mismatches:,} prompts were others at the endpoint than by this target's template: "
            "the server uses another template, tokenizer or model than extraction will"
        )
    if counts is not None and counts.num_text:
        yield (
            f"{counts.num_text:,} of {counts.num_answered:,} conversations are text, since the endpoint gave no "
            "token ids for them: extraction tokenises them again, perhaps to others than were sampled (vLLM gives ids)"
        )
