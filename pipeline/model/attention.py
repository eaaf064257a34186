"""Attention with rotary position embeddings and grouped queries."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from pipeline.config import ModelConfig
from pipeline.model.layers import Linear
from pipeline.model.sequence import WholeSequence

# Takes new keys and values [B, kv_heads, W, D] and returns all keys and values to attend to
# (`KeyValueCache.put`).
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Frequencies with fewer than SLOW turns in the original length are slow, with more than FAST turns fast
# (low_freq_factor and high_freq_factor of Llama 3).
SLOW, FAST = 1.0, 4.0


def rotary_table(
    length: int, size: int, theta: float, factor: float, original_length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [L, size] float32 for positions 0..L-1, in Llama's half-split layout.

    As in Llama 3.1, slow frequencies are divided by `factor`, fast ones are unchanged, and those between are
    interpolated linearly by their turns in `original_length`.

    Args:
        length: L.
        size: of a head.
        theta: base of the frequencies.
        factor: 1 = all frequencies are unchanged.
        original_length: positions that the network was first trained on.
        device: of the result.
    """
    frequency = theta ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    if factor != 1.0:
        turns = original_length * frequency / (2 * math.pi)
        kept = ((turns - SLOW) / (FAST - SLOW)).clamp(0.0, 1.0)
        frequency = frequency * (kept + (1.0 - kept) / factor)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [B, heads, L, head_size] by its position; dot products then depend on i - j only."""
    cos, sin = table
    first, second = x.float().chunk(2, dim=-1)
    turned = x.float() * cos + torch.cat([-second, first], dim=-1) * sin
    return turned.to(x.dtype)


class Attention(nn.Module):
    """Self-attention over the positions that the mask shows."""

    def __init__(self, config: ModelConfig, residual_std: float, sequence: WholeSequence) -> None:
        """Create the projections.

        Args:
            config: shape of the network.
            residual_std: initial standard deviation of the output projection.
            sequence: how the positions are split among processes.
        """
        super().__init__()
        self.sequence = sequence
        self.rotate = rotate  # or its compiled form
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.head_size = config.head_width
        hidden, std, bias = config.hidden_size, config.init_std, config.attention_bias
        width, kv_width = self.heads * self.head_size, self.kv_heads * self.head_size
        self.q_proj = Linear(hidden, width, std, bias)
        self.k_proj = Linear(hidden, kv_width, std, bias)
        self.v_proj = Linear(hidden, kv_width, std, bias)
        self.o_proj = Linear(width, hidden, residual_std)
        self.q_norm = nn.RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        attention_mask: Tensor | BlockMask | None,
        remember: Remember | None = None,
    ) -> Tensor:
        """Return [B, L / N, H] for x [B, L / N, H], this process's positions.

        Args:
            x: the inputs.
            table: cosines and sines of the same positions.
            attention_mask: over all positions, see `visibility.attention_mask`.
            remember: adds cached keys and values of other positions, for decoding.
        """
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, self.heads, self.head_size))
        k = self.k_norm(self.k_proj(x).view(batch, length, self.kv_heads, self.head_size))
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_size)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, L, D]
        q, k = self.rotate(q, table), self.rotate(k, table)
        if remember is not None:
            k, v = remember(k, v)
        out = self.sequence.attend(q, k, v, attention_mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
