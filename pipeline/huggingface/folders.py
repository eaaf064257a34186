"""Folders of safetensors files with an index, as transformers reads and writes them."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.base.cli import ToolParser
from pipeline.base.errors import Failure, UserError
from pipeline.base.progress import Progress
from pipeline.engine.weights import StoredWeight, StoredWeights
from pipeline.huggingface import mapping

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def add_shard_argument(parser: ToolParser) -> None:
    """Add the option that bounds files and memory."""
    parser.add_argument(
        "--max-shard-size",
        type=_bytes,
        default="5GB",
        help="largest file of weights, and about the memory that is used",
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+) ?(KB|MB|GB)", text.upper())
    if match is None or int(match[1]) == 0:
        raise UserError(f"--max-shard-size is {text!r}: give a whole number with KB, MB or GB, such as 5GB.")
    return int(match[1]) * UNITS[match[2]]


def open_weights(folder: Path) -> StoredWeights:
    """Return the weights in a folder's safetensors files by name; they are mapped, not read.

    Raises:
        UserError: when a file is missing or damaged.
    """
    index, single = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if index.is_file():
        places: dict[str, str] = mapping.read_json(index)["weight_map"]
        names = sorted(set(places.values()))
    elif single.is_file():
        names = [WEIGHTS_FILE]
    else:
        raise UserError(
            f"{folder} holds no {WEIGHTS_FILE} and no {INDEX_FILE}: convert older files by loading and "
            "saving them with transformers."
        )
    weights: dict[str, StoredWeight] = {}
    for name in names:
        try:
            file = safe_open(folder / name, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name} is missing or damaged ({error}): bring it again.") from None
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            weights[key] = StoredWeight.of(file.get_tensor(key))  # mapped: nothing is read yet
    return weights


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
    max_shard_size: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights as model.safetensors, or in shards with an index where that file would be too large.

    At most one shard and one weight as it is stored are in memory.

    Args:
        weights: what to write, in this order.
        folder: where to write.
        max_shard_size: bytes of weights in a file, unless a single weight is larger.
        dtype: type of the numbers in the files; by default the type that each weight has.
    """
    types = {name: dtype or weight.dtype for name, weight in weights.items()}
    sizes = {name: math.prod(w.shape) * types[name].itemsize for name, w in weights.items()}
    shards = divide(sizes, max_shard_size)
    places: dict[str, str] = {}
    progress = Progress(len(weights), 0, "weight")
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: weights[name].read().to(types[name]) for name in names}
        try:
            save_file(shard, folder / file, {"format": "pt"})
        except SafetensorError as error:  # in place of an OSError
            raise Failure(f"{folder / file} cannot be written ({error}): start again with room.") from None
        del shard  # before the next one is read
        (folder / file).chmod(0o666 & ~_umask())  # safetensors would let nobody else read it
        places |= dict.fromkeys(names, file)
        progress.advance(len(places))
        progress.report(file)
    progress.close()
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    """Return the permissions that new files do not have; they can only be read by setting them."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
