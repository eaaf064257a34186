"""The masked head and the attention kernels against float64.

usage: python -m benchmarks.gpu_proof.numerics --output FILE.json

Errors are norms of differences over norms; those of confidences are the largest difference. Inputs are bf16
on a GPU and fp32 on a CPU, and float64 has the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_proof.measuring import output_of, there, write
from pipeline.base.cli import run
from pipeline.model.batch import Vocabulary
from pipeline.model.masked_head import HeadOptions, MaskedHead
from pipeline.model.sequence import WHOLE
from pipeline.model.visibility import block_mask, sees

MASK, BLOCK = 3, 32
# bf16 has 8 bits: results round by up to 2^-9 = 0.002. Loss and confidence are computed in fp32.
TOLERANCES = {"loss": 1e-4, "confidence": 1e-4, "hidden": 0.01, "weight": 0.01, "attention": 0.02}
HEADS = ("head", "fused head")
KINDS = ("all seen", "padding", "dense block mask", "block mask", "documents")
DOCUMENT = 50  # tokens
LENGTHS = (256, 192)  # explicit masks have failed on some cards at 64 modulo 128


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected; NaN stays NaN."""
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def head_errors(
    device: torch.device, rows: int, vocabulary: int, width: int = 64, fused: bool = False
) -> dict[str, float]:
    """Return the errors of loss, confidences and gradients of hidden states and weight.

    Args:
        device: where the head runs.
        rows: masked rows.
        vocabulary: V; the last eight rows are no tokens.
        width: H.
        fused: take the Triton kernels, where there is a GPU.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = torch.nn.Parameter((torch.randn(vocabulary, width, device=device) / math.sqrt(width)).to(dtype))
    targets = torch.randint(MASK + 1, vocabulary - 8, (rows,), device=device)
    weights = torch.rand(rows, device=device)
    head = MaskedHead(weight, Vocabulary(vocabulary, vocabulary - 8, MASK))
    head.options = HeadOptions(fused)
    output = head(hidden, targets, weights)
    output.loss.backward()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = exact_hidden @ exact_weight.T
    forbidden = torch.tensor([MASK, *range(vocabulary - 8, vocabulary)], device=device)
    logits = logits.index_fill(1, forbidden, -torch.inf)
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights.double()).sum()
    loss.backward()
    confidence = logits.detach().softmax(dim=-1).amax(dim=-1)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert exact_hidden.grad is not None
    assert exact_weight.grad is not None
    return {
        "loss": abs(float(output.loss.detach()) / float(loss.detach()) - 1),
        "confidence": float((output.confidence.double() - confidence).abs().max()),
        "hidden": relative(hidden.grad, exact_hidden.grad),
        "weight": relative(weight.grad, exact_weight.grad),
    }


def attention_errors(device: torch.device, kind: str, length: int, width: int = 64) -> dict[str, float]:
    """Return the errors of the output of attention and of the gradients of queries, keys and values.

    Args:
        device: where it runs.
        kind: one of KINDS: what the queries see.
        length: positions.
        width: of a head.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(2, 4, length, width, device=device).to(dtype).requires_grad_() for _ in range(3))
    positions = torch.arange(length, device=device)
    seen = torch.ones(2, 1, length, length, dtype=torch.bool, device=device)
    mask = None
    if kind == "padding":
        present = positions < torch.tensor([[length], [length - 40]], device=device)  # [B, L]
        mask = present[:, None, None, :]
        seen = mask.expand_as(seen)
    if kind == "documents":
        documents = (positions + torch.tensor([[0], [17]], device=device)) // DOCUMENT  # [B, L]
        seen = (documents[:, :, None] == documents[:, None])[:, None].expand_as(seen)
        mask = block_mask(torch.zeros_like(positions)[None], positions < 0, None, documents)
    if "block" in kind:
        noisy, blocks = positions < length // 2, positions[None] % (length // 2) // BLOCK
        dense = sees(blocks[:, :, None], blocks[:, None, :], noisy[:, None], noisy)[:, None]
        seen = dense.expand_as(seen)
        mask = dense if "dense" in kind else block_mask(blocks, noisy, None)
    direction = torch.randn_like(q)
    out = WHOLE.attend(q, k, v, mask)
    found = [out, *torch.autograd.grad(out, (q, k, v), direction)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].mT / math.sqrt(width)
    expected_out = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ exact[2]
    expected = [expected_out, *torch.autograd.grad(expected_out, exact, direction.double())]
    names = ("output", "queries", "keys", "values")
    return {name: relative(a, b) for name, a, b in zip(names, found, expected, strict=True)}


def kinds(device: torch.device) -> tuple[str, ...]:
    """Return the kinds of attention that a device has: compiled flex_attention has no backward on a CPU."""
    return KINDS if device.type == "cuda" else KINDS[:-2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write everything, with what is beyond its tolerance."""
    path, device = output_of(__doc__, arguments), there()
    large = device.type == "cuda"
    sizes = (4096, 32_008, 512) if large else (50, 500, 64)
    heads = {name: head_errors(device, *sizes, fused=name == "fused head") for name in HEADS}
    attention = {
        f"{kind}, {length} positions": attention_errors(device, kind, length)
        for kind in kinds(device)
        for length in LENGTHS
    }
    beyond = [
        f"{name}: {of}" for name, errors in heads.items() for of, error in errors.items()
        if not error <= TOLERANCES[of]
    ]  # fmt: skip
    for name, errors in attention.items():
        beyond += [f"{name}: {of}" for of, error in errors.items() if not error <= TOLERANCES["attention"]]
    write(path, {"heads": heads, "attention": attention, "tolerances": TOLERANCES, "beyond": beyond})


if __name__ == "__main__":
    run(main)
