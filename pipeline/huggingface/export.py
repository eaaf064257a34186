"""Export a checkpoint as a transformers folder: weights, config.json, tokenizer, code and model card."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline import config as configuration
from pipeline.base.errors import UserError
from pipeline.base.files import creating_folder
from pipeline.checkpoint.load_model import Weights, needed_for, takes_average
from pipeline.checkpoint.manifest import check_hashes, find
from pipeline.config import Config
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.build import open_weights
from pipeline.huggingface import mapping
from pipeline.huggingface.card import model_card
from pipeline.huggingface.folders import write_weights
from pipeline.huggingface.tokenizer_files import write_tokenizer
from pipeline.model.batch import Vocabulary
from pipeline.objectives import decoding_layout
from pipeline.ranks import Ranks

DType = Literal["float32", "bfloat16"]
CODE = Path(__file__).with_name("remote_code")


def export(
    source: Path,
    output: Path,
    weights: Weights | None,
    dtype: DType,
    max_shard_size: int,
    verify: bool = True,
) -> int:
    """Export a checkpoint to `output`, completely or not at all, in one process on the CPU.

    Peak memory is one shard and one fp32 weight, whatever the model size and the number of training ranks.
    Only checkpoints of ZeRO-1 and ZeRO-2 are assembled in memory (4 bytes per parameter).

    Args:
        source: run folder or checkpoint folder.
        output: folder to create; it must not exist.
        weights: ema = the moving average, raw = the weights of the last step; None = ema if available.
        dtype: data type of the exported weights.
        max_shard_size: maximum bytes per file, unless a single weight is larger.
        verify: compare the hashes of the files that are read.

    Returns:
        The step of the exported checkpoint.

    Raises:
        UserError: if there is no checkpoint, it is damaged, it lacks the weights, or `output` exists.
    """
    if output.exists():
        raise UserError(f"--output {output} exists: remove it, or choose another folder.")
    folder, manifest = find(source)
    config = configuration.load(["--config", str(folder / "config.yaml")])
    averaged = takes_average(folder, weights)
    if verify:
        check_hashes(folder, manifest, needed_for(averaged), Ranks())
    stored = dict(open_weights(folder / "model", averaged))
    if config.model.tie_embeddings:  # one tensor with two names; a checkpoint may hold either or both
        stored.pop("lm_head.weight", None)
    with creating_folder(output) as writing:
        write_weights(stored, writing, max_shard_size, getattr(torch, dtype))
        length = config.data.sequence_length
        tokenizer = write_tokenizer(folder / "tokenizer", writing, length)
        settings = mapping.to_json(config.model, Vocabulary(**manifest.vocabulary), tokenizer, length, dtype)
        settings |= attention(config, tokenizer, manifest.step)
        (writing / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for code in CODE.glob("*_masked_diffusion.py"):
            shutil.copyfile(code, writing / code.name)
        card = model_card(
            output.name,
            config,
            manifest,
            parameters=sum(math.prod(weight.shape) for weight in stored.values()),
            weights="ema" if averaged else "raw",
            dtype=dtype,
            mask=tokenizer.model.token(tokenizer.mask),
            attention=settings["attention"],
        )
        (writing / "README.md").write_text(card, encoding="utf-8")
    return manifest.step


def attention(config: Config, tokenizer: Tokenizer, step: int) -> dict[str, Any]:
    """Return the attention pattern for config.json, the one used for decoding after `step` steps."""
    pattern = decoding_layout(config, tokenizer.mask, step).attention
    blocks = {"block_size": config.objective.block_size} if pattern == "blocks" else {}
    return {"attention": pattern, **blocks}
