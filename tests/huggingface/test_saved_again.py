"""Exports that transformers has saved again, as the weights that a run starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.base.errors import UserError
from pipeline.config import ModelConfig
from pipeline.corpus.tokenizer_making import import_tokenizer, train_tokenizer
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.weights import StoredWeight
from pipeline.huggingface.export import write_model
from pipeline.huggingface.folders import open_weights
from pipeline.huggingface.initial import open_initial_weights
from pipeline.huggingface.mapping import Exported
from pipeline.huggingface.remote_code.modeling_masked_diffusion import MaskedDiffusionForMaskedLM
from pipeline.huggingface.remote_code.tokenization_masked_diffusion import MaskedDiffusionTokenizer
from pipeline.huggingface.tokenizer_files import write_tokenizer
from pipeline.model.batch import Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from support.foreign import write_tokenizer as write_characters

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["char", "huggingface"])
@pytest.mark.parametrize("tie", [True, False])
def test_an_export_saved_again(kind: str, tie: bool, tmp_path: Path) -> None:
    """The same weights, bit for bit; another tokenizer, or none, is noticed."""
    place = tmp_path / "tokenizer"
    if kind == "huggingface":
        write_characters(tmp_path / "characters.json")
        import_tokenizer(tmp_path / "characters.json", {}, place)
    else:
        train_tokenizer(["abc def"], 20, kind, place)
    train_tokenizer(["abc xyz"], 20, "char", tmp_path / "other")
    tokenizer = Tokenizer.load(place)
    model = ModelConfig(
        layers=2, hidden_size=32, kv_heads=2, intermediate_size=48, rope_theta=5000.0, rope_factor=2.0,
        tie_embeddings=tie, prediction="shifted", qk_norm=True,
    )  # fmt: skip
    vocabulary = Vocabulary(model.rows_for(tokenizer.vocab_size), tokenizer.vocab_size, tokenizer.mask)
    network = MaskedDiffusionModel(model, vocabulary)
    weights = {name: StoredWeight.of(weight.detach()) for name, weight in network.named_parameters()}
    (tmp_path / "mine").mkdir()
    exported = Exported(model, vocabulary, tokenizer, 16, "float32", "bidirectional")
    write_model(tmp_path / "mine", "own", exported, weights, 10**9)
    write_tokenizer(place, tmp_path / "mine", 16)
    again = tmp_path / "again"
    MaskedDiffusionForMaskedLM.from_pretrained(tmp_path / "mine").save_pretrained(again)
    with pytest.raises(UserError, match="save the tokenizer there, too"):
        open_initial_weights(again, model, vocabulary, place)
    reader = PreTrainedTokenizerFast if kind == "huggingface" else MaskedDiffusionTokenizer
    reader.from_pretrained(tmp_path / "mine").save_pretrained(again)
    assert not (again / "tokenizer").exists()
    found = open_initial_weights(again, model, vocabulary, place)
    for name, weight in open_weights(tmp_path / "mine").items():
        assert torch.equal(found[name].read(), weight.read()), name
    with pytest.raises(UserError, match=r"model\.rope_theta = 5000\.0, the run has 1\.0"):
        open_initial_weights(again, dataclasses.replace(model, rope_theta=1.0), vocabulary, place)
    words = "neither tokenizer/ nor tokenizer.model" if kind == "huggingface" else "is another tokenizer"
    with pytest.raises(UserError, match=words):
        open_initial_weights(again, model, vocabulary, tmp_path / "other")
