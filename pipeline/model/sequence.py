"""Which positions of the sequences a process computes: all of them, or a share (sequence parallelism)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Return flex_attention for a GPU; other runs start faster without the compiler."""
    return torch.compile(flex_attention)


def repeated(x: Tensor, heads: int) -> Tensor:
    """Return keys or values [B, heads, L, D], each of x [B, kv_heads, L, D] for all the queries it serves."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


class WholeSequence:
    """This process computes every position; a subclass may divide them among the ranks of a group.

    The model asks for three things: the positions that are its own, attention that sees all of them, and what
    the others have computed. All ranks of a group are given the same batch and return the same output.

    Attributes:
        size: N, the processes that share each sequence.
    """

    size: int = 1

    def own(self, x: Tensor, dim: int) -> Tensor:
        """Return this process's share of the positions (or masked rows) along `dim` of x."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | BlockMask | None) -> Tensor:
        """Return softmax(q k^T / sqrt(D)) v, [B, heads, L / N, D], over the keys of the whole sequence.

        Args:
            q: [B, heads, L / N, D], this process's positions.
            k: [B, kv_heads, L / N, D].
            v: [B, kv_heads, L / N, D].
            attention_mask: broadcastable to [B, heads, L, L], False where a key is not to be seen; or the
                block mask that says so.
        """
        grouped = k.shape[1] != q.shape[1]
        if isinstance(attention_mask, BlockMask):
            return _compiled_flex_attention()(q, k, v, block_mask=attention_mask, enable_gqa=grouped)
        if grouped and attention_mask is not None:
            # On a GPU flash takes no mask and the memory-efficient kernel no groups: with both of them torch
            # goes over to one that holds [B, heads, L, L] in fp32.
            k, v, grouped = repeated(k, q.shape[1]), repeated(v, q.shape[1]), False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, enable_gqa=grouped)

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """Return x with all `length` positions along `dim`, of which each process has its `own`."""
        return x


WHOLE = WholeSequence()
