"""The frozen target: where its files lie, what identifies it, and its parts under the names of many architectures."""

import hashlib
import json
import logging
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from stages.errors import StageError
from stages.extract.settings import TargetSection
from stages.rope import pin_rope
from stages.target_head import join_head
from storage import CacheWriteError

HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
CONFIG_KEYS_WITHOUT_MEANING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
SAMPLE_BYTES = (
    512  # read at the start, the middle and the end of every tensor: seconds for any model, whatever its size
)
NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm", "norm_f")
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

logger = logging.getLogger(__name__)


class TargetError(StageError, ValueError):
    """The target cannot be used: files missing, unknown architecture, layer ids out of range."""


def locate_target(target: TargetSection) -> Path:
    """The local folder of the target's files; a Hugging Face repository is downloaded once. Raises TargetError."""
    folder = Path(target.model)
    if not folder.is_dir():
        if target.model.count("/") != 1 or target.model.startswith((".", "/", "~")):
            raise TargetError(
                f"target.model: no folder {target.model!r}; give a folder or a Hugging Face id owner/name"
            )
        folder = _download(target)
    if not (folder / "config.json").is_file():
        raise TargetError(f"target.model: {folder} has no config.json; expected a transformers model folder")
    return folder


def _download(target: TargetSection) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(target.model, revision=target.revision, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the hub client raises many families: no network, no such repository, no permission
        raise TargetError(
            f"target.model: {target.model!r} is no folder here and cannot be downloaded: {error}"
        ) from error


def load_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """The transformers config of the target's text stack."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validators of configs raise families of their own
        raise TargetError(f"{folder}/config.json: {error}") from error
    return config.get_text_config(decoder=True)


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
    found = [getattr(config, "eos_token_id", None)]
    file = folder / "generation_config.json"
    if file.is_file():
        found.append(_read_json(file).get("eos_token_id"))
    flat: set[int] = set()
    for item in found:
        flat.update([item] if isinstance(item, int) else item or [])
    return frozenset(flat)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TargetError(f"{file}: broken JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise TargetError(f"{file}: expected a JSON object, got {type(content).__name__}; fetch it again")
    return content


def digest_config(config: Any) -> str:
    """sha256 of the text config without the keys that change no computation."""
    fields = {key: value for key, value in config.to_dict().items() if key not in CONFIG_KEYS_WITHOUT_MEANING}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def digest_weights(folder: Path) -> str:
    """sha256 of every safetensors header and of sampled bytes of every tensor, so that it costs seconds for any model.

    Raises TargetError when there are no safetensors files or when one of the index's files is missing or cut short.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(_read_json(index).get("weight_map", {}).values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise TargetError(f"{folder}: weights are missing: {', '.join(missing)}, named by {index.name}")
        files = [folder / name for name in sorted(named)]
    if not files:
        raise TargetError(f"{folder}: no *.safetensors weights; convert the model with save_pretrained first")
    digest = hashlib.sha256()
    for file in files:
        digest.update(_sample_safetensors(file))
    return digest.hexdigest()


def _sample_safetensors(file: Path) -> bytes:
    """Header and sampled payload of one file, hashed."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if header_bytes > size - 8:
            raise TargetError(f"{file}: not a safetensors file or cut short at {size} bytes; fetch it again")
        header = stream.read(header_bytes)
        digest.update(header)
        try:
            tensors = {key: entry for key, entry in json.loads(header).items() if key != "__metadata__"}
        except ValueError as error:
            raise TargetError(f"{file}: its safetensors header is damaged: {error}; fetch it again") from error
        payload = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if size != 8 + header_bytes + payload:
            raise TargetError(f"{file}: expected {8 + header_bytes + payload} bytes, got {size}; fetch it again")
        for begin, end in sorted(entry["data_offsets"] for entry in tensors.values()):
            for offset in (begin, (begin + end) // 2, max(end - SAMPLE_BYTES, begin)):
                stream.seek(8 + header_bytes + offset)
                digest.update(stream.read(min(SAMPLE_BYTES, end - offset)))
    return digest.digest()


def digest_tokenizer(tokenizer: Any) -> str:
    """sha256 of the fast tokenizer's whole state."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def digest_chat_template(tokenizer: Any) -> str:
    """sha256 of the chat template's text; of nothing where there is none."""
    template = tokenizer.chat_template or ""
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def choose_mask_token(tokenizer: Any, *, vocab_size: int, wanted: int | None) -> int:
    """The configured mask token; else the tokenizer's own; else the first id that the embedding has and the tokenizer
    does not use. Raises TargetError saying which ids could serve."""
    if wanted is not None:
        if not 0 <= wanted < vocab_size:
            raise TargetError(f"draft.mask_token_id: expected 0 to {vocab_size - 1}, got {wanted}")
        return wanted
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id < vocab_size:
        return int(tokenizer.mask_token_id)
    used = set(tokenizer.get_vocab().values())
    free = next((token for token in range(vocab_size) if token not in used), None)
    if free is None:
        unusual = tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder)
        taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
        candidates = sorted({token for token in unusual if token < vocab_size} - taken)
        raise TargetError(
            "draft.mask_token_id: the tokenizer has no mask token and uses every id of the embedding; name an id that "
            f"no conversation contains, perhaps one of the special tokens {candidates[:20]}"
        )
    return free


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
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, target.dtype),
            attn_implementation=target.attn_implementation,
            device_map=target.device_map,
            trust_remote_code=target.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # missing weights, a class that does not exist, an attention that is not installed
        raise TargetError(f"{folder}: the target cannot be loaded: {error}") from error
    _check_loaded(report, folder=folder)
    if target.device_map is None:
        model.to(device)
    model.eval()
    if max_length is not None:
        pin_rope(model, max_length=max_length)
    return find_parts(model)


