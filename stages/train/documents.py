"""Where the documents of a packed row begin and end.

Shape suffixes: B rows, S tokens of a row.
"""

import torch


def document_bounds(seq_lens: torch.Tensor | None, input_like_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First token and one past the last token of each token's document: two long tensors [B, S].

    `seq_lens [B, max_docs]` holds the documents' lengths in order, 0 for none; None means one document a row. Tokens
    behind the last document belong to none: both bounds are 0 there. Raises ValueError for lengths that do not fit.
    """
    num_rows, num_tokens = input_like_BS.shape
    device = input_like_BS.device
    if seq_lens is None:
        start_BS = torch.zeros(num_rows, num_tokens, dtype=torch.long, device=device)
        return start_BS, torch.full_like(start_BS, num_tokens)
    if seq_lens.ndim != 2 or seq_lens.shape[0] != num_rows or seq_lens.shape[1] < 1:
        raise ValueError(f"seq_lens: expected [{num_rows}, documents], got {list(seq_lens.shape)}")
    lengths = seq_lens.to(device=device, dtype=torch.long)
    ends = lengths.cumsum(dim=1)
    if bool((lengths < 0).any()) or bool((ends[:, -1] > num_tokens).any()):
        raise ValueError(
            f"seq_lens: expected lengths of at least 0 that sum to at most {num_tokens} tokens a row, "
            f"got {seq_lens.tolist()}"
        )
    positions = torch.arange(num_tokens, device=device).expand(num_rows, -1).contiguous()
    document_BS = torch.searchsorted(ends, positions, right=True)
    inside_BS = document_BS < ends.shape[1]
    document_BS = document_BS.clamp_max(ends.shape[1] - 1)
    end_BS = ends.gather(1, document_BS) * inside_BS
    start_BS = (ends - lengths).gather(1, document_BS) * inside_BS
    return start_BS, end_BS
