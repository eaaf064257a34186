"""Open the initial weights of a run: those of an exported or imported folder, or of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import tokenizers

from pipeline.base.errors import UserError
from pipeline.checkpoint.manifest import MANIFEST
from pipeline.checkpoint.saved_model import SavedModel
from pipeline.config import ModelConfig
from pipeline.data.tokenizer import FACTS_FILE, HUGGING_FACE, MODEL_FILE, Tokenizer, is_own, read_facts
from pipeline.engine.weights import StoredWeights
from pipeline.huggingface import mapping
from pipeline.huggingface.folders import open_weights
from pipeline.huggingface.tokenizer_files import TOKENIZER_FILE
from pipeline.model.batch import Vocabulary


def open_initial_weights(
    folder: Path, model: ModelConfig, vocabulary: Vocabulary, tokenizer: Path
) -> StoredWeights:
    """Return the weights in `folder`, memory-mapped; of a checkpoint the moving average, if it has one.

    Raises:
        UserError: if model, vocabulary or tokenizer differ from the run's, or a file is damaged.
    """
    saved = None
    if (folder / MANIFEST).is_file():  # such as one of tools/average_checkpoints.py
        saved = SavedModel.find(folder, verify=False)
        theirs = dataclasses.replace(saved.config.model, vocab_size=saved.vocabulary.rows)
    else:
        theirs = _of_export(folder)
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
    _check_tokenizer(folder, tokenizer)
    return open_weights(folder) if saved is None else saved.weights()


def _of_export(folder: Path) -> ModelConfig:
    """Return the model of a folder in the format of transformers."""
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
    return mapping.from_json(settings, where)


def _check_tokenizer(folder: Path, tokenizer: Path) -> None:
    """Raise a `UserError` if the tokenizer in `folder` is not the run's.

    A folder that transformers has saved again lacks our own copy; then its files for transformers must have
    the same model, and config.json the same special tokens.
    """
    own, run = folder / "tokenizer", Tokenizer.load(tokenizer)
    if is_own(own / FACTS_FILE):
        if Tokenizer.load(own).sha256 != run.sha256:
            raise UserError(
                f"train.initial_weights: {folder} has another tokenizer than data.tokenizer = {tokenizer}: "
                f"set it to {own}, and preprocess the data with it."
            )
        return
    facts = read_facts(tokenizer)
    saved = folder / (TOKENIZER_FILE if facts.model_type == HUGGING_FACE else MODEL_FILE)
    if not saved.is_file():
        raise UserError(
            f"train.initial_weights: {folder} has neither {own.name}/ nor {saved.name}: save the tokenizer "
            "there, too, by tokenizer.save_pretrained(FOLDER)."
        )
    settings = mapping.read_json(folder / "config.json")
    pairs = [(settings.get(f"{use}_token_id"), run.special_ids[use]) for use in ("mask", "pad", "eos")]
    same = _model_of(saved) == _model_of(tokenizer / facts.model_file)
    if not same or any(there != here for there, here in pairs):
        raise UserError(
            f"train.initial_weights: {saved} is another tokenizer than data.tokenizer = {tokenizer}: take "
            "the folder that it was saved from."
        )


def _model_of(path: Path) -> object:
    """Return what decides which ids a text has: the bytes of a SentencePiece model, or parts of the JSON."""
    content = path.read_bytes()
    if path.suffix == ".model":
        return content
    values = json.loads(tokenizers.Tokenizer.from_str(content.decode()).to_str())
    return [values[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
