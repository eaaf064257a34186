"""A checkpoint as a folder that transformers loads: weights, config.json, tokenizer, code and model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from pipeline import checkpoint
from pipeline import config as configuration
from pipeline.cli import UserError
from pipeline.config import Config
from pipeline.data.tokenizer import MASK
from pipeline.huggingface import mapping
from pipeline.huggingface.card import model_card
from pipeline.huggingface.folders import write_weights
from pipeline.huggingface.tokenizer_files import write_tokenizer
from pipeline.model.batch import Vocabulary
from pipeline.runtime import open_weights
from pipeline.sampling import Weights, takes_average

DType = Literal["float32", "bfloat16"]
CODE = Path(__file__).with_name("remote_code")


def check_exportable(config: Config) -> None:
    """Raise a `UserError` for a model that the exported code would run in another way than it was trained."""
    for key, value, only in [
        ("model.prediction", config.model.prediction, "same"),
        ("objective.block_size", config.objective.block_size, None),
    ]:
        if value != only:
            raise UserError(
                f"the run has {key} = {value!r}: the exported code knows bidirectional attention with each "
                "token predicted at its own position only. Decode with tools/generate.py."
            )


def export(
    source: Path,
    output: Path,
    weights: Weights | None,
    dtype: DType,
    max_shard_size: int,
    on_progress: Callable[[int, int], None] = lambda written, total: None,
) -> int:
    """Write `output`, whole or not at all, in one process on the CPU.

    Memory is one shard and one weight in fp32, whatever the size of the model and the number of ranks that
    trained it; only a checkpoint of ZeRO 1 or 2 is put together in memory (4 bytes a parameter).

    Args:
        source: a run folder or a checkpoint folder.
        output: the folder; it must not exist.
        weights: ema = the moving average, raw = those of the last step; by default ema where there is one.
        dtype: type of the numbers in the files.
        max_shard_size: bytes of weights in a file, unless a single weight is larger.
        on_progress: called with the number of weights written and their number in all.

    Returns:
        The step that was exported.

    Raises:
        UserError: when there is no checkpoint, it is damaged, it lacks the weights, or `output` exists.
    """
    if output.exists():
        raise UserError(f"--output {output} exists: remove it, or name another folder.")
    folder, manifest = checkpoint.find(source)
    config = configuration.load(["--config", str(folder / "config.yaml")])
    check_exportable(config)
    averaged = takes_average(folder, weights)
    stored = dict(open_weights(folder / "model", averaged))
    if config.model.tie_embeddings:  # one tensor under two names; a checkpoint may hold either or both
        stored.pop("lm_head.weight", None)
    writing = output.with_name(f".{output.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    total = len(stored)
    write_weights(stored, writing, getattr(torch, dtype), max_shard_size, lambda n: on_progress(n, total))
    tokenizer = write_tokenizer(folder / "tokenizer", writing, config.data.sequence_length)
    settings = mapping.config_json(config, Vocabulary(**manifest.vocabulary), tokenizer, dtype)
    (writing / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for code in CODE.glob("*_masked_diffusion.py"):
        shutil.copyfile(code, writing / code.name)
    parameters = sum(torch.Size(weight.shape).numel() for weight in stored.values())
    card = model_card(output.name, config, manifest, parameters, "ema" if averaged else "raw", dtype, MASK)
    (writing / "README.md").write_text(card, encoding="utf-8")
    writing.rename(output)
    return manifest.step