def _check_loaded(report: dict[str, Any], *, folder: Path) -> None:
    """transformers fills weights that the files lack with random ones; a cache of those would be silently wrong."""
    missing = sorted({str(name) for kind in ("missing_keys", "mismatched_keys") for name in report.get(kind, ())})
    if missing:
        raise TargetError(
            f"{folder}: {len(missing)} tensors that config.json asks for are missing or have another shape, the first "
            f"of them {', '.join(missing[:3])}; config.json and the weights do not belong together, or a file is cut"
        )
    unused = sorted(str(name) for name in report.get("unexpected_keys", ()))
    if unused:  # layers for predicting several tokens, old buffers: many sound models have such
        logger.warning("%s: %d tensors are not used, the first of them %s", folder, len(unused), ", ".join(unused[:3]))


def find_parts(model: Any) -> TargetParts:
    """Decoder stack, blocks, final norm, embedding and head, under whatever names the architecture gives them.

    Raises TargetError when one of them cannot be told.
    """
    config = model.config.get_text_config(decoder=True)
    num_layers = config.num_hidden_layers
    for decoder in model.modules():
        blocks = [
            child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == num_layers
        ]
        norm = next(
            (getattr(decoder, name) for name in NORM_NAMES if isinstance(getattr(decoder, name, None), nn.Module)), None
        )
        if len(blocks) == 1 and norm is not None:
            lm_head = model.get_output_embeddings()
            if lm_head is None:
                raise TargetError(f"{type(model).__name__} has no output embedding; a causal language model is needed")
            if getattr(lm_head, "bias", None) is not None:
                raise TargetError(
                    f"{type(model).__name__}: lm_head has a bias, which the drafts that servers load have no place for"
                )
            return TargetParts(
                model=model,
                decoder=decoder,
                blocks=blocks[0],
                embed_tokens=model.get_input_embeddings(),
                final_norm=norm,
                lm_head=lm_head,
            )
    raise TargetError(
        f"{type(model).__name__}: found no stack of {num_layers} blocks with a final norm beside it "
        f"(one of {', '.join(NORM_NAMES)}); this architecture is not supported yet"
    )


def write_target(destination: Path, *, folder: Path, parts: TargetParts, tokenizer: Any) -> None:
    """Fill the cache's `target/`: config, tokenizer, and head.safetensors with embedding, head and final norm.

    An embedding that is the head too is stored once.
    """
    destination.mkdir(exist_ok=True)
    shutil.copyfile(folder / "config.json", destination / "config.json")
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, destination / name)
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
