"""Export a checkpoint as a transformers folder: weights, config.json, tokenizer, code and model card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch

from pipeline.base.files import creating_folder, require_new, write_json
from pipeline.checkpoint.saved_model import SavedModel, Weights
from pipeline.config import Config
from pipeline.data.tokenizer import HUGGING_FACE, Tokenizer
from pipeline.engine.weights import StoredWeights
from pipeline.huggingface.card import model_card
from pipeline.huggingface.folders import write_sums, write_weights
from pipeline.huggingface.formats import Format, check, generation_settings, name_of, settings
from pipeline.huggingface.mapping import Exported, to_json
from pipeline.huggingface.standalone import standalone
from pipeline.huggingface.tokenizer_files import write_tokenizer
from pipeline.model.batch import Vocabulary
from pipeline.objectives import decoding_layout

DType = Literal["float32", "bfloat16"]
CODE = Path(__file__).with_name("remote_code")


def export(
    source: Path,
    output: Path,
    weights: Weights | None,
    dtype: DType,
    max_shard_size: int,
    verify: bool = True,
    form: Format = "own",
    chat_template: str | None = None,
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
        form: names of settings and weights; "own" comes with code.
        chat_template: from `read_template`; None = that of the training, if there is one.

    Returns:
        The step of the exported checkpoint.

    Raises:
        UserError: if there is no checkpoint, it is damaged, it lacks the weights, the model does not fit the
            format, or `output` exists.
    """
    require_new(output)
    saved = SavedModel.find(source, weights, verify)
    folder, manifest, stored = saved.folder, saved.manifest, saved.weights()
    exported = describe(saved.config, saved.vocabulary, folder / "tokenizer", manifest.step, dtype)
    check(form, exported)
    with creating_folder(output, shared=False) as writing:
        write_model(writing, form, exported, stored, max_shard_size)
        write_tokenizer(folder / "tokenizer", writing, exported.sequence_length, chat_template)
        card = model_card(
            output.name,
            saved.config,
            manifest,
            exported,
            form,
            parameters=sum(math.prod(weight.shape) for weight in stored.values()),
            weights="ema" if saved.averaged else "raw",
        )
        (writing / "README.md").write_text(card, encoding="utf-8")
        write_sums(writing)
    return manifest.step


def describe(config: Config, vocabulary: Vocabulary, tokenizer: Path, step: int, dtype: DType) -> Exported:
    """Return what an export says about its model; the attention is that of decoding at `step`."""
    loaded = Tokenizer.load(tokenizer)
    pattern = decoding_layout(config, loaded.mask, step).attention
    size = config.objective.block_size if pattern == "blocks" else None
    length = config.data.sequence_length
    return Exported(config.model, vocabulary, loaded, length, dtype, pattern, size, config.data.kind)


def write_model(
    folder: Path, form: Format, exported: Exported, stored: StoredWeights, max_shard_size: int
) -> None:
    """Write weights, config.json, generation_config.json, and the code that belongs to the format."""
    name = name_of(form)
    renamed = {name(ours): weight for ours, weight in stored.items()}
    write_weights(renamed, folder, max_shard_size, getattr(torch, exported.dtype))
    found = to_json(exported) if form == "own" else settings(form, exported)
    write_json(folder / "config.json", found)
    write_json(folder / "generation_config.json", generation_settings(form, exported))
    for code in CODE.glob("*_masked_diffusion.py" if form == "own" else "tokenization_*.py"):
        if form == "own" or exported.tokenizer.model_type != HUGGING_FACE:
            (folder / code.name).write_text(standalone(code), encoding="utf-8")
