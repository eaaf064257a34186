"""Fixtures that the tests of the data share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.corpus.tokenizer_making import train_tokenizer

QUESTIONS = [
    (f"what is {n} + {n}?" if n % 5 else "", f"{2 * n}\n\u2028 é 🎉"[: 2 + n % 7]) for n in range(97)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with x.jsonl (97 pairs, some prompts empty), y.txt and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "x.jsonl").open("w") as file:
        file.writelines(json.dumps({"q": q, "a": a, "text": q + a}) + "\n" for q, a in QUESTIONS)
    (folder / "y.txt").write_text("to be\nor not\n\nto be\n")
    train_tokenizer([q + a for q, a in QUESTIONS], 300, "bpe", folder / "tokenizer")
    return folder
