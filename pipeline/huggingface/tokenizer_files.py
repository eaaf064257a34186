"""The tokenizer of a run in a form that transformers' AutoTokenizer loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.data.tokenizer import MODEL_FILE, Tokenizer


def write_tokenizer(source: Path, folder: Path, sequence_length: int) -> Tokenizer:
    """Write the tokenizer of the folder `source`: as it is to FOLDER/tokenizer, and for transformers.

    transformers reads the same SentencePiece model by the code in `remote_code`, so that the ids are the
    same. One thing differs, as its users expect: "<mask>" written in a text is the mask token there.
    """
    tokenizer = Tokenizer.load(source)
    shutil.copytree(source, folder / "tokenizer")
    shutil.copyfile(source / MODEL_FILE, folder / MODEL_FILE)
    piece = tokenizer.processor.id_to_piece
    settings = {
        "tokenizer_class": "MaskedDiffusionTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_masked_diffusion.MaskedDiffusionTokenizer", None]},
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
        "unk_token": piece(tokenizer.unk),
        "pad_token": piece(tokenizer.pad),
        "eos_token": piece(tokenizer.eos),
        "mask_token": piece(tokenizer.mask),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer
