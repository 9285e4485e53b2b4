"""Config sections of stage two: `[draft]`, `[objective]`, `[train]`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.section import Section

AveragingFactor = Annotated[float, Field(ge=0, lt=1)]


class DraftSection(Section):
    """The draft model; what is not named here it takes from the target."""

    num_layers: int = Field(default=5, ge=1)
    """Decoder layers of the draft."""
    block_size: int = Field(default=7, ge=1)
    """Tokens K that one draft pass proposes."""
    num_anchors: int = Field(default=512, ge=1)
    """Blocks that are trained in a sample at most."""
    target_layer_ids: tuple[int, ...] | None = None
    """Target layers that the draft sees, a subset of the cache's. Default: all that the cache stores."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """MLP width. Default: the target's."""
    mask_token_id: int | None = None
    """Id at the slots to be predicted. Default: see the README, "Mask token"."""
    markov_rank: int = Field(default=256, ge=0)
    """Rank of the Markov head; 0 trains DFlash, without one."""
    markov_head_type: Literal["vanilla", "gated", "rnn"] = "vanilla"
    """Form of the Markov head."""
    enable_confidence_head: bool = True
    """Train the head that predicts acceptance."""
    confidence_head_with_markov: bool = True
    """Let the confidence head see the previous token's Markov embedding."""
    init_from: Path | None = None
    """Draft folder or checkpoint whose weights the draft starts from: same target, layers and shapes, but it may have
    fewer layers, and no Markov or confidence head. Default: random weights."""


class ObjectiveSection(Section):
    """Weights of the loss terms (DSpark paper, section on training)."""

    loss_decay_gamma: float | None = Field(default=4.0, gt=0)
    """Slot k weighs exp(-k/gamma). Write `inf` in TOML for equal weights."""
    ce_loss_alpha: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy against the data's tokens."""
    l1_loss_alpha: float = Field(default=0.9, ge=0, allow_inf_nan=False)
    """Weight of the L1 distance between draft and target distribution."""
    confidence_head_alpha: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the confidence head's binary cross-entropy."""

    @model_validator(mode="after")
    def _check_alphas(self) -> Self:
        if self.ce_loss_alpha == self.l1_loss_alpha == self.confidence_head_alpha == 0:
            raise ValueError(
                "ce_loss_alpha, l1_loss_alpha and confidence_head_alpha are all 0, so that nothing is trained; "
                "give at least one of them a weight"
            )
        return self


class TrainSection(Section):
    """The optimisation."""

    run_dir: Path = Path("runs/train")
    """Folder of checkpoints, metrics and the resolved config."""
    epochs: int = Field(default=10, ge=1)
    """Passes over the training split."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps at most, whatever `epochs` says; the schedule ends there."""
    global_batch_size: int = Field(default=512, ge=1)
    """Samples of one optimizer step."""
    max_batch_tokens: int = Field(default=4096, ge=1)
    """Tokens of one packed micro-batch; a longer sample goes alone."""
    lr: float = Field(default=6e-4, gt=0, le=1e6, allow_inf_nan=False)
    """Peak learning rate of AdamW."""
    betas: tuple[AveragingFactor, AveragingFactor] = (0.9, 0.95)
    """AdamW's averaging factors, from 0 to below 1."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """AdamW's decoupled weight decay."""
    warmup_fraction: float = Field(default=0.04, ge=0, le=1)
    """Share of the steps with linearly rising learning rate; cosine to zero follows."""
    clip_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Norm that the gradient is clipped to."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype; master weights and optimizer are float32 in either case."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How torchrun's processes train together: `ddp` (whole weights on each), `fsdp` (weights, gradients and optimizer
    sharded). `auto`: ddp where there are several. Free to change when a run is continued, and so is their number."""
    compile: bool = False
    """Compile the draft's layers with torch.compile; needs a C++ compiler, on CUDA triton."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds initial weights, order and anchors."""
    shuffle_window: int | None = Field(default=None, ge=0)
    """Shards whose samples are shuffled together, so that each is read in one go; 0: the whole epoch. Default: 4 for a
    cache at an address, 0 for a local one."""
    validate_every: int | None = Field(default=None, ge=1)
    """Steps between validations on the held-out split. Default: once an epoch, and at the end."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints; one is also written at the end."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints to keep."""
