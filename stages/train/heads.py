"""The small heads of DSpark: the Markov head, which ties a slot to the token before it, and the confidence head.

Both read h, the backbone's state after its final norm, which is also what `lm_head` multiplies, and W1[x] of the
previous token x. A Markov head gives a latent of its rank; the bias on the logits is W2·latent, so that nothing of
vocabulary size is made for slots that nobody needs (DSpark, arXiv 2607.05147).

Shape suffixes: B rows, A anchors, K slots, N supervised slots, M blocks, D hidden, R rank, V vocabulary.
"""

import torch
from torch import nn
from transformers import Qwen3Config

from stages.train.slots import Slots


class LogitBias(nn.Linear):
    """W2: latents to a bias on the logits. A class of its own, so that initialisation knows it."""


class MarkovHead(nn.Module):
    """`vanilla`: latent = W1[x]."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.rank = int(config.markov_rank)
        self.markov_w1 = nn.Embedding(config.vocab_size, self.rank)
        self.markov_w2 = LogitBias(self.rank, config.vocab_size, bias=False)

    def embed(self, prev_tokens: torch.Tensor) -> torch.Tensor:
        """W1[x]: [...] ids to [..., R]."""
        embedded: torch.Tensor = self.markov_w1(prev_tokens)
        return embedded

    def latent(self, h_BAKD: torch.Tensor, prev_tokens_BAK: torch.Tensor) -> torch.Tensor:
        """Latents [B, A, K, R] of whole blocks, given the true previous token of each slot (slot 0: the anchor).

        Here, and where the head looks at no other slot, any shape [...] of slots will do.
        """
        return self.embed(prev_tokens_BAK)

    def latent_of_slots(self, h_ND: torch.Tensor, prev_tokens_N: torch.Tensor, slots: Slots) -> torch.Tensor:
        """Latents [N, R] of the supervised slots alone, from their h [N, D] and previous tokens [N]."""
        return self.latent(h_ND, prev_tokens_N)

    def advance(
        self, state: torch.Tensor, h: torch.Tensor, prev_token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One slot while a block is decoded: next state and latent, both [..., R]. The state starts as zeros."""
        return state, self.latent(h, prev_token)

    def bias(self, latent: torch.Tensor) -> torch.Tensor:
        """W2·latent: [..., R] to [..., V]."""
        bias: torch.Tensor = self.markov_w2(latent)
        return bias


class GatedMarkovHead(MarkovHead):
    """`gated`: latent = sigmoid(gate([h; W1[x]])) * W1[x]."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size + self.rank, self.rank)

    def latent(self, h_BAKD: torch.Tensor, prev_tokens_BAK: torch.Tensor) -> torch.Tensor:
        embedded_BAKR = self.embed(prev_tokens_BAK)
        gate_BAKR = torch.sigmoid(self.gate_proj(torch.cat([h_BAKD, embedded_BAKR], dim=-1)))
        return gate_BAKR * embedded_BAKR


class RnnMarkovHead(MarkovHead):
    """`rnn`: (g, c, o) = joint([s; W1[x]; h]), s' = sigmoid(g)*s + (1-sigmoid(g))*tanh(c), latent = tanh(o).

    s is 0 at slot 0.
    """

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.joint_proj = nn.Linear(2 * self.rank + config.hidden_size, 3 * self.rank)

    def latent(self, h_BAKD: torch.Tensor, prev_tokens_BAK: torch.Tensor) -> torch.Tensor:
        embedded_BAKR = self.embed(prev_tokens_BAK)
        state_BAR = torch.zeros_like(embedded_BAKR[:, :, 0])
        latents = []
        for slot in range(embedded_BAKR.shape[2]):
            state_BAR, latent_BAR = self.step(state_BAR, embedded_BAKR[:, :, slot], h_BAKD[:, :, slot])
            latents.append(latent_BAR)
        return torch.stack(latents, dim=2)

    def latent_of_slots(self, h_ND: torch.Tensor, prev_tokens_N: torch.Tensor, slots: Slots) -> torch.Tensor:
        # A block's supervised slots are its first ones: no latent depends on what is filled in behind them.
        shape = (1, slots.num_blocks, slots.block_size)
        h_1MKD = h_ND.new_zeros(*shape, h_ND.shape[-1]).index_put((slots.block * 0, slots.block, slots.slot), h_ND)
        prev_1MK = prev_tokens_N.new_zeros(shape)
        prev_1MK[0, slots.block, slots.slot] = prev_tokens_N
        return self.latent(h_1MKD, prev_1MK)[0, slots.block, slots.slot]

    def advance(
        self, state: torch.Tensor, h: torch.Tensor, prev_token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.step(state, self.embed(prev_token), h)

    def step(
        self, state: torch.Tensor, embedded: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next state and latent of one slot, both [..., R]."""
        joint = self.joint_proj(torch.cat([state, embedded, hidden], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        keep = torch.sigmoid(gate)
        return keep * state + (1 - keep) * torch.tanh(candidate), torch.tanh(output)


class ConfidenceHead(nn.Module):
    """Logit of the accept rate from [h; W1[x]], or from h alone."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.with_markov = bool(config.confidence_head_with_markov) and config.markov_rank > 0
        self.proj = nn.Linear(config.hidden_size + (config.markov_rank if self.with_markov else 0), 1)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor | None) -> torch.Tensor:
        """[..., D] and W1[x] [..., R] to logits [...]."""
        features = hidden if embedded is None else torch.cat([hidden, embedded], dim=-1)
        logit: torch.Tensor = self.proj(features).squeeze(-1)
        return logit


def build_markov_head(config: Qwen3Config) -> MarkovHead | None:
    """The head that the config names; None at rank 0 (DFlash). Raises ValueError for an unknown type."""
    if config.markov_rank == 0:
        return None
    kinds = {"vanilla": MarkovHead, "gated": GatedMarkovHead, "rnn": RnnMarkovHead}
    if config.markov_head_type not in kinds:
        raise ValueError(f"markov_head_type: expected one of {', '.join(kinds)}, got {config.markov_head_type!r}")
    return kinds[config.markov_head_type](config)
