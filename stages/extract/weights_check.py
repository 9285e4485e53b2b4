"""Whether the target in memory is the one in its files: every number used, and read as what it is.

transformers fills what files lack with random numbers, leaves out what it has no place for, and casts 8-bit weights
to floats without their scales where it does not know how a model was quantised. A cache of any of these would be
silently wrong, so each is refused.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.extract.model_files import TargetError, list_weights, read_header, read_json
from stages.target_config import open_text_config, read_field

FLOATS = {"F64", "F32", "F16", "BF16"}
ADVICE = "name the model in its own precision (bfloat16), or one quantised in a way that transformers applies"

_QUANTISATION_KEY = re.compile(r"quant|^compression_config$")
_QUANTISED_TYPE = re.compile(r"F[468]_|F[468]$")
_SCALE = re.compile(
    r"(^|[._])(scales?|scale_inv|scale_\d|scaling_factor|q?zeros|zero_point|qweight|packed|absmax|g_idx)$"
)

# Tensors that sound models carry and that a causal language model does not use.
_HARMLESS = (
    re.compile(r"(^|\.)(mtp|nextn|eh_proj|enorm|hnorm|mtp_\w+)(\.|$)|nextn_predict"),  # prediction of several tokens
    re.compile(r"(^|\.)(\w*inv_freq|(cos|sin)_cached)$"),  # of ropes, computed today
    re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.(bias|masked_bias|mask)$"),  # causal masks
    re.compile(r"(^|\.)position_ids$|(^|\.)(num_batches_tracked)$"),
)
_OTHER_SENSES = re.compile(
    r"(^|\.)(visual|vision\w*|vit|image_\w+|img_\w+|video\w*|audio\w*|speech\w*|multi_modal_\w+|multimodal_\w+|mm_\w+"
    r"|embed_(vision|audio|image)\w*|patch_\w+|qformer|resampler|perceiver\w*|talker|token2wav|code2wav|siglip\w*)(\.|$)"
)
_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.(\d+)\.")
_OF_PREDICTION = re.compile(r"(eh_proj|enorm|hnorm|shared_head|nextn\w*|mtp\w*)(\.|$)")  # of several tokens

_CACHE_SCALE = re.compile(r"\.(k|v|kv)_(scale|zero_point)$")  # of a server's cache of 8-bit keys and values

logger = logging.getLogger(__name__)


def check_files(folder: Path, *, config: Any, model: Any) -> None:
    """Refuse, by config and headers alone, files whose numbers transformers would not read as what they are.

    `model`: built from the config, without weights. A folder without weights is not looked into. Raises TargetError.
    """
    method = find_quantisation(folder, config)
    if method is not None:
        if not _is_applied(config):
            raise TargetError(
                f"{folder}: is quantised ({method}) in a way that transformers does not apply, so its weights would be "
                f"read without their scales; {ADVICE}"
            )
        return
    tails = {name.rsplit(".", 1)[-1] for name in model.state_dict()}
    for file in list_weights(folder) if any(folder.glob("*.safetensors")) else []:
        for name, entry in read_header(file)[1].items():
            tail = name.rsplit(".", 1)[-1]
            is_packed = entry["dtype"] not in FLOATS and tail.endswith("weight")
            if _QUANTISED_TYPE.match(entry["dtype"]) or is_packed or (_is_scale(name) and tail not in tails):
                raise TargetError(
                    f"{file}: {name} ({entry['dtype']}) is a quantised weight or a scale of one, but config.json names "
                    f"no quantisation; {ADVICE}"
                )


def _is_scale(name: str) -> bool:
    return _SCALE.search(name) is not None and _CACHE_SCALE.search(name) is None


def find_quantisation(folder: Path, config: Any) -> str | None:
    """What config.json or a file beside it names as the weights' quantisation; None where nothing does."""
    for fields in (read_json(folder / "config.json"), _plain(config), _plain(open_text_config(config))):
        for key, value in fields.items():
            if _QUANTISATION_KEY.search(key) and isinstance(value, dict) and value:
                named = value.get("quant_algo") or value.get("quant_method") or value.get("format")
                return f"{key} in config.json" + (f": {named}" if named else "")
    return next((file.name for file in sorted(folder.glob("*quant*.json"))), None)


