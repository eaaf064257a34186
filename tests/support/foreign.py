"""Small random models in the formats of other projects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
