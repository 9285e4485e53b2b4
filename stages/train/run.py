"""Stage two from end to end: a cache in, a trained draft out."""

import fcntl
import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stages.errors import SettingError
from stages.train.checkpoint import (
    CheckpointError,
    TrainerState,
    check_folder,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_draft,
)
from stages.train.config import build_draft_config
from stages.train.feed import BatchFeed
from stages.train.loop import Stepper, Validate, run_steps
from stages.train.metrics import MetricsLog
from stages.train.model import Qwen3DSparkModel
from stages.train.module import DSparkTrainerModule
from stages.train.order import plan_schedule, resolve_window
from stages.train.parallel import ALONE, Ranks, wrap
from stages.train.settings import DraftSection, ObjectiveSection, TrainSection
from storage import CacheReader

# Settings that may differ between a run and its resume: they change no weight, or only in how a sum is rounded, as
# another device or another number of ranks does.
FREE_TRAIN_KEYS = {
    "run_dir", "device", "parallel", "compile", "activation_checkpointing",
    "validate_every", "checkpoint_every", "keep_last",
}  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where the draft lies, how many steps made it, and whether this call did any of them."""

    draft_dir: Path
    num_steps: int
    was_complete: bool


def build_draft(draft: DraftSection, reader: CacheReader, *, seed: int) -> Qwen3DSparkModel:
    """A new draft for the cache's target, with the target's embedding and head in place.

    Initial weights are a function of the seed and of the draft's config. Raises SettingError, and CacheError when a
    file of the target is not the one that the cache was made with.
    """
    from transformers import AutoConfig

    target_dir = reader.check_target("config.json", "head.safetensors")
    try:
        target_config = AutoConfig.from_pretrained(target_dir)
    except (OSError, ValueError) as error:
        raise SettingError(f"{target_dir}/config.json: this version of transformers cannot read it: {error}") from error
    config = build_draft_config(
        target_config,
        num_draft_layers=draft.num_layers,
        block_size=draft.block_size,
        target_layer_ids=reader.layers,
        mask_token_id=reader.manifest.header.mask_token_id if draft.mask_token_id is None else draft.mask_token_id,
        num_anchors=draft.num_anchors,
        markov_rank=draft.markov_rank,
        markov_head_type=draft.markov_head_type,
        enable_confidence_head=draft.enable_confidence_head,
        confidence_head_with_markov=draft.confidence_head_with_markov,
        intermediate_size=draft.intermediate_size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3DSparkModel(config)
    with safe_open(target_dir / "head.safetensors", framework="pt") as head:
        model.load_target_head(head.get_tensor("embed_tokens.weight"), head.get_tensor("lm_head.weight"))
    return model


def train(
    *,
    reader: CacheReader,
    draft: DraftSection,
    objective: ObjectiveSection,
    train: TrainSection,
    validate: Validate | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Train a draft, or finish the training that `train.run_dir` holds. All ranks call it with the same arguments.

    `reader` gives the layers that the draft sees. `validate` is called with the module at intervals, and what it
    returns is logged. The draft that servers load is written to RUN/draft when the last step is done.

    Raises SettingError for settings that do not fit the cache, CheckpointError for a run made from other settings and
    for a disk that is full, CacheError for a damaged cache, NonFiniteLossError, NothingSupervisedError.
    """
    # 1. The cache, the schedule, and what this run is made from.
    schedule = plan_schedule(train, num_samples=len(reader.split_indices("train")))
    train = resolve_window(train, is_remote=reader.is_remote)
    made_from = describe_inputs(reader, draft=draft, objective=objective, train=train)
    with ExitStack() as held:
        ranks.on_first(lambda: held.enter_context(_exclusive(train.run_dir)))
        # 2. Model, optimizer, and the newest checkpoint.
        model = build_draft(draft, reader, seed=train.seed)
        if train.dtype == "bfloat16":
            model.keep_target_head_in(torch.bfloat16)
        module = wrap(DSparkTrainerModule(model, **objective_arguments(objective)), ranks=ranks, train=train)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
        start = _resume(train.run_dir, made_from=made_from, model=model, optimizer=optimizer, ranks=ranks)
        draft_dir = train.run_dir / "draft"
        ranks.on_first(lambda: check_folder(draft_dir))
        if start == schedule.num_steps:  # written anew all the same: nothing says that the one there is whole
            save_draft(draft_dir, draft_model=model, dtype=getattr(torch, train.dtype), ranks=ranks)
            return TrainResult(draft_dir=draft_dir, num_steps=start, was_complete=True)
        # 3. Steps.
        if start:
            logger.info("continuing behind step %d of %d", start, schedule.num_steps)
        log = MetricsLog(train.run_dir, resume_step=start) if ranks.is_first else None
        try:
            stepper = Stepper(module=module, optimizer=optimizer, train=train, ranks=ranks)
            feed = BatchFeed(
                reader=reader, train=train, num_anchors=draft.num_anchors, device=ranks.device,
                rank=ranks.rank, world=ranks.world,
            )  # fmt: skip
            for done in run_steps(stepper, feed, schedule=schedule, start=start, log=log, validate=validate):
                if done % train.checkpoint_every == 0 or done == schedule.num_steps:
                    state = TrainerState(step=done, made_from=made_from)
                    save_checkpoint(
                        train.run_dir / "checkpoints",
                        state=state, draft_model=model, optimizer=optimizer, keep_last=train.keep_last,
                        ranks=ranks,
                    )  # fmt: skip
        finally:
            if log is not None:
                log.close()
        # 4. The draft that servers load.
        save_draft(draft_dir, draft_model=model, dtype=getattr(torch, train.dtype), ranks=ranks)
    return TrainResult(draft_dir=draft_dir, num_steps=schedule.num_steps, was_complete=False)


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
    knobs = {key: value for key, value in train.model_dump(mode="json").items() if key not in FREE_TRAIN_KEYS}
    return {
        "cache.identity": reader.identity.digest(),
        "cache.plan": reader.manifest.plan_digest,
        **{f"draft.{key}": value for key, value in draft.model_dump(mode="json").items()},
        **{f"objective.{key}": value for key, value in objective.model_dump(mode="json").items()},
        **{f"train.{key}": value for key, value in knobs.items()},
    }


