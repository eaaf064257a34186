"""Bidirectional attention with rotary positions and grouped queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.model.layers import Linear
from pipeline.model.sequence import WholeSequence


def rotary_table(length: int, head_size: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [L, head_size] float32 for positions 0..L-1, half-split as Llama has them."""
    frequency = theta ** (-torch.arange(0, head_size, 2, device=like.device, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x [B, heads, L, head_size] by its position: a product of two turned vectors depends on i - j."""
    cos, sin = table
    first, second = x.float().chunk(2, dim=-1)
    turned = x.float() * cos + torch.cat([-second, first], dim=-1) * sin
    return turned.to(x.dtype)


class Attention(nn.Module):
    """Self-attention over the whole sequence; there is no causal mask."""

    def __init__(self, config: ModelConfig, residual_std: float, sequence: WholeSequence) -> None:
        """Make the projections.

        Args:
            config: shape of the network.
            residual_std: initialises the projection that writes to the residual stream.
            sequence: which positions are computed here, and how they attend to the others.
        """
        super().__init__()
        self.sequence = sequence
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.head_size = config.hidden_size // config.heads
        width, kv_width = config.hidden_size, self.kv_heads * self.head_size
        std, bias = config.init_std, config.attention_bias
        self.q_proj = Linear(width, width, std, bias)
        self.k_proj = Linear(width, kv_width, std, bias)
        self.v_proj = Linear(width, kv_width, std, bias)
        self.o_proj = Linear(width, width, residual_std)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], attention_mask: Tensor | None) -> Tensor:
        """Return [B, L / N, H] for x [B, L / N, H], this process's positions.

        Args:
            x: the inputs.
            table: cosines and sines of the same positions.
            attention_mask: [B, 1, 1, L] bool, over all positions, False at padding.
        """
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_size).transpose(1, 2)  # [B, heads, L, D]
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_size).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_size).transpose(1, 2)
        out = self.sequence.attend(rotate(q, table), rotate(k, table), v, attention_mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
