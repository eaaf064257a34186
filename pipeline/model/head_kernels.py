"""The masked head's passes over its logits as two Triton kernels: scores, then the gradient.

A pass is as long as the memory takes to read the logits once. The eager operations read and write them about
ten times. Liger's kernels were no help: they give loss, accuracy and likeliest tokens, but not the highest
probability, by which the chains advance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.base.extras import extra
from pipeline.model.batch import Vocabulary

with extra("triton", "engine.fused_head"):
    import triton
    import triton.language as tl

BLOCK = 4096  # logits that a program holds at once


@triton.jit  # type: ignore[untyped-decorator]
def _score(logits, stride, targets, nll, confidence, highest, total, tokens, mask_id, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reduce one row of logits in one pass: each lane keeps its own maximum and sum until the end."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tokens, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(start + column, mask=(column < tokens) & (column != mask_id), other=float("-inf"))
        higher = tl.maximum(top, x)
        # -inf minus -inf is no number. A sum that is none, from a logit that is none, must stay so.
        mass *= tl.where(top == higher, 1.0, tl.exp(top - higher))
        mass += tl.where(x == float("-inf"), 0.0, tl.exp(x - higher))
        top = higher
    best = tl.max(top, axis=0)
    everything = tl.sum(mass * tl.exp(top - best), axis=0)
    target = tl.load(targets + row)
    known = (target < tokens) & (target != mask_id)
    of_target = tl.load(start + target, mask=known, other=float("-inf"))
    tl.store(nll + row, best - of_target + tl.log(everything))
    tl.store(confidence + row, 1.0 / everything)
    tl.store(highest + row, best)
    tl.store(total + row, everything)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(  # type: ignore[no-untyped-def]
    logits, stride, targets, weights, highest, total, out, out_stride, columns, tokens, mask_id,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write weight * (softmax - one hot target) of one row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    allowed = (column < tokens) & (column != mask_id)
    x = tl.load(logits + row * stride + column, mask=allowed, other=float("-inf"))
    weight = tl.load(weights + row)
    gradient = tl.exp(x - tl.load(highest + row)) * (weight / tl.load(total + row))
    gradient = tl.where(column == tl.load(targets + row), gradient - weight, gradient)
    tl.store(out + row * out_stride + column, gradient.to(out.dtype.element_ty), mask=column < columns)


def score(
    logits: Tensor, targets: Tensor, nll: Tensor, confidence: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Write NLL and confidence [C] of a chunk; return its highest logits and sums of exponentials, [C].

    Args:
        logits: [C, V] float32, of every row of the weight; those never predicted are left out here.
        targets: [C] int64.
        nll: [C] float32, room for -log p(target).
        confidence: [C] float32, room for the highest probability.
        vocabulary: says which tokens are never predicted.
    """
    highest, total = torch.empty_like(nll), torch.empty_like(nll)
    _score[(len(logits),)](
        logits, logits.stride(0), targets, nll, confidence, highest, total,
        vocabulary.tokens, vocabulary.mask_id, BLOCK, num_warps=8,
    )  # fmt: skip
    return highest, total


def gradient(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    highest: Tensor,
    total: Tensor,
    out: Tensor,
    vocabulary: Vocabulary,
) -> None:
    """Write the gradient of sum(weights * NLL) with respect to the logits.

    Args:
        logits: [C, V] float32.
        targets: [C] int64.
        weights: [C] float32.
        highest: [C] float32, of `score`.
        total: [C] float32, of `score`.
        out: [C, V], room for the gradient, in the dtype of the products that follow; may be `logits`.
        vocabulary: says which tokens are never predicted; their gradient is 0.
    """
    rows, columns = logits.shape
    _gradient[(rows, triton.cdiv(columns, BLOCK))](
        logits, logits.stride(0), targets, weights, highest, total, out, out.stride(0), columns,
        vocabulary.tokens, vocabulary.mask_id, BLOCK, num_warps=8,
    )  # fmt: skip
