"""The frozen target: its config, tokenizer and model, and its parts under the names of many architectures."""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from stages.extract.model_files import TargetError, first_line, read_json
from stages.extract.settings import TargetSection
from stages.extract.weights_check import check_files, check_loaded
from stages.rope import pin_rope
from stages.target_config import open_text_config, read_field
from stages.target_head import join_head
from stages.target_shape import SHAPE_FILE, parse_target_shape
from storage import CacheWriteError

NORM_NAMES = (
    "norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm", "norm_f", "embedding_norm", "layer_norm",
)  # fmt: skip
ONLY_DECODERS = "expected a decoder-only language model, whose tokens see earlier ones alone"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def load_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """The target's transformers config, whole. Raises TargetError."""
    from transformers import AutoConfig

    if not trust_remote_code and "auto_map" in (fields := read_json(folder / "config.json")):
        from transformers import CONFIG_MAPPING

        if fields.get("model_type") not in CONFIG_MAPPING:
            raise TargetError(
                f"{folder}/config.json: the model is Python code of its own repository; read that code, and if you "
                "trust it, set target.trust_remote_code = true"
            )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validators of configs raise families of their own
        raise TargetError(f"{folder}/config.json: {first_line(error)}") from error


def load_tokenizer(folder: Path, *, target: TargetSection, chat_template: Path | None) -> Any:
    """The target's tokenizer, with its chat template replaced where the config says so."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=target.trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exception for a broken tokenizer.json
        raise TargetError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TargetError(f"data.chat_template: {chat_template} cannot be read: {error}") from error
    return tokenizer


def eos_token_ids(folder: Path, config: Any) -> frozenset[int]:
    """End-of-turn ids of the target, from its generation config and its config."""
    found = [read_field(open_text_config(config), "eos_token_id")]
    file = folder / "generation_config.json"
    if file.is_file():
        found.append(read_json(file).get("eos_token_id"))
    flat: set[int] = set()
    for item in found:
        flat.update([item] if isinstance(item, int) else item or [])
    return frozenset(flat)


@dataclass(frozen=True, kw_only=True)
class TargetParts:
    """The modules of a loaded target that extraction touches."""

    model: Any
    decoder: Any
    blocks: Any
    embed_tokens: Any
    final_norm: Any
    lm_head: Any

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        device: torch.device = self.embed_tokens.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the target computes in."""
        dtype: torch.dtype = self.lm_head.weight.dtype
        return dtype


