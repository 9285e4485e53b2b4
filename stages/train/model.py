"""The DSpark draft: a few Qwen3 layers that fill a block of K slots at once, looking at the target's hidden states.

Tensor names are those that servers load. `embed_tokens` and `lm_head` are the target's and frozen.

Shape suffixes: B rows, S context tokens, X those of all rows, L target layers, D hidden, A anchors, K slots, M blocks,
Q slots of all blocks, N any slots, V vocabulary, H heads, G key-value heads, E head size.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3Config
from transformers import initialization as init
from transformers import logging as transformers_logging
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    rotate_half,
)

from stages.rope import draft_rope
from stages.target_head import TARGET_TENSORS, TargetHead, read_head
from stages.train.attention import (
    Attend,
    BlockRanges,
    DenseAttention,
    FlexAttention,
    GroupedAttention,
    KeyValue,
    block_mask,
)
from stages.train.documents import document_bounds
from stages.train.draft_files import find_head, missing_target_tensors, write_draft_files
from stages.train.heads import ConfidenceHead, LogitBias, MarkovHead, build_markov_head
from stages.train.slots import Slots

Rope = tuple[torch.Tensor, torch.Tensor]


class Context(NamedTuple):
    """What every layer makes its keys and values of the context from."""

    states: torch.Tensor  # [B, S, D]
    rope: Rope


BIAS_IN_SCALE = "markov_bias_in_logit_scale"
"""Field of an exported draft: `markov_w2` is divided by `logit_scale`, which servers multiply it by."""
_REQUIRED_FIELDS = ("block_size", "mask_token_id", "target_layer_ids", "num_anchors", "markov_rank")


class DSparkRotaryEmbedding(Qwen3RotaryEmbedding):  # type: ignore[misc]
    """Qwen3's rope of the config's one set of frequencies, which no call changes.

    They stay float32 when the module is cast: bfloat16 ones turn far positions astray.
    """

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Rope:
        """Cosines and sines [..., E] of positions [...], in `x`'s dtype; of no position at all, too."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float32)
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if exact[name].is_meta and not buffer.is_meta:
                frequencies = type(self)(self.config).get_buffer(name)
                setattr(self, name, frequencies.to(buffer.device))
            elif buffer.dtype != torch.float32:
                setattr(self, name, exact[name].to(buffer.device))
        return self


