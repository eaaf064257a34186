"""Which positions of a sequence a process computes: all, or a share (sequence parallelism)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# The flash kernel supports no mask. With one, cuDNN's gives NaN gradients on Hopper, at lengths that are an
# odd multiple of 64 (https://github.com/pytorch/pytorch/issues/196678).
MASKED_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Compile flex_attention on first use, so that runs without it start faster."""
    return torch.compile(flex_attention)


def repeated(x: Tensor, heads: int) -> Tensor:
    """Repeat keys or values x [B, kv_heads, L, D] for their query heads: [B, heads, L, D]."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


class WholeSequence:
    """This process computes every position; a subclass may split them among the ranks of a group.

    All ranks of a group get the same batch and return the same output.

    Attributes:
        size: N, processes per sequence.
    """

    size: int = 1

    def own(self, x: Tensor, dim: int) -> Tensor:
        """Return this process's share of x along `dim`, positions or masked rows."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | BlockMask | None) -> Tensor:
        """Return softmax(q k^T / sqrt(D)) v, [B, heads, L / N, D], over the keys of the whole sequence.

        Args:
            q: [B, heads, L / N, D], this process's positions.
            k: [B, kv_heads, L / N, D].
            v: [B, kv_heads, L / N, D].
            attention_mask: bool, broadcastable to [B, heads, L, L], False where a key is hidden; or a block
                mask.
        """
        grouped = k.shape[1] != q.shape[1]
        if attention_mask is None:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        if isinstance(attention_mask, BlockMask):
            return _compiled_flex_attention()(q, k, v, block_mask=attention_mask, enable_gqa=grouped)
        if grouped:
            # The memory-efficient kernel supports no groups: torch would fall back to one that stores
            # [B, heads, L, L] in fp32.
            k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
        with sdpa_kernel(MASKED_KERNELS):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """Return all `length` positions along `dim` from the shares x of all processes; inverts `own`."""
        return x


WHOLE = WholeSequence()
