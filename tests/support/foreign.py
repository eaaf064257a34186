"""Small random models in the formats of other projects."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
import yaml

from support.programs import Outcome, run_here
from tools import import_hf

EOS, UNKNOWN = "<|endoftext|>", "<unk>"
RESERVED = ("<reserved_0>", "<reserved_1>")


def write_tokenizer(path: Path) -> int:
    """Write the tokenizer.json of characters up to "{", without mask and padding; return its size."""
    characters = {chr(code): code - 31 for code in range(32, 124)}
    vocabulary = {EOS: 0} | characters | {UNKNOWN: 93, RESERVED[0]: 94, RESERVED[1]: 95}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token=UNKNOWN))
    model.add_special_tokens([EOS, UNKNOWN, *RESERVED])
    model.save(str(path))
    return len(vocabulary)


def save(folder: Path, family: str, rows: int = 101, **more: Any) -> transformers.PreTrainedModel:
    """Write a small random model of transformers in several files; return it."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        **{"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}} | more,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.2)
    model.save_pretrained(folder, max_shard_size="20KB")
    write_tokenizer(folder / "tokenizer.json")
    return model


def bring_in(
    source: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[Outcome, dict[str, Any]]:
    """Import; return what was printed and the settings that go with it."""
    outcome = run_here(import_hf.main, ["--input", str(source), "--output", str(output), *more], capsys)
    assert outcome.code == 0, outcome.error
    return outcome, yaml.safe_load((output / "model.yaml").read_text())


def rewrite(folder: Path, **more: Any) -> None:
    """Change settings in a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def llada_logits(weights: dict[str, torch.Tensor], config: dict[str, Any], ids: np.ndarray[Any, Any]) -> Any:
    """Return LLaDA's logits [L, V] of one sequence, in float64, from its description."""
    w = {name.removeprefix("model.transformer."): x.double().numpy() for name, x in weights.items()}

    def norm(x: Any, name: str) -> Any:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w[f"{name}.weight"]

    def linear(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def turned(x: Any) -> Any:  # [L, heads, 8]: pairs (i, i + 4) are complex numbers that rotate
        angle = np.arange(len(x))[:, None] * config["rope_theta"] ** (-np.arange(4) / 4)
        z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    def silu(x: Any) -> Any:
        return x / (1 + np.exp(-x))

    x = w["wte.weight"][ids]
    for layer in (f"blocks.{number}" for number in range(config["n_layers"])):
        y = norm(x, f"{layer}.attn_norm")
        if config["block_type"] == "llama":
            q, k, v = (linear(y, f"{layer}.{part}_proj") for part in "qkv")
        else:
            q, k, v = np.split(linear(y, f"{layer}.att_proj"), (32, 48), -1)
        q, k, v = (part.reshape(len(ids), -1, 8) for part in (q, k, v))
        q, k = turned(q), turned(k)
        heads = []
        for head in range(4):
            scores = np.exp(q[:, head] @ k[:, head // 2].T / math.sqrt(8))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, head // 2])
        x = x + linear(np.concatenate(heads, -1), f"{layer}.attn_out")
        y = norm(x, f"{layer}.ff_norm")
        if config["block_type"] == "llama":
            inner = silu(linear(y, f"{layer}.ff_proj")) * linear(y, f"{layer}.up_proj")
        else:
            up, gate = np.split(linear(y, f"{layer}.ff_proj"), 2, -1)
            inner = silu(gate) * up
        x = x + linear(inner, f"{layer}.ff_out")
    return norm(x, "ln_f") @ w["wte.weight" if config["weight_tying"] else "ff_out.weight"].T
