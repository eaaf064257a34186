"""Grouped-query attention against the textbook formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.model import sequence
from pipeline.model.sequence import WHOLE


def textbook(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Return attention [B, H, L, D], one query at a time; query head h reads key head h // (H / kv_heads)."""
    out = torch.zeros_like(q)
    for row, head, query in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        group = head // (q.shape[1] // k.shape[1])
        scores = k[row, group] @ q[row, head, query] / math.sqrt(q.shape[3])
        weights = scores.masked_fill(~seen[row, query], -torch.inf).softmax(dim=0)
        out[row, head, query] = weights @ v[row, group]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["none", "padding", "dense"])
def test_grouped_queries(monkeypatch: pytest.MonkeyPatch, kv_heads: int, kind: str) -> None:
    """Equals the formula, by kernels that suit it on a GPU.

    No call combines groups with a mask, for which the kernel is the slowest, nor a mask with cuDNN.
    """
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 8, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 6, 8, requires_grad=True) for _ in range(2))
    mask = {"none": None, "padding": torch.ones(2, 1, 1, 6).bool(), "dense": torch.ones(2, 1, 6, 6).bool()}[
        kind
    ]
    if mask is not None:
        mask[1, ..., 4:] = False
    unfit: list[bool] = []
    torch_attention = sequence.F.scaled_dot_product_attention

    def watched(*inputs: Tensor, attn_mask: Tensor | None = None, enable_gqa: bool = False) -> Any:
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        unfit.append(attn_mask is not None and (enable_gqa or cudnn))
        return torch_attention(*inputs, attn_mask=attn_mask, enable_gqa=enable_gqa)

    monkeypatch.setattr(sequence.F, "scaled_dot_product_attention", watched)
    found = WHOLE.attend(q, k, v, mask)
    seen = torch.ones(2, 6, 6).bool() if mask is None else mask[:, 0].expand(2, 6, 6)
    expected = textbook(q, k, v, seen)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    gradients = (torch.autograd.grad((x * direction).sum(), (q, k, v)) for x in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert unfit == [False]