def _plain(config: Any) -> dict[str, Any]:
    return {"quantization_config": read_field(config, "quantization_config")}


def _is_applied(config: Any) -> bool:
    """Whether transformers knows the method that the config names."""
    from transformers.quantizers import AutoHfQuantizer

    fields = read_field(config, "quantization_config") or read_field(open_text_config(config), "quantization_config")
    try:
        return bool(fields) and bool(AutoHfQuantizer.supports_quant_method(fields))
    except Exception:  # no method in it, or a dict of another kind
        return False


def check_loaded(report: dict[str, Any], *, model: Any, folder: Path) -> None:
    """Refuse a model that was not loaded whole. `report`: what transformers says of the loading. Raises TargetError."""
    missing = sorted({str(name) for kind in ("missing_keys", "mismatched_keys") for name in report.get(kind, ())})
    if missing:
        raise TargetError(
            f"{folder}: {len(missing)} tensors that config.json asks for are missing or have another shape, the first "
            f"of them {', '.join(missing[:3])}; config.json and the weights do not belong together, or a file is cut"
        )
    method = find_quantisation(folder, model.config)
    if method is not None and read_field(model, "hf_quantizer") is None:
        raise TargetError(
            f"{folder}: is quantised ({method}), and transformers did not keep it as it is quantised: on this device, "
            f"or as the config asks, it leaves it out or turns the weights into plain ones; {ADVICE}, or use a device "
            "that it is made for"
        )
    unused = sorted(str(name) for name in report.get("unexpected_keys", ()))
    scales = [name for name in unused if _is_scale(name)]
    if scales:
        raise TargetError(
            f"{folder}: {len(scales)} scales of quantised weights are not used, the first of them "
            f"{', '.join(scales[:3])}; the weights would be read without them; {ADVICE}"
        )
    unknown = list(find_unknown(unused, model=model))
    if unknown:
        raise TargetError(
            f"{folder}: {len(unknown)} tensors have no place in {type(model).__name__}, the first of them "
            f"{', '.join(unknown[:3])}; config.json and the weights do not belong together, or this version of "
            "transformers does not know the model; leave out of the files what the model does not need"
        )
    if unused:
        logger.info("%s: %d tensors are not used, the first of them %s", folder, len(unused), ", ".join(unused[:3]))


def find_unknown(unused: Iterable[str], *, model: Any) -> Iterable[str]:
    """Those of the unused tensors that no sound model is known to carry.

    Known are: layers after the last one that predict further tokens, which their own projections tell from layers that
    config.json leaves out of the stack; buffers that are computed today, the head of a
    model whose head is its embedding, and towers of other senses where the text stack alone was loaded.
    """
    text = open_text_config(model.config)
    num_layers, is_tied = read_field(text, "num_hidden_layers"), read_field(text, "tie_word_embeddings")
    unused = list(unused)
    layers = {name: layer for name in unused if (layer := _LAYER.search(name)) is not None}
    beyond = {
        name[: layer.end()]
        for name, layer in layers.items()
        if num_layers is not None and int(layer[3]) >= num_layers and _OF_PREDICTION.match(name, layer.end())
    }
    for name in unused:
        if _CACHE_SCALE.search(name):
            continue
        is_beyond = name in layers and name[: layers[name].end()] in beyond
        is_head = bool(is_tied) and name.endswith(("lm_head.weight", "embed_out.weight", "output.weight"))
        if not (is_beyond or is_head or _OTHER_SENSES.search(name) or any(kind.search(name) for kind in _HARMLESS)):
            yield name
