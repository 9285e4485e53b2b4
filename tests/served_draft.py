"""A server in the smallest form: it drafts blocks from an exported folder by the documented names alone.

It shares no code with the project. Every field that it needs must be in `config.json`, none has a default, and the
tensors must be exactly those that the fields ask for: what a reader would guess at is an error here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu

SHARED = ("embed_tokens.weight", "lm_head.weight")


class ServerError(Exception):
    """The folder is not what its form promises."""


@dataclass(frozen=True)
class Served:
    fields: dict[str, Any]
    layer_ids: list[int]
    """Output of target block k; -1: embeddings."""
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Block:
    tokens: list[int]
    logits: Tensor
    confidences: Tensor | None


def load_served(folder: Path, *, target: dict[str, Tensor] | None = None) -> Served:
    """The draft in `folder`, in float32; `target` has the tensors that the folder was to leave to the server."""
    raw = json.loads((folder / "config.json").read_text())
    fields = _speculators(raw) if "speculators_model_type" in raw else _dspark(raw)
    for name, expected in (
        ("model_type", "qwen3"), ("hidden_act", "silu"), ("attention_bias", False), ("sample_from_anchor", True),
        ("tie_word_embeddings", False), ("layer_types", ["full_attention"] * fields["num_hidden_layers"]),
        ("use_sliding_window", False),
    ):  # fmt: skip
        if fields[name] != expected:
            raise ServerError(f"{name}: {fields[name]}")
    if fields["rope_parameters"]["rope_type"] != "default" or fields["rope_scaling"] is not None:
        raise ServerError("rope")
    if fields["rope_parameters"]["rope_theta"] != fields["rope_theta"]:
        raise ServerError("two ropes")
    weights = load_file(folder / "model.safetensors")
    if {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()} != {fields["dtype"]}:
        raise ServerError("dtype")
    weights = {name: tensor.float() for name, tensor in (target or {}).items()} | {
        name: tensor.float() for name, tensor in weights.items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != _expected_shapes(fields):
        raise ServerError(f"tensors: {sorted(set(shapes.items()) ^ set(_expected_shapes(fields).items()))}")
    return Served(fields=fields, layer_ids=fields["layer_ids"], weights=weights)


def _dspark(raw: dict[str, Any]) -> dict[str, Any]:
    if raw["architectures"] != ["Qwen3DSparkModel"]:
        raise ServerError("architectures")
    return {**raw, "layer_ids": raw["target_layer_ids"]}


def _speculators(raw: dict[str, Any]) -> dict[str, Any]:
    inner = raw["transformer_layer_config"]
    methods = raw["speculators_config"]["proposal_methods"]
    checks = {
        "algorithm": (raw["speculators_config"]["algorithm"], raw["speculators_model_type"], "dspark"),
        "vocabulary": (raw["draft_vocab_size"], inner["vocab_size"], inner["vocab_size"]),
        "width": (raw["target_hidden_size"], inner["hidden_size"], inner["hidden_size"]),
        "tokens": (methods[0]["speculative_tokens"], raw["block_size"], raw["block_size"]),
        "method": (methods[0]["proposal_type"], raw["speculators_config"]["default_proposal_method"], "greedy"),
        "dtype": (raw["dtype"], inner["dtype"], inner["dtype"]),
        "tied": (raw["tie_word_embeddings"], inner["tie_word_embeddings"], False),
        "both ways": (raw["sliding_window_non_causal"], True, True),
        "class": (raw["architectures"], ["DSparkDraftModel"], ["DSparkDraftModel"]),
    }
    for name, (first, second, third) in checks.items():
        if not first == second == third:
            raise ServerError(f"{name}: {first}, {second}, {third}")
    if not raw["speculators_config"]["verifier"]["name_or_path"]:
        raise ServerError("no target")
    outer = ("block_size", "mask_token_id", "sample_from_anchor", "markov_rank", "markov_head_type",
             "enable_confidence_head", "confidence_head_with_markov")  # fmt: skip
    layer_ids = [input_of - 1 for input_of in raw["aux_hidden_state_layer_ids"]]
    return {**inner, **{name: raw[name] for name in outer}, "layer_ids": layer_ids}


def _expected_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, vocab, rank, width = (fields[n] for n in ("hidden_size", "vocab_size", "markov_rank", "intermediate_size"))
    head, queries, keys = fields["head_dim"], fields["num_attention_heads"], fields["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden), "norm.weight": (hidden,),
        "hidden_norm.weight": (hidden,), "fc.weight": (hidden, hidden * len(fields["layer_ids"])),
    }  # fmt: skip
    for layer in range(fields["num_hidden_layers"]):
        shapes |= {
            f"layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (queries * head, hidden), "self_attn.k_proj": (keys * head, hidden),
                "self_attn.v_proj": (keys * head, hidden), "self_attn.o_proj": (hidden, queries * head),
                "self_attn.q_norm": (head,), "self_attn.k_norm": (head,),
                "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width),
            }.items()
        }  # fmt: skip
    if rank > 0:
        shapes |= {"markov_head.markov_w1.weight": (vocab, rank), "markov_head.markov_w2.weight": (vocab, rank)}
        extra = {"vanilla": {}, "gated": {"gate_proj": (rank, hidden + rank)},
                 "rnn": {"joint_proj": (3 * rank, hidden + 2 * rank)}}[fields["markov_head_type"]]  # fmt: skip
        for name, shape in extra.items():
            shapes |= {f"markov_head.{name}.weight": shape, f"markov_head.{name}.bias": shape[:1]}
    if fields["enable_confidence_head"]:
        seen = hidden + (rank if fields["confidence_head_with_markov"] else 0)
        shapes |= {"confidence_head.proj.weight": (1, seen), "confidence_head.proj.bias": (1,)}
    return shapes


def draft_block(served: Served, tokens: list[int], target_states: dict[int, Tensor]) -> Block:
    """Draft greedily behind the last of `tokens`; `target_states[k]` [T, D] is the output of the target's block k.

    The last token is the anchor, whose own states no draft sees.
    """
    fields, weights = served.fields, served.weights
    size, anchor = fields["block_size"], len(tokens) - 1
    context_TX = torch.cat([target_states[layer][:anchor] for layer in served.layer_ids], dim=-1)
    context_TD = _rms(linear(context_TX, weights["fc.weight"]), weights["hidden_norm.weight"], fields)
    ids = torch.tensor([tokens[-1]] + [fields["mask_token_id"]] * (size - 1))
    states_KD = weights["embed_tokens.weight"][ids]
    for layer in range(fields["num_hidden_layers"]):
        states_KD = _layer(served, f"layers.{layer}.", states_KD, context_TD)
    h_KD = _rms(states_KD, weights["norm.weight"], fields)
    base_KV = linear(h_KD, weights["lm_head.weight"])
    drafted, logits, confidences = [], [], []
    previous, state = tokens[-1], torch.zeros(fields["markov_rank"])
    for slot in range(size):
        bias, embedded, state = _markov(served, h_KD[slot], previous, state)
        logits.append((fields.get("logit_scale") or 1.0) * (base_KV[slot] + bias))  # as vLLM scales, bias and all
        if fields["enable_confidence_head"]:
            seen = [h_KD[slot], embedded] if fields["confidence_head_with_markov"] else [h_KD[slot]]
            confidences.append(
                linear(torch.cat(seen), weights["confidence_head.proj.weight"], weights["confidence_head.proj.bias"])
            )
        previous = int(logits[-1].argmax())
        drafted.append(previous)
    return Block(drafted, torch.stack(logits), torch.cat(confidences) if confidences else None)


def _layer(served: Served, prefix: str, states_KD: Tensor, context_TD: Tensor) -> Tensor:
    fields = served.fields
    own = {name.removeprefix(prefix): w for name, w in served.weights.items() if name.startswith(prefix)}
    start, size = len(context_TD), len(states_KD)
    normed_KD = _rms(states_KD, own["input_layernorm.weight"], fields)
    seen_XD = torch.cat([context_TD, normed_KD])
    query = _rms(_heads(normed_KD, own["self_attn.q_proj.weight"], fields), own["self_attn.q_norm.weight"], fields)
    key = _rms(_heads(seen_XD, own["self_attn.k_proj.weight"], fields), own["self_attn.k_norm.weight"], fields)
    value = _heads(seen_XD, own["self_attn.v_proj.weight"], fields)
    query = _rope(query, torch.arange(start, start + size), fields)
    key = _rope(key, torch.arange(start + size), fields)
    groups = fields["num_attention_heads"] // fields["num_key_value_heads"]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("khe,xhe->hkx", query, key) / fields["head_dim"] ** 0.5
    mixed = torch.einsum("hkx,xhe->khe", scores.softmax(-1), value).flatten(1)
    states_KD = states_KD + linear(mixed, own["self_attn.o_proj.weight"])
    normed_KD = _rms(states_KD, own["post_attention_layernorm.weight"], fields)
    gate = silu(linear(normed_KD, own["mlp.gate_proj.weight"]))
    return states_KD + linear(gate * linear(normed_KD, own["mlp.up_proj.weight"]), own["mlp.down_proj.weight"])


def _markov(served: Served, h: Tensor, previous: int, state: Tensor) -> tuple[Tensor | float, Tensor, Tensor]:
    """Bias on the logits, W1 of the previous token, and the next state of an `rnn` head."""
    weights, kind = served.weights, served.fields["markov_head_type"]
    if served.fields["markov_rank"] == 0:
        return 0.0, torch.empty(0), state
    embedded = latent = weights["markov_head.markov_w1.weight"][previous]
    if kind == "gated":
        gate = linear(
            torch.cat([h, embedded]), weights["markov_head.gate_proj.weight"], weights["markov_head.gate_proj.bias"]
        )
        latent = torch.sigmoid(gate) * embedded
    if kind == "rnn":
        joint = linear(
            torch.cat([state, embedded, h]),
            weights["markov_head.joint_proj.weight"],
            weights["markov_head.joint_proj.bias"],
        )
        keep, candidate, output = joint.chunk(3)
        state = torch.sigmoid(keep) * state + (1 - torch.sigmoid(keep)) * torch.tanh(candidate)
        latent = torch.tanh(output)
    return linear(latent, weights["markov_head.markov_w2.weight"]), embedded, state


def _heads(states: Tensor, weight: Tensor, fields: dict[str, Any]) -> Tensor:
    return linear(states, weight).view(len(states), -1, fields["head_dim"])


def _rms(states: Tensor, weight: Tensor, fields: dict[str, Any]) -> Tensor:
    return weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + fields["rms_norm_eps"])


def _rope(states_XHE: Tensor, positions: Tensor, fields: dict[str, Any]) -> Tensor:
    """Rotate the pairs (i, i + E/2) by position * theta^(-2i/E)."""
    width = fields["head_dim"]
    frequencies = fields["rope_parameters"]["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    angles = (positions[:, None].double() * frequencies)[:, None, :].float()
    first, second = states_XHE.chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )
