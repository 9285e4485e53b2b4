"""Stage two from end to end: a cache in, a trained draft out."""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config

from stages.errors import SettingError
from stages.rope import mixes_ropes
from stages.target_head import is_stored_once, read_head
from stages.target_shape import TargetShape, read_target_shape
from stages.train.checkpoint import (
    CheckpointError,
    TrainerState,
    check_folder,
    find_checkpoint,
    keep_head,
    load_checkpoint,
    save_checkpoint,
    save_draft,
)
from stages.train.config import build_draft_config
from stages.train.feed import BatchFeed
from stages.train.interrupt import StopRequest
from stages.train.loop import Stepper, run_steps
from stages.train.mask_token import choose_mask_token
from stages.train.meaning import differences
from stages.train.memory import check_memory, estimate_memory, free_memory, largest_batch
from stages.train.metrics import MetricsLog
from stages.train.model import Qwen3DSparkModel
from stages.train.module import DSparkTrainerModule
from stages.train.order import Schedule, plan_schedule, resolve_window
from stages.train.parallel import ALONE, Ranks, wrap
from stages.train.profiling import StepProfiler
from stages.train.settings import DraftSection, ObjectiveSection, TrainSection
from stages.train.validation import Validate
from stages.train.warm_start import digest_draft, load_initial_weights
from stages.whole_files import write_whole
from storage import CacheReader
from storage.errors import CacheError
from storage.locks import lock, open_lock, unlock

# Settings that may differ between a run and its resume: they change no weight, or only in how a sum is rounded, as
# another device or another number of ranks does.
FREE_TRAIN_KEYS = {
    "run_dir", "device", "parallel", "compile", "activation_checkpointing",
    "validate_every", "checkpoint_every", "keep_last",
}  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where the draft lies, how many steps are done, and whether this call did any of them.

    `was_stopped`: it was asked to stop. If that came before the last step, there is a checkpoint of what is done, and
    the same command continues; the draft is not written yet.
    """

    draft_dir: Path
    num_steps: int
    was_complete: bool
    was_stopped: bool = False


def plan_draft(draft: DraftSection, reader: CacheReader) -> Qwen3Config:
    """The config of a draft for the cache's target, whose files are checked.

    Raises SettingError, and CacheError when a file of the target is not the one that the cache was made with.
    """

    target_dir = reader.check_target("config.json", "head.safetensors")
    shape = _read_shape(target_dir, reader)
    _warn_of_mixed_ropes(reader, shape)
    return build_draft_config(
        shape,
        num_draft_layers=draft.num_layers,
        block_size=draft.block_size,
        target_layer_ids=reader.layers,
        mask_token_id=choose_mask_token(draft.mask_token_id, reader),
        num_anchors=draft.num_anchors,
        markov_rank=draft.markov_rank,
        markov_head_type=draft.markov_head_type,
        enable_confidence_head=draft.enable_confidence_head,
        confidence_head_with_markov=draft.confidence_head_with_markov,
        intermediate_size=draft.intermediate_size,
        max_length=reader.identity.max_length,
    )


def _read_shape(target_dir: Path, reader: CacheReader) -> TargetShape:
    """The target's shape. Raises SettingError where it is not that of the states in the cache."""
    shape, header = read_target_shape(target_dir), reader.manifest.header
    for name, expected in (
        ("hidden_size", header.hidden_size),
        ("num_layers", header.num_target_layers),
        ("vocab_size", header.vocab_size),
    ):
        if getattr(shape, name) != expected:
            raise SettingError(
                f"{target_dir}: {name} is {getattr(shape, name)}, but the cache holds states of a target with "
                f"{expected}; the folder was changed by hand: fetch the cache again"
            )
    return shape


def _warn_of_mixed_ropes(reader: CacheReader, shape: TargetShape) -> None:
    """Caches made before the target's rope was held to one set of frequencies do not name it."""
    is_named = "rope" in reader.manifest.header.provenance or reader.identity.imported_from is not None
    if not is_named and mixes_ropes(shape, max_length=reader.identity.max_length):
        logger.warning(
            "%s: an earlier version made it, which let each batch choose the target's rope: its states may depend on "
            "what was computed beside them; extract it anew",
            reader.path,
        )


def build_draft(
    draft: DraftSection, reader: CacheReader, *, seed: int, config: Qwen3Config | None = None
) -> Qwen3DSparkModel:
    """A new draft for the cache's target, with the target's embedding and head in place.

    Initial weights are a function of the seed and of the draft's config, or those of `draft.init_from`. `config` is
    `plan_draft`'s, if it is there already. Raises as that.
    """
    config = config or plan_draft(draft, reader)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3DSparkModel(config)
    model.load_target_head(*read_head(reader.target_dir / "head.safetensors"))
    if draft.init_from is not None:
        load_initial_weights(model, draft.init_from)
    return model


