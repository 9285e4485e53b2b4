"""DSpark drafts in the smallest form: tiny models and batches, and the objective as loops over documents and blocks.

The reference shares no code with `stages.train`. It is float64, one query and one head at a time, and takes the draft's
weights as a dict of tensors, so that autograd gives the gradients that the tests compare.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import Qwen3Config

from stages.train import Qwen3DSparkModel, build_draft_config

VOCAB, HIDDEN, MASK_ID = 31, 16, 30


def tiny_target_config(**changes: object) -> Qwen3Config:
    fields: dict[str, object] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "dtype": torch.float32,
    }  # fmt: skip
    return Qwen3Config(**{**fields, **changes})


def tiny_config(**changes: object) -> Qwen3Config:
    settings: dict[str, object] = {
        "mask_token_id": MASK_ID, "num_draft_layers": 2, "block_size": 3, "target_layer_ids": [0, 3], "num_anchors": 4,
        "markov_rank": 5,
    }  # fmt: skip
    return build_draft_config(tiny_target_config(), **{**settings, **changes})


def tiny_model(config: Qwen3Config | None = None, *, seed: int = 0) -> Qwen3DSparkModel:
    """A draft whose every weight is random and large enough to matter: norms, biases and W2 too."""
    model = Qwen3DSparkModel(config or tiny_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name else 0.0
            parameter.copy_(offset + 0.35 * torch.randn(parameter.shape, generator=generator))
    return model


def make_document(num_tokens: int, *, seed: int, loss_mask: list[int] | None = None) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    random_mask = (torch.rand(num_tokens, generator=generator) < 0.8).long()
    return SimpleNamespace(
        ids=torch.randint(0, VOCAB - 1, (num_tokens,), generator=generator),
        hidden=torch.randn(num_tokens, 2 * HIDDEN, generator=generator),
        mask=random_mask if loss_mask is None else torch.tensor(loss_mask),
        last=2 * torch.randn(num_tokens, HIDDEN, generator=generator),
    )


def pack(
    rows: list[list[SimpleNamespace]], anchors: list[list[list[int]]] | None = None, *, num_tokens: int | None = None
) -> dict[str, Tensor]:
    """Documents side by side in rows, padded with rubbish; `anchors[row][document]` count from the document's start."""
    width = num_tokens or max(sum(len(document.ids) for document in row) for row in rows)
    generator = torch.Generator().manual_seed(99)
    batch = {
        "input_ids": torch.randint(0, VOCAB - 1, (len(rows), width), generator=generator),
        "target_hidden_states": torch.randn(len(rows), width, 2 * HIDDEN, generator=generator),
        "loss_mask": torch.ones(len(rows), width, dtype=torch.uint8),
        "target_last_hidden_states": torch.randn(len(rows), width, HIDDEN, generator=generator),
        "seq_lens": torch.zeros(len(rows), max(len(row) for row in rows) + 1, dtype=torch.long),
    }
    positions: list[list[int]] = [[] for _ in rows]
    for row, documents in enumerate(rows):
        start = 0
        for index, document in enumerate(documents):
            here = slice(start, start + len(document.ids))
            batch["input_ids"][row, here] = document.ids
            batch["target_hidden_states"][row, here] = document.hidden
            batch["loss_mask"][row, here] = document.mask.to(torch.uint8)
            batch["target_last_hidden_states"][row, here] = document.last
            batch["seq_lens"][row, index] = len(document.ids)
            if anchors is not None:
                positions[row] += [start + anchor for anchor in anchors[row][index]]
            start += len(document.ids)
    if anchors is not None:
        most = max(len(row) for row in positions) + 1
        batch["anchor_positions"] = torch.tensor([row + [-1] * (most - len(row)) for row in positions])
    return batch


@dataclass
class Reference:
    """What the loops add up: the objective's sums, and one entry a supervised slot."""

    ce: Tensor
    l1: Tensor
    confidence: Tensor
    weight: float = 0.0
    tau: float = 0.0
    blocks: int = 0
    abs_error: float = 0.0
    bias: float = 0.0
    cumprod_bias: float = 0.0
    accept_num: list[float] = field(default_factory=list)
    accept_den: list[int] = field(default_factory=list)
    slots: list[SimpleNamespace] = field(default_factory=list)


