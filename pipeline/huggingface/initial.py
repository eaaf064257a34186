"""Open the initial weights of a run, a folder written by tools/import_hf.py or tools/export_hf.py."""

from __future__ import annotations

from pathlib import Path

from pipeline.base.errors import UserError
from pipeline.config import ModelConfig
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.weights import StoredWeights
from pipeline.huggingface import mapping
from pipeline.huggingface.folders import open_weights
from pipeline.model.batch import Vocabulary


def open_initial_weights(
    folder: Path, model: ModelConfig, vocabulary: Vocabulary, tokenizer: Path
) -> StoredWeights:
    """Return the weights in `folder`, memory-mapped.

    Raises:
        UserError: if model, vocabulary or tokenizer differ from the run's, or a file is damaged.
    """
    where = folder / "config.json"
    if not where.exists():
        raise UserError(
            f"train.initial_weights: {where} is missing: give a folder written by "
            "tools/import_hf.py or tools/export_hf.py. A run must be exported first."
        )
    settings = mapping.read_json(where)
    if settings.get("model_type") != mapping.MODEL_TYPE:
        raise UserError(
            f"train.initial_weights: {where} has model_type {settings.get('model_type')!r}, without a mask "
            "token: convert it with tools/import_hf.py."
        )
    theirs = mapping.from_json(settings, where)
    pairs = {
        f"model.{key}": (getattr(theirs, key), getattr(model, key))
        for key in mapping.NAMES
        if key not in ("kv_heads", "head_size", "vocab_size", "init_std")
    }
    pairs["model.kv_heads"] = (theirs.kv_heads or theirs.heads, model.kv_heads or model.heads)
    pairs["model.head_size"] = (theirs.head_width, model.head_width)
    pairs["model.vocab_size"] = (theirs.vocab_size, vocabulary.rows)
    for key, (there, here) in pairs.items():
        if there != here:
            raise UserError(
                f"train.initial_weights: the model in {folder} has {key} = {there}, the run has {here}: "
                f"set it to {there}."
            )
    own = folder / "tokenizer"
    if Tokenizer.load(own).sha256 != Tokenizer.load(tokenizer).sha256:
        raise UserError(
            f"train.initial_weights: {folder} has another tokenizer than data.tokenizer = {tokenizer}: "
            f"set it to {own}, and preprocess the data with it."
        )
    return open_weights(folder)
