"""Load exported folders with transformers alone and write what they give; started by the tests.

usage: load.py OUTPUT.pt TEXT FOLDER...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = str(Path(sys.argv[1]).with_name("modules"))  # copies of the folders' code

import torch


def main(output: str, text: str, *folders: str) -> None:
    sys.modules["pipeline"] = None  # type: ignore[assignment]  # an import of our package fails
    from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

    results = []
    for folder in folders:
        model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
        body = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        present = torch.ones_like(ids)
        present[:, -2:] = 0
        labels = ids.masked_fill(ids == tokenizer.mask_token_id, -100)
        with torch.no_grad():
            results.append(
                {
                    "ids": ids,
                    "logits": model(ids).logits,
                    "padded_logits": model(ids, attention_mask=present).logits,
                    "hidden": body(ids).last_hidden_state,
                    "loss": model(ids, labels=labels).loss,
                    "fill-mask": pipeline("fill-mask", model=model, tokenizer=tokenizer)(text, top_k=2),
                }
            )
    assert "deepspeed" not in sys.modules
    torch.save(results, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
