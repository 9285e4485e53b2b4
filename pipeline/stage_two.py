"""Stage two as the command line runs it: the cache held against the config, training, and evaluation joined to it."""

import glob
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from itertools import chain, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from pipeline.config import Config
from pipeline.stage_one import settings_of
from stages.device import choose_device
from stages.errors import SettingError
from stages.evaluate.cached import CacheEvaluation, evaluate_scores
from stages.extract.import_run import UNKNOWN_FIELDS, describe_imported
from stages.extract.run import Settings, configured_identity, describe_inputs, read_plan
from stages.extract.settings import CacheSection
from stages.train import DSparkTrainerModule, Qwen3DSparkModel
from stages.train.batches import EMPTY_BATCH, gather_batch, plan_batches
from stages.train.checkpoint import save_draft
from stages.train.interrupt import StopRequest, stop_on_signals
from stages.train.loop import compute_dtype
from stages.train.module import SlotScores
from stages.train.parallel import Ranks, join_ranks
from stages.train.run import TrainResult, objective_arguments, train
from stages.train.warm_start import COMPARED_ROWS, same_rows
from storage import CacheIdentity, CacheReader, check_identity

logger = logging.getLogger(__name__)


def open_cache(config: Config, *, layers: tuple[int, ...] | None) -> CacheReader:
    """The config's cache, refused if it was made from something else than the config says.

    Target and data are compared where their files are at hand; stage two needs neither of them.
    """
    cache = config.cache
    reader = open_reader(cache)
    check_identity(reader.identity, wanted_identity(config, cached=reader.identity), where=cache.path)
    if layers is None:
        return reader
    missing = sorted(set(layers) - set(reader.layers))
    if missing:
        raise SettingError(
            f"draft.target_layer_ids: {missing} are not in the cache, which stores {list(reader.layers)}"
        )
    return open_reader(cache, layers=layers)


def open_reader(cache: CacheSection, *, layers: tuple[int, ...] | None = None, partial: bool = False) -> CacheReader:
    """The cache of the section, whatever it was made from; `partial`: also an incomplete one."""
    return CacheReader(
        cache.path,
        layers=layers,
        io=cache.io,
        checks=cache.checks,
        staging=cache.staging,
        staging_bytes=cache.staging_bytes,
        partial=partial,
    )


def is_imported(config: Config) -> bool:
    """Whether the config's cache is there and came from another project: there is nothing to extract then."""
    plan = read_plan(config.cache.folder)
    return plan is not None and plan.manifest.identity.imported_from is not None


def wanted_identity(config: Config, *, cached: CacheIdentity) -> CacheIdentity:
    """What the config says that the cache should be; fields that cannot be told here are taken from `cached`.

    So is `shard_bytes`: how samples are spread over shards means nothing to a reader.
    """
    wanted = _wanted_identity(config, cached=cached)
    return wanted.model_copy(update={"shard_bytes": cached.shard_bytes})


def _wanted_identity(config: Config, *, cached: CacheIdentity) -> CacheIdentity:
    settings = settings_of(config)
    known: dict[str, Any] = configured_identity(settings) | {"dtype": config.target.dtype}
    if config.cache.layers is not None:
        known["layers"] = config.cache.layers
    if cached.imported_from:
        return _wanted_import(settings, known, cached=cached)
    data_at_hand = all(glob.glob(pattern, recursive=True) for pattern in config.data.files)  # none for an address
    if Path(config.target.model).is_dir() and data_at_hand:
        return describe_inputs(settings).header.identity
    logger.info("target or data are no local files here: the cache is compared with the config's own values only")
    return cached.model_copy(update=known)


def _wanted_import(settings: Settings, known: dict[str, Any], *, cached: CacheIdentity) -> CacheIdentity:
    """As above for an imported cache, whose source is not at hand and whose forward pass was another's."""
    if Path(settings.target.model).is_dir():
        layers = settings.cache.layers or cached.layers
        known = describe_imported(settings, layers=layers, data_digest=cached.data_digest).header.identity.model_dump()
    else:
        logger.info("the target is no local folder here: the cache is compared with the config's own values only")
    return cached.model_copy(update={name: known[name] for name in known.keys() - set(UNKNOWN_FIELDS)})


def train_draft(config: Config, *, profiled: bool = False, ranks: Ranks | None = None) -> TrainResult:
    """Train the config's draft, or finish the training that its run folder holds.

    SIGTERM and Ctrl-C end it behind the step in progress, with a checkpoint; see `TrainResult.was_stopped`. `ranks` are
    those that the process has joined already; without them it joins what torchrun started, if anything.
    """
    with ExitStack() as entered:
        stop = entered.enter_context(stop_on_signals())
        ranks = ranks or entered.enter_context(join_ranks(config.train))
        return _train_draft(config, stop=stop, profiled=profiled, ranks=ranks)


