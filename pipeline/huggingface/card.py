"""Write the model card of an exported model: architecture, training, how to load it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.checkpoint.manifest import Manifest
from pipeline.config import Config

_CARD = """\
---
library_name: transformers
pipeline_tag: fill-mask
tags:
- masked-diffusion
- diffusion-language-model
---

# {name}

A masked diffusion language model: a transformer that fills in masked tokens. It has no `generate` method;
call it from a sampler on partly masked sequences.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("any text with {mask} in it", return_tensors="pt", return_token_type_ids=False)
logits = model(**inputs).logits  # [1, length, {rows}]; -inf for the mask token and for padding rows
```

`AutoModel` returns the hidden states. The model never predicts the mask token or rows of the output matrix
beyond the {tokens} tokens of the tokenizer. Training used sequences of {sequence_length} tokens; pass an
attention mask for padded batches.

## Model

{model}

## Training

{training}

## Files

- The weights are {weights}, in {dtype}.
- `tokenizer/` is the tokenizer in the format of the training pipeline.

This card describes neither the licence nor the data: add both before you share the model.
"""


def model_card(
    name: str,
    config: Config,
    manifest: Manifest,
    *,
    parameters: int,
    weights: str,
    dtype: str,
    mask: str,
    attention: str,
) -> str:
    """Return the text of README.md.

    Args:
        name: name of the exported folder.
        config: configuration of the run.
        manifest: manifest of the checkpoint.
        parameters: number of parameters, with tied ones counted once.
        weights: "ema" or "raw".
        dtype: data type of the exported weights.
        mask: text of the mask token.
        attention: attention pattern, as in config.json.
    """
    model, train, objective = config.model, config.train, config.objective
    shape = {
        "parameters": f"{parameters:,}",
        "layers": model.layers,
        "hidden size": model.hidden_size,
        "heads": f"{model.heads} query, {model.kv_heads or model.heads} key and value",
        "intermediate size (SwiGLU)": model.intermediate_size,
        "vocabulary": f"{manifest.vocabulary['tokens']:,} tokens, {manifest.vocabulary['rows']:,} rows",
        "embeddings tied": "yes" if model.tie_embeddings else "no",
        "rotary base": f"{model.rope_theta:g}",
        "position i is predicted at": {"same": "i", "shifted": "i - 1 (position 0 is always given)"}[
            model.prediction
        ],
        "attention": attention,
    }
    examples, loss = manifest.step * train.global_batch_size, manifest.held_out_loss
    facts = {
        "optimizer steps": f"{manifest.step:,}",
        "sequences seen": f"{examples:,} of {config.data.sequence_length} tokens",
        "tokens seen": f"{manifest.tokens:,}",
        "held-out loss": "not measured at this step" if loss is None else f"{loss:.4f} nats per masked token",
        "datasets": ", ".join(Path(prefix).name for prefix in config.data.prefixes),
        "kind of examples": config.data.kind,
        "data fingerprint": f"`{manifest.data_fingerprint[:16]}`",
        "objective": _settings(objective),
        "optimizer": f"AdamW, {_settings(config.optimizer)}",
        "schedule": _settings(config.schedule),
        "global batch": f"{train.global_batch_size} sequences",
        "seed": train.seed,
        "ranks": manifest.world_size,
        "software": ", ".join(f"{package} {version}" for package, version in manifest.versions.items()),
    }
    long = {"ema": "the exponential moving average of the trained weights", "raw": "those of the last step"}
    return _CARD.format(
        name=name,
        mask=mask,
        rows=manifest.vocabulary["rows"],
        tokens=manifest.vocabulary["tokens"],
        sequence_length=config.data.sequence_length,
        model=_table(shape),
        training=_table(facts),
        weights=long[weights],
        dtype=dtype,
    )


def _settings(section: Any) -> str:
    values = dataclasses.asdict(section)
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def _table(facts: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())])
