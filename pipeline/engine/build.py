"""Build the configured engine; open the weights that an engine of either kind saved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pipeline.config import Config
from pipeline.engine.ema import open_average
from pipeline.engine.module import choose_deterministic_kernels
from pipeline.engine.plain import PlainEngine, open_plain_weights
from pipeline.engine.protocol import Engine
from pipeline.engine.weights import StoredWeights
from pipeline.model.batch import Vocabulary
from pipeline.ranks import Ranks


def build_engine(config: Config, ranks: Ranks, vocabulary: Vocabulary) -> Engine:
    """Return the configured engine around a new model.

    Raises:
        UserError: for a plain engine on several ranks, or DeepSpeed settings that cannot work.
    """
    if config.engine.deterministic:
        choose_deterministic_kernels()
    if config.engine.kind == "plain":
        return PlainEngine(config, ranks, vocabulary)
    engine: Engine = _deepspeed(config.engine.device).DeepSpeedEngine(config, ranks, vocabulary)
    return engine


def engine_settings(config: Config, world_size: int | None = None) -> dict[str, Any]:
    """Return the settings of DeepSpeed's JSON, checked against the run; empty for the plain engine.

    Args:
        config: the run.
        world_size: number of ranks, if known.

    Raises:
        UserError: for a missing file, or settings that cannot work.
    """
    if config.engine.kind == "plain":
        return {}
    settings: dict[str, Any] = _deepspeed(config.engine.device).read_settings(config, world_size)
    return settings


def compatible_ops(names: Sequence[str]) -> dict[str, bool]:
    """Return which of DeepSpeed's kernels can be compiled on this machine."""
    compatible: dict[str, bool] = _deepspeed().compatible_ops(names)
    return compatible


def _deepspeed(device: str = "auto") -> ModuleType:
    """Import DeepSpeed only when it is needed: plain runs start faster without it.

    Args:
        device: ``engine.device`` of the run; DeepSpeed learns of it when it is imported.
    """
    on_gpu = device != "cpu" and torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    from pipeline.engine import deepspeed

    return deepspeed


def open_weights(folder: Path, averaged: bool = False) -> StoredWeights:
    """Return the fp32 weights by name that an engine of either kind saved in `folder`; nothing is read yet.

    Args:
        folder: folder of the files of `Engine.snapshot`, from any world size.
        averaged: open the moving average of the weights instead (see `ema.has_average`).
    """
    if averaged:
        return open_average(folder)
    weights = open_plain_weights(folder)
    if weights is None:
        weights = _deepspeed().open_sharded_weights(folder)
    return weights
