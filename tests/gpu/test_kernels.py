"""The head and the attention kernels of a GPU against float64."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.gpu_proof.numerics import KINDS, LENGTHS, TOLERANCES, attention_errors, head_errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
GPU = torch.device("cuda")


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 264), (700, 5003), (4096, 32_008)])
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
def test_the_head(rows: int, vocabulary: int, fused: bool) -> None:
    """One row, rows that are no multiple of anything, several chunks; an odd vocabulary is not aligned."""
    for name, error in head_errors(GPU, rows, vocabulary, 128, fused).items():
        assert error <= TOLERANCES[name], name


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention(kind: str, length: int) -> None:
    """Output and gradients are finite and close, under every kind of mask."""
    for name, error in attention_errors(GPU, kind, length).items():
        assert math.isfinite(error), name
        assert error <= TOLERANCES["attention"], name
