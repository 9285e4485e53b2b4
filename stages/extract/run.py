"""Stage one from end to end: a target and conversations in, a cache of hidden states out."""

import functools
import logging
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from stages.device import choose_device
from stages.extract import digests
from stages.extract import target as targets
from stages.extract.capture import Capture, check_blocks, pad_batch
from stages.extract.mask_token import MaskToken, find_mask_token
from stages.extract.model_files import TargetError, locate_target
from stages.extract.on_policy import describe_regeneration
from stages.extract.price import (
    Price,
    bound_overhead,
    count_forward_parameters,
    estimate_hours,
    expected_bytes,
    free_bytes,
    price_tiers,
)
from stages.extract.rows import digest_files, find_files, read_rows
from stages.extract.samples import RowPlanner, SampleCounts, plan_samples
from stages.extract.self_check import check_shortest
from stages.extract.settings import CacheSection, DataSection, ExtractSection, TargetSection
from stages.extract.shards import CheckStates, ComputeStates, Progress, compute_shards
from stages.extract.share import ALONE, Share
from stages.extract.tokenize import SampleTokenizer
from stages.rope import describe_rope, mixes_ropes
from stages.target_config import check_layers, choose_max_length, default_layers
from stages.target_shape import TargetShape, parse_target_shape
from storage import (
    FORMAT_VERSION,
    CacheHeader,
    CacheIdentity,
    CacheNotFoundError,
    CachePlan,
    CacheSpaceError,
    CacheWriter,
    PlannedSample,
    check_identity,
)

SPACE_MARGIN_BYTES = 64 << 20  # what must stay free beside the cache: logs, checkpoints, the file system's own needs

