"""The output layer at masked positions: loss and confidence in one pass, without a [B, L, V] tensor.

Logits are computed for a chunk of rows at a time. The gradients of the loss with respect to the hidden states
and the weight are formed in the forward, while the chunk's logits exist, and only scaled in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.batch import Vocabulary

CHUNK_LOGITS = 2**26  # fp32 logits held at once: 256 MiB


class _MaskedLoss(torch.autograd.Function):
    """loss = sum_i weights_i * (logsumexp(h_i W^T) - h_i W^T[target_i]), with the mask token excluded."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden.shape[0]
        need_gradients = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.zeros_like(hidden) if need_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_gradients else None
        nll = hidden.new_empty(rows, dtype=torch.float32)
        confidence = hidden.new_empty(rows, dtype=torch.float32)
        chunk = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = masked_logits(hidden[part], weight, vocabulary)  # [C, V] float32
            lse = torch.logsumexp(logits, dim=-1)
            nll[part] = lse - logits.gather(1, targets[part, None]).squeeze(1)
            confidence[part] = torch.exp(logits.amax(dim=-1) - lse)
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = logits.sub_(lse[:, None]).exp_()  # the probabilities, in place
                grad_logits.scatter_add_(1, targets[part, None], grad_logits.new_full((len(lse), 1), -1.0))
                grad_logits = grad_logits.mul_(weights[part, None]).to(weight.dtype)
                grad_hidden[part] = grad_logits @ weight
                grad_weight += grad_logits.T @ hidden[part]
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(nll, confidence)
        return (nll * weights).sum(), nll, confidence

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None


def masked_logits(hidden: Tensor, weight: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return logits [R, V] float32 for hidden [R, H] and weight [V, H]; -inf for what is never predicted."""
    logits = (hidden @ weight.T).float()
    logits[:, vocabulary.mask_id] = -torch.inf
    logits[:, vocabulary.tokens :] = -torch.inf
    return logits


class MaskedHead(nn.Module):
    """The output matrix; its module hooks gather the weight under ZeRO-3, also where a rank has 0 rows."""

    def __init__(self, weight: Tensor, vocabulary: Vocabulary) -> None:
        """Make the head of `weight` [V, H], which is the embedding itself where the two are tied."""
        super().__init__()
        self.weight = weight  # an nn.Parameter, registered under its own name here too
        self.vocabulary = vocabulary

    def forward(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted loss [], and NLL [R] and confidence [R] without gradient, all float32.

        Args:
            hidden: [R, H].
            targets: [R] int64.
            weights: [R] float32, share of each row in the loss.
        """
        loss, nll, confidence = _MaskedLoss.apply(hidden, self.weight, targets, weights, self.vocabulary)
        return loss, nll, confidence

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [R, V] float32 for hidden [R, H]; -inf for what is never predicted."""
        return masked_logits(hidden, self.weight, self.vocabulary)
