"""Inputs and outputs of the model, as tuples, because DeepSpeed's hooks look for tensors in tuples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Vocabulary(NamedTuple):
    """The vocabulary of a model.

    Attributes:
        rows: rows of the embedding and the output matrix.
        tokens: tokens of the tokenizer; the rows beyond are padding and never predicted.
        mask_id: the mask token M, never predicted.
    """

    rows: int
    tokens: int
    mask_id: int


class Visibility(NamedTuple):
    """Which positions each position sees; by default all.

    Attributes:
        blocks: [B or 1, L] int64, the block of each position. A position sees its own block and lower ones;
            blocks of one position make attention causal.
        clean_ids: [B, L] int64, x0 (block diffusion, arXiv 2503.09573). The model's input is then [xt ; x0]:
            a position of xt sees its own block of xt and the lower blocks of x0.
        also_visible: [L, L] bool, (query, key) pairs that are visible in addition.
        documents: [B, L] int32; of all that, a position sees only what is in its own document.
    """

    blocks: Tensor | None = None
    clean_ids: Tensor | None = None
    also_visible: Tensor | None = None
    documents: Tensor | None = None


EVERYTHING = Visibility()

# Draws tokens [C] int64 for the rows [C] of the flattened [B, L], from their logits [C, V] float32, which it
# leaves unchanged and which are -inf at tokens never predicted.
Draw = Callable[[Tensor, Tensor], Tensor]


class MaskedBatch(NamedTuple):
    """Partly masked sequences with their targets.

    Attributes:
        input_ids: [B, L] int64, xt.
        attention_mask: [B, L] bool, False at padding; None = no padding.
        rows: [R] int64, the masked positions as indices into the flattened [B * L].
        targets: [R] int64, the true tokens of `rows`.
        weights: [R] float32, the loss weight of each row.
        visibility: which positions each position sees.
        scores: which of "margin" and "entropy" to return besides the confidence.
        draw: draws a token for each row; without gradients only. A plain function: DeepSpeed warns of others.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    rows: Tensor
    targets: Tensor
    weights: Tensor
    visibility: Visibility = Visibility()
    scores: tuple[str, ...] = ()
    draw: Draw | None = None


class HeadOutput(NamedTuple):
    """Loss and scores at the masked positions of a batch; only the loss has a gradient.

    Attributes:
        loss: [] float32, sum over the rows of weight x NLL.
        nll: [R] float32, -log p(x0 | xt) in nats.
        confidence: [R] float32, max_v p(v | xt).
        margin: [R] float32, the highest probability minus the second highest; None unless in `scores`.
        entropy: [R] float32, -sum_v p(v | xt) log p(v | xt) in nats; None unless in `scores`.
        drawn: [R] int64, the tokens of `MaskedBatch.draw`; None without it.
    """

    loss: Tensor
    nll: Tensor
    confidence: Tensor
    margin: Tensor | None = None
    entropy: Tensor | None = None
    drawn: Tensor | None = None


def masked_batch(
    tokens: Tensor,
    masked: Tensor,
    rows: int,
    mask_id: int,
    padding: Tensor | None = None,
    weights: Tensor | None = None,
) -> MaskedBatch:
    """Build a batch from clean sequences and their masks.

    Args:
        tokens: [B, L] int64, x0.
        masked: [B, L] bool.
        rows: number of masked positions in the batch; known on the host, which avoids a device sync.
        mask_id: the mask token M.
        padding: [B, L] bool, positions that must not be attended to.
        weights: [B, L] float32, loss weight of each masked position; by default the loss is the mean over
            sequences of the mean NLL of their masked positions.
    """
    flat = torch.nonzero_static(masked.flatten(), size=rows).squeeze(1)  # [R]
    if weights is None:
        weights = (1.0 / (masked.sum(dim=1, keepdim=True) * len(masked))).expand(masked.shape)
    return MaskedBatch(
        input_ids=tokens.masked_fill(masked, mask_id),
        attention_mask=None if padding is None else ~padding,
        rows=flat,
        targets=tokens.flatten()[flat],
        weights=weights.flatten()[flat].float(),
    )
