"""Folders of safetensors files with an index, as transformers reads and writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.weights import StoredWeights

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def divide(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Return the names in shards of at most `limit` bytes each, in order; a larger one has a shard alone."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_weights(
    weights: StoredWeights,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: int,
    on_progress: Callable[[int], None] = lambda written: None,
) -> None:
    """Write weights as model.safetensors, or in shards with an index where that file would be too large.

    At most one shard and one weight as it is stored are in memory.

    Args:
        weights: what to write, in this order.
        folder: where to write.
        dtype: type of the numbers in the files.
        max_shard_size: bytes of weights in a file, unless a single weight is larger.
        on_progress: called with the number of weights written so far.
    """
    sizes = {name: torch.Size(w.shape).numel() * dtype.itemsize for name, w in weights.items()}
    shards = divide(sizes, max_shard_size)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # A dictionary of its own in each call: no shard is still held while the next one is read.
        save_file({name: weights[name].read().to(dtype) for name in names}, folder / file, {"format": "pt"})
        (folder / file).chmod(0o666 & ~_umask())  # safetensors would let nobody else read it
        places |= dict.fromkeys(names, file)
        on_progress(len(places))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    """Return the permissions that new files do not have; they can only be read by setting them."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
