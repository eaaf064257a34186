"""Read and write folders of safetensors files with an index, in the format of transformers."""

from __future__ import annotations

import math
import os
import re
from contextlib import closing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.base.errors import Failure, UserError
from pipeline.base.files import sha256_of, write_json
from pipeline.base.progress import Progress, ReadingProgress
from pipeline.engine.weights import StoredWeight, StoredWeights
from pipeline.huggingface import mapping

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SUMS_FILE = "SHA256SUMS"  # as of sha256sum, which checks it, too


def open_weights(folder: Path) -> StoredWeights:
    """Return the weights in a folder's safetensors files, by name; they are memory-mapped, not read.

    Raises:
        UserError: if a file is missing or damaged.
    """
    weights: dict[str, StoredWeight] = {}
    for name in files_of(folder):
        try:
            file = safe_open(folder / name, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name} is missing or damaged ({error}): download it again.") from None
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            weights[key] = StoredWeight.of(file.get_tensor(key))  # memory-mapped, not read yet
    return weights


def files_of(folder: Path) -> list[str]:
    """Return the names of a folder's safetensors files; raise a `UserError` if there are none."""
    if (folder / INDEX_FILE).is_file():
        return _files_in(folder / INDEX_FILE)
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    raise UserError(
        f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: convert older files by loading and saving "
        "them with transformers."
    )


def _files_in(index: Path) -> list[str]:
    """Return the names of the files that an index lists; raise a `UserError` if it is not an index."""
    places = mapping.read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index} lists no weights in its weight_map: download the folder again.")
    for key, name in places.items():
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name:
            raise UserError(
                f"{index}: the weight {key} is in {name!r}, which is no file of the folder: download the "
                "folder again, from a source that you trust."
            )
    return sorted(set(places.values()))


def write_sums(folder: Path) -> None:
    """Write the hashes of all files of a folder, in the format of sha256sum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(path)}  {path.relative_to(folder)}\n" for path in files]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Raise a `UserError` if a model file of a folder differs from its hash.

    A folder without hashes is accepted: transformers writes none when it saves a model again. README and code
    may have been changed, and are not read.
    """
    path = folder / SUMS_FILE
    if not path.is_file():
        return
    sums: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if match is None or ".." in Path(match[2]).parts or Path(match[2]).is_absolute():
            raise UserError(f"{path}, line {number} is damaged ({line!r}): copy the folder again.")
        sums[match[2]] = match[1]
    needed = [
        name for name in sums if name.endswith((".safetensors", ".index.json")) or name == "config.json"
    ]
    total = sum((folder / name).stat().st_size for name in needed if (folder / name).is_file())
    with closing(ReadingProgress(f"checking {folder}", total)) as progress:
        for name in needed:
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing, but {path} names it: copy the folder again.")
            if sha256_of(folder / name, progress.advance) != sums[name]:
                raise UserError(
                    f"{folder / name} has changed since it was written ({path}): copy the folder again, or "
                    f"remove {path} if you changed it yourself."
                )


def divide(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Group names into shards of at most `limit` bytes, in order; a larger tensor gets its own shard."""
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
    weights: StoredWeights, folder: Path, max_shard_size: int, dtype: torch.dtype | None = None
) -> None:
    """Write weights as model.safetensors, or as shards with an index if that file would be too large.

    Peak memory is one shard and one stored weight.

    Args:
        weights: weights to write, in this order.
        folder: destination.
        max_shard_size: maximum bytes per file, unless a single weight is larger.
        dtype: data type to write; None keeps the type of each weight.
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
        except SafetensorError as error:  # safetensors raises this instead of an OSError
            raise Failure(
                f"{folder / file} cannot be written ({error}): free disk space and start again."
            ) from None
        del shard  # free it before the next one is read
        (folder / file).chmod(0o666 & ~_umask())  # safetensors makes it private
        places |= dict.fromkeys(names, file)
        progress.advance(len(places))
        progress.report(file)
    progress.close()
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_json(folder / INDEX_FILE, index)


def _umask() -> int:
    """Return the umask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
