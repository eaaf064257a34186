"""The tokenizer of a run in a form that transformers' AutoTokenizer loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.data.tokenizer import HUGGING_FACE_FILE, MODEL_FILE, HuggingFaceModel, Tokenizer


def write_tokenizer(source: Path, folder: Path, sequence_length: int) -> Tokenizer:
    """Write the tokenizer of the folder `source`: as it is to FOLDER/tokenizer, and for transformers.

    transformers reads the same SentencePiece model by the code in `remote_code`, or the same file of its own
    kind, so that the ids are the same. One thing differs, as its users expect: "<mask>" written in a text
    is the mask token there.
    """
    tokenizer = Tokenizer.load(source)
    shutil.copytree(source, folder / "tokenizer")
    settings = {
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokenizer.model.token(i) for name, i in tokenizer.special_ids.items() if i >= 0},
    }
    if isinstance(tokenizer.model, HuggingFaceModel):
        shutil.copyfile(source / HUGGING_FACE_FILE, folder / "tokenizer.json")
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        shutil.copyfile(source / MODEL_FILE, folder / MODEL_FILE)
        settings["tokenizer_class"] = "MaskedDiffusionTokenizer"
        code = "tokenization_masked_diffusion.MaskedDiffusionTokenizer"
        settings["auto_map"] = {"AutoTokenizer": [code, None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer
