"""Import a causal or a diffusion model as a folder for train.initial_weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.base.files import creating_folder, require_new, write_json
from pipeline.config import ModelConfig
from pipeline.engine.weights import StoredWeight
from pipeline.huggingface import llada, mapping
from pipeline.huggingface.folders import check_sums, open_weights, write_sums, write_weights
from pipeline.huggingface.tokenizer_files import import_tokenizer_of
from pipeline.model.batch import Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel

SETTINGS_FILE = "model.yaml"
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
        is_diffusion: the model was trained to fill in masks; otherwise it is causal.
        prediction: see `ModelConfig`.
    """

    settings: str
    vocabulary: Vocabulary
    mask: str
    added: list[str]
    old_rows: int
    is_diffusion: bool
    prediction: str


def import_model(
    source: Path,
    output: Path,
    special_tokens: dict[str, str | None],
    max_shard_size: int,
    prediction: Literal["same", "shifted"] | None = None,
    block_size: int | None = None,
    verify: bool = True,
) -> Imported:
    """Import a model to `output`, completely or not at all: an export without code and model card.

    The weights are copied bit for bit in their own data type, one shard at a time. The embedding and the
    output matrix get rows for the tokens that the tokenizer lacks (usually a mask token), rounded up to a
    multiple of 8. New rows start at the mean of the others, because a random direction would be far from
    everything the network has seen; so does, in a causal model, the row of a mask token that was there.

    Args:
        source: folder with config.json, safetensors and tokenizer.json of a family in `mapping.FAMILIES`.
        output: folder to create; it must not exist.
        special_tokens: tokens for mask, pad and eos; see `tokenizer_files.import_tokenizer_of`.
        max_shard_size: maximum bytes per file, unless a single weight is larger.
        prediction: see `mapping.from_json`.
        block_size: tokens of a block, of a model trained in blocks whose config.json does not say so.
        verify: compare the hashes of the files that are read, if the folder has them.

    Raises:
        UserError: if the architecture is not supported, the folder is damaged, or `output` exists.
    """
    require_new(output)
    where = source / "config.json"
    settings = mapping.read_json(where)
    model = mapping.from_json(settings, where, prediction)
    if settings["model_type"] == mapping.MODEL_TYPE:
        raise UserError(f"{source} is already an exported model: set train.initial_weights to it.")
    is_diffusion = mapping.FAMILIES[settings["model_type"]].is_diffusion
    attention = attention_of(settings, block_size, where)
    settings = mapping.in_llama_keys(settings, where)
    if verify:
        check_sums(source)
    stored = parameters_in(source, model)
    with creating_folder(output, shared=False) as writing:
        tokenizer, added = import_tokenizer_of(source, settings, special_tokens, is_diffusion, writing)
        tokens, old_rows = tokenizer.vocab_size, model.vocab_size or 0
        vocabulary = Vocabulary(max(old_rows, -(-tokens // 8) * 8), tokens, tokenizer.mask)
        first_new = old_rows if is_diffusion else min(old_rows, tokens - len(added))
        new = sorted({*range(first_new, tokens), *(() if is_diffusion else (tokenizer.mask,))})
        if new or vocabulary.rows > old_rows:
            stored |= {
                name: with_tokens(stored[name], vocabulary, new) for name in MATRICES if name in stored
            }
        write_weights(stored, writing, max_shard_size)
        model = dataclasses.replace(model, vocab_size=vocabulary.rows)
        length = int(settings.get("max_position_embeddings", 2048))
        dtype = str(stored[MATRICES[0]].dtype).removeprefix("torch.")
        own = mapping.to_json(mapping.Exported(model, vocabulary, tokenizer, length, dtype, **attention))
        del own["architectures"], own["auto_map"]  # only exported models include the code
        write_json(writing / "config.json", own)
        text = sections_of(output, model, attention.get("block_size"))
        (writing / SETTINGS_FILE).write_text(text, encoding="utf-8")
        write_sums(writing)
    mask = tokenizer.model.token(tokenizer.mask)
    return Imported(text, vocabulary, mask, added, old_rows, is_diffusion, model.prediction)


def sections_of(output: Path, model: ModelConfig, block_size: int | None) -> str:
    """Return the YAML sections of a run that starts from an imported model."""
    sections: dict[str, Any] = {
        "data": {"tokenizer": str(output / "tokenizer")},
        "model": {key: value for key, value in dataclasses.asdict(model).items() if value is not None},
        "train": {"initial_weights": str(output)},
    }
    if block_size is not None:
        sections["objective"] = {"block_size": block_size}
    text: str = yaml.safe_dump(sections, sort_keys=False)
    return text


def attention_of(settings: dict[str, Any], block_size: int | None, where: Path) -> dict[str, Any]:
    """Return how `mapping.Exported` shows sequences; nothing for a causal model, whose run chooses it.

    Raises:
        UserError: for a model in blocks of unknown size, or a size given for another model.
    """
    kind = settings["model_type"]
    if kind != "sdar" and not kind.startswith("a2d-"):
        if block_size is not None:
            raise UserError(
                f"--block-size is {block_size}, but {where} is of the kind {kind}, which has no blocks: "
                "leave the option out, and set objective.block_size in the run."
            )
        return {"attention": "bidirectional"} if mapping.FAMILIES[kind].is_diffusion else {}
    size = settings.get("block_size") if block_size is None else block_size
    if size is None:
        if kind == "sdar":
            raise UserError(f"{where} has no block_size: give the tokens of a block with --block-size.")
        return {"attention": "bidirectional"}
    if type(size) is not int or size < 1:
        raise UserError(f"{where}: block_size is {size!r}: give a whole number of tokens with --block-size.")
    return {"attention": "blocks", "block_size": size, "data_kind": "packed"}  # from the first token on


def parameters_in(folder: Path, model: ModelConfig) -> dict[str, StoredWeight]:
    """Return the weights in `folder` that our model has, by name.

    Raises:
        UserError: if a weight is missing or has the wrong shape, or the model has no such weight.
    """
    rows = model.vocab_size or 0
    with torch.device("meta"):  # names and shapes only
        parameters = dict(MaskedDiffusionModel(model, Vocabulary(rows, rows, 0)).named_parameters())
    stored = llada.renamed(open_weights(folder), model)
    if "embed_tokens.weight" in stored:  # saved without the head, as LlamaModel and not LlamaForCausalLM
        stored = {f"model.{name}": weight for name, weight in stored.items()}
    for name, parameter in parameters.items():
        shape = stored[name].shape if name in stored else "missing"
        if shape != tuple(parameter.shape):
            raise UserError(
                f"{folder}: the weight {name} is {shape}, by config.json it is {tuple(parameter.shape)}: "
                "download the folder again."
            )
    for name in stored:
        if name not in parameters and name != "lm_head.weight" and not name.endswith(".inv_freq"):
            raise UserError(
                f"{folder}: the weight {name} has no place in our blocks, and config.json does not announce "
                "it: choose another model."
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
