"""A trained draft as a folder for servers, in one of two forms, written whole or not at all.

`dspark`       the form of the published Qwen3 DSpark drafts (deepseek-ai/DeepSpec): a flat `config.json`. What
               `RUN/draft` is; this project reads it back.
`speculators`  the form of vllm-project/speculators 0.9.0 (`DSparkSpeculatorConfig`, `DSparkDraftModel`), which vLLM's
               reader of such checkpoints takes: the backbone's config inside `transformer_layer_config`, the rest
               beside it. The tensors have the same names and meaning in both.

Layer ids differ: here, and in the first form, k is the output of block k; speculators counts the inputs of blocks, so
that its id is k + 1.
"""

import glob
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import Qwen3Config

from stages.errors import StageError
from stages.target_head import TARGET_TENSORS
from stages.train.checkpoint import publishing
from stages.train.draft_files import write_draft_files
from stages.train.model import BIAS_IN_SCALE, Qwen3DSparkModel, config_fields
from storage.temps import is_running, remove_stale_temps, temp_path

Form = Literal["dspark", "speculators"]
FORMS: tuple[Form, ...] = ("dspark", "speculators")
SPECULATORS_VERSION = "0.9.0"  # the release whose layout is written
CARD_FILE = "README.md"
W1, W2 = "markov_head.markov_w1.weight", "markov_head.markov_w2.weight"

# Fields of the draft that both forms have under the same name.
_COMMON_FIELDS = (
    "block_size", "mask_token_id", "sample_from_anchor", "markov_rank", "markov_head_type", "enable_confidence_head",
    "confidence_head_with_markov",
)  # fmt: skip
# Fields of the first form that the second spells otherwise, or has no use for.
_DSPARK_FIELDS = (*_COMMON_FIELDS, "architectures", "target_layer_ids", "num_target_layers", "num_anchors")
_LOGIT_FIELDS = ("logit_scale", "final_logit_softcapping")


class ExportError(StageError, ValueError):
    """The draft cannot be written in the form that was asked for, or not to that place."""


@dataclass(frozen=True, kw_only=True)
class ServedTarget:
    """The target as a server is told of it: hub id or path, and `architectures` of its config.json where known.

    `is_from_hub`: a name that looks like a hub id is known to be one, not a folder of another machine or another day.
    """

    name: str
    architectures: tuple[str, ...] = ()
    is_from_hub: bool = False

    def __post_init__(self) -> None:
        """Raises ExportError for a name with characters that would break the lines of a card or a command."""
        if not self.name.isprintable():
            raise ExportError(
                f"the target's name: expected printable characters, got {self.name!r}; give --target with the hub id "
                "or path that servers load"
            )


def dspark_fields(config: Qwen3Config, *, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` of the `dspark` form, every field written out; it belongs to the tensors of `export_weights`."""
    fields = config_fields(config, dtype=dtype)
    if not config.markov_rank:
        fields |= {"markov_rank": 1, "markov_head_type": "vanilla"}
    if _bias_scale(config) is not None:
        fields[BIAS_IN_SCALE] = True
    return fields


def speculators_fields(config: Qwen3Config, *, target: ServedTarget, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` of the `speculators` form, every field written out. Raises ExportError for what it cannot say."""
    _check_expressible(config)
    fields = dspark_fields(config, dtype=dtype)
    common = {name: fields[name] for name in _COMMON_FIELDS}
    backbone = {name: value for name, value in fields.items() if name not in _DSPARK_FIELDS}
    return {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": "dspark",
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": fields["block_size"],  # the anchor's slot proposes a token too
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": target.name, "architectures": list(target.architectures)},
        },
        "transformer_layer_config": backbone,
        **common,
        "aux_hidden_state_layer_ids": [layer + 1 for layer in fields["target_layer_ids"]],
        "target_hidden_size": fields["hidden_size"],
        "draft_vocab_size": fields["vocab_size"],  # the whole vocabulary: no d2t, no t2d
        # All layers see their block in both directions. A reader that knows one flag for all takes this one.
        "sliding_window_non_causal": True,
        "tie_word_embeddings": False,
        "dtype": fields["dtype"],
    }


def export_weights(
    model: Qwen3DSparkModel, *, dtype: torch.dtype, with_target_weights: bool
) -> dict[str, torch.Tensor]:
    """The draft's tensors by name, in `dtype`; one that is embedding and head as the embedding alone.

    A draft without a Markov head gets one of rank 1 that adds nothing, since vLLM and SGLang load no other. Where the
    target's logits are scaled, but not soft-capped, the bias is divided by the scale: training computes
    scale·head + W2·e, vLLM scale·(head + W2·e). Raises ExportError where a value does not fit the dtype.
    """
    left_out = () if with_target_weights else TARGET_TENSORS
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters() if name not in left_out}
    scale = _bias_scale(model.config)
    if not model.config.markov_rank:
        tensors |= dict.fromkeys((W1, W2), torch.zeros(model.config.vocab_size, 1))
    elif scale is not None:
        tensors[W2] = tensors[W2].float() / scale
    weights = {name: tensor.to("cpu", dtype, copy=True).contiguous() for name, tensor in tensors.items()}
    broken = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ExportError(
            f"not finite in {_dtype_name(dtype)}: {', '.join(broken)}; export as bfloat16 or float32, or another "
            "checkpoint"
        )
    return weights


def write_export(
    out: Path, *, fields: dict[str, Any], weights: dict[str, torch.Tensor], texts: Mapping[str, str]
) -> None:
    """Write the folder `out` whole or not at all, with the files `texts` (name to content) beside the draft.

    Raises ExportError, also where there is something already.
    """
    if out.exists() or out.is_symlink():
        raise ExportError(f"{out}: exists already; name a new folder")
    partial = temp_path(out)
    try:
        remove_stale_temps([out.parent])
        _remove_earlier_partials(out)
        with publishing(partial, out):
            write_draft_files(partial, fields=fields, weights=weights)
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{out}: cannot write: {error}; nothing of it is left. Free some space, or name another folder"
        ) from error


def _remove_earlier_partials(out: Path) -> None:
    """What killed exports of earlier versions left: its name says whose it was."""
    for partial in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        owner = partial.name.removesuffix(".partial").rpartition(".")[2]
        if owner.isdigit() and not is_running(int(owner)):
            shutil.rmtree(partial, ignore_errors=True)


def _bias_scale(config: Qwen3Config) -> float | None:
    """What servers multiply the Markov bias by and training does not, where dividing by it undoes that."""
    scale: float | None = getattr(config, "logit_scale", None)
    return scale if scale and getattr(config, "final_logit_softcapping", None) is None else None


def _check_expressible(config: Qwen3Config) -> None:
    """The library multiplies a slot's state by the head and adds the Markov bias, and does nothing else to it."""
    given = [f"{name} {value}" for name in _LOGIT_FIELDS if (value := getattr(config, name, None)) is not None]
    if given:
        raise ExportError(
            f"the speculators form has no place for the target's {' and '.join(given)}, without which the draft's "
            "logits are others; use --format dspark"
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