def _resume(
    run_dir: Path,
    *,
    made_from: dict[str, Any],
    model: Qwen3DSparkModel,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> int:
    """Load the newest whole checkpoint, if there is one; the number of steps that are done. Rank 0 chooses for all."""
    found = ranks.on_first(lambda: _find_start(run_dir, made_from=made_from))
    if found is None:
        return 0
    folder, state = found
    load_checkpoint(folder, draft_model=model, optimizer=optimizer, ranks=ranks)
    return state.step


def _find_start(run_dir: Path, *, made_from: dict[str, Any]) -> tuple[Path, TrainerState] | None:
    """The checkpoint to continue from, if there is one. Raises CheckpointError for a run of other inputs."""
    found = find_checkpoint(run_dir / "checkpoints")
    if found is None:
        return None
    _, state = found
    keys = sorted(set(made_from) | set(state.made_from))
    differing = [key for key in keys if made_from.get(key) != state.made_from.get(key)]
    if differing:
        lines = [f"  {key}: the run has {state.made_from.get(key)}, now {made_from.get(key)}" for key in differing]
        raise CheckpointError(
            "\n".join([f"{run_dir} holds a run made from something else:", *lines])
            + "\nset train.run_dir to a new folder, or restore these settings to continue"
        )
    return found


@contextmanager
def _exclusive(run_dir: Path) -> Iterator[None]:
    """Keep a second training out of the run's folder. Raises CheckpointError while another process holds it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(
            f"{run_dir}: cannot be the folder of a run: {error.strerror}; set train.run_dir to a new folder"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise CheckpointError(f"another process is training in {run_dir}; set train.run_dir to a new folder") from error
    try:
        yield
    finally:
        os.close(descriptor)