def _train_draft(config: Config, *, stop: StopRequest, profiled: bool, ranks: Ranks) -> TrainResult:
    reader = open_cache(config, layers=config.draft.target_layer_ids)

    def validate(module: DSparkTrainerModule) -> dict[str, Any]:
        return _score_split(config, module, reader=reader, ranks=ranks, stop=stop).to_json()

    has_validation = len(reader.split_indices("validation")) > 0
    if not has_validation:
        logger.warning("the cache has no validation split, so nothing will be measured; see data.validation_fraction")
    return train(
        reader=reader,
        draft=config.draft,
        objective=config.objective,
        train=config.train,
        validate=validate if has_validation else None,
        stop=stop,
        profiled=profiled,
        ranks=ranks,
    )


def evaluate_draft(config: Config, *, draft_dir: Path) -> CacheEvaluation:
    """Score the draft in `draft_dir`, as servers would load it, on the validation split."""
    model, reader = open_draft(config, draft_dir=draft_dir, dtype=torch.float32)
    reader.plan_reads(evaluated_indices(config, reader))
    ranks = Ranks(device=choose_device(config.train.device))
    module = DSparkTrainerModule(model.to(ranks.device), **objective_arguments(config.objective))
    return _score_split(config, module, reader=reader, ranks=ranks)


def open_draft(config: Config, *, draft_dir: Path, dtype: torch.dtype) -> tuple[Qwen3DSparkModel, CacheReader]:
    """The draft in `draft_dir`, and the config's cache with the layers that it sees. Raises SettingError."""
    if not (draft_dir / "config.json").is_file():
        raise SettingError(f"{draft_dir}: no draft here; train one first, or name its folder with --draft")
    model = Qwen3DSparkModel.from_pretrained(draft_dir, dtype=dtype)
    reader = open_cache(config, layers=tuple(model.config.target_layer_ids))
    _check_same_target(model, reader, draft_dir=draft_dir)
    return model, reader


def _check_same_target(model: Qwen3DSparkModel, reader: CacheReader, *, draft_dir: Path) -> None:
    """The draft carries its target's embedding: it must be the cache's. Raises SettingError."""
    with safe_open(reader.check_target("head.safetensors") / "head.safetensors", framework="pt") as head:
        rows = head.get_slice("embed_tokens.weight")
        own = model.embed_tokens.weight
        same_shape = list(rows.get_shape()) == list(own.shape)
        if not same_shape or not same_rows(rows[:COMPARED_ROWS], own[:COMPARED_ROWS]):
            raise SettingError(
                f"{draft_dir}: this draft was trained for another target than that of {reader.path}: their "
                "embeddings differ; evaluate it on the cache that it was trained from"
            )


def export_draft(checkpoint: Path, out: Path, *, dtype: str) -> None:
    """Write the draft in `checkpoint` to `out` as servers load it. Raises SettingError."""
    if not (checkpoint / "config.json").is_file():
        raise SettingError(f"{checkpoint}: no draft here; name a run's draft/ or one of its checkpoints/")
    if out.exists():
        raise SettingError(f"{out}: exists already; name a new folder")
    model = Qwen3DSparkModel.from_pretrained(checkpoint, dtype=torch.float32)
    save_draft(out, draft_model=model, dtype=getattr(torch, dtype))


def evaluated_indices(config: Config, reader: CacheReader) -> np.ndarray:
    """The validation samples that are scored, in the order of sample ids."""
    indices = reader.split_indices("validation")
    return indices[np.argsort(reader.sample_ids[indices], kind="stable")][: config.evaluate.max_samples]


def _score_split(
    config: Config,
    module: DSparkTrainerModule,
    *,
    reader: CacheReader,
    ranks: Ranks,
    stop: StopRequest | None = None,
) -> CacheEvaluation:
    """What the validation split says of the draft, on every rank; each scores its share of the samples.

    Raises StopAskedError once a rank was asked to stop.
    """
    own = list(_iterate_scores(config, module, reader=reader, ranks=ranks, stop=stop or StopRequest()))
    scores = sorted((scored for part in ranks.gather(own) for scored in part), key=itemgetter(0))
    return ranks.on_first(lambda: evaluate_scores(scores, block_size=module.draft_model.config.block_size))


def _iterate_scores(
    config: Config, module: DSparkTrainerModule, *, reader: CacheReader, ranks: Ranks, stop: StopRequest
) -> Iterator[tuple[int, SlotScores]]:
    """Scores of one of this rank's validation samples at a time, on the CPU, in the order of sample ids.

    Equally many forwards on every rank: sharded weights are gathered for each.
    """
    indices = evaluated_indices(config, reader)
    own = indices[ranks.rank :: ranks.world].tolist()
    batches = plan_batches(
        reader, own, max_batch_tokens=1,
        num_anchors=config.evaluate.num_anchors, seed=config.evaluate.seed, epoch=0,
    )  # fmt: skip
    fill = repeat(EMPTY_BATCH, -(-len(indices) // ranks.world) - len(own))
    was_training = module.training
    module.eval()
    for batch in chain(batches, fill):
        stop.check(ranks)
        with compute_dtype(ranks.device, config.train.dtype):
            scores = module.score(**gather_batch(reader, batch, device=ranks.device))
        for sample_id in batch.sample_ids:  # one, or none in an empty batch
            yield sample_id, _to_cpu(scores)
    module.train(was_training)


def _to_cpu(scores: SlotScores) -> SlotScores:
    tensors = {field.name: getattr(scores, field.name) for field in fields(scores)}
    return replace(scores, **{name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None})
