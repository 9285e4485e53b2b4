"""What the processes of a training, its ranks, do together. torchrun starts them; without it there is one, alone.

Each rank has its own micro-batches of a step, equally many. Sums and gradients are added up over the ranks, never
averaged, so a step is that of one process with all the micro-batches. Rank 0 reads and writes the run's folder.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from stages.device import choose_device
from stages.errors import SettingError, StageError
from stages.torchrun import read_ranks
from stages.train.module import DSparkTrainerModule
from stages.train.settings import TrainSection

# The longest that a rank waits for another: while rank 0 writes a checkpoint, evaluates a trial of a sweep, or fetches
# a shard, or while a rank computes its last shard of an extraction. A hung rank is given up after it (assumption).
PATIENCE = timedelta(minutes=30)

CPU = torch.device("cpu")

T = TypeVar("T")

logger = logging.getLogger(__name__)


class RankError(StageError, RuntimeError):
    """Another rank has failed, or does not answer."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of a training. Alone, every operation is the identity."""

    device: torch.device = CPU
    rank: int = 0
    world: int = 1
    is_joined: bool = False
    """Whether there is a process group. One process can have one too: then it is sharded over itself."""

    @property
    def is_first(self) -> bool:
        """Whether this rank reads and writes the run's folder."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's sum over all ranks, in place."""
        if self.is_joined:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's values, in place."""
        if self.is_joined:
            dist.broadcast(tensor, src=0)
        return tensor

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns, or raises, on rank 0, where alone it is called. Other ranks raise RankError."""
        if not self.is_joined:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except Exception as error:
                dist.broadcast_object_list([None, f"{error}"], src=0)
                raise
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise RankError(f"rank 0 has failed: {outcome[1]}")
        return cast(T, outcome[0])

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in their order, on rank 0; nothing on the others. They travel pickled."""
        if not self.is_joined:
            return [value]
        values: list[Any] | None = [None] * self.world if self.is_first else None
        dist.gather_object(value, values, dst=0)
        return values or []


ALONE = Ranks()


@contextmanager
def join_ranks(train: TrainSection) -> Iterator[Ranks]:
    """This process's place among those that torchrun started; the process group lives as long as the body.

    Raises SettingError for an environment or a device that does not fit, RankError when another rank has gone.
    """
    rank, world = read_ranks()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if os.environ.get("MASTER_PORT") == "0":  # torchrun's own store takes any free port, but tells nobody which
        missing.append("MASTER_PORT but 0")
    if missing and train.parallel != "auto":
        raise SettingError(
            f'train.parallel: "{train.parallel}" is for processes that torchrun starts: '
            "torchrun --nproc-per-node 8 -m pipeline.cli train ...; without it write auto"
        )
    if missing and world > 1:
        raise SettingError(
            f"WORLD_SIZE = {world} in the environment, but no {', '.join(missing)}: start with torchrun, which on one "
            "machine finds a port by --standalone, or unset WORLD_SIZE"
        )
    device = choose_device(train.device)
    if world == 1 and train.parallel == "auto":
        yield Ranks(device=device)
        return
    _check_own_device(train.device, device, world=world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE, rank=rank, world_size=world)
        logger.info("rank %d of %d on %s", rank, world, device)
        yield Ranks(device=device, rank=rank, world=world, is_joined=True)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RankError(
            f"rank {rank}: another rank has ended or does not answer; what it printed says why. Run the same command "
            f"again to continue from the last checkpoint ({error})"
        ) from error
    # Not after an error: to leave together, all ranks must still be there.
    dist.destroy_process_group()


