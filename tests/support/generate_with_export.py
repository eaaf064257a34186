"""Generate with exported folders by transformers alone; started by the tests.

usage: generate_with_export.py OUTPUT.json CASES.json; cases are [folder, texts, padding side, arguments].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = str(Path(sys.argv[1]).with_name("modules"))  # copies of the folders' code


def main(output: str, cases: str) -> None:
    sys.modules["pipeline"] = None  # type: ignore[assignment]  # an import of our package fails
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    results, models = [], {}
    for folder, texts, side, arguments in json.loads(Path(cases).read_text()):
        if folder not in models:
            models[folder] = (
                AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True),
                AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
            )
        model, tokenizer = models[folder]
        inputs = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        found = model.generate(**inputs, **arguments, return_dict_in_generate=True)
        assert found.sequences.equal(model.generate(**inputs, **arguments))
        size = inputs["input_ids"].shape[1]
        start = 0 if found.sequences.shape[1] == size else size
        results.append(
            {
                "tokens": found.sequences[:, start:].tolist(),
                "order": found.order[:, start:].tolist(),
                "steps": found.steps.tolist(),
                "inputs": found.sequences[:, :size].equal(inputs["input_ids"]),
            }
        )
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
