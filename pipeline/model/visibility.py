"""Attention masks of a `Visibility`: flex_attention's block mask on a GPU, else a dense mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from pipeline.model.batch import Visibility


def sees(query_block: Tensor, key_block: Tensor, query_noisy: Tensor, key_noisy: Tensor) -> Tensor:
    """Return which queries see which keys; all arguments broadcast.

    With the input [xt ; x0], positions of xt are noisy. A noisy key is seen by noisy queries of its block. A
    clean key is seen by clean queries of its block and by all queries of later blocks. These are the block
    diagonal, offset block causal and block causal parts of BD3-LM's mask (arXiv 2503.09573).
    """
    same = key_block == query_block
    within = same & (query_noisy == key_noisy)
    return within | (~key_noisy & (key_block < query_block))


def attention_mask(present: Tensor | None, visibility: Visibility) -> Tensor | BlockMask | None:
    """Return the attention mask of the N model inputs, N = L or, with `clean_ids`, 2 L.

    Args:
        present: [B, L] bool, False at padding.
        visibility: which positions each position sees.

    Returns:
        A block mask, a bool tensor that broadcasts to [B, heads, N, N], or None if every position sees all.
    """
    blocks, clean_ids, also_visible = visibility
    if blocks is None:
        return None if present is None else present[:, None, None, :]
    length = blocks.shape[1]
    if clean_ids is not None:
        blocks = torch.cat([blocks, blocks], dim=1)  # [B, N]
        present = None if present is None else torch.cat([present, present], dim=1)
    noisy = torch.arange(blocks.shape[1], device=blocks.device) < (length if clean_ids is not None else 0)
    if blocks.is_cuda and also_visible is None:
        return block_mask(blocks, noisy, present)
    dense = sees(blocks[:, :, None], blocks[:, None, :], noisy[:, None], noisy)  # [B, N, N]
    if also_visible is not None:
        dense = dense | also_visible
    if present is not None:
        dense = dense & present[:, None, :]
    return dense[:, None]


def block_mask(blocks: Tensor, noisy: Tensor, present: Tensor | None) -> BlockMask:
    """Return flex_attention's block mask for blocks [B or 1, N], noisy [N] and present [B, N] or None."""

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = batch if len(blocks) > 1 else batch * 0
        seen = sees(blocks[row, query], blocks[row, key], noisy[query], noisy[key])
        return seen if present is None else seen & present[batch, key]

    rows, length = max(len(blocks), 0 if present is None else len(present)), blocks.shape[1]
    return create_block_mask(rule, rows, None, length, length, device=str(blocks.device))
