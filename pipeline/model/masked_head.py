"""The output layer at masked positions: loss and scores in one pass, without a [B, L, V] tensor.

The forward computes the logits of a chunk of rows at a time, and the gradients of the loss with respect to
hidden states and weight while these logits exist. The backward only scales the gradients. Logits,
probabilities and sums are fp32 for any dtype of the weights.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.batch import HeadOutput, Vocabulary

CHUNK_LOGITS = 2**26  # fp32 logits held at once on a CPU: 256 MiB
GPU_SHARE = 32  # on a GPU the logits of a chunk and their gradients take 1/32 of its memory
ROW_MULTIPLE = 128  # rows of a tile of a GPU's matrix products


def chunk_rows(vocabulary_rows: int, memory: int | None) -> int:
    """Return the rows of a chunk, a multiple of 128.

    Each chunk reads and writes the gradient of the weight, [V, H] float32, once, so few large ones are fast.
    The size depends on what the GPU has, not on what is free: other chunks round differently.

    Args:
        vocabulary_rows: V.
        memory: bytes of the GPU; None = a CPU.
    """
    logits = CHUNK_LOGITS if memory is None else memory // GPU_SHARE // 6  # fp32, and bf16 gradients
    return max(1, logits // vocabulary_rows // ROW_MULTIPLE) * ROW_MULTIPLE


@functools.cache
def memory_of(device: torch.device) -> int | None:
    """Return the bytes of memory of a GPU; None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


class HeadOptions(NamedTuple):
    """How the head computes; the results are the same up to rounding.

    Attributes:
        fused: on a GPU with Triton and a C compiler, take the kernels of head_kernels.py where no score
            besides the confidence is wanted.
        row_multiple: pad the rows to a multiple of this, so that shapes repeat.
    """

    fused: bool = True
    row_multiple: int = 1


class Values(NamedTuple):
    """Scores of rows without gradients; see `HeadOutput`."""

    nll: Tensor
    confidence: Tensor
    margin: Tensor | None
    entropy: Tensor | None
    drawn: Tensor | None

    @classmethod
    def empty(cls, targets: Tensor, scores: tuple[str, ...], draws: bool = False) -> Values:
        """Return room for the scores of targets [R], and for a drawn token of each."""
        new = functools.partial(torch.empty_like, targets, dtype=torch.float32)
        return cls(
            new(),
            new(),
            new() if "margin" in scores else None,
            new() if "entropy" in scores else None,
            torch.empty_like(targets) if draws else None,
        )

    def at(self, rows: slice) -> Values:
        """Return the same tensors at `rows`."""
        return Values(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


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
        options: HeadOptions = HeadOptions(),  # noqa: B008
    ) -> tuple[Tensor | None, ...]:
        need_gradients = any(ctx.needs_input_grad[:2])
        loss, values, ctx.gradients = _computed(
            hidden, weight, targets, weights, vocabulary, scores, options, need_gradients
        )
        ctx.mark_non_differentiable(*(x for x in values if x is not None))
        return loss, *values

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the masked head was run backward twice: it scales its gradients in place")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None, None, None, None


