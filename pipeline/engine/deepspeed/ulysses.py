"""Sequence parallelism: DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509) for bidirectional attention.

Groups of N consecutive ranks train on the same sequences; each rank computes L / N positions. Around the
attention, an all-to-all exchanges positions for heads, so that each rank has all positions of heads / N
heads. The masked rows are divided evenly among the group, wherever in the sequence they are.
"""

from __future__ import annotations

from typing import Any

import deepspeed.comm
import torch
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pipeline.model.sequence import WholeSequence


def form_group(size: int) -> Any:
    """Divide the ranks into groups of `size` consecutive ones; return the group of this rank."""
    world_size, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
    groups = [
        deepspeed.comm.new_group(list(range(first, first + size))) for first in range(0, world_size, size)
    ]
    return groups[rank // size]


class _Gather(torch.autograd.Function):
    """All-gather along dimension 0; the backward sums and divides again (reduce-scatter)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        size = deepspeed.comm.get_world_size(group)
        gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
        deepspeed.comm.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = deepspeed.comm.get_world_size(ctx.group)
        own = grad.new_empty(grad.shape[0] // size, *grad.shape[1:])
        deepspeed.comm.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


class UlyssesSequence(WholeSequence):
    """Computes a share of the positions; see `WholeSequence` for the methods."""

    def __init__(self, size: int) -> None:
        """Join a group of `size` consecutive ranks; every rank calls this."""
        self.size = size
        self.group = form_group(size)
        self.rank = deepspeed.comm.get_rank(self.group)
        # [B, L / N, heads, D] -> [B, L, heads / N, D] and back
        self.exchange = DistributedAttention(self._attend, self.group, scatter_idx=2, gather_idx=1)

    def own(self, x: Tensor, dim: int) -> Tensor:
        """See `WholeSequence`; if N does not divide the length, the last ranks have fewer positions."""
        each = -(-x.shape[dim] // self.size)
        first = min(self.rank * each, x.shape[dim])
        return x.narrow(dim, first, min(each, x.shape[dim] - first))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | BlockMask | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, L / N, heads, D]
        out: Tensor = self.exchange(q, k, v, 0, None, attention_mask)
        return out.transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | BlockMask | None) -> Tensor:
        """Attend over the whole sequence in some of the heads; all [B, L, heads / N, D]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return super().attend(q, k, v, attention_mask).transpose(1, 2)

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        each = -(-length // self.size)
        own = x.transpose(0, dim)
        if own.shape[0] < each:
            own = torch.cat([own, own.new_zeros(each - own.shape[0], *own.shape[1:])])
        return _Gather.apply(own, self.group).narrow(0, 0, length).transpose(0, dim)
