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

from pipeline.config import Config, to_toml
from pipeline.stage_one import settings_of
from stages.device import choose_device
from stages.errors import SettingError, StageError
from stages.evaluate.cached import evaluate_scores
from stages.evaluate.calibration import Origin, write_calibration
from stages.evaluate.evaluation import Evaluation, evaluate_fully, write_evaluation
from stages.evaluate.throughput import read_throughput_table
from stages.extract.import_run import UNKNOWN_FIELDS, describe_imported
from stages.extract.run import Settings, configured_identity, describe_inputs, read_plan
from stages.extract.settings import CacheSection
from stages.train import DSparkTrainerModule, Qwen3DSparkModel
from stages.train.anchors import anchor_candidates
from stages.train.batches import EMPTY_BATCH, gather_batch, plan_batches
from stages.train.draft_folder import check_draft_folder, digest_draft, read_draft
from stages.train.interrupt import StopRequest, stop_on_signals
from stages.train.loop import compute_dtype
from stages.train.module import SlotScores
from stages.train.parallel import Ranks, join_ranks
from stages.train.run import TrainResult, objective_arguments, train
from stages.train.validation import Judge, Validate
from stages.train.warm_start import COMPARED_ROWS, same_rows
from storage import CacheIdentity, CacheReader, check_identity
from storage.progress import Meter

logger = logging.getLogger(__name__)


class NonFiniteScoreError(StageError, ArithmeticError):
    """A draft cannot be measured: what it says of a sample is NaN or infinite."""


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
    patterns = (*config.data.files, *config.data.validation_files)
    data_at_hand = all(glob.glob(pattern, recursive=True) for pattern in patterns)  # none for an address
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


def train_draft(
    config: Config, *, profiled: bool = False, ranks: Ranks | None = None, judge: Judge | None = None
) -> TrainResult:
    """Train the config's draft, or finish the training that its run folder holds.

    SIGTERM and Ctrl-C end it behind the step in progress, with a checkpoint; see `TrainResult.was_stopped`. `ranks` are
    those that the process has joined already; without them it joins what torchrun started, if anything. `judge` sees
    each validation, and ends the training in the same way if it gives a reason.
    """
    with ExitStack() as entered:
        stop = entered.enter_context(stop_on_signals())
        ranks = ranks or entered.enter_context(join_ranks(config.train))
        return _train_draft(config, stop=stop, profiled=profiled, ranks=ranks, judge=judge)


def _train_draft(
    config: Config, *, stop: StopRequest, profiled: bool, ranks: Ranks, judge: Judge | None
) -> TrainResult:
    reader = open_cache(config, layers=config.draft.target_layer_ids)

    def measure(module: DSparkTrainerModule) -> dict[str, Any]:
        scores = _score_split(config, module, reader=reader, ranks=ranks, stop=stop)
        block_size = module.draft_model.config.block_size
        return ranks.on_first(lambda: evaluate_scores(scores, block_size=block_size)).to_json()

    has_validation = _can_measure(config, reader)
    return train(
        reader=reader,
        draft=config.draft,
        objective=config.objective,
        train=config.train,
        validate=Validate(measure=measure, judge=judge) if has_validation else None,
        config_text=to_toml(config),
        stop=stop,
        profiled=profiled,
        ranks=ranks,
    )


def _can_measure(config: Config, reader: CacheReader) -> bool:
    """Whether the validation split has anything to score; warns if not."""
    if not len(reader.split_indices("validation")):
        logger.warning("the cache has no validation split, so nothing will be measured; see data.validation_fraction")
        return False
    indices = evaluated_indices(config, reader)
    if any(len(anchor_candidates(reader.read_tokens(index)[1])) for index in indices):
        return True
    logger.warning(
        f"none of the {len(indices)} validation samples has two supervised tokens in a row, so nothing will be "
        "measured; see data.validation_fraction, and evaluate.max_samples"
    )
    return False


def check_evaluation(config: Config) -> None:
    """See to it, before a training, that its draft can be evaluated behind it. Raises SettingError, CacheError."""
    read_throughput_table(config.evaluate.throughput_table, least_tokens=1 + config.draft.block_size)
    with open_reader(config.cache) as reader:
        if not len(reader.split_indices("validation")):
            raise SettingError(
                f"{config.cache.path}: the cache has no validation split, on which the draft could be evaluated; train "
                "with --no-evaluate, or extract anew with a larger data.validation_fraction"
            )


def evaluate_draft(config: Config, *, draft_dir: Path) -> Evaluation:
    """Score the draft in `draft_dir`, as servers would load it, on the validation split."""
    model, reader = open_draft(config, draft_dir=draft_dir)
    block_size = int(model.config.block_size)
    table = read_throughput_table(config.evaluate.throughput_table, least_tokens=1 + block_size)
    reader.plan_reads(evaluated_indices(config, reader))
    ranks = Ranks(device=choose_device(config.train.device))
    module = DSparkTrainerModule(model.to(ranks.device), **objective_arguments(config.objective))
    scores = _score_split(config, module, reader=reader, ranks=ranks)
    return evaluate_fully(
        scores,
        block_size=block_size,
        origin=_origin_of(config, reader),
        table=table,
        weights_digest=digest_draft(draft_dir),
        computed_in=config.train.dtype,
    )


def is_evaluation_of(evaluation: Evaluation, config: Config, *, draft_dir: Path) -> bool:
    """Whether `evaluate_draft` would measure these numbers again: same weights, same blocks, same table."""
    check_draft_folder(draft_dir)
    reader, scheduling = open_reader(config.cache), evaluation.scheduling
    table = read_throughput_table(config.evaluate.throughput_table, least_tokens=1 + evaluation.block_size)
    return (
        evaluation.weights_digest == digest_draft(draft_dir)
        and evaluation.computed_in == config.train.dtype
        and evaluation.origin == _origin_of(config, reader)
        and evaluation.num_samples == len(evaluated_indices(config, reader))
        and (scheduling is None or scheduling.outlook.throughput == table)
    )


def _origin_of(config: Config, reader: CacheReader) -> Origin:
    return Origin(
        cache_digest=reader.identity.digest(), num_anchors=config.evaluate.num_anchors, seed=config.evaluate.seed
    )


def save_evaluation(evaluation: Evaluation, *, file: Path, draft_dir: Path) -> None:
    """Write the evaluation's file, and the draft's calibration where there is one."""
    if evaluation.scheduling is not None:
        write_calibration(draft_dir, evaluation.scheduling.calibration)
    write_evaluation(file, evaluation)


def open_draft(
    config: Config, *, draft_dir: Path, dtype: torch.dtype = torch.float32
) -> tuple[Qwen3DSparkModel, CacheReader]:
    """The draft in `draft_dir`, and the config's cache with the layers that it sees. Raises SettingError."""
    model = read_draft(draft_dir, dtype=dtype)
    _check_same_target(model, open_reader(config.cache), draft_dir=draft_dir)
    return model, open_cache(config, layers=tuple(model.config.target_layer_ids))


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
) -> list[tuple[int, SlotScores]]:
    """Scores of the validation split by sample id, on rank 0; each rank scores its share of the samples.

    Raises StopAskedError once a rank was asked to stop.
    """
    own = list(_iterate_scores(config, module, reader=reader, ranks=ranks, stop=stop or StopRequest()))
    return sorted((scored for part in ranks.gather(own) for scored in part), key=itemgetter(0))


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
    meter = Meter(logger, "measuring", total=len(own), unit="conversations")
    for batch in chain(batches, fill):
        stop.check(ranks)
        with compute_dtype(ranks.device, config.train.dtype):
            scores = module.score(**gather_batch(reader, batch, device=ranks.device))
        for sample_id in batch.sample_ids:  # one, or none in an empty batch
            yield sample_id, _checked(_to_cpu(scores), sample_id=sample_id)
            meter.advance()
    module.train(was_training)


def _checked(scores: SlotScores, *, sample_id: int) -> SlotScores:
    """The scores, if they are numbers. Raises NonFiniteScoreError."""
    if not bool(scores.cross_entropy.isfinite().all()):
        raise NonFiniteScoreError(
            f"sample {sample_id}: the draft's cross-entropy is NaN or infinite; its weights are broken, or the cached "
            "states are: see grad_norm in metrics.jsonl, lower train.lr in a new train.run_dir, or run dspark verify"
        )
    return scores


def _to_cpu(scores: SlotScores) -> SlotScores:
    tensors = {field.name: getattr(scores, field.name) for field in fields(scores)}
    return replace(scores, **{name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None})
