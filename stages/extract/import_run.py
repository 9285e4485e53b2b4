"""A cache of another project in, a cache of ours out: the plan of its samples, then its states, converted."""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from stages.device import choose_device
from stages.errors import SettingError
from stages.extract import target as targets
from stages.extract.capture import CapturedBatch
from stages.extract.import_check import NUM_CHECKED_SAMPLES, check_source, norm_last_state
from stages.extract.peer_caches import PeerCache, PeerCacheError, PeerStates
from stages.extract.price import Price, expected_bytes
from stages.extract.rows import BadRowError
from stages.extract.run import (
    CheckTarget,
    ExtractResult,
    Inputs,
    Settings,
    build_skeleton,
    check_space,
    commit_shards,
    describe_inputs,
    make_planner,
    make_price,
    read_plan,
    start_counts,
    sum_up,
)
from stages.extract.samples import SampleCounts, plan_samples
from storage import CachePlan, CacheWriter, PlannedSample, check_identity

# Fields of the identity that the import of states that others computed cannot know; they hold the config's values.
UNKNOWN_FIELDS = ("attn_implementation", "max_batch_tokens", "supervise")

Load = Callable[[], targets.TargetParts]


def import_cache(
    settings: Settings,
    source: PeerCache,
    *,
    check_target: CheckTarget | None = None,
    show_price: Callable[[Price, SampleCounts], None] | None = None,
) -> ExtractResult:
    """Plan the cache if it is not planned, then convert and commit every shard that has no commit.

    `cache.layers` may choose among the source's layers. Arguments and errors as in `extract`, and PeerCacheError.
    """
    started = time.monotonic()
    # 1. What the source says it is, and the plan: the one on disk, if it is of the same source.
    inputs = _describe_source(settings, source)
    if check_target is not None:
        check_target(inputs.shape)
    device = choose_device(settings.extract.device)
    load = functools.cache(functools.partial(targets.load_target, inputs.folder, target=settings.target, device=device))
    plan = read_plan(settings.cache.folder)
    is_planned = plan is not None
    if plan is None:
        plan = _write_plan(inputs, settings, source, load=load, show_price=show_price)
    else:
        found = plan.manifest.identity
        known = {name: getattr(found, name) for name in UNKNOWN_FIELDS}
        check_identity(found, inputs.header.identity.model_copy(update=known), where=settings.cache.folder)
    # 2. What is missing, and whether it fits.
    writer = CacheWriter(plan.path)
    missing = writer.missing_shards()
    computed = []
    if missing:
        check_space(settings.cache.folder, needed=expected_bytes(plan.bytes_on_disk(missing), plan.header))
        parts = load()
        if is_planned:  # else it was checked before the plan was published
            _self_check(source, plan.read_samples(missing[0]), inputs=inputs, parts=parts)
        # 3. Shards, each committed whole.
        compute = functools.partial(_compute, plan=plan, source=source, parts=parts)
        computed = commit_shards(writer, missing, compute=compute, parts=parts, settings=settings)
    return sum_up(writer, computed, started=started)


def describe_imported(settings: Settings, *, layers: tuple[int, ...], data_digest: str) -> Inputs:
    """`describe_inputs` for an imported cache: the target is the config's, the data are not its files."""
    data = settings.data.model_copy(update={"files": (), "validation_files": ()})
    cache = settings.cache.model_copy(update={"layers": layers})
    inputs = describe_inputs(replace(settings, data=data, cache=cache))
    identity = inputs.header.identity.model_copy(update={"data_digest": data_digest})
    return replace(inputs, header=inputs.header.model_copy(update={"identity": identity}))


def _describe_source(settings: Settings, source: PeerCache) -> Inputs:
    layers = settings.cache.layers or source.layers
    missing = sorted(set(layers) - set(source.layers))
    if missing:
        raise SettingError(f"cache.layers: {missing} are not in {source.path}, which has {list(source.layers)}")
    inputs = describe_imported(settings, layers=layers, data_digest=f"{source.name}:{source.digest()}")
    if source.hidden_size != inputs.header.hidden_size:
        raise PeerCacheError(
            f"{source.path}: its states have {source.hidden_size} values, those of {settings.target.model} have "
            f"{inputs.header.hidden_size}; name the target that the source was made with"
        )
    provenance = inputs.header.provenance | {"data": str(source.path), "imported from": source.name}
    provenance.pop("rope", None)  # the source's own, which it does not say
    return replace(inputs, header=inputs.header.model_copy(update={"provenance": provenance}))


