"""Write the model card of an exported model: architecture, training, how to load it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.checkpoint.manifest import Manifest
from pipeline.config import Config, TrainConfig
from pipeline.data.tokenizer import HUGGING_FACE
from pipeline.huggingface.formats import PROJECTS, Format
from pipeline.huggingface.mapping import Exported

_CARD = """\
---
library_name: transformers
pipeline_tag: fill-mask
tags:
- masked-diffusion
- diffusion-language-model
---

# {name}

A masked diffusion language model: a transformer that fills in masked tokens. {sampling}

```python
{usage}
```

{facts}

## Model

{model}

## Training

{training}

## Files

- The weights are {weights}, in {dtype}.
- `tokenizer/` is the tokenizer in the format of the training pipeline.

This card describes neither the licence nor the data: add both before you share the model.
"""


_OWN = """\
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer(["any text", "another text"], padding=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens={new_tokens})
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))"""
_OTHER = """\
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)  # with the code of {code}"""
_DLLM = """\
import dllm
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained("{name}")"""
_OWN_FACTS = """\
`generate` takes `steps` or `tokens_per_step`, `policy` (confidence, margin, entropy, random, left_to_right),
`threshold`, `block_length`, `temperature`, `top_k`, `top_p`, `remasking` with `eta`, `use_cache` and `seed`.
Their defaults are in generation_config.json; the method's docstring says what each does. {attention}

`model(**inputs)` returns logits, `AutoModel` hidden states. The model never predicts the mask token or rows
of the output matrix beyond the {tokens} tokens of the tokenizer. Training used sequences of
{sequence_length} tokens."""
_ATTENTION = {
    "bidirectional": 'Texts\nwith {mask} have these filled in, also by `pipeline("fill-mask")`.',
    "blocks": "The\nmodel was trained in blocks of {block_size} tokens, which `generate` fills one after "
    "another. A call of\nthe model itself needs `blocks`, the number of each position's block{first_block}.",
    "causal": "The\nmodel is causal: it predicts each token from those before it.",
}
_FIRST_BLOCK = {
    "pairs": ": 0 for the prompt, counted\nfrom 1 behind it",
    "packed": ", counted from 1 at\nthe first token that is not always given",
}
_OTHER_FACTS = """\
Settings and weights are in the format of {project}. Its code is not in this folder. Training never had the
mask token or the rows of the output matrix beyond the {tokens} tokens of the tokenizer as targets: exclude
them when you sample (`suppress_tokens` in generation_config.json). Training used sequences of
{sequence_length} tokens. Position i is predicted at {prediction}."""
_PREDICTED = {"same": "i", "shifted": "i - 1 (position 0 is always given)"}


def _usage(name: str, exported: Exported, form: Format) -> dict[str, str]:
    """Return the texts of the card that depend on the format."""
    tokenizer, vocabulary, project = exported.tokenizer, exported.vocabulary, PROJECTS.get(form)
    values = {
        "name": name,
        "mask": tokenizer.model.token(tokenizer.mask),
        "rows": vocabulary.rows,
        "tokens": vocabulary.tokens,
        "block_size": exported.block_size,
        "first_block": _FIRST_BLOCK[exported.data_kind],
        "new_tokens": min(64, exported.sequence_length // 2),
        "sequence_length": exported.sequence_length,
        "prediction": _PREDICTED[exported.model.prediction],
        "project": project and project.name,
        "code": project and project.code,
    }
    if project is None:
        usage, facts = _OWN, _OWN_FACTS
        needed = "" if tokenizer.model_type == HUGGING_FACE else " and sentencepiece"
        sampling = f"It needs torch,\ntransformers 4.57 or later{needed}:"
        values["attention"] = _ATTENTION[exported.attention].format(**values)
    else:
        usage, facts = (_DLLM if project.code is None else _OTHER), _OTHER_FACTS
        sampling = f"Load it with the code of {project.name}:"
    if project is not None and project.mask not in (None, values["mask"]):
        facts += f" dllm takes {project.mask} for the mask token: tell it that it is {{mask}}."
    return {"usage": usage.format(**values), "facts": facts.format(**values), "sampling": sampling}


def model_card(
    name: str,
    config: Config,
    manifest: Manifest,
    exported: Exported,
    form: Format,
    *,
    parameters: int,
    weights: str,
) -> str:
    """Return the text of README.md.

    Args:
        name: name of the exported folder.
        config: configuration of the run.
        manifest: manifest of the checkpoint.
        exported: what config.json says.
        form: format of the folder.
        parameters: number of parameters, with tied ones counted once.
        weights: "ema" or "raw".
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
        "position i is predicted at": _PREDICTED[model.prediction],
        "attention": exported.attention,
    }
    examples, loss = train.examples_until(manifest.step), manifest.held_out_loss
    facts = {
        "optimizer steps": f"{manifest.step:,}",
        "sequences seen": f"{examples:,} of {config.data.sequence_length} tokens",
        "tokens seen": f"{manifest.tokens:,}",
        "held-out loss": "not measured at this step" if loss is None else f"{loss:.4f} nats per masked token",
        "datasets": ", ".join(Path(prefix).name for prefix in config.data.all_prefixes),
        "kind of examples": config.data.kind,
        "data fingerprint": f"`{manifest.data_fingerprint[:16]}`",
        "objective": _settings(objective),
        "optimizer": _settings(config.optimizer),
        "schedule": _settings(config.schedule),
        "global batch": f"{_batches(train)} sequences",
        "seed": train.seed,
        "ranks": manifest.world_size,
        "software": ", ".join(f"{package} {version}" for package, version in manifest.versions.items()),
    }
    long = {"ema": "the exponential moving average of the trained weights", "raw": "those of the last step"}
    return _CARD.format(
        name=name,
        **_usage(name, exported, form),
        model=_table(shape),
        training=_table(facts),
        weights=long[weights],
        dtype=exported.dtype,
    )


def _batches(train: TrainConfig) -> str:
    """Return the global batch, and the later ones of a ramp."""
    larger = (f", {each.global_batch_size} from step {each.first_step:,}" for each in train.batch_ramp)
    return f"{train.global_batch_size}{''.join(larger)}"


def _settings(section: Any) -> str:
    values = dataclasses.asdict(section)
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def _table(facts: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())])
