"""Write the tokenizer of a run in a format that transformers' AutoTokenizer loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.data.tokenizer import FACTS_FILE, MODEL_FILE, Tokenizer, read_facts


def write_tokenizer(source: Path, folder: Path, sequence_length: int) -> Tokenizer:
    """Write the tokenizer in `source` twice: unchanged to FOLDER/tokenizer, and to FOLDER for transformers.

    In transformers, the code in `remote_code` reads a SentencePiece model, and transformers itself reads a
    Hugging Face tokenizer, so the ids are the same. One difference is intended: transformers recognises
    special tokens in a text, such as "<mask>".
    """
    tokenizer, model_file = Tokenizer.load(source), read_facts(source).model_file
    (folder / "tokenizer").mkdir()
    # Only what was just read and checked: a folder from someone else may hold links to files of this machine.
    for name in (FACTS_FILE, model_file):
        shutil.copyfile(source / name, folder / "tokenizer" / name)
    settings: dict[str, Any] = {"model_max_length": sequence_length, "clean_up_tokenization_spaces": False}
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
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer
