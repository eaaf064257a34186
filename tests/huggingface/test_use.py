"""Exports as transformers' users treat them: saved again, in bf16, placed, trained; with any version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.exports import export_random
from support.forked import LIBRARIES, run_forked
from support.programs import ROOT

pytestmark = pytest.mark.slow

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, in blocks, rows that are no multiple of 8": {
        "tie_embeddings": False,
        "objective": {"block_size": 3},
        "rows": 13,
        "prediction": "shifted",
    },
    "a tokenizer of Hugging Face": {"tokenizer": "huggingface", "qk_norm": True, "attention_bias": True},
}


@pytest.mark.parametrize("model", MODELS)
def test_an_export_behaves_as_a_model_of_transformers(model: str, tmp_path: Path) -> None:
    loaded = export_random(tmp_path / "mine", **MODELS[model])
    program = str(ROOT / "tests/support/use_export.py")
    done = run_forked(program, str(tmp_path), str(tmp_path / "mine"), by=LIBRARIES)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["rows"] == MODELS[model].get("rows", facts["rows"])
    assert facts["finite"] == loaded.tokenizer.vocab_size - 1, "all tokens but the mask token"
    assert facts["is tied"] == [loaded.config.model.tie_embeddings] * 3
    assert facts["same again"], "weights, code, settings of generation"
    assert facts["same texts"]
    assert facts["resized"], "more rows, which are never predicted"
    assert facts["dtypes"] == ["torch.bfloat16", "torch.float32"], "logits are float32"
    assert 0 < facts["bf16 error"] < 0.1, "in standard deviations of the logits"
    assert facts["same from disk"]
    assert 0 < facts["trained"]["loss"] < 50
    assert facts["trained"]["unchanged"] == []
    assert facts["trained"]["is tied"] == loaded.config.model.tie_embeddings
    again = {path.name for path in (tmp_path / "again").glob("*.py")}
    assert {f"{kind}_masked_diffusion.py" for kind in ("modeling", "generation", "decoding")} <= again