def wrap(module: DSparkTrainerModule, *, ranks: Ranks, train: TrainSection) -> nn.Module:
    """The module on the rank's device, in the form that is trained: its gradients are those of all ranks, summed.

    With FSDP the parameters are replaced, so the optimizer is made after this. Raises SettingError.
    """
    if train.dtype == "bfloat16":
        module.draft_model.keep_target_head_in(torch.bfloat16)
    if train.compile:
        _check_compiler(ranks.device)
    for layer in module.draft_model.layers:
        _prepare_layer(layer, compiled=train.compile, checkpointed=train.activation_checkpointing)
    if ranks.is_joined and train.parallel == "fsdp":
        _shard(module, ranks=ranks, dtype=train.dtype)
        return module
    module.to(ranks.device)
    if not ranks.is_joined:
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases have another name for broadcast_buffers
        wrapped = DistributedDataParallel(
            module,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            broadcast_buffers=False,  # they are constants
            gradient_as_bucket_view=True,
        )
    wrapped.register_comm_hook(None, _sum_gradients)
    return wrapped


def unwrap(module: nn.Module) -> DSparkTrainerModule:
    """The trainer module in what `wrap` returned."""
    return cast(DSparkTrainerModule, module.module if isinstance(module, DistributedDataParallel) else module)


def last_backward(module: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Around forward and backward of a micro-batch: only those of the step's last one reduce gradients."""
    if isinstance(module, DistributedDataParallel):
        return nullcontext() if is_last else module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
        module.set_is_last_backward(is_last)
    return nullcontext()


def reshard(module: nn.Module) -> None:
    """Give every module of an FSDP model its sharded parameters back: a forward without a backward keeps whole ones."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together, which all ranks must ask for; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that all ranks have whole, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _check_own_device(name: str, device: torch.device, *, world: int) -> None:
    """Ranks of one machine that name the same CUDA device would wait for each other for ever."""
    if device.type == "cuda" and ":" in name and int(os.environ.get("LOCAL_WORLD_SIZE", world)) > 1:
        raise SettingError(f"train.device: {name} would be that of every rank of a machine; write auto or cuda")


def _check_compiler(device: torch.device) -> None:
    """Refuse train.compile where torch.compile could make no code. Raises SettingError."""
    import importlib.util
    import shutil

    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise SettingError("train.compile: needs triton, which is not installed here; install it, or set it to false")
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise SettingError(
            f"train.compile: needs a C++ compiler on a CPU, and there is no {compiler} here; install one, name it in "
            "the environment variable CXX, or set train.compile to false"
        )


def _prepare_layer(layer: nn.Module, *, compiled: bool, checkpointed: bool) -> None:
    """Change how the layer's forward runs, under the hooks of FSDP; parameters and their names stay."""
    forward = layer.forward
    if compiled:  # lengths differ from batch to batch
        forward = torch.compile(forward, dynamic=True)
    if checkpointed:
        plain = forward

        def forward(*arguments: Any, **named: Any) -> Any:
            # Nothing in a layer is random, so there is no generator's state to restore.
            return torch.utils.checkpoint.checkpoint(
                plain, *arguments, use_reentrant=False, preserve_rng_state=False, **named
            )

    if compiled or checkpointed:
        layer.forward = forward


def _shard(module: DSparkTrainerModule, *, ranks: Ranks, dtype: str) -> None:
    """FSDP2: each layer a unit, the rest another. The target's embedding and head are frozen, and whole on each rank.

    For bfloat16, the layers' weights are gathered in it and their gradients summed in float32. The small rest, whose
    embedding and norms would lose by it, is gathered in float32. Autocast stays on: the residual stream is float32,
    and inputs are cast where a product needs it, as with one process.
    """
    model = module.draft_model
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    for parameter in frozen:
        parameter.data = parameter.data.to(ranks.device)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(ranks.device.type, (ranks.world,)),
        "ignored_params": frozen,
    }
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy, **options)
    fully_shard(module, **options)
    register_fsdp_forward_method(module, "score")
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            part.set_gradient_divide_factor(1.0)


def _sum_gradients(_state: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's reduction of a bucket: the sum, where its own would be the mean."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return cast("torch.futures.Future[torch.Tensor]", future.then(lambda done: done.value()[0]))
