"""What the forward keeps for the backward, counted on the network itself, which runs but computes nothing."""

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
from pipeline.model.masked_head import CHUNK_LOGITS
from pipeline.model.sequence import WHOLE
from pipeline.model.transformer import Body
from pipeline.planning.live_memory import LiveStorages


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of one micro-batch on one rank.

    Attributes:
        kept: what lives between the forward and the backward.
        peak: the most that lives in forward or backward.
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
    """Return what the transformer blocks need beside weights and gradients.

    Two small networks at one and two sequences are run on tensors without contents (`LiveStorages`): memory
    is linear in blocks and in sequences.

    Args:
        model: shape of the network.
        recompute: engine.activation_checkpointing.
        sequences: sequences of the micro-batch.
        positions: positions of each that this rank computes, a clean copy included.
        width: bytes of an element.
        on_gpu: count RMSNorm as the kernel that GPUs have, which keeps its input alone.
        masked: attention is given a mask, for which keys and values of grouped queries are repeated.
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
    """Return the bytes after the forward, and the most in forward and backward."""
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
    """RMSNorm in what it keeps: input, weight and a number a row."""

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
    rows: int, hidden_size: int, vocabulary_rows: int, width: int, on_gpu: bool
) -> ActivationMemory:
    """Return what the masked head needs: its gradients are formed in the forward, a chunk of rows at a time.

    Args:
        rows: masked rows of the micro-batch that this rank computes.
        hidden_size: H.
        vocabulary_rows: V.
        width: bytes of an element of the weights.
        on_gpu: GPUs multiply bf16 matrices with an fp32 result; CPUs are given fp32 copies.
    """
    matrix, states = vocabulary_rows * hidden_size, rows * hidden_size
    chunk = min(rows, max(1, CHUNK_LOGITS // vocabulary_rows)) * vocabulary_rows
    kept = (matrix + states) * width  # the gradients of weight and hidden states
    peak = 4 * matrix + 2 * states * width + 4 * chunk  # the weight's gradient is summed in fp32
    if width == 2:  # a product of its size, and the chunk in bf16; or the operands in fp32
        peak += 4 * matrix + (2 * chunk if on_gpu else 4 * states)
    return ActivationMemory(kept, peak)
