"""Load an exported or imported folder, or a checkpoint, as a model to decode with or to measure."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from pipeline.base.errors import UserError
from pipeline.base.files import sha256_of
from pipeline.checkpoint.load_model import Loaded, chat_template_beside, fill_weights, load_model
from pipeline.checkpoint.manifest import CONFIG_FILE, is_export
from pipeline.checkpoint.saved_model import Weights
from pipeline.config import Config, DataConfig, ObjectiveConfig
from pipeline.engine.module import make_model
from pipeline.huggingface import mapping
from pipeline.huggingface.folders import check_sums, files_of, open_weights
from pipeline.huggingface.tokenizer_files import load_tokenizer
from pipeline.model.batch import Vocabulary
from pipeline.ranks import Ranks


def load_any(
    path: Path,
    device: torch.device,
    untrained: bool = False,
    weights: Weights | None = None,
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
    ranks: Ranks | None = None,
) -> Loaded:
    """Load a run, a checkpoint or an export; see `load_model` for the arguments.

    Raises:
        UserError: see `load_model`; and for an option that an export does not have.
    """
    if not is_export(path):
        return load_model(path, device, untrained, weights, dtype, verify, ranks)
    if untrained or weights is not None:
        given = "--untrained" if untrained else f"--weights {weights}"
        raise UserError(f"{given} has no effect on {path}, an export with one set of weights: leave it out.")
    if verify and (ranks is None or ranks.is_first):
        check_sums(path)
    return _load_export(path, device, dtype)


def _load_export(folder: Path, device: torch.device, dtype: torch.dtype) -> Loaded:
    where = folder / CONFIG_FILE
    settings = mapping.read_json(where)
    if settings.get("model_type") != mapping.MODEL_TYPE:
        kind = settings.get("model_type")
        raise UserError(f"{where} has model_type {kind!r}: convert it with tools/import_hf.py first.")
    model = mapping.from_json(settings, where)
    config = Config(run_dir="", model=model, objective=_objective_of(settings, where))
    config.data = DataConfig(
        kind=settings.get("data_kind", "pairs"), sequence_length=settings["max_position_embeddings"]
    )
    vocabulary = Vocabulary(settings["vocab_size"], settings["num_tokens"], settings["mask_token_id"])
    network = make_model(config, vocabulary)
    fill_weights(network, open_weights(folder), model.tie_embeddings, where, "copy it again")
    tokenizer, template = load_tokenizer(folder, settings), chat_template_beside(folder)
    return Loaded(network.to(device, dtype).eval(), tokenizer, config, 1, template)


def _objective_of(settings: dict[str, Any], where: Path) -> ObjectiveConfig:
    """Return an objective whose layout shows sequences as the model was trained to see them."""
    attention = settings.get("attention")
    if attention == "blocks":
        return ObjectiveConfig(block_size=settings["block_size"])
    if attention == "causal":
        return ObjectiveConfig(kind="autoregressive")
    if attention != "bidirectional":
        raise UserError(
            f"{where}: attention is {attention!r}: this model was imported, and is to be trained first."
        )
    return ObjectiveConfig()


def fingerprint(folder: Path) -> str:
    """Return a hash of an export's settings and weights."""
    files = [folder / CONFIG_FILE, *(folder / name for name in files_of(folder))]
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