def run_reference(
    weights: dict[str, Tensor],
    config: Qwen3Config,
    documents: list[tuple[SimpleNamespace, list[int]]],
    *,
    gamma: float | None,
) -> Reference:
    """The objective over documents with their anchors; `weights` are float64."""
    zero = torch.zeros((), dtype=torch.float64)
    size = config.block_size
    total = Reference(ce=zero, l1=zero, confidence=zero, accept_num=[0.0] * size, accept_den=[0] * size)
    for document, anchors in documents:
        for anchor in anchors:
            _add_block(total, weights, config, document, anchor, gamma)
    return total


def _add_block(
    total: Reference, weights: dict[str, Tensor], config: Qwen3Config, document: SimpleNamespace, anchor: int,
    gamma: float | None,
) -> None:  # fmt: skip
    size = config.block_size
    if not document.mask[anchor]:
        return
    hidden = block_states(weights, config, document, anchor)
    biases = _markov_biases(weights, config, document, anchor, hidden)
    survival, tau, foreseen = 1.0, 1.0, 1.0
    for slot in range(size):
        position = anchor + slot + 1
        if position >= len(document.ids) or not document.mask[position]:
            break
        draft = _softmax(_logits(weights, config, hidden[slot]) + biases[slot])
        target = _softmax(_logits(weights, config, document.last[position - 1].double())).detach()
        label = int(document.ids[position])
        l1 = sum((draft[token] - target[token]).abs() for token in range(config.vocab_size))
        accept = 1 - float(l1.detach()) / 2
        weight = 1.0 if gamma is None else 2.718281828459045 ** (-slot / gamma)
        confidence = None
        total.ce = total.ce - weight * torch.log(draft[label])
        total.l1 = total.l1 + weight * l1
        if config.enable_confidence_head:
            seen = hidden[slot]
            if config.confidence_head_with_markov:
                seen = torch.cat([seen, weights["markov_head.markov_w1.weight"][document.ids[position - 1]]])
            logit = weights["confidence_head.proj.weight"][0] @ seen + weights["confidence_head.proj.bias"][0]
            chance = 1 / (1 + torch.exp(-logit))
            bce = -accept * torch.log(chance) - (1 - accept) * torch.log(1 - chance)
            total.confidence = total.confidence + weight * bce
            confidence = float(chance.detach())
            total.abs_error += weight * abs(confidence - accept)
            total.bias += weight * (confidence - accept)
            foreseen *= confidence
            total.cumprod_bias += weight * (foreseen - survival * accept)
        total.weight += weight
        total.accept_num[slot] += accept
        total.accept_den[slot] += 1
        survival *= accept
        tau += survival
        total.slots.append(
            SimpleNamespace(
                slot=slot, accept=accept, top1=int(draft.argmax()) == int(target.argmax()),
                greedy=float(target[int(draft.argmax())]),
                ce=-float(torch.log(draft[label].detach())), confidence=confidence,
            )
        )  # fmt: skip
        if slot == 0:
            total.blocks += 1
    total.tau += tau if total.slots and anchor + 1 < len(document.ids) and document.mask[anchor + 1] else 0.0


