"""Count activation memory by running the network itself on fake tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.config import ModelConfig, Recompute
from pipeline.model.masked_head import chunk_rows
from pipeline.model.sequence import WHOLE
from pipeline.model.transformer import Body
from pipeline.planning.live_memory import LiveStorages


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of one micro-batch on one rank.

    Attributes:
        kept: bytes alive between forward and backward.
        peak: maximum bytes alive during forward or backward.
    """

    kept: int
    peak: int


def body_memory(
    model: ModelConfig,
    recompute: Recompute,
    sequences: int,
    positions: int,
    width: int,
    on_gpu: bool,
    masked: bool,
) -> ActivationMemory:
    """Return the memory of the transformer blocks, without weights and gradients.

    Memory is linear in blocks and in sequences, so it is extrapolated from networks of two and three blocks,
    run on one and two sequences of fake tensors (`LiveStorages`).

    Args:
        model: shape of the network.
        recompute: engine.activation_checkpointing.
        sequences: sequences per micro-batch.
        positions: positions per sequence on this rank, including the clean copy.
        width: bytes per element.
        on_gpu: count RMSNorm as the fused GPU kernel, which keeps only its input.
        masked: attention takes a mask; grouped keys and values are then repeated.
    """
    shape = dataclasses.astuple(model)
    counted = {
        (layers, rows): _counted(shape, recompute, layers, rows, positions, width, on_gpu, masked)
        for layers in (2, 3)
        for rows in (1, 2)
    }

    def at(layers: int, part: int) -> int:
        one, two = counted[layers, 1][part], counted[layers, 2][part]
        return one + (sequences - 1) * (two - one)

    kept, peak = (at(2, part) + (model.layers - 2) * (at(3, part) - at(2, part)) for part in (0, 1))
    return ActivationMemory(kept, peak)


@functools.cache
def _counted(
    shape: tuple[Any, ...],
    recompute: Recompute,
    layers: int,
    rows: int,
    positions: int,
    width: int,
    on_gpu: bool,
    masked: bool,
) -> tuple[int, int]:
    """Return the bytes alive after the forward, and the peak over forward and backward."""
    config = dataclasses.replace(ModelConfig(*shape), layers=layers)
    dtype = {2: torch.bfloat16, 4: torch.float32}[width]
    with _fused_norm(on_gpu), _default_dtype(dtype), FakeTensorMode():
        body = Body(config, 8, WHOLE, recompute)
        inputs = [torch.zeros(rows, positions, dtype=torch.int64)]
        if masked:
            inputs.append(torch.ones(rows, positions, dtype=torch.bool))
        weights = list(body.parameters())
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        with LiveStorages([*weights, *gradients, *inputs]) as live:
            hidden = body(*inputs)
            kept = live.now
            hidden.backward(torch.empty_like(hidden))
    return kept, live.peak


class _FusedNorm(torch.autograd.Function):
    """A stand-in for fused RMSNorm that keeps what the kernel keeps: input, weight and one fp32 per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextmanager
def _fused_norm(enabled: bool) -> Iterator[None]:
    original = F.rms_norm
    if enabled:
        F.rms_norm = lambda x, _shape, weight=None, _eps=None: _FusedNorm.apply(x, weight)  # type: ignore[assignment]
    yield
    F.rms_norm = original


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def head_memory(
    rows: int, hidden_size: int, vocabulary_rows: int, width: int, gpu_memory: int | None
) -> ActivationMemory:
    """Return the memory of the masked head, which computes its gradients in the forward, chunk by chunk.

    Args:
        rows: masked rows per micro-batch on this rank.
        hidden_size: H.
        vocabulary_rows: V.
        width: bytes per element of the weights.
        gpu_memory: bytes of the GPU, which multiplies bf16 matrices with an fp32 result; None = a CPU, which
            needs fp32 copies.
    """
    matrix, states = vocabulary_rows * hidden_size, rows * hidden_size
    chunk = min(rows, chunk_rows(vocabulary_rows, gpu_memory)) * vocabulary_rows
    kept = (matrix + states) * width  # the gradients of weight and hidden states
    peak = 4 * matrix + 2 * states * width + 4 * chunk  # the gradient of the weight accumulates in fp32
    if width == 2 and gpu_memory is None:
        peak += 4 * matrix + 4 * states  # the operands in fp32
    elif width == 2:
        peak += 2 * max(chunk, matrix)  # first the chunk's gradients in bf16, in the end the weight's
    return ActivationMemory(kept, peak)
