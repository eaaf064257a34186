"""Import a causal Hugging Face model as a folder for train.initial_weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.base.files import creating_folder
from pipeline.config import ModelConfig
from pipeline.corpus.tokenizer_making import import_tokenizer
from pipeline.engine.weights import StoredWeight
from pipeline.huggingface import mapping
from pipeline.huggingface.folders import open_weights, write_weights
from pipeline.model.batch import Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "model.yaml"
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")  # one row per token
MEAN_ROWS = 4096  # rows summed in float64 at once


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        settings: matching YAML sections for a run, as text.
        vocabulary: vocabulary of the new model.
        mask: text of the mask token.
        added: tokens added to the tokenizer.
        old_rows: rows of the matrices before the import.
    """

    settings: str
    vocabulary: Vocabulary
    mask: str
    added: list[str]
    old_rows: int


def import_model(
    source: Path, output: Path, special_tokens: dict[str, str | None], max_shard_size: int
) -> Imported:
    """Import a model to `output`, completely or not at all: an export without code and model card.

    The weights are copied bit for bit in their own data type, one shard at a time. The embedding and the
    output matrix get rows for the tokens that the tokenizer lacks (usually a mask token), rounded up to a
    multiple of 8. The rows of the mask token and of every added token start at the mean of the other rows,
    because a random direction would be far from everything the network has seen.

    Args:
        source: folder with config.json, safetensors and tokenizer.json of a Qwen2, Qwen3 or Llama model.
        output: folder to create; it must not exist.
        special_tokens: tokens for mask, pad and eos; see `import_tokenizer`.
        max_shard_size: maximum bytes per file, unless a single weight is larger.

    Raises:
        UserError: if the architecture is not supported, the folder is damaged, or `output` exists.
    """
    if output.exists():
        raise UserError(f"--output {output} exists: remove it, or choose another folder.")
    settings = mapping.read_json(source / "config.json")
    model = mapping.from_json(settings, source / "config.json")
    if settings["model_type"] == mapping.MODEL_TYPE:
        raise UserError(f"{source} is already an exported model: set train.initial_weights to it.")
    if not (source / TOKENIZER_FILE).is_file():
        raise UserError(
            f"{source / TOKENIZER_FILE} is missing: create it with transformers, by "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    stored = parameters_in(source, model)
    with creating_folder(output) as writing:
        tokenizer, added = import_tokenizer(source / TOKENIZER_FILE, special_tokens, writing / "tokenizer")
        tokens, old_rows = tokenizer.vocab_size, model.vocab_size or 0
        vocabulary = Vocabulary(max(old_rows, -(-tokens // 8) * 8), tokens, tokenizer.mask)
        new = sorted({tokenizer.mask, *range(min(old_rows, tokens - len(added)), tokens)})
        for name in MATRICES:
            if name in stored:
                stored[name] = with_tokens(stored[name], vocabulary, new)
        write_weights(stored, writing, max_shard_size)
        model = dataclasses.replace(model, vocab_size=vocabulary.rows)
        length = int(settings.get("max_position_embeddings", 2048))
        dtype = str(stored[MATRICES[0]].dtype).removeprefix("torch.")
        own = mapping.to_json(model, vocabulary, tokenizer, length, dtype)
        del own["architectures"], own["auto_map"]  # only exported models include the code
        (writing / "config.json").write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
        sections = {
            "data": {"tokenizer": str(output / "tokenizer")},
            "model": {key: value for key, value in dataclasses.asdict(model).items() if value is not None},
            "train": {"initial_weights": str(output)},
        }
        text = yaml.safe_dump(sections, sort_keys=False)
        (writing / SETTINGS_FILE).write_text(text, encoding="utf-8")
    return Imported(text, vocabulary, tokenizer.model.token(tokenizer.mask), added, old_rows)


def parameters_in(folder: Path, model: ModelConfig) -> dict[str, StoredWeight]:
    """Return the weights in `folder` that our model has, by name; others are ignored.

    Raises:
        UserError: if a weight is missing or has the wrong shape.
    """
    rows = model.vocab_size or 0
    with torch.device("meta"):  # names and shapes only
        parameters = dict(MaskedDiffusionModel(model, Vocabulary(rows, rows, 0)).named_parameters())
    stored = open_weights(folder)
    if "embed_tokens.weight" in stored:  # saved without the head, as LlamaModel and not LlamaForCausalLM
        stored = {f"model.{name}": weight for name, weight in stored.items()}
    for name, parameter in parameters.items():
        shape = stored[name].shape if name in stored else "missing"
        if shape != tuple(parameter.shape):
            raise UserError(
                f"{folder}: the weight {name} is {shape}, by config.json it is {tuple(parameter.shape)}: "
                "download the folder again."
            )
    return {name: stored[name] for name in parameters}


def with_tokens(matrix: StoredWeight, vocabulary: Vocabulary, new: Sequence[int]) -> StoredWeight:
    """Return an embedding or output matrix resized to `vocabulary`; nothing is read until it is used.

    Args:
        matrix: [old rows, H], one row per token.
        vocabulary: new vocabulary, with at least as many rows; rows without a token are 0.
        new: ids of the tokens whose rows start at the mean of the others.
    """

    def read() -> Tensor:
        old = matrix.read()
        result = old.new_zeros(vocabulary.rows, old.shape[1])
        result[: len(old)] = old
        known = torch.ones(min(vocabulary.tokens, len(old)), 1, dtype=torch.bool)
        known[[token for token in new if token < len(known)]] = False
        parts = zip(old[: len(known)].split(MEAN_ROWS), known.split(MEAN_ROWS), strict=True)
        total = torch.stack([torch.where(keep, part.double(), 0.0).sum(0) for part, keep in parts]).sum(0)
        result[new] = (total / known.sum()).to(old.dtype)
        return result

    return StoredWeight((vocabulary.rows, matrix.shape[1]), matrix.dtype, read)