def _write_plan(
    inputs: Inputs,
    settings: Settings,
    source: PeerCache,
    *,
    load: Load,
    show_price: Callable[[Price, SampleCounts], None] | None,
) -> CachePlan:
    counts = start_counts(inputs)
    skeleton = build_skeleton(inputs, settings)
    first: list[PlannedSample] = []

    def write_target(destination: Path) -> None:
        # Called when every sample is counted. A source that fails the check leaves no plan, so it can be mended.
        price = replace(make_price(inputs, settings, counts=counts, skeleton=skeleton), hours=0.0)
        if show_price is not None:
            show_price(price, counts)
        check_space(settings.cache.folder, needed=price.num_bytes + price.num_overhead_bytes)
        _self_check(source, first, inputs=inputs, parts=load())
        targets.write_target(destination, folder=inputs.folder, parts=load(), tokenizer=inputs.tokenizer)

    return CachePlan.write(
        settings.cache.folder,
        _keep_first(_iterate_samples(inputs, settings, source, counts=counts), first),
        header=inputs.header,
        write_target=write_target,
        dropped=counts.all_reasons,
        mask_token_id=lambda: inputs.mask_token.choose(counts.unseen_tokens),
    )


def _iterate_samples(
    inputs: Inputs, settings: Settings, source: PeerCache, *, counts: SampleCounts
) -> Iterator[PlannedSample]:
    return plan_samples(source.rows(), planner=make_planner(inputs, settings), counts=counts)


def _keep_first(samples: Iterator[PlannedSample], first: list[PlannedSample]) -> Iterator[PlannedSample]:
    for sample in samples:
        if len(first) < NUM_CHECKED_SAMPLES:
            first.append(sample)
        yield sample


def _self_check(source: PeerCache, samples: list[PlannedSample], *, inputs: Inputs, parts: targets.TargetParts) -> None:
    layers = inputs.header.identity.layers
    chosen = [(sample, _read_states(source, sample, layers=layers)) for sample in samples[:NUM_CHECKED_SAMPLES]]
    check_source(source, chosen, layers=layers, parts=parts)


@torch.inference_mode()
def _compute(
    samples: list[PlannedSample], *, plan: CachePlan, source: PeerCache, parts: targets.TargetParts
) -> CapturedBatch:
    """The samples' states as ours are kept."""
    layers, dtype = plan.header.identity.layers, plan.header.encoding.torch_dtype
    read = [_read_states(source, sample, layers=layers) for sample in samples]
    last = [norm_last_state(states.last_hidden_states, source=source, parts=parts) for states in read]
    return CapturedBatch(
        hidden_states=torch.cat([states.hidden_states.to(dtype) for states in read]),
        last_hidden_states=torch.cat([states.to(dtype) for states in last]),
        num_tokens=tuple(sample.num_tokens for sample in samples),
    )


def _read_states(source: PeerCache, sample: PlannedSample, *, layers: tuple[int, ...]) -> PeerStates:
    """The planned sample's states: its tokens only, `layers` only. Raises PeerCacheError if the source changed."""
    rows = slice(sample.num_tokens)  # a sample that the plan cut: what stands behind it never changed its states
    try:
        read = source.read_states(sample.source_row)
        if not np.array_equal(read.input_ids[rows], sample.input_ids):
            raise BadRowError("its token ids are not those of the plan")
    except BadRowError as error:
        raise PeerCacheError(
            f"{source.path}: row {sample.source_row}: {error}; the source changed since the cache was planned"
        ) from error
    places = [source.layers.index(layer) for layer in layers]
    return PeerStates(
        input_ids=read.input_ids[rows],
        hidden_states=read.hidden_states[rows, places],
        last_hidden_states=read.last_hidden_states[rows],
    )