def train(  # noqa: PLR0913 (three sections, and what a caller joins to the training)
    *,
    reader: CacheReader,
    draft: DraftSection,
    objective: ObjectiveSection,
    train: TrainSection,
    validate: Validate | None = None,
    config_text: str | None = None,
    stop: StopRequest | None = None,
    profiled: bool = False,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Train a draft, or finish the training that `train.run_dir` holds. All ranks call it with the same arguments.

    `reader` gives the layers that the draft sees. `validate` measures the module at intervals, which is logged, and may
    give the training up, which is then ended as by `stop`. `config_text` goes to RUN/config.toml once nothing forbids
    the run. The draft that servers load is written to RUN/draft when the last step is done. Once `stop` is asked for,
    the step in progress is finished and a checkpoint written. `profiled`: a trace goes to RUN/profile.

    Raises SettingError for settings that do not fit the cache, CheckpointError for a run made from other settings and
    for a disk that is full, CacheError for a damaged cache, NonFiniteLossError, NothingSupervisedError.
    """
    # 1. The cache, the schedule, and what this run is made from.
    schedule = plan_schedule(train, num_samples=len(reader.split_indices("train")))
    train = resolve_window(train, is_remote=reader.is_remote)
    _check_source(draft, run_dir=train.run_dir)
    made_from = describe_inputs(reader, draft=draft, objective=objective, train=train)
    stop = stop or StopRequest()
    draft_dir, checkpoints = train.run_dir / "draft", train.run_dir / "checkpoints"
    with ExitStack() as opened:
        ranks.on_first(lambda: opened.enter_context(_exclusive(train.run_dir)))
        ranks.on_first(lambda: check_folder(draft_dir))
        # 2. The newest checkpoint, and whether what is left to do fits the device.
        folder, start = ranks.on_first(lambda: _find_start(train.run_dir, made_from=made_from))
        config = plan_draft(draft, reader)
        if start < schedule.num_steps:
            _check_memory(reader, train, schedule=schedule, config=config, ranks=ranks)
        ranks.on_first(lambda: _check_meaning(folder, config))
        ranks.on_first(lambda: _keep_config(train.run_dir, config_text))
        ranks.on_first(lambda: keep_head(train.run_dir, reader.target_dir / "head.safetensors"))
        # 3. Model and optimizer.
        model = build_draft(draft, reader, seed=train.seed, config=config)
        module = wrap(DSparkTrainerModule(model, **objective_arguments(objective)), ranks=ranks, train=train)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
        if folder is not None:
            load_checkpoint(folder, draft_model=model, optimizer=optimizer, ranks=ranks)
        # 4. Steps.
        if 0 < start < schedule.num_steps:
            logger.info("continuing behind step %d of %d", start, schedule.num_steps)
        log, profiler = _open_outputs(opened, train.run_dir, start=start, profiled=profiled, ranks=ranks)
        stepper = Stepper(module=module, optimizer=optimizer, train=train, ranks=ranks, stop=stop)
        feed = BatchFeed(
            reader=reader, train=train, num_anchors=draft.num_anchors, device=ranks.device,
            rank=ranks.rank, world=ranks.world,
        )  # fmt: skip

        def save(done: int) -> int:
            state = TrainerState(step=done, made_from=made_from)
            save_checkpoint(
                checkpoints, state=state, draft_model=model, optimizer=optimizer, keep_last=train.keep_last, ranks=ranks
            )
            return done

        done = saved = start
        for done in run_steps(
            stepper, feed, schedule=schedule, start=start, log=log, validate=validate, profiler=profiler
        ):
            if done % train.checkpoint_every == 0 or done == schedule.num_steps:
                saved = save(done)
        if done != saved:  # asked to stop in between
            saved = save(done)
        # 5. The draft that servers load; written anew for a run that was complete: nothing says that it is whole.
        if done == schedule.num_steps:
            save_draft(draft_dir, draft_model=model, dtype=getattr(torch, train.dtype), ranks=ranks)
        was_stopped = stop.agree(ranks)  # also while the last files were written
    if was_stopped:
        logger.info("%s", _describe_stop(stop, checkpoints, done=done, num_steps=schedule.num_steps))
    return TrainResult(
        draft_dir=draft_dir, num_steps=done, was_complete=start == schedule.num_steps, was_stopped=was_stopped
    )


def _keep_config(run_dir: Path, config_text: str | None) -> None:
    """Only now that nothing forbids the run: a refused one must leave the config of the one that is there."""
    if config_text is not None:
        write_whole(run_dir / "config.toml", config_text)


def _check_source(draft: DraftSection, *, run_dir: Path) -> None:
    """Refuse a start from what this run itself writes: it would not be found again. Raises SettingError."""
    if draft.init_from is not None and draft.init_from.resolve().is_relative_to(run_dir.resolve()):
        raise SettingError(
            f"draft.init_from: {draft.init_from} lies in train.run_dir, {run_dir}, which this training writes to; set "
            "train.run_dir to a new folder"
        )


def objective_arguments(objective: ObjectiveSection) -> dict[str, Any]:
    """`DSparkTrainerModule`'s keyword arguments; an infinite gamma means equal weights."""
    arguments = objective.model_dump()
    if arguments["loss_decay_gamma"] is not None and math.isinf(arguments["loss_decay_gamma"]):
        arguments["loss_decay_gamma"] = None
    return arguments


def describe_inputs(
    reader: CacheReader, *, draft: DraftSection, objective: ObjectiveSection, train: TrainSection
) -> dict[str, Any]:
    """Everything that a resumed run must have in common with the run that it continues, as plain JSON values."""
    model = draft.model_dump(mode="json")
    model["target_layer_ids"] = list(reader.layers)
    if draft.init_from is not None:  # what the weights are counts, not where they lie
        model["init_from"] = f"sha256 {digest_draft(draft.init_from)}"
    knobs = {key: value for key, value in train.model_dump(mode="json").items() if key not in FREE_TRAIN_KEYS}
    identity = reader.identity.model_dump(mode="json", exclude={"format_version"})  # the digest has it
    return {
        "cache.identity": reader.identity.digest(),
        **{f"cache.{key}": value for key, value in identity.items()},
        "cache.plan": reader.manifest.plan_digest,
        **{f"draft.{key}": value for key, value in model.items()},
        **{f"objective.{key}": value for key, value in objective.model_dump(mode="json").items()},
        **{f"train.{key}": value for key, value in knobs.items()},
    }


def _find_start(run_dir: Path, *, made_from: dict[str, Any]) -> tuple[Path | None, int]:
    """The newest whole checkpoint, if there is one, and the number of steps that are done. Raises CheckpointError."""
    found = find_checkpoint(run_dir / "checkpoints")
    if found is None:
        return None, 0
    folder, state = found
    keys = sorted(set(made_from) | set(state.made_from))
    differing = [key for key in keys if made_from.get(key) != state.made_from.get(key)]
    if differing:
        lines = [f"  {key}: the run has {state.made_from.get(key)}, now {made_from.get(key)}" for key in differing]
        raise CheckpointError(
            "\n".join([f"{run_dir} holds a run made from something else:", *lines])
            + "\nset train.run_dir to a new folder, or restore these settings to continue"
        )
    return folder, state.step


def _check_meaning(folder: Path | None, config: Qwen3Config) -> None:
    """Refuse to go on with weights that another version of this project gave another meaning."""
    lines = [] if folder is None else differences(Qwen3Config.from_pretrained(folder), config)
    if lines:
        raise CheckpointError(
            "\n".join([f"{folder}: was trained by another version, as another draft:", *lines])
            + "\nset train.run_dir to a new folder"
        )


def _check_memory(
    reader: CacheReader, train: TrainSection, *, schedule: Schedule, config: Qwen3Config, ranks: Ranks
) -> None:
    """Refuse a run whose least does not fit this rank's device. Raises SettingError."""
    device = ranks.device
    shape = largest_batch(reader, train, schedule=schedule, config=config, device=device)
    estimate = estimate_memory(
        config, shape, dtype=train.dtype, device=device, state_bytes=reader.dtype.itemsize,
        num_shards=ranks.world if train.parallel == "fsdp" else 1, recomputes=train.activation_checkpointing,
        is_tied=is_stored_once(reader.target_dir / "head.safetensors"),
    )  # fmt: skip
    check_memory(estimate, shape, free=free_memory(device), device=device)


def _open_outputs(
    opened: ExitStack, run_dir: Path, *, start: int, profiled: bool, ranks: Ranks
) -> tuple[MetricsLog | None, StepProfiler | None]:
    """The log and, if asked for, the profiler, closed with `opened`. Both are rank 0's."""
    if not ranks.is_first:
        return None, None
    log = MetricsLog(run_dir, resume_step=start)
    opened.callback(log.close)
    profiler = opened.enter_context(StepProfiler(run_dir / "profile", device=ranks.device)) if profiled else None
    return log, profiler


def _describe_stop(stop: StopRequest, checkpoints: Path, *, done: int, num_steps: int) -> str:
    """The line that says how to go on."""
    by = f"stopped by {stop.asked_by or 'another rank'}"
    if stop.is_given_up:
        return f"{by} behind step {done} of {num_steps}, with a checkpoint in {checkpoints}"
    if done == num_steps:
        return f"{by} behind the last step: the draft is written; run the same command again for what follows it"
    if done == 0:
        return f"{by} before the first step: run the same command again to start"
    return f"{by} behind step {done} of {num_steps}: run the same command again to continue from {checkpoints}"


@contextmanager
def _exclusive(run_dir: Path) -> Iterator[None]:
    """Keep a second training out of the run's folder. Raises CheckpointError while another process holds it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{run_dir}: cannot be the folder of a run: {error.strerror}; set train.run_dir to a new folder"
        ) from error
    descriptor = _take_lock(run_dir)
    try:
        yield
    finally:
        unlock(descriptor)


def _take_lock(run_dir: Path) -> int:
    """The locked file, to be unlocked."""
    path = run_dir / ".lock"
    try:
        descriptor = open_lock(path)
        got = lock(descriptor, path)
    except CacheError as error:
        raise CheckpointError(str(error)) from error
    if got == "busy":
        unlock(descriptor)
        raise CheckpointError(f"another process is training in {run_dir}; set train.run_dir to a new folder")
    return descriptor
