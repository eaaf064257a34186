"""The output layer at masked positions: loss and scores in one pass, without a [B, L, V] tensor.

The forward computes the logits of a chunk of rows at a time, and the gradients of the loss with respect to
hidden states and weight while these logits exist. The backward only scales the gradients. Logits,
probabilities and sums are fp32 for any dtype of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.batch import HeadOutput, Vocabulary

CHUNK_LOGITS = 2**26  # fp32 logits held at once: 256 MiB


class _MaskedLoss(torch.autograd.Function):
    """loss = sum_i weights_i * (logsumexp(h_i W^T) - h_i W^T[target_i]), without the mask token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        vocabulary: Vocabulary,
        scores: tuple[str, ...] = (),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        rows = hidden.shape[0]
        h, w = _operands(hidden, weight)
        need_gradients = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if need_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_gradients else None
        chunk = max(1, CHUNK_LOGITS // weight.shape[0])
        buffer = h.new_empty(min(chunk, rows), len(weight)) if h.dtype == torch.float32 else None
        nll = hidden.new_empty(rows, dtype=torch.float32)
        confidence = torch.empty_like(nll)
        margin = torch.empty_like(nll) if "margin" in scores else None
        entropy = torch.empty_like(nll) if "entropy" in scores else None
        likeliest = torch.empty_like(targets) if "likeliest" in scores else None
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            target = targets[part, None]
            out = None if buffer is None else buffer[: len(target)]
            logits = _logits(h[part], w, vocabulary, out)  # [C, V] float32
            if margin is not None:
                top = logits.topk(2, dim=-1).values  # [C, 2]
            if likeliest is not None:
                likeliest[part] = logits.argmax(dim=-1)
            highest = logits.amax(dim=-1, keepdim=True)  # [C, 1]
            nll[part] = (highest - logits.gather(1, target)).squeeze(1)
            exponentials = logits.sub_(highest).exp_()  # in place
            total = exponentials.sum(dim=-1, keepdim=True)  # [C, 1], at least 1
            nll[part] += total.log().squeeze(1)
            confidence[part] = 1.0 / total.squeeze(1)
            if margin is not None:
                margin[part] = -torch.expm1(top[:, 1] - top[:, 0]) / total.squeeze(1)
            if entropy is not None:
                entropy[part] = torch.special.entr(exponentials / total).sum(dim=-1)
            if grad_hidden is not None and grad_weight is not None:
                scale = weights[part, None] / total
                grad_logits = exponentials.mul_(scale).scatter_add_(1, target, -weights[part, None])
                grad_logits = grad_logits.to(w.dtype)
                grad_hidden[part] = _product(grad_logits, w)
                _add_product(grad_weight, grad_logits.T, h[part])
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        values = (nll, confidence, margin, entropy, likeliest)
        ctx.mark_non_differentiable(*(x for x in values if x is not None))
        return (nll * weights).sum(), *values

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the masked head was run backward twice: it scales its gradients in place")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None, None, None


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to the dtype of their product: the weight's, or autocast's; fp32 instead of bf16 on a CPU."""
    device = hidden.device.type
    dtype = weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and dtype == torch.bfloat16:
        dtype = torch.float32  # CPUs have no bf16 matmul with an fp32 result
    return hidden.to(dtype), weight.to(dtype)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a @ b in fp32, because rounding to bf16 would create ties between confidences."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to the fp32 `total`; fp32 operands need no temporary matrix."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            total.addmm_(a, b)
        else:
            total += torch.mm(a, b, out_dtype=torch.float32)


def _logits(hidden: Tensor, weight: Tensor, vocabulary: Vocabulary, out: Tensor | None = None) -> Tensor:
    """Return logits [R, V] float32 for hidden [R, H] and weight [V, H]; -inf at tokens never predicted."""
    logits = _product(hidden, weight.T, out)
    logits[:, vocabulary.mask_id] = -torch.inf
    logits[:, vocabulary.tokens :] = -torch.inf
    return logits


class MaskedHead(nn.Module):
    """The output layer; a module, so that ZeRO-3's hooks gather the weight even on a rank with 0 rows."""

    def __init__(self, weight: Tensor, vocabulary: Vocabulary) -> None:
        """Create the head of `weight` [V, H]; with tied embeddings this is the embedding's parameter."""
        super().__init__()
        self.weight = weight  # an nn.Parameter, also registered as lm_head.weight
        self.vocabulary = vocabulary

    def forward(
        self, hidden: Tensor, targets: Tensor, weights: Tensor, scores: tuple[str, ...] = ()
    ) -> HeadOutput:
        """Return the loss, differentiable, and NLL and scores without gradients.

        Args:
            hidden: [R, H].
            targets: [R] int64.
            weights: [R] float32, the loss weight of each row.
            scores: which of "margin", "entropy" and "likeliest" to compute besides the confidence.
        """
        return HeadOutput(*_MaskedLoss.apply(hidden, self.weight, targets, weights, self.vocabulary, scores))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [R, V] float32 for hidden [R, H]; -inf at tokens never predicted."""
        return _logits(*_operands(hidden, self.weight), self.vocabulary)
