"""Use an exported folder as transformers' users do, and write what came of it; started by the tests.

usage: use_export.py WORK FOLDER. It runs with any version of transformers, with accelerate or without.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = str(Path(sys.argv[1]) / "modules")  # copies of the folders' code

import torch


def main(work: Path, folder: str) -> dict[str, Any]:
    """Return facts, by name."""
    sys.modules["pipeline"] = None  # type: ignore[assignment]  # an import of our package fails
    import transformers
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    def load(place: Any, **more: Any) -> Any:
        return AutoModelForMaskedLM.from_pretrained(place, trust_remote_code=True, **more)

    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(["abcd", "fe"], padding=True, return_tensors="pt")
    given = dict(inputs)
    if model.config.attention == "blocks":
        given["blocks"] = torch.arange(4)[None] // model.config.block_size + 1
    drawn = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}

    def results(one: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return one(**given).logits, one.generate(**inputs, **drawn)

    logits, tokens = results(model)
    model.save_pretrained(work / "again")
    tokenizer.save_pretrained(work / "again")
    again, half = load(work / "again"), load(folder, dtype=torch.bfloat16)
    texts = AutoTokenizer.from_pretrained(work / "again", trust_remote_code=True)
    half_logits, _ = results(half)
    finite, rows = logits.isfinite(), logits.shape[2]
    facts = {
        "transformers": transformers.__version__,
        "rows": rows,
        "finite": int(logits[0, 0].isfinite().sum()),
        "is tied": [one.lm_head.weight is one.model.embed_tokens.weight for one in (model, again, half)],
        "same again": all(a.equal(b) for a, b in zip(results(again), (logits, tokens), strict=True)),
        "same texts": dict(texts(["abcd"])) == dict(tokenizer(["abcd"])),
        "dtypes": [str(half.dtype), str(half_logits.dtype)],
        "bf16 error": float((half_logits - logits)[finite].abs().max() / logits[finite].std()),
    }
    again.resize_token_embeddings(rows + 3, mean_resizing=False)
    resized, _ = results(again)
    facts["resized"] = resized[..., :rows].equal(logits) and resized[..., rows:].max().item() == -torch.inf
    if importlib.util.find_spec("accelerate") is not None:
        places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm"], "cpu")
        places |= dict.fromkeys(["model.layers.1"] + ["lm_head"] * (not facts["is tied"][0]), "disk")
        places |= {} if "lm_head" in places else {"lm_head": "cpu"}
        placed = load(folder, device_map=places, offload_folder=str(work / "offloaded"))
        facts["same from disk"] = all(
            torch.allclose(a, b) for a, b in zip(results(placed), (logits, tokens), strict=True)
        )
        facts["trained"] = trained(model, given, work)
    return facts


def trained(model: Any, given: dict[str, torch.Tensor], work: Path) -> dict[str, Any]:
    """Take a step of transformers' Trainer, with gradient checkpointing; return what has changed."""
    from transformers import Trainer, TrainingArguments

    labels = given["input_ids"].masked_fill(torch.arange(4)[None] % 2 == 0, -100)
    masked = given["input_ids"].masked_fill(labels != -100, model.config.mask_token_id)
    rows = [
        {"input_ids": masked[row], "attention_mask": given["attention_mask"][row], "labels": labels[row]}
        | ({"blocks": given["blocks"][0]} if "blocks" in given else {})
        for row in range(2)
    ]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(work / "trainer"), max_steps=1, per_device_train_batch_size=2, learning_rate=0.01,
        gradient_checkpointing=True, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    output = Trainer(model=model, args=arguments, train_dataset=rows).train()
    return {
        "loss": output.training_loss,
        "unchanged": [name for name, weight in model.named_parameters() if weight.equal(before[name])],
        "is tied": model.lm_head.weight is model.model.embed_tokens.weight,
    }


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), sys.argv[2])
    (Path(sys.argv[1]) / "facts.json").write_text(json.dumps(found))
