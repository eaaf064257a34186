"""The average of several checkpoints' weights, as a checkpoint to evaluate, to export or to start from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.base.files import FileFacts, creating_folder, require_new, sha256_of, write_hashed
from pipeline.checkpoint.manifest import AVERAGE, MANIFEST
from pipeline.checkpoint.options import check_shares
from pipeline.checkpoint.saved_model import SavedModel, Weights, is_setting
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.plain import PLAIN_FILE

ORIGIN = "average.json"


def average(
    paths: Sequence[Path], shares: Sequence[float] | None, output: Path, weights: Weights | None, verify: bool
) -> int:
    """Write the average of checkpoints to `output`, completely or not at all, in one process on the CPU.

    Sums are float64 in a file beside the result, one weight in memory at a time; only checkpoints of ZeRO-1
    and ZeRO-2 are assembled in memory, one after another (4 bytes per parameter). Settings and tokenizer are
    those of the checkpoint with the most steps.

    Args:
        paths: checkpoints, as `find` takes them.
        shares: of each, with any sum; None = equal.
        output: folder to create; it must not exist.
        weights: see `load_model`.
        verify: compare the hashes of the files that are read.

    Returns:
        The step of the result.

    Raises:
        UserError: if checkpoints do not fit together, one is damaged, or `output` exists.
    """
    require_new(output)
    check_shares(len(paths), shares)
    shares = [1.0] * len(paths) if shares is None else shares
    shares = [share / sum(shares) for share in shares]
    sources = [SavedModel.find(path, weights, verify) for path in paths]
    for source in sources[1:]:
        _check_alike(sources[0], source)
    newest = max(sources, key=lambda source: source.manifest.step)
    with creating_folder(output, shared=False) as writing:
        files = _copied(newest, writing)
        (writing / "model").mkdir()
        with TemporaryDirectory(dir=writing) as scratch:
            state = {"model": _summed(sources, shares, Path(scratch)), "optimizer": {}}
            files[f"model/{PLAIN_FILE}"] = write_hashed(
                writing / "model" / PLAIN_FILE, partial(torch.save, state)
            )
        files[ORIGIN] = write_hashed(writing / ORIGIN, lambda file: file.write(_origin(sources, shares)))
        manifest = replace(
            newest.manifest, world_size=1, sharding=AVERAGE, held_out_loss=None, guard={}, files=files
        )
        (writing / MANIFEST).write_bytes(manifest.to_json())
    return newest.manifest.step


def _check_alike(first: SavedModel, other: SavedModel) -> None:
    """Raise a `UserError` unless two checkpoints are of one network, vocabulary and tokenizer."""
    between = f"--checkpoint {first.folder} and {other.folder}"
    tokenizers = [Tokenizer.load(source.folder / "tokenizer").sha256[:12] for source in (first, other)]
    pairs = [("tokenizers (sha256)", *tokenizers)]
    pairs += [("vocabularies", str(first.manifest.vocabulary), str(other.manifest.vocabulary))]
    shapes = [{name: w.shape for name, w in source.weights().items()} for source in (first, other)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        pairs.append((f"shapes of {name}", *(str(shape.get(name, "missing")) for shape in shapes)))
    settings = [vars(source.config.model) for source in (first, other)]
    pairs += [
        (f"values of model.{key}", str(value), str(settings[1][key]))
        for key, value in settings[0].items()
        if key != "init_std"
    ]
    for what, one, two in pairs:
        if one != two:
            raise UserError(
                f"{between} have different {what}, {one} and {two}: average checkpoints of one model."
            )


def _summed(sources: Sequence[SavedModel], shares: Sequence[float], scratch: Path) -> dict[str, Tensor]:
    """Return the average by name, fp32 and mapped from a file in `scratch`."""
    shapes = {name: weight.shape for name, weight in sources[0].weights().items()}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    places = {
        name: slice(int(end) - math.prod(shape), int(end))
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }
    total = np.memmap(scratch / "sums", np.float64, "w+", shape=(int(ends[-1]),))
    for source, share in zip(sources, shares, strict=True):
        for name, weight in source.weights().items():
            total[places[name]] += share * weight.read().double().flatten().numpy()
    result = np.memmap(scratch / "weights", np.float32, "w+", shape=total.shape)
    for place in places.values():
        result[place] = total[place]
    return {name: torch.from_numpy(result[place]).view(shapes[name]) for name, place in places.items()}


def _copied(source: SavedModel, folder: Path) -> dict[str, FileFacts]:
    """Copy settings and tokenizer of a checkpoint to `folder`; return the files."""
    names = [name for name in source.manifest.files if is_setting(name)]
    for name in names:
        if (source.folder / name).is_symlink():  # to any file of this machine
            raise UserError(f"{source.folder / name} is a link, which no checkpoint holds: it is not copied.")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / name, folder / name)
    return {name: FileFacts((folder / name).stat().st_size, sha256_of(folder / name)) for name in names}


def _origin(sources: Sequence[SavedModel], shares: Sequence[float]) -> bytes:
    """Return what the average was made of, as JSON."""
    facts = [
        {
            "checkpoint": str(source.folder),
            "step": source.manifest.step,
            "share": share,
            "weights": "ema" if source.averaged else "raw",
            "manifest_sha256": sha256_of(source.folder / MANIFEST),
        }
        for source, share in zip(sources, shares, strict=True)
    ]
    return (json.dumps(facts, indent=2) + "\n").encode()