CheckTarget = Callable[[TargetShape], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The config sections that stage one reads. `mask_token_id` is the draft's, where the config names one."""

    target: TargetSection
    data: DataSection
    cache: CacheSection
    extract: ExtractSection
    mask_token_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything known before a token is read: the target's folder, config and tokenizer, the files, the identity.

    `data` is the config's section with `max_length` filled in and the files of validation named one by one.
    """

    folder: Path
    config: Any
    shape: TargetShape
    tokenizer: Any
    mask_token: MaskToken
    files: tuple[str, ...]
    data: DataSection
    header: CacheHeader


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What a run did: it computed `num_computed_shards` of `num_shards`; `num_missing_shards` are left to others."""

    plan: CachePlan
    num_shards: int
    num_computed_shards: int
    num_missing_shards: int
    num_tokens: int
    num_excluded: int
    seconds: float


def describe_inputs(settings: Settings, *, with_weights: bool = True) -> Inputs:
    """Check the settings against the target's files and derive the cache's header and identity.

    `with_weights=False` is for an estimate: the weight digest is then empty, so that no weights are needed.
    Raises TargetError, DataError or ValueError.
    """
    target, data = settings.target, settings.data
    files, validation_files = find_files(data.files, data.validation_files)
    folder = locate_target(target)
    config = targets.load_config(folder, trust_remote_code=target.trust_remote_code)
    shape = parse_target_shape(config)
    tokenizer = targets.load_tokenizer(folder, target=target, chat_template=data.chat_template)
    layers = settings.cache.layers or default_layers(shape.num_layers)
    check_layers(layers, num_target_layers=shape.num_layers, key="cache.layers")
    max_length = choose_max_length(data.max_length, shape.max_positions)
    mask_token = find_mask_token(
        tokenizer,
        vocab_size=shape.vocab_size,
        wanted=settings.mask_token_id,
        eos_token_ids=targets.eos_token_ids(folder, config),
    )
    identity = CacheIdentity(
        format_version=FORMAT_VERSION,
        validation_digest=digest_files(validation_files) if validation_files else None,
        target_config_digest=digests.digest_config(config),
        target_weights_digest=digests.digest_weights(folder) if with_weights else "",
        tokenizer_digest=digests.digest_tokenizer(tokenizer),
        chat_template_digest=digests.digest_chat_template(tokenizer),
        data_digest=digest_files(files),
        layers=layers,
        dtype=target.dtype,
        **(configured_identity(settings) | {"max_length": max_length}),
    )
    header = CacheHeader(
        identity=identity,
        hidden_size=shape.hidden_size,
        num_target_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        mask_token_id=mask_token.token_id,
        logit_scale=shape.logit_scale,
        logit_softcap=shape.logit_softcap,
        provenance={
            "target": target.model,
            "revision": target.revision or "",
            "data": " ".join((*data.files, *data.validation_files)),
            "host": platform.node(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **_describe_rope(shape, max_length=max_length),
            **describe_regeneration((*files, *validation_files), identity=identity),
        },
    )
    data = data.model_copy(update={"max_length": max_length, "validation_files": validation_files})
    return Inputs(
        folder=folder,
        config=config,
        shape=shape,
        tokenizer=tokenizer,
        mask_token=mask_token,
        files=files,
        data=data,
        header=header,
    )


def _describe_rope(shape: TargetShape, *, max_length: int) -> dict[str, str]:
    """Which of its ropes a target computes, where it has several."""
    rope = describe_rope(shape, max_length=max_length)
    return {"rope": rope} if rope else {}


def _check_rope(cached: CacheHeader, inputs: Inputs, *, where: Path) -> None:
    """Refuse to go on with a cache whose first shards were computed with whatever rope a batch asked for."""
    wanted = inputs.header.provenance.get("rope")
    if cached.provenance.get("rope") != wanted and mixes_ropes(
        inputs.shape, max_length=inputs.header.identity.max_length
    ):
        raise TargetError(
            f"{where}: was begun by a version that let each batch choose the target's rope; expected {wanted}, for all "
            "of a cache; name another cache.path, or delete this one"
        )


def loader(inputs: Inputs, settings: Settings, *, device: torch.device) -> Callable[[], targets.TargetParts]:
    """What loads the target, once; with one rope for all texts of the cache."""
    rope = inputs.header.provenance.get("rope")
    if rope:
        logger.info("the target's rope depends on the length of a text: all of this cache is computed with %s", rope)
    return functools.cache(
        functools.partial(
            targets.load_target, inputs.folder, target=settings.target, device=device,
            max_length=inputs.header.identity.max_length,
        )
    )  # fmt: skip


def configured_identity(settings: Settings) -> dict[str, Any]:
    """The fields of the identity that the config alone decides, without the target or the data at hand."""
    length = {} if settings.data.max_length is None else {"max_length": settings.data.max_length}
    return length | {
        "encoding": settings.cache.encoding,
        "shard_bytes": settings.cache.shard_bytes,
        "attn_implementation": settings.target.attn_implementation,
        "overlong": settings.data.overlong,
        "supervise": settings.data.supervise,
        "min_supervised_tokens": settings.data.min_supervised_tokens,
        "max_samples": settings.data.max_samples,
        "validation_fraction": settings.data.validation_fraction,
        "max_batch_tokens": settings.extract.max_batch_tokens,
    }


def start_counts(inputs: Inputs) -> SampleCounts:
    """Counts before the first row; they will say which of the mask token's candidates no sample contains."""
    return SampleCounts(unseen_tokens=set(inputs.mask_token.candidates))


def iterate_samples(inputs: Inputs, settings: Settings, *, counts: SampleCounts) -> Iterator[PlannedSample]:
    """The samples of the cache in source order; `counts` says afterwards what was left out and why."""
    rows = read_rows((*inputs.data.validation_files, *inputs.files))
    return plan_samples(rows, planner=make_planner(inputs, settings), counts=counts)


def make_planner(inputs: Inputs, settings: Settings) -> RowPlanner:
    """What makes samples of rows."""
    eos = targets.eos_token_ids(inputs.folder, inputs.config)
    return RowPlanner(
        tokenizer=SampleTokenizer(inputs.tokenizer, supervise=settings.data.supervise, eos_token_ids=eos),
        data=inputs.data,
        mask_token_id=inputs.header.mask_token_id,
        vocab_size=inputs.header.vocab_size,
    )


def estimate(settings: Settings, *, check_target: CheckTarget | None = None) -> tuple[Price, SampleCounts]:
    """Tokenise everything and price the run; needs no weights and writes nothing. Arguments as in `extract`."""
    inputs = describe_inputs(settings, with_weights=False)
    if check_target is not None:
        check_target(inputs.shape)
    skeleton = build_skeleton(inputs, settings)
    counts = start_counts(inputs)
    for _ in iterate_samples(inputs, settings, counts=counts):
        pass
    inputs.mask_token.choose(counts.unseen_tokens)
    return make_price(inputs, settings, counts=counts, skeleton=skeleton), counts


def build_skeleton(inputs: Inputs, settings: Settings) -> targets.TargetParts:
    """The target without weights. Raises TargetError for one that cannot be loaded or cached."""
    trust = settings.target.trust_remote_code
    parts = targets.build_skeleton(inputs.folder, inputs.config, trust_remote_code=trust)
    check_blocks(parts, layers=inputs.header.identity.layers)
    return parts


def make_price(inputs: Inputs, settings: Settings, *, counts: SampleCounts, skeleton: targets.TargetParts) -> Price:
    """Bytes and hours of the counted samples on this machine."""
    device = choose_device(settings.extract.device)
    parameters = count_forward_parameters(skeleton)
    hours = estimate_hours(
        num_parameters=parameters,
        num_tokens=counts.num_tokens,
        device=device,
        dtype=getattr(torch, settings.target.dtype),
    )
    return Price(
        num_samples=counts.num_samples,
        num_tokens=counts.num_tokens,
        num_supervised=counts.num_supervised,
        bytes_per_token=expected_bytes(inputs.header.token_bytes, inputs.header),
        num_bytes=expected_bytes(counts.num_tokens * inputs.header.token_bytes, inputs.header),
        num_overhead_bytes=bound_overhead(inputs.header, num_samples=counts.num_samples, num_tokens=counts.num_tokens),
        num_free_bytes=free_bytes(settings.cache.folder),
        encoding=inputs.header.identity.encoding,
        tiers=price_tiers(inputs.header, num_tokens=counts.num_tokens),
        layers=inputs.header.identity.layers,
        max_length=inputs.header.identity.max_length,
        num_forward_parameters=parameters,
        hours=hours,
        device=str(device),
    )


def extract(
    settings: Settings,
    *,
    check_target: CheckTarget | None = None,
    show_price: Callable[[Price, SampleCounts], None] | None = None,
    share: Share = ALONE,
) -> ExtractResult:
    """Plan the cache if it is not planned, then compute and commit every shard that has no commit.

    Of several extractions at once, each has its `share`.

    `check_target` may refuse the target's config before anything is done. Raises CacheIdentityError when the folder
    holds a cache of something else, CacheSpaceError when the disk is too small (before the target is loaded),
    TargetError, DataError, QuarantineError.
    """
    started = time.monotonic()
    folder = settings.cache.folder
    # 1. What is asked for, and the plan: the one on disk, if it is of the same inputs.
    device = choose_device(settings.extract.device)
    inputs = describe_inputs(settings)
    if check_target is not None:
        check_target(inputs.shape)
    load = loader(inputs, settings, device=device)
    plan = read_plan(folder) if share.plans else _await_plan(folder)
    if plan is None:
        plan = _write_plan(inputs, settings, load=load, show_price=show_price)
    else:
        check_identity(plan.manifest.identity, inputs.header.identity, where=folder)
    # 2. What is missing, and whether it fits.
    writer = CacheWriter(plan.path)
    missing = share.plan_turns(writer.missing_shards())
    computed = []
    if missing:
        _check_rope(plan.header, inputs, where=folder)
        check_space(folder, needed=expected_bytes(plan.bytes_on_disk(missing), plan.header))
        # 3. The target.
        parts = load()
        capture = Capture(parts, layers=plan.header.identity.layers, dtype=plan.header.encoding.torch_dtype)
        # 4. Shards, each checked against the target alone and committed whole.
        computed = commit_shards(
            writer,
            missing,
            compute=lambda samples: capture.launch(pad_batch([sample.input_ids for sample in samples])),
            check=functools.partial(check_shortest, parts=parts, header=plan.header),
            parts=parts,
            settings=settings,
        )
    return sum_up(writer, computed, started=started)


def commit_shards(
    writer: CacheWriter,
    missing: list[int],
    *,
    compute: ComputeStates,
    check: CheckStates | None = None,
    parts: targets.TargetParts,
    settings: Settings,
) -> list[int]:
    """Compute, check and commit shards, with a line for each; those that were not another process's."""
    progress = Progress(writer.plan, missing)
    computed = []
    head_VD = parts.lm_head.weight
    for shard in compute_shards(
        writer, missing, compute=compute, check=check, head_VD=head_VD, extract=settings.extract
    ):
        computed.append(shard)
        progress.log_shard(shard)
    return computed


def sum_up(writer: CacheWriter, computed: list[int], *, started: float) -> ExtractResult:
    """What a run did that began at `started` of the monotonic clock."""
    plan = writer.plan
    return ExtractResult(
        plan=plan,
        num_shards=plan.num_shards,
        num_computed_shards=len(computed),
        num_missing_shards=len(writer.missing_shards()),
        num_tokens=sum(plan.planned_shard(shard).num_tokens for shard in computed),
        num_excluded=writer.count_excluded(),
        seconds=time.monotonic() - started,
    )


def read_plan(path: Path) -> CachePlan | None:
    """The published plan in `path`, or None where there is none yet."""
    try:
        return CachePlan.read(path)
    except CacheNotFoundError:
        return None


def _await_plan(path: Path) -> CachePlan:
    """The plan that the first rank writes, once it is there."""
    waited = 0
    while (plan := read_plan(path)) is None:
        if waited % 60 == 0:
            logger.info("waiting for rank 0 to plan %s (do the ranks share this folder? if not, use --part)", path)
        time.sleep(1)
        waited += 1
    return plan


def check_space(path: Path, *, needed: int) -> None:
    """Raises CacheSpaceError unless `needed` bytes and a margin fit on the disk under `path`."""
    free = free_bytes(path)
    if needed + SPACE_MARGIN_BYTES > free:
        raise CacheSpaceError(
            f"{path}: the cache still needs {needed / 1e9:,.2f} GB, the disk has {free / 1e9:,.2f} GB free; use a "
            "larger disk, fewer cache.layers, a smaller data.max_length or less data"
        )


def _write_plan(
    inputs: Inputs,
    settings: Settings,
    *,
    load: Callable[[], targets.TargetParts],
    show_price: Callable[[Price, SampleCounts], None] | None,
) -> CachePlan:
    counts = start_counts(inputs)
    skeleton = build_skeleton(inputs, settings)

    def write_target(destination: Path) -> None:
        # Called when every sample is counted: the price is shown and the disk checked before weights are loaded.
        price = make_price(inputs, settings, counts=counts, skeleton=skeleton)
        if show_price is not None:
            show_price(price, counts)
        check_space(settings.cache.folder, needed=price.num_bytes + price.num_overhead_bytes)
        targets.write_target(destination, folder=inputs.folder, parts=load(), tokenizer=inputs.tokenizer)

    return CachePlan.write(
        settings.cache.folder,
        iterate_samples(inputs, settings, counts=counts),
        header=inputs.header,
        write_target=write_target,
        dropped=counts.all_reasons,
        mask_token_id=lambda: inputs.mask_token.choose(counts.unseen_tokens),
    )
