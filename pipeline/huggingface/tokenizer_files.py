"""Tokenizers in folders of transformers: written for AutoTokenizer, and imported."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from pipeline.base.errors import UserError
from pipeline.base.files import write_json
from pipeline.checkpoint.load_model import chat_template_beside
from pipeline.corpus.chat_template import SETTINGS_FILE
from pipeline.corpus.tokenizer_making import import_tokenizer
from pipeline.data.tokenizer import (
    FACTS_FILE,
    FORMAT,
    HUGGING_FACE,
    MODEL_FILE,
    TEMPLATE_FILE,
    HuggingFaceModel,
    SentencePieceModel,
    Tokenizer,
    TokenizerFacts,
    is_own,
    read_facts,
)

TOKENIZER_FILE = "tokenizer.json"


def copy_tokenizer(source: Path, folder: Path) -> Tokenizer:
    """Copy a tokenizer in our format to a new folder, and return it."""
    tokenizer = Tokenizer.load(source)
    folder.mkdir()
    # Only what was just read and checked: a folder from someone else may hold links to files of this machine.
    for name in (FACTS_FILE, read_facts(source).model_file):
        shutil.copyfile(source / name, folder / name)
    return tokenizer


def write_tokenizer(
    source: Path, folder: Path, sequence_length: int, chat_template: str | None = None
) -> Tokenizer:
    """Write the tokenizer in `source` twice: unchanged to FOLDER/tokenizer, and to FOLDER for transformers.

    The chat template beside it comes along, or the one that is given instead.

    In transformers, the code in `remote_code` reads a SentencePiece model, and transformers itself reads a
    Hugging Face tokenizer, so the ids are the same. One difference is intended: transformers recognises
    special tokens in a text, such as "<mask>".
    """
    tokenizer, model_file = copy_tokenizer(source, folder / "tokenizer"), read_facts(source).model_file
    settings: dict[str, Any] = {
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # what the model takes
    }
    for use, token in tokenizer.special_ids.items():
        if token >= 0:
            settings[f"{use}_token"] = tokenizer.model.token(token)
    if model_file == MODEL_FILE:
        shutil.copyfile(source / MODEL_FILE, folder / MODEL_FILE)
        settings["tokenizer_class"] = "MaskedDiffusionTokenizer"
        settings["auto_map"] = {
            "AutoTokenizer": ["tokenization_masked_diffusion.MaskedDiffusionTokenizer", None]
        }
    else:
        model = json.loads((source / model_file).read_text(encoding="utf-8"))
        model["post_processor"] = None  # it would add tokens that training never saw
        (folder / "tokenizer.json").write_text(json.dumps(model, ensure_ascii=False), encoding="utf-8")
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / SETTINGS_FILE, settings)
    if chat_template is None and (source / TEMPLATE_FILE).is_symlink():  # to any file of this machine
        raise UserError(
            f"{source / TEMPLATE_FILE} is a link, which no run writes: remove it, or copy its file."
        )
    template = chat_template_beside(source) if chat_template is None else chat_template
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    return tokenizer


def load_tokenizer(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of an export; if transformers has saved it again, from the files for transformers.

    Args:
        folder: the export.
        settings: its config.json.

    Raises:
        UserError: if it has none.
    """
    if is_own(folder / "tokenizer" / FACTS_FILE):
        return Tokenizer.load(folder / "tokenizer")
    found = next((folder / name for name in (MODEL_FILE, TOKENIZER_FILE) if (folder / name).is_file()), None)
    if found is None:
        raise UserError(
            f"{folder} has neither tokenizer/ nor {MODEL_FILE} nor {TOKENIZER_FILE}: save the tokenizer "
            "there, too, by tokenizer.save_pretrained(FOLDER)."
        )
    content = found.read_bytes()
    model = HuggingFaceModel(content) if found.name == TOKENIZER_FILE else SentencePieceModel(content)
    kind = HUGGING_FACE if found.name == TOKENIZER_FILE else "unigram"  # SentencePiece's kinds read alike
    facts = TokenizerFacts(
        format=FORMAT,
        model_type=kind,
        vocab_size=settings["num_tokens"],
        unk_id=model.unknown(),
        sha256=hashlib.sha256(content).hexdigest(),
        **{f"{use}_id": settings[f"{use}_token_id"] for use in ("mask", "pad", "eos")},
    )
    return Tokenizer(model, facts)


def import_tokenizer_of(
    source: Path,
    settings: dict[str, Any],
    names: dict[str, str | None],
    is_diffusion: bool,
    folder: Path,
) -> tuple[Tokenizer, list[str]]:
    """Write the tokenizer of a model folder to FOLDER/tokenizer.

    Args:
        source: the model folder. If we have exported it, our own tokenizer in it is copied.
        settings: its config.json, in the keys of Llama.
        names: the tokens for mask, pad and eos; None for those that a diffusion model's folder names, else
            for usual ones.
        is_diffusion: the model has learned to fill in a mask token, so there must be one.
        folder: the folder that is written.

    Returns:
        The tokenizer, and the added tokens.

    Raises:
        UserError: if there is no tokenizer, or a diffusion model's folder does not name its mask token.
    """
    path = source / TOKENIZER_FILE
    if is_own(source / "tokenizer" / FACTS_FILE):
        given = next((use for use, name in names.items() if name is not None), None)
        if given is not None:
            raise UserError(
                f"--{given}-token is {names[given]}, but {source / 'tokenizer'} already names the special "
                "tokens: leave the option out."
            )
        return copy_tokenizer(source / "tokenizer", folder / "tokenizer"), []
    if not path.is_file():
        raise UserError(
            f"{path} is missing: create it with transformers, by "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), or for Dream and SDAR by "
            "Qwen2TokenizerFast.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    if is_diffusion:
        names = _named_by_folder(source, settings) | {use: name for use, name in names.items() if name}
        if names.get("mask") is None:
            raise UserError(f"{source} does not name its mask token: name it with --mask-token.")
    return import_tokenizer(path, names, folder / "tokenizer")


def _named_by_folder(source: Path, settings: dict[str, Any]) -> dict[str, str | None]:
    """Return the mask, pad and eos tokens that config.json and tokenizer_config.json name."""
    path = source / SETTINGS_FILE
    texts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    model = tokenizers.Tokenizer.from_file(str(source / TOKENIZER_FILE))
    names: dict[str, str | None] = {}
    for use in ("mask", "eos", "pad"):
        number, text = settings.get(f"{use}_token_id"), texts.get(f"{use}_token")
        number = number[0] if isinstance(number, list) and number else number
        text = text.get("content") if isinstance(text, dict) else text
        known = model.id_to_token(number) if isinstance(number, int) else None
        if use == "mask" and isinstance(number, int) and known is None:
            raise UserError(
                f"{source / 'config.json'}: mask_token_id is {number}, which {source / TOKENIZER_FILE} does "
                "not have: download the folder again."
            )
        name = text if known is None else known
        names[use] = None if name in names.values() else name  # many pad with eos; ours are three tokens
    return names
