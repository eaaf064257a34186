"""Layers that initialise their weights in the constructor, because ZeRO-3 shards them right after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import Recompute


@torch.no_grad()
def draw_normal(weight: Tensor, std: float) -> None:
    """Draw `weight`, of any shape, from N(0, std^2), in fp32 on the CPU.

    The same seed gives the same weights on every device; in bf16, the same rounded to bf16.
    """
    if not weight.is_meta:
        weight.copy_(torch.normal(0.0, std, weight.shape, device="cpu", dtype=torch.float32))


class Linear(nn.Linear):
    """nn.Linear with N(0, std^2) weights and zero biases."""

    def __init__(self, inputs: int, outputs: int, std: float, bias: bool = False) -> None:
        """Create the layer; `std` is the standard deviation of its initial weights."""
        self.std = std
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        draw_normal(self.weight, self.std)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.zero_()


class Embedding(nn.Embedding):
    """nn.Embedding with N(0, std^2) weights.

    With torch's default N(0, 1) and tied embeddings, an untrained model would predict its input token.
    """

    def __init__(self, count: int, width: int, std: float) -> None:
        """Create the table; `std` is the standard deviation of its initial weights."""
        self.std = std
        super().__init__(count, width)

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        draw_normal(self.weight, self.std)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, element by element."""
    return nn.functional.silu(gate) * up


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, GLU variants improve transformer)."""

    def __init__(
        self, width: int, inner: int, std: float, residual_std: float, recompute: Recompute = "none"
    ) -> None:
        """Create the projections; `residual_std` is the initial standard deviation of `down_proj`."""
        super().__init__()
        self.recompute = recompute == "swiglu"
        self.gated = gated  # or its compiled form
        self.gate_proj = Linear(width, inner, std)
        self.up_proj = Linear(width, inner, std)
        self.down_proj = Linear(inner, width, residual_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, H] for x [B, L, H]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        return recomputed(self._down, gate, up) if self.recompute else self._down(gate, up)

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(self.gated(gate, up))


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Return function(*inputs), and recompute it in the backward pass instead of storing activations.

    Chen et al. 2016, Training deep nets with sublinear memory cost (arXiv 1604.06174). `function` must not
    draw random numbers.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    output: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output
