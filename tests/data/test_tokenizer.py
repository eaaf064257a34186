"""Tokenizers: nothing is lost, special tokens never come from text, the folder proves itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import run_here

from pipeline.cli import UserError
from pipeline.data.tokenizer import Tokenizer, train_tokenizer
from tools import train_tokenizer as tool

CORPUS = [f"the {a} {b} jumps over\n{b} lazy dogs, {n}!" for a in ("quick", "slow") for b in ("fox", "cat") for n in range(40)]  # fmt: skip  # noqa: E501


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def lossless(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(CORPUS, 300, request.param, tmp_path_factory.mktemp("t") / "tokenizer")


@settings(deadline=None)
@given(text=st.text())
def test_decoding_gives_the_text_back(lossless: Tokenizer, text: str) -> None:
    """Any unicode: line ends, tabs, leading spaces, NUL, emoji, what looks like special tokens."""
    for given_text in (text, f" {text}\n\n\t{text}  ", f"<mask>{text}</s><pad>\r\n \x00 🎉"):
        ids = lossless.encode(given_text)
        assert lossless.decode(ids) == given_text
        assert not set(ids.tolist()) & {lossless.mask, lossless.pad, lossless.eos, lossless.unk}


def test_batches_equal_single_texts(lossless: Tokenizer) -> None:
    texts = ["", "fox", "the quick\n", "ü"]
    for text, ids in zip(texts, lossless.encode_batch(texts), strict=True):
        assert ids.tolist() == lossless.encode(text).tolist()


def test_masks_are_shown_and_padding_is_not(lossless: Tokenizer) -> None:
    ids = [lossless.mask, *lossless.encode("fox"), lossless.mask, lossless.eos, lossless.pad]
    assert lossless.decode(ids, mask_text="_") == "_fox_"
    assert lossless.decode(ids) == "fox"


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char", "word"])
def test_training_is_deterministic_and_ids_are_distinct(tmp_path: Path, model_type: str) -> None:
    one = train_tokenizer(CORPUS, 300, model_type, tmp_path / "one")
    two = train_tokenizer(CORPUS, 300, model_type, tmp_path / "two")
    assert one.sha256 == two.sha256
    assert len({one.unk, one.pad, one.eos, one.mask}) == 4
    assert one.vocab_size <= 300
    loaded = Tokenizer.load(tmp_path / "one")
    assert loaded.encode("the quick").tolist() == one.encode("the quick").tolist()
    assert (loaded.vocab_size, loaded.eod) == (one.vocab_size, one.eos)


def test_char_pieces_are_characters(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["0123", "3210"], 64, "char", tmp_path / "t")
    assert len(tokenizer.encode("0123")) == 4
    assert tokenizer.encode("7").tolist() == [tokenizer.unk]


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    train_tokenizer(CORPUS, 300, "bpe", tmp_path / "t")
    with pytest.raises(UserError, match=r"nowhere.*train_tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")
    shutil.copytree(tmp_path / "t", tmp_path / "other")
    (tmp_path / "other/tokenizer.model").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"not the file that .*tokenizer.json describes"):
        Tokenizer.load(tmp_path / "other")
    (tmp_path / "t/tokenizer.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"tokenizer.json is damaged"):
        Tokenizer.load(tmp_path / "t")


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"q": text, "a": "yes"}) + "\n" for text in CORPUS))
    base = ["--input", str(corpus), "--output", str(tmp_path / "t"), "--vocab-size"]
    complaint = run_here(tool.main, [*base, "300"], capsys).complaint()
    assert "line 1 has no key 'text'; it has 'q', 'a'" in complaint
    keys = ["--prompt-key", "q", "--answer-key", "a"]
    assert "--vocab-size 99999" in run_here(tool.main, [*base, "99999", *keys], capsys).complaint()
    assert "--vocab-size 20" in run_here(tool.main, [*base, "20", *keys], capsys).complaint()
    assert "--vocab-size is 0" in run_here(tool.main, [*base, "0", *keys], capsys).complaint()
    assert "--answer-key is missing" in run_here(tool.main, [*base, "300", *keys[:2]], capsys).complaint()
    assert not (tmp_path / "t").exists()
    outcome = run_here(tool.main, [*base, "300", *keys], capsys)
    assert outcome.code == 0
    assert "300 tokens" in outcome.output
    assert "exists" in run_here(tool.main, [*base, "300", *keys], capsys).complaint()
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    command = ["--input", str(empty), "--vocab-size", "300", "--output", str(tmp_path / "e")]
    assert "--vocab-size 300" in run_here(tool.main, command, capsys).complaint()