def block_states(
    weights: dict[str, Tensor], config: Qwen3Config, document: SimpleNamespace, anchor: int
) -> list[Tensor]:
    """The K states of a block after the final norm."""
    size, eps = config.block_size, config.rms_norm_eps
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    context = [
        _rms(weights["fc.weight"] @ document.hidden[position].double(), weights["hidden_norm.weight"], eps)
        for position in range(anchor)
    ]
    ids = [int(document.ids[anchor])] + [config.mask_token_id] * (size - 1)
    states = [weights["embed_tokens.weight"][token] for token in ids]
    for layer in range(config.num_hidden_layers):
        own = {
            name.removeprefix(f"layers.{layer}."): w
            for name, w in weights.items()
            if name.startswith(f"layers.{layer}.")
        }
        normed = [_rms(state, own["input_layernorm.weight"], eps) for state in states]
        seen = [(position, state) for position, state in enumerate(context)]
        seen += [(anchor + slot, state) for slot, state in enumerate(normed)]
        outputs = []
        for slot in range(size):
            joined = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                rows, kv_rows = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
                query = _rms(own["self_attn.q_proj.weight"][rows] @ normed[slot], own["self_attn.q_norm.weight"], eps)
                query = _turn(query, anchor + slot, config)
                scores, values = [], []
                for position, state in seen:
                    key = _rms(own["self_attn.k_proj.weight"][kv_rows] @ state, own["self_attn.k_norm.weight"], eps)
                    scores.append(query @ _turn(key, position, config) / width**0.5)
                    values.append(own["self_attn.v_proj.weight"][kv_rows] @ state)
                chances = _softmax(torch.stack(scores))
                joined.append(sum(chance * value for chance, value in zip(chances, values, strict=True)))
            outputs.append(own["self_attn.o_proj.weight"] @ torch.cat(joined))
        states = [state + output for state, output in zip(states, outputs, strict=True)]
        for slot in range(size):
            x = _rms(states[slot], own["post_attention_layernorm.weight"], eps)
            gate = own["mlp.gate_proj.weight"] @ x
            inner = gate / (1 + torch.exp(-gate)) * (own["mlp.up_proj.weight"] @ x)
            states[slot] = states[slot] + own["mlp.down_proj.weight"] @ inner
    return [_rms(state, weights["norm.weight"], eps) for state in states]


def _markov_biases(
    weights: dict[str, Tensor], config: Qwen3Config, document: SimpleNamespace, anchor: int, hidden: list[Tensor]
) -> list[Tensor]:
    none = torch.zeros(config.vocab_size, dtype=torch.float64)
    if config.markov_rank == 0:
        return [none] * config.block_size
    rank = config.markov_rank
    state = torch.zeros(rank, dtype=torch.float64)
    biases = []
    for slot in range(config.block_size):
        if anchor + slot >= len(document.ids):
            biases.append(none)
            continue
        embedded = weights["markov_head.markov_w1.weight"][document.ids[anchor + slot]]
        latent = embedded
        if config.markov_head_type == "gated":
            seen = torch.cat([hidden[slot], embedded])
            gate = weights["markov_head.gate_proj.weight"] @ seen + weights["markov_head.gate_proj.bias"]
            latent = embedded / (1 + torch.exp(-gate))
        if config.markov_head_type == "rnn":
            z = torch.cat([state, embedded, hidden[slot]])
            joint = weights["markov_head.joint_proj.weight"] @ z + weights["markov_head.joint_proj.bias"]
            keep = 1 / (1 + torch.exp(-joint[:rank]))
            state = keep * state + (1 - keep) * torch.tanh(joint[rank : 2 * rank])
            latent = torch.tanh(joint[2 * rank :])
        biases.append(weights["markov_head.markov_w2.weight"] @ latent)
    return biases


def _logits(weights: dict[str, Tensor], config: Qwen3Config, state: Tensor) -> Tensor:
    logits = weights["lm_head.weight"] @ state * getattr(config, "logit_scale", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _softmax(scores: Tensor) -> Tensor:
    powers = torch.exp(scores - scores.max().detach())
    return powers / powers.sum()


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).sum() / len(x) + eps)


def _turn(x: Tensor, position: int, config: Qwen3Config) -> Tensor:
    """Rotate the pairs (i, i + E/2) by position * theta^(-2i/E)."""
    half = len(x) // 2
    index = torch.arange(half, dtype=torch.float64)
    angle = position * config.rope_parameters["rope_theta"] ** (-2 * index / len(x))
    first, second = x[:half], x[half:]
    turned = [
        first * torch.cos(angle) - second * torch.sin(angle),
        second * torch.cos(angle) + first * torch.sin(angle),
    ]
    return torch.cat(turned)
