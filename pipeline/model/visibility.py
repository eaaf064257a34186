"""Attention masks of a `Visibility`: flex_attention's block mask on a GPU, else a dense mask."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pipeline.model.batch import Visibility

TILE = 128  # positions of a tile of flex_attention's block mask
SMALLEST_HEAD = 16  # compiled flex_attention refuses smaller ones


def sees(query_block: Tensor, key_block: Tensor, query_noisy: Tensor, key_noisy: Tensor) -> Tensor:
    """Return which queries see which keys; all arguments broadcast.

    With the input [xt ; x0], positions of xt are noisy. A noisy key is seen by noisy queries of its block. A
    clean key is seen by clean queries of its block and by all queries of later blocks. These are the block
    diagonal, offset block causal and block causal parts of BD3-LM's mask (arXiv 2503.09573).
    """
    same = key_block == query_block
    within = same & (query_noisy == key_noisy)
    return within | (~key_noisy & (key_block < query_block))


def takes_flex(device: torch.device, head_width: int) -> bool:
    """Return whether attention by blocks or documents takes flex_attention instead of a dense mask."""
    return device.type == "cuda" and head_width >= SMALLEST_HEAD


def attention_mask(
    present: Tensor | None, visibility: Visibility, head_width: int = SMALLEST_HEAD
) -> Tensor | BlockMask | None:
    """Return the attention mask of the N model inputs, N = L or, with `clean_ids`, 2 L.

    Args:
        present: [B, L] bool, False at padding.
        visibility: which positions each position sees.
        head_width: elements of a head.

    Returns:
        A block mask, a bool tensor that broadcasts to [B, heads, N, N], or None if every position sees all.
    """
    blocks, clean_ids, also_visible, documents = visibility
    if blocks is None:
        within = documents if documents is not None else present
        if within is None:
            return None
        # Decoding changes its shapes, and flex_attention would be compiled for each. At lengths that do not
        # fill their tiles it is slower than the dense mask.
        aligned = torch.is_grad_enabled() and within.shape[1] % TILE == 0
        if documents is None and not (aligned and takes_flex(within.device, head_width)):
            return within[:, None, None, :]
        if also_visible is None and takes_flex(within.device, head_width):
            return block_mask(None, torch.zeros_like(within[0], dtype=torch.bool), present, documents)
        blocks = torch.zeros_like(within[:1], dtype=torch.int32)  # a single block
    length = blocks.shape[1]
    if clean_ids is not None:
        blocks = blocks.repeat(1, 2)  # [B, N]
        present = None if present is None else present.repeat(1, 2)
        documents = None if documents is None else documents.repeat(1, 2)
    noisy = torch.arange(blocks.shape[1], device=blocks.device) < (length if clean_ids is not None else 0)
    if also_visible is None and takes_flex(blocks.device, head_width):
        return block_mask(blocks, noisy, present, documents)
    dense = sees(blocks[:, :, None], blocks[:, None, :], noisy[:, None], noisy)  # [B, N, N]
    if also_visible is not None:
        dense = dense | also_visible
    if documents is not None:
        dense = dense & (documents[:, :, None] == documents[:, None, :])
    if present is not None:
        dense = dense & present[:, None, :]
    return dense[:, None]


def block_mask(
    blocks: Tensor | None, noisy: Tensor, present: Tensor | None, documents: Tensor | None = None
) -> BlockMask:
    """Return flex_attention's block mask for blocks [B or 1, N], noisy [N], present and documents [B, N].

    Without blocks every position sees all others; then documents or present must be given.

    Which tiles hold visible pairs follows from the lowest and highest block of each: some 40 operations,
    where torch's create_block_mask looks at all N^2 pairs, and takes 20 ms of the host's time.
    """

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        conditions = []
        if blocks is not None:
            row = batch if len(blocks) > 1 else batch * 0
            conditions.append(sees(blocks[row, query], blocks[row, key], noisy[query], noisy[key]))
        if documents is not None:
            conditions.append(documents[batch, query] == documents[batch, key])
        if present is not None:
            conditions.append(present[batch, key])
        return functools.reduce(operator.and_, conditions)

    ranges = torch.zeros_like(noisy, dtype=torch.int32)[None] if blocks is None else blocks
    some, every = visible_tiles(ranges, noisy, present, documents)
    length = len(noisy)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), TILE, mask_mod=rule, seq_lengths=(length, length)
    )


def visible_tiles(
    blocks: Tensor, noisy: Tensor, present: Tensor | None, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the tiles with any visible pair, and those with visible pairs alone, [B, N / 128, N / 128] bool.

    The first may hold a tile without a visible pair, the second may miss a tile, if blocks or documents do
    not grow with the position or a tile holds both copies. The mask's rule then decides pair by pair. The
    arguments are those of `block_mask`.
    """
    length = blocks.shape[1]
    tiles = -(-length // TILE)
    place = torch.arange(tiles * TILE, device=blocks.device).clamp(max=length - 1).view(tiles, TILE)
    low, high = blocks[:, place].aminmax(dim=2)  # [B, T]
    any_noisy, all_noisy = noisy[place].any(dim=1), noisy[place].all(dim=1)  # [T]
    whole = torch.arange(1, tiles + 1, device=blocks.device) * TILE <= length  # [T]
    low_q, high_q, low_k, high_k = low[:, :, None], high[:, :, None], low[:, None], high[:, None]

    both_noisy, both_clean = any_noisy[:, None] & any_noisy, ~(all_noisy[:, None] | all_noisy)
    some = (low_k <= high_q) & (low_q <= high_k) & (both_noisy | both_clean)
    some = some | (~all_noisy & (low_k < high_q))
    one_block = (low_q == high_k) & (high_q == low_k)
    every = one_block & all_noisy[:, None] & all_noisy
    every = every | (~any_noisy & (high_k < low_q + (~any_noisy[:, None]).long()))
    every = every & whole & whole[:, None]
    if documents is not None:
        first, last = documents[:, place].aminmax(dim=2)  # [B, T]
        some = some & (first[:, None] <= last[:, :, None]) & (first[:, :, None] <= last[:, None])
        every = every & (first[:, None] == last[:, :, None]) & (first[:, :, None] == last[:, None])
    if present is not None:
        some = some & present[:, place].any(dim=2)[:, None]
        every = every & present[:, place].all(dim=2)[:, None]
    return some, every


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number and the order of the key tiles of each query tile, as flex_attention wants them."""
    order = tiles.byte().argsort(dim=2, descending=True, stable=True)
    return tiles.sum(dim=2, dtype=torch.int32)[:, None], order.int()[:, None]
