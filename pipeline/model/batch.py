"""What goes into the model and what comes out: tuples, so that DeepSpeed's hooks see the tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Vocabulary(NamedTuple):
    """The tokens that a model knows.

    Attributes:
        rows: rows of the embedding and the output matrix.
        tokens: tokens of the tokenizer; rows beyond them pad the matrix and are never predicted.
        mask_id: the mask token M, which is never predicted.
    """

    rows: int
    tokens: int
    mask_id: int


class Visibility(NamedTuple):
    """Which positions see which others; by default each sees all.

    Attributes:
        blocks: [B or 1, L] int64, number of each position's block: a position sees none of a higher one.
            Blocks of one position each make attention causal.
        clean_ids: [B, L] int64, x0. A position then sees its own block as in xt, and the lower blocks as they
            are here; the model's input is [xt ; x0] (block diffusion, arXiv 2503.09573).
        also_visible: [L, L] bool, pairs of query and key that see each other in spite of their blocks.
    """

    blocks: Tensor | None = None
    clean_ids: Tensor | None = None
    also_visible: Tensor | None = None


class MaskedBatch(NamedTuple):
    """Partly masked sequences and what is to be predicted in them.

    Attributes:
        input_ids: [B, L] int64, xt.
        attention_mask: [B, L] bool, False at padding; None where there is none.
        rows: [R] int64, the masked positions, as indices into the flattened [B * L].
        targets: [R] int64, the true tokens there.
        weights: [R] float32, the share of each row in the loss.
        visibility: which positions see which others.
        scores: which of "margin", "entropy" and "likeliest" the head gives besides the confidence.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    rows: Tensor
    targets: Tensor
    weights: Tensor
    visibility: Visibility = Visibility()
    scores: tuple[str, ...] = ()


class HeadOutput(NamedTuple):
    """The model's answer at the masked positions of a batch.

    Attributes:
        loss: [] float32, sum over the rows of weight x NLL; carries the gradient.
        nll: [R] float32, -log p(x0 | xt) in nats; no gradient.
        confidence: [R] float32, max_v p(v | xt); no gradient.
        margin: [R] float32, the highest probability less the second; None unless the batch asks for it.
        entropy: [R] float32, -sum_v p(v | xt) log p(v | xt) in nats; None unless the batch asks for it.
        likeliest: [R] int64, argmax_v p(v | xt); None unless the batch asks for it.
    """

    loss: Tensor
    nll: Tensor
    confidence: Tensor
    margin: Tensor | None = None
    entropy: Tensor | None = None
    likeliest: Tensor | None = None


def masked_batch(
    tokens: Tensor,
    masked: Tensor,
    rows: int,
    mask_id: int,
    padding: Tensor | None = None,
    weights: Tensor | None = None,
) -> MaskedBatch:
    """Return the batch of partly masked sequences.

    Args:
        tokens: [B, L] int64, x0.
        masked: [B, L] bool.
        rows: how many positions are masked in all; known on the host, so that nothing waits for the device.
        mask_id: the mask token M.
        padding: [B, L] bool, positions that must not be attended to.
        weights: [B, L] float32, share of each masked position in the loss; by default the loss is the mean
            over sequences of the mean NLL of their masked positions.
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
