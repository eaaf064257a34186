"""Write the tokenizer of a run in a format that transformers' AutoTokenizer loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.data.tokenizer import HUGGING_FACE_FILE, MODEL_FILE, Tokenizer


def write_tokenizer(source: Path, folder: Path, sequence_length: int) -> Tokenizer:
    """Write the tokenizer in `source` twice: unchanged to FOLDER/tokenizer, and to FOLDER for transformers.

    In transformers, the code in `remote_code` reads a SentencePiece model, and transformers itself reads a
    Hugging Face tokenizer, so the ids are the same. One difference is intended: transformers recognises
    special tokens in a text, such as "<mask>".
    """
    tokenizer = Tokenizer.load(source)
    shutil.copytree(source, folder / "tokenizer")
    settings: dict[str, Any] = {"model_max_length": sequence_length, "clean_up_tokenization_spaces": False}
    for use, token in tokenizer.special_ids.items():
        if token >= 0:
            settings[f"{use}_token"] = tokenizer.model.token(token)
    if (source / MODEL_FILE).is_file():
        shutil.copyfile(source / MODEL_FILE, folder / MODEL_FILE)
        settings["tokenizer_class"] = "MaskedDiffusionTokenizer"
        settings["auto_map"] = {
            "AutoTokenizer": ["tokenization_masked_diffusion.MaskedDiffusionTokenizer", None]
        }
    else:
        model = json.loads((source / HUGGING_FACE_FILE).read_text(encoding="utf-8"))
        model["post_processor"] = None  # it would add tokens that training never saw
        (folder / "tokenizer.json").write_text(json.dumps(model, ensure_ascii=False), encoding="utf-8")
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer
