"""Saved weights, read whole."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pipeline.engine.build import open_weights


def read_weights(folder: Path, averaged: bool = False) -> dict[str, Tensor]:
    """Read all of `open_weights` to the CPU."""
    return {name: weight.read() for name, weight in open_weights(folder, averaged).items()}