class DSparkAttention(nn.Module):
    """Qwen3's attention, with keys and values of the context made apart from those of the block."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, num_heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, num_kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, num_kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def key_value(self, states: torch.Tensor, rope: Rope) -> KeyValue:
        """Keys, normed and rotated, and values of `states [B, X, D]`: two [B, G, X, E]."""
        key = _rotate(self.k_norm(_split_heads(self.k_proj(states), self.head_dim)), rope)
        return key, _split_heads(self.v_proj(states), self.head_dim)

    def forward(
        self,
        states_BQD: torch.Tensor,
        rope: Rope,
        context: Context | KeyValue,
        attend: Attend,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        block = self.key_value(states_BQD, rope)
        if isinstance(context, Context):
            context = self.key_value(context.states, context.rope)
        if queries is not None:
            states_BQD, rope = states_BQD[:, queries], (rope[0][:, queries], rope[1][:, queries])
        query_BHQE = _rotate(self.q_norm(_split_heads(self.q_proj(states_BQD), self.head_dim)), rope)
        output_BHQE = attend(query_BHQE, context, block)
        output_BQD: torch.Tensor = self.o_proj(output_BHQE.transpose(1, 2).flatten(2))
        return output_BQD


class DSparkLayer(nn.Module):
    """A Qwen3 decoder layer over `DSparkAttention`."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = DSparkAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        states_BQD: torch.Tensor,
        rope: Rope,
        context: Context | KeyValue,
        attend: Attend,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The slots' next states. Those at `queries` alone are computed where it is given; all are seen by them.

        `context` is what keys and values are made from, or these themselves.
        """
        attended_BQD = self.self_attn(self.input_layernorm(states_BQD), rope, context, attend, queries)
        states_BQD = (states_BQD if queries is None else states_BQD[:, queries]) + attended_BQD
        output_BQD: torch.Tensor = states_BQD + self.mlp(self.post_attention_layernorm(states_BQD))
        return output_BQD


class Qwen3DSparkModel(PreTrainedModel):  # type: ignore[misc]
    """The draft model. `config` is `build_draft_config`'s, or that of a published Qwen3 DSpark draft."""

    config_class = Qwen3Config
    base_model_prefix = ""
    _no_split_modules = ["DSparkLayer"]  # noqa: RUF012 (transformers declares it as an instance attribute)
    _supports_sdpa = True

    def __init__(self, config: Qwen3Config) -> None:
        missing = [name for name in _REQUIRED_FIELDS if getattr(config, name, None) is None]
        if missing:
            raise ValueError(f"config: {', '.join(missing)} missing; expected the config of a DSpark draft")
        _check_computed(config)
        config.rope_parameters = one_rope(config)
        super().__init__(config)
        self.block_size = int(config.block_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DSparkLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DSparkRotaryEmbedding(config)
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.markov_head: MarkovHead | None = build_markov_head(config)
        enabled = getattr(config, "enable_confidence_head", False)
        self.confidence_head: ConfidenceHead | None = ConfidenceHead(config) if enabled else None
        self.post_init()
        self.freeze_target_head()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LogitBias):
            # No bias at first: training starts as DFlash and learns only what the previous token adds. W1 is random,
            # so W2's gradient is not zero.
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, which makes loaded parameters trainable: here the target's stay frozen.

        A checkpoint's embedding and head are those of its run; one that is both is one tensor here.
        Raises ValueError for a file whose tensors are not those of the config: transformers fills in random numbers.
        """
        with _quiet_loading():
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing, folder = set(info["missing_keys"]), Path(args[0]) if args else None
        if folder is not None and missing & set(TARGET_TENSORS) and not missing_target_tensors(folder):
            head = find_head(folder)
            model.load_target_head(*(TargetHead(model.embed_tokens.weight, None) if head is None else read_head(head)))
            missing -= set(TARGET_TENSORS)
        wrong = [f"no {name}" for name in sorted(missing)]
        wrong += [f"{name}, which its config does not ask for" for name in sorted(info["unexpected_keys"])]
        if wrong:
            raise ValueError(f"{args[0] if args else 'the draft'}: its weights have {'; '.join(wrong)}")
        model._take_bias_out_of_scale()
        model.freeze_target_head()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a draft's two files; `config.json` has every field, defaults included. Other arguments mean nothing."""
        weights = {name: tensor.detach() for name, tensor in self.named_parameters()}
        write_draft_files(
            Path(save_directory),
            fields=config_fields(self.config, dtype=self.fc.weight.dtype),
            weights=weights,
        )

    @torch.no_grad()
    def _take_bias_out_of_scale(self) -> None:
        """An export for servers that scale head and bias together is, in memory, as it was trained."""
        if getattr(self.config, BIAS_IN_SCALE, False) and self.markov_head is not None:
            self.markov_head.markov_w2.weight.mul_(self.config.logit_scale)
            delattr(self.config, BIAS_IN_SCALE)

    def freeze_target_head(self) -> None:
        """Take the target's embedding and head out of training."""
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one tensor."""
        return self.lm_head.weight is self.embed_tokens.weight

    @torch.no_grad()
    def load_target_head(self, embed_tokens: torch.Tensor, lm_head: torch.Tensor | None = None) -> None:
        """Copy the target's embedding and head, both [V, D], into the draft; None: one tensor is both, here too.

        Raises ValueError for other shapes.
        """
        if lm_head is None:
            self.lm_head.weight = self.embed_tokens.weight
            lm_head = embed_tokens
        elif self.is_tied:
            self.lm_head.weight = nn.Parameter(torch.empty_like(self.embed_tokens.weight), requires_grad=False)
        for name, given, own in (("embed_tokens", embed_tokens, self.embed_tokens), ("lm_head", lm_head, self.lm_head)):
            if given.shape != own.weight.shape:
                raise ValueError(
                    f"{name}: expected {list(own.weight.shape)} as in the draft's config, got {list(given.shape)}; "
                    "build the draft's config from the same target"
                )
            own.weight.copy_(given)

    @torch.no_grad()
    def keep_target_head_in(self, dtype: torch.dtype) -> None:
        """Keep the target's embedding and head in `dtype`, each only where that loses nothing.

        Autocast casts a weight that needs no gradient anew for every product.
        """
        is_tied = self.is_tied
        for module in (self.embed_tokens,) if is_tied else (self.embed_tokens, self.lm_head):
            narrow = module.weight.to(dtype)
            if torch.equal(narrow.to(module.weight.dtype), module.weight):
                module.weight = nn.Parameter(narrow, requires_grad=False)
        if is_tied:
            self.lm_head.weight = self.embed_tokens.weight

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] ids to [..., D]. Under autocast in float32, whatever the embedding is kept in: layers add to it."""
        states = self.embed_tokens(ids)
        return at_least_float32(states) if torch.is_autocast_enabled(states.device.type) else states

    def project_context(self, target_hidden_BSX: torch.Tensor) -> torch.Tensor:
        """The target's layers [B, S, L*D], side by side in ascending id order, as every layer's context [B, S, D]."""
        if not torch.is_autocast_enabled(target_hidden_BSX.device.type):
            target_hidden_BSX = target_hidden_BSX.to(self.fc.weight.dtype)
        context_BSD: torch.Tensor = self.hidden_norm(self.fc(target_hidden_BSX))
        return context_BSD

    def context_key_values(self, context_BSD: torch.Tensor, positions_BS: torch.Tensor) -> list[KeyValue]:
        """Keys and values of the context for each draft layer, [B, G, S, E]: what a draft KV cache holds."""
        rope = self.rotary_emb(context_BSD, positions_BS)
        return [cast(DSparkLayer, layer).self_attn.key_value(context_BSD, rope) for layer in self.layers]

    def run_blocks(
        self,
        block_ids_BQ: torch.Tensor,
        positions_BQ: torch.Tensor,
        context: list[KeyValue],
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """h, the state after the final norm, of each slot: [B, Q, D]. `mask` as in `DenseAttention`."""
        states_BQD = self._embed(block_ids_BQ)
        rope = self.rotary_emb(states_BQD, positions_BQ)
        for layer, key_value in zip(self.layers, context, strict=True):
            states_BQD = layer(states_BQD, rope, key_value, DenseAttention(mask=mask))
        h_BQD: torch.Tensor = self.norm(states_BQD)
        return h_BQD

    def forward(
        self,
        input_ids: torch.Tensor,
        target_hidden_states: torch.Tensor,
        anchor_positions: torch.Tensor,
        seq_lens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """h [B, A, K, D] of the blocks `[token a, mask, ..., mask]` at anchors a: the plain form of `forward_slots`.

        `input_ids [B, S]`, `target_hidden_states [B, S, L*D]`, `anchor_positions [B, A]` (-1: none, its h means
        nothing), `seq_lens [B, documents]`. Positions count from the document's start, so that packing changes nothing.
        """
        start_BS, _ = document_bounds(seq_lens, input_ids)
        positions_BS = torch.arange(input_ids.shape[1], device=input_ids.device) - start_BS
        anchor_BA = anchor_positions.clamp_min(0)
        start_BA = start_BS.gather(1, anchor_BA)
        slots_K = torch.arange(self.block_size, device=input_ids.device)
        positions_BAK = (anchor_BA - start_BA)[..., None] + slots_K
        ids_BAK = torch.full_like(positions_BAK, self.config.mask_token_id)
        ids_BAK[..., 0] = input_ids.gather(1, anchor_BA)
        context = self.context_key_values(self.project_context(target_hidden_states), positions_BS)
        mask = block_mask(anchor_positions, start_BA, num_context=input_ids.shape[1], block_size=self.block_size)
        h_BQD = self.run_blocks(ids_BAK.flatten(1), positions_BAK.flatten(1), context, mask)
        return h_BQD.view(len(h_BQD), -1, self.block_size, h_BQD.shape[-1])

    def forward_slots(
        self,
        input_ids: torch.Tensor,
        target_hidden_states: torch.Tensor,
        slots: Slots,
        seq_lens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """h [N, D] of the supervised slots, as `forward` computes them; other blocks and unseen context cost nothing.

        Rows are laid end to end. Slots of a block that are not supervised are seen by the others, so only the last
        layer leaves them out.
        """
        start_BS, _ = document_bounds(seq_lens, input_ids)
        num_rows, num_tokens = input_ids.shape
        positions_X = (torch.arange(num_tokens, device=input_ids.device) - start_BS).flatten()
        start_X = (start_BS + num_tokens * torch.arange(num_rows, device=input_ids.device)[:, None]).flatten()
        anchor_M = slots.block_anchors
        is_empty = len(anchor_M) == 0
        if is_empty:  # the graph must still reach every weight, or whoever waits for its gradient waits for ever
            anchor_M = anchor_M.new_zeros(1)
        # 1. The blocks, end to end.
        slots_K = torch.arange(self.block_size, device=input_ids.device)
        positions_1Q = (positions_X[anchor_M][:, None] + slots_K).view(1, -1)
        ids_MK = torch.full((len(anchor_M), self.block_size), self.config.mask_token_id, device=input_ids.device)
        ids_MK[:, 0] = input_ids.flatten()[anchor_M]
        queries_N = slots_K if is_empty else slots.block * self.block_size + slots.slot
        states = self._embed(ids_MK.view(1, -1))
        rope = self.rotary_emb(states, positions_1Q)
        # 2. The context tokens that some block sees; where a block's begin and end among them.
        seen_X = _seen(start_X[anchor_M], anchor_M, num_tokens=num_rows * num_tokens)
        picked = seen_X.nonzero().squeeze(1)
        before_X = seen_X.cumsum(0) - seen_X.long()
        ranges = BlockRanges(start=before_X[start_X[anchor_M]], anchor=before_X[anchor_M], block_size=self.block_size)
        context_1XD = self.project_context(target_hidden_states.flatten(0, 1)[picked][None])
        context = Context(context_1XD, self.rotary_emb(context_1XD, positions_X[picked][None]))
        # 3. The layers, the last one for the supervised slots alone.
        attend, attend_last = _plan_attention(ranges, queries_N, num_context=context_1XD.shape[1])
        for layer in self.layers[:-1]:
            states = layer(states, rope, context, attend)
        states = self.layers[-1](states, rope, context, attend_last, queries_N)
        h_ND: torch.Tensor = self.norm(states[0])
        return h_ND[:0] if is_empty else h_ND

    def base_logits(self, states_ND: torch.Tensor) -> torch.Tensor:
        """`lm_head`'s logits [N, V] of draft or target states, at least float32, with the target's scale and soft-cap.

        The Markov bias is added to these, after the soft-cap.
        """
        if not torch.is_autocast_enabled(states_ND.device.type):
            states_ND = states_ND.to(self.lm_head.weight.dtype)
        logits_NV = at_least_float32(self.lm_head(states_ND))
        scale = getattr(self.config, "logit_scale", None)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        if scale is not None:
            logits_NV = logits_NV * scale
        return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' report of tensors that a file lacks: those that matter are an error afterwards."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _seen(start_M: torch.Tensor, end_M: torch.Tensor, *, num_tokens: int) -> torch.Tensor:
    """Which tokens lie in one of the ranges: bool [num_tokens]."""
    edges = start_M.new_zeros(num_tokens + 1)
    edges.index_add_(0, start_M, torch.ones_like(start_M)).index_add_(0, end_M, -torch.ones_like(end_M))
    return edges[:-1].cumsum(0) > 0


def _plan_attention(ranges: BlockRanges, queries_N: torch.Tensor, *, num_context: int) -> tuple[Attend, Attend]:
    """Attention of all slots, and of the queries alone."""
    attention = FlexAttention if ranges.anchor.is_cuda else GroupedAttention
    return attention(ranges, num_context=num_context), attention(ranges, queries_N, num_context=num_context)


def _check_computed(config: Qwen3Config) -> None:
    """Refuse a draft that would be computed as something else. Raises ValueError."""
    if not getattr(config, "sample_from_anchor", True):
        raise ValueError("config: sample_from_anchor is false; slot 0 must predict the token after the anchor")
    others = sorted(set(config.layer_types or ()) - {"full_attention"})
    if others:
        raise ValueError(
            f"config: layer_types: expected full_attention in every layer, got {', '.join(others)} (sliding_window "
            f"{config.sliding_window}); drafts of such layers are neither trained nor computed here"
        )
    if getattr(config, "is_causal", False):
        raise ValueError("config: is_causal is true; the slots of a block must see each other in both directions")


def one_rope(config: Qwen3Config) -> dict[str, Any]:
    """The rope that a draft of this config computes, whatever the length of a text; its own, if that says all.

    A key `alpha` was never obeyed here: drafts that have it were trained without.
    """
    rope = {key: value for key, value in config.rope_parameters.items() if key != "alpha"}
    return draft_rope(rope, head_dim=config.head_dim, max_positions=config.max_position_embeddings)


def config_fields(config: Qwen3Config, *, dtype: torch.dtype) -> dict[str, Any]:
    """What `config.json` holds: every Qwen3 field, the draft's own, and rope under its older names as well.

    `dtype` is that of the stored weights.

    Readers before transformers 5 know `rope_theta` and `rope_scaling` only; a draft served without its rope drafts
    badly in silence.
    """
    whole = config.to_dict()
    names = {*config.to_diff_dict(), *Qwen3Config.__annotations__, "model_type", "dtype"}
    fields = {name: whole[name] for name in names if name in whole}
    rope = dict(config.rope_parameters)
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return fields | {"dtype": str(dtype).removeprefix("torch.")}


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision to float32; wider types as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _split_heads(states_BXD: torch.Tensor, head_dim: int) -> torch.Tensor:
    num_heads = states_BXD.shape[-1] // head_dim  # not -1: a context may be empty
    return states_BXD.view(*states_BXD.shape[:-1], num_heads, head_dim).transpose(1, 2)


def _rotate(states_BHXE: torch.Tensor, rope: Rope) -> torch.Tensor:
    cos_B1XE, sin_B1XE = (part.unsqueeze(1) for part in rope)
    rotated: torch.Tensor = states_BHXE * cos_B1XE + rotate_half(states_BHXE) * sin_B1XE
    return rotated