def _computed(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    vocabulary: Vocabulary,
    scores: tuple[str, ...],
    options: HeadOptions,
    need_gradients: bool,
    draw: Callable[[Tensor, slice], Tensor] | None = None,
) -> tuple[Tensor, Values, tuple[Tensor, Tensor] | None]:
    """Return loss, scores and, on demand, the gradients of hidden states and weight."""
    fused = options.fused and not scores and draw is None and _has_kernels(hidden.device)
    if fused:
        from pipeline.model import head_kernels
    h, w = _operands(hidden, weight)
    rows, padding = len(h), -len(h) % options.row_multiple
    if padding:  # rows of weight 0
        h = F.pad(h, (0, 0, 0, padding))
        targets, weights = F.pad(targets, (0, padding)), F.pad(weights, (0, padding))
    values = Values.empty(targets, scores, draw is not None)
    chunk = chunk_rows(len(weight), memory_of(hidden.device))
    buffer = h.new_empty(min(chunk, len(h)), len(weight), dtype=torch.float32)
    if need_gradients:
        grad_hidden = torch.empty_like(h, dtype=hidden.dtype)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        # Chunks share it as they share the logits: two of them would be as large as the logits of one.
        of_logits = buffer if w.dtype == torch.float32 else torch.empty_like(buffer, dtype=w.dtype)
    for start in range(0, len(h), chunk):
        part = slice(start, start + chunk)
        target, factor, of_part = targets[part, None], weights[part, None], values.at(part)
        logits = _product(h[part], w.T, buffer[: len(target)])  # [C, V] float32
        if fused:
            nll, confidence, *_ = of_part
            sums = head_kernels.score(logits, target, nll, confidence, vocabulary)
        else:
            _forbidding(logits, vocabulary)
            if draw is not None and of_part.drawn is not None:
                count = min(len(target), max(0, rows - start))  # without the padding
                of_part.drawn[:count] = draw(logits[:count], slice(start, start + count))
            total = score_rows(logits, target, of_part)
        if need_gradients:
            grad_logits = of_logits[: len(target)]
            if fused:
                head_kernels.gradient(logits, target, factor, *sums, grad_logits, vocabulary)
            else:  # logits has become exp(logits - highest)
                logits.mul_(factor / total).scatter_add_(1, target, -factor)
                if grad_logits.dtype != logits.dtype:
                    grad_logits.copy_(logits)
            grad_hidden[part] = _product(grad_logits, w)
            _add_product(grad_weight, grad_logits.T, h[part])
            del grad_logits
    values = values.at(slice(rows))
    loss = (values.nll * weights[:rows]).sum()
    if not need_gradients:
        return loss, values, None
    del of_logits  # before the weight's gradient in its dtype needs room
    return loss, values, (grad_hidden[:rows], grad_weight.to(weight.dtype))


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    """Return whether Triton's kernels run on the device: Triton compiles their launchers by a C compiler."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    found = importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))
    return device.type == "cuda" and found


def score_rows(logits: Tensor, target: Tensor, values: Values) -> Tensor:
    """Write the scores of a chunk; turn its logits [C, V] into exp(logits - highest); return its sums [C, 1].

    Args:
        logits: [C, V] float32.
        target: [C, 1] int64.
        values: room for the scores of these rows.
    """
    nll, confidence, margin, entropy, _ = values
    if margin is not None:
        top = logits.topk(2, dim=-1).values  # [C, 2]
    highest = logits.amax(dim=-1, keepdim=True)  # [C, 1]
    nll.copy_((highest - logits.gather(1, target)).squeeze(1))
    exponentials = logits.sub_(highest).exp_()  # in place
    total = exponentials.sum(dim=-1, keepdim=True)  # [C, 1], at least 1
    nll += total.log().squeeze(1)
    confidence.copy_(1.0 / total.squeeze(1))
    if margin is not None:
        margin.copy_(-torch.expm1(top[:, 1] - top[:, 0]) / total.squeeze(1))
    if entropy is not None:
        entropy.copy_(torch.special.entr(exponentials / total).sum(dim=-1))
    return total


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
        return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to the fp32 `total` inside the product, where the device can."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            total.addmm_(a, b)
        elif _adds_to_fp32(a.device, a.dtype):
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        else:
            total += torch.mm(a, b, out_dtype=torch.float32)


@functools.cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this torch adds a product of `dtype` to an fp32 matrix; some versions refuse, by device.

    A matrix of that size would otherwise be written and read once more for each chunk.
    """
    total, a = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


def _forbidding(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Set the logits [R, V] of tokens that are never predicted to -inf, in place."""
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
        self.options = HeadOptions()

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        scores: tuple[str, ...] = (),
        draw: Callable[[Tensor, slice], Tensor] | None = None,
    ) -> HeadOutput:
        """Return the loss, differentiable, and NLL and scores without gradients.

        Args:
            hidden: [R, H].
            targets: [R] int64.
            weights: [R] float32, the loss weight of each row.
            scores: which of "margin" and "entropy" to compute besides the confidence.
            draw: without gradients, draws a token for each row of a slice from their logits.
        """
        inputs = (hidden, self.weight, targets, weights, self.vocabulary, scores, self.options)
        if torch.is_grad_enabled():
            return HeadOutput(*_MaskedLoss.apply(*inputs))
        # Inside of `apply` the inputs seem to need gradients even under no_grad.
        loss, values, _ = _computed(*inputs, need_gradients=False, draw=draw)
        return HeadOutput(loss, *values)

    def scores(self, hidden: Tensor, needs: tuple[str, ...]) -> HeadOutput:
        """Return the scores of the predictions at hidden [R, H], for decoding: there is no target."""
        unknown = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        output: HeadOutput = self(hidden, unknown, unknown.float(), needs)
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [R, V] float32 for hidden [R, H]; -inf at tokens never predicted."""
        h, w = _operands(hidden, self.weight)
        return _forbidding(_product(h, w.T), self.vocabulary)
