"""Small random models, exported without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.load_model import Loaded
from pipeline.config import Config, ModelConfig, ObjectiveConfig
from pipeline.corpus.tokenizer_making import import_tokenizer, train_tokenizer
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.weights import StoredWeight
from pipeline.huggingface.export import describe, write_model
from pipeline.huggingface.tokenizer_files import write_tokenizer
from pipeline.model.batch import Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from support.foreign import write_tokenizer as write_characters

LENGTH = 16  # tokens of a sequence


def export_random(
    folder: Path,
    objective: dict[str, Any] | None = None,
    data_kind: str = "pairs",
    tokenizer: str = "char",
    rows: int | None = None,
    **model: Any,
) -> Loaded:
    """Write the export of a model with large random weights, and return the model.

    Args:
        folder: folder to create; its neighbour with the suffix .tokenizer holds the tokenizer.
        objective: settings of the objective.
        data_kind: pairs or packed.
        tokenizer: "char" of SentencePiece, or "huggingface".
        rows: rows of the embedding; by default a multiple of 8.
        model: settings of the network.
    """
    place = folder.with_suffix(".tokenizer")
    if tokenizer == "huggingface":
        write_characters(folder.with_suffix(".json"))
        import_tokenizer(folder.with_suffix(".json"), {}, place)
    else:
        train_tokenizer(["abcdefg"], 12, tokenizer, place)
    shape = {
        "layers": 2,
        "hidden_size": 32,
        "heads": 4,
        "kv_heads": 2,
        "intermediate_size": 48,
        "init_std": 0.4,
    }
    network = ModelConfig(**(shape | model))
    config = Config(run_dir="", model=network, objective=ObjectiveConfig(**(objective or {})))
    config.data.kind, config.data.sequence_length = data_kind, LENGTH
    loaded = Tokenizer.load(place)
    vocabulary = Vocabulary(rows or network.rows_for(loaded.vocab_size), loaded.vocab_size, loaded.mask)
    torch.manual_seed(0)
    made = MaskedDiffusionModel(network, vocabulary).eval()
    weights = {name: StoredWeight.of(weight.detach()) for name, weight in made.named_parameters()}
    folder.mkdir()
    write_model(folder, "own", describe(config, vocabulary, place, 1, "float32"), weights, 10**9)
    write_tokenizer(place, folder, LENGTH)
    return Loaded(made, loaded, config, 1)