def load_target(
    folder: Path, *, target: TargetSection, device: torch.device, max_length: int | None = None
) -> TargetParts:
    """The target in evaluation mode on `device` (or as `target.device_map` spreads it). Raises TargetError.

    `max_length`: the longest text; a rope that depends on the length is held to that of such a text.
    """
    config = load_config(folder, trust_remote_code=target.trust_remote_code)
    try:
        model, report = choose_class(config, trust_remote_code=target.trust_remote_code).from_pretrained(
            folder,
            dtype=getattr(torch, target.dtype),
            attn_implementation=target.attn_implementation,
            device_map=target.device_map,
            trust_remote_code=target.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except TargetError:
        raise
    except Exception as error:  # missing weights, a class that does not exist, an attention that is not installed
        raise TargetError(f"{folder}: the target cannot be loaded: {first_line(error)}") from error
    check_loaded(report, model=model, folder=folder)
    if target.device_map is None:
        model.to(device)
    model.eval()
    if max_length is not None:
        pin_rope(model, max_length=max_length)
    return find_parts(model)


def build_skeleton(folder: Path, config: Any, *, target: TargetSection) -> TargetParts:
    """The target without weights, so that what cannot be loaded or cached is refused before anything is computed.

    Raises TargetError.
    """
    trust = target.trust_remote_code
    try:
        with torch.device("meta"):
            model = choose_class(config, trust_remote_code=trust).from_config(
                copy.deepcopy(config), trust_remote_code=trust, attn_implementation="eager", dtype=torch.bfloat16
            )
    except TargetError:
        raise
    except Exception as error:  # a config that does not fit its class, a package that is not installed
        raise TargetError(
            f"{folder}: the target cannot be built: {type(error).__name__}: {first_line(error)}"
        ) from error
    if target.attn_implementation == "sdpa" and read_field(model, "_supports_sdpa") is False:
        raise TargetError(
            f"target.attn_implementation: {type(model).__name__} does not compute its attention with sdpa; "
            'set target.attn_implementation = "eager"'
        )
    check_files(folder, config=config, model=model)
    return find_parts(model)


def choose_class(config: Any, *, trust_remote_code: bool) -> Any:
    """What loads the target: its text stack alone where transformers can, else the whole model that it is part of.

    Raises TargetError for what is no decoder.
    """
    import transformers

    if read_field(config, "is_encoder_decoder"):
        raise TargetError(f"{config.model_type}: {ONLY_DECODERS}, got an encoder and a decoder")
    remote = (read_field(config, "auto_map") or {}) if trust_remote_code else {}
    for name, mapping in (
        ("AutoModelForCausalLM", transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
        ("AutoModelForImageTextToText", transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        ("AutoModelForMultimodalLM", transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING),
    ):
        if name in remote or type(config) in mapping:
            return getattr(transformers, name)
    raise TargetError(
        f"{config.model_type}: transformers {transformers.__version__} has no language model class for it; name a "
        "causal language model, or a multimodal one with a text stack"
    )


def find_parts(model: Any) -> TargetParts:
    """Decoder stack, blocks, final norm, embedding and head, under whatever names the architecture gives them.

    Raises TargetError when one of them cannot be told.
    """
    num_layers = parse_target_shape(model.config).num_layers
    name = type(model).__name__
    try:
        embed_tokens, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError as error:
        raise TargetError(f"{name}: {ONLY_DECODERS}, got one whose embedding cannot be told") from error
    if not isinstance(getattr(embed_tokens, "weight", None), torch.Tensor):
        raise TargetError(f"{name}: its input embedding is no table of one row a token, which a draft shares")
    for decoder in model.modules():
        blocks = [
            child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == num_layers
        ]
        norm = next(
            (getattr(decoder, name) for name in NORM_NAMES if isinstance(getattr(decoder, name, None), nn.Module)), None
        )
        # The embedding tells the text stack from an image tower with as many blocks.
        if len(blocks) != 1 or norm is None or not any(module is embed_tokens for module in decoder.modules()):
            continue
        if lm_head is None:
            raise TargetError(f"{name} has no output embedding; a causal language model is needed")
        if getattr(lm_head, "bias", None) is not None:
            raise TargetError(f"{name}: lm_head has a bias, which the drafts that servers load have no place for")
        if any(read_field(module, "is_causal") is False for module in blocks[0].modules()):
            raise TargetError(f"{name}: {ONLY_DECODERS}, got attention to later tokens")
        return TargetParts(
            model=model,
            decoder=decoder,
            blocks=blocks[0],
            embed_tokens=embed_tokens,
            final_norm=norm,
            lm_head=lm_head,
        )
    raise TargetError(
        f"{name}: found no stack of {num_layers} blocks with a final norm beside it "
        f"(one of {', '.join(NORM_NAMES)}); this architecture is not supported yet"
    )


def write_target(destination: Path, *, folder: Path, parts: TargetParts, tokenizer: Any) -> None:
    """Fill the cache's `target/`: shape, config, tokenizer, and head.safetensors with embedding, head and final norm.

    An embedding that is the head too is stored once.
    """
    destination.mkdir(exist_ok=True)
    (destination / SHAPE_FILE).write_text(parse_target_shape(parts.model.config).render(), encoding="utf-8")
    shutil.copyfile(folder / "config.json", destination / "config.json")
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, destination / name)
    if not (destination / "tokenizer.json").is_file():  # made of older files, which no reader should have to know
        tokenizer.backend_tokenizer.save(str(destination / "tokenizer.json"))
    if isinstance(tokenizer.chat_template, str):
        (destination / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    tensors = {
        **join_head(parts.embed_tokens.weight, parts.lm_head.weight).tensors(),
        "norm.weight": parts.final_norm.weight,
        "norm.bias": getattr(parts.final_norm, "bias", None),
    }
    copies = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items() if tensor is not None
    }
    head = destination / "head.safetensors"
    try:
        save_file(copies, head)
        head.chmod(destination.stat().st_mode & 0o666)  # safetensors writes for the owner alone
    except SafetensorError as error:  # also what the system refuses
        raise CacheWriteError(f"{head}: cannot write: {error}; see to the disk and run extract again") from error
