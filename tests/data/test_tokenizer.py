"""Tokenizers: nothing is lost, special tokens never come from text, the folder proves itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.corpus.tokenizer_making import import_tokenizer, train_tokenizer
from pipeline.data.tokenizer import Tokenizer
from support.byte_level import train_byte_level
from support.programs import run_here
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


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_long_lines_are_trained_on(tmp_path: Path, model_type: str) -> None:
    """SentencePiece leaves out lines of more than 4,192 bytes unless it is told otherwise."""
    line = " ".join(CORPUS).replace("\n", " ")
    assert len(line) > 4192
    trained = train_tokenizer(["a short line", line], 300, model_type, tmp_path / "t")
    pieces = [trained.model.token(token) for token in trained.encode("quick").tolist()]
    assert not any(piece.startswith("<0x") for piece in pieces)  # bytes, of letters that were not seen


@pytest.mark.parametrize(
    "error", [UserError("x.jsonl, line 3: no key"), KeyboardInterrupt(), OSError(5, "I/O")]
)
def test_what_ends_the_reading_is_raised(tmp_path: Path, error: BaseException) -> None:
    """Not SentencePiece's words for it."""

    def texts() -> Iterator[str]:
        yield from CORPUS
        raise error

    with pytest.raises(type(error)) as caught:
        train_tokenizer(texts(), 300, "bpe", tmp_path / "t")
    assert caught.value is error
    assert not (tmp_path / "t").exists()


def test_a_folder_that_cannot_be_made_shows_before_the_reading(tmp_path: Path) -> None:
    """Reading and training take hours."""
    (tmp_path / "file").touch()
    read = []
    texts = (read.append(text) or text for text in ["a b c", "d e f"])
    with pytest.raises(OSError, match="file"):
        train_tokenizer(texts, 300, "unigram", tmp_path / "file" / "tokenizer")
    assert read == []


def test_char_pieces_are_characters(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["0123", "3210"], 64, "char", tmp_path / "t")
    assert len(tokenizer.encode("0123")) == 4
    assert tokenizer.encode("7").tolist() == [tokenizer.unk]


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    train_tokenizer(CORPUS, 300, "bpe", tmp_path / "t")
    with pytest.raises(UserError, match=r"nowhere.*train_tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"t/tokenizer.model is a file: name the folder"):
        Tokenizer.load(tmp_path / "t/tokenizer.model")
    shutil.copytree(tmp_path / "t", tmp_path / "other")
    (tmp_path / "other/tokenizer.model").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"does not match its sha256 in .*tokenizer.json"):
        Tokenizer.load(tmp_path / "other")
    (tmp_path / "t/tokenizer.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"tokenizer.json is damaged"):
        Tokenizer.load(tmp_path / "t")


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"q": text, "a": "yes"}) + "\n" for text in CORPUS))
    base = ["--input", str(corpus), "--output", str(tmp_path / "t"), "--vocab-size"]
    complaint = run_here(tool.main, [*base, "300"], capsys).complaint()
    assert "line 1: no key 'text'; it has 'q', 'a'" in complaint
    keys = ["--prompt-key", "q", "--answer-key", "a"]
    assert "--vocab-size 99999" in run_here(tool.main, [*base, "99999", *keys], capsys).complaint()
    assert "--vocab-size 20" in run_here(tool.main, [*base, "20", *keys], capsys).complaint()
    assert "--vocab-size is 0" in run_here(tool.main, [*base, "0", *keys], capsys).complaint()
    for wrong, message in (
        (["300", "--mask-token", "<m>"], "--mask-token has no effect without --import-json"),
        (["300", "--import-json", "t.json"], "--input has no effect with --import-json"),
    ):
        assert message in run_here(tool.main, [*base, *wrong], capsys).complaint()
    assert "--vocab-size is missing" in run_here(tool.main, base[:-1], capsys).complaint()
    assert "--answer-key is missing" in run_here(tool.main, [*base, "300", *keys[:2]], capsys).complaint()
    assert not (tmp_path / "t").exists()
    outcome = run_here(tool.main, [*base, "300", *keys], capsys)
    assert outcome.code == 0
    assert "300 tokens" in outcome.output
    size = sum(len(text.encode()) + 3 for text in CORPUS)
    assert f"training on {size / 1e6:.1f} MB of text, from" in outcome.output
    texts = [part for text in CORPUS for part in (text, "yes")]
    whole = train_tokenizer(texts, 300, "unigram", tmp_path / "whole")
    assert Tokenizer.load(tmp_path / "t").sha256 == whole.sha256
    less = [*base[:3], str(tmp_path / "less"), "--vocab-size", "300", *keys, "--sample-megabytes"]
    assert "--sample-megabytes is 0.0" in run_here(tool.main, [*less, "0"], capsys).complaint()
    assert run_here(tool.main, [*less, "0.002"], capsys).code == 0
    part = texts[: next(n for n in range(2, 999, 2) if len("".join(texts[:n]).encode()) >= 2000)]
    sampled = train_tokenizer(part, 300, "unigram", tmp_path / "sampled")
    assert Tokenizer.load(tmp_path / "less").sha256 == sampled.sha256 != whole.sha256
    assert "exists" in run_here(tool.main, [*base, "300", *keys], capsys).complaint()
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    command = ["--input", str(empty), "--vocab-size", "300", "--output", str(tmp_path / "e")]
    assert "--input has no text" in run_here(tool.main, command, capsys).complaint()


def write_hugging_face(path: Path, specials: list[str]) -> None:
    """Train a byte-level BPE and write its tokenizer.json."""
    model = train_byte_level(CORPUS, 400, specials)
    model.enable_truncation(3)
    model.enable_padding()
    model.save(str(path))


def test_a_hugging_face_file_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its ids are those of `tokenizers` itself; special tokens never come from text; nothing is cut."""
    path = tmp_path / "tokenizer.json"
    write_hugging_face(path, ["<|endoftext|>", "<pad>"])
    arguments = ["--import-json", str(path), "--output", str(tmp_path / "t")]
    outcome = run_here(tool.main, arguments, capsys)
    assert outcome.code == 0, outcome.error
    assert "added <mask>" in outcome.output
    oracle = tokenizers.Tokenizer.from_file(str(path))
    oracle.no_truncation()
    oracle.no_padding()
    ours = Tokenizer.load(tmp_path / "t")
    size = oracle.get_vocab_size()
    assert (ours.eos, ours.pad, ours.mask, ours.unk) == (0, 1, size, -1)
    assert ours.vocab_size == size + 1
    for text in (*CORPUS[:5], "", "Ünïcode 🎉\n\n\u2028"):
        assert ours.encode(text).tolist() == oracle.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    strange = "<|endoftext|> <mask> <pad>"
    assert not set(ours.encode(strange).tolist()) & {ours.eos, ours.pad, ours.mask}
    assert ours.decode(ours.encode(strange)) == strange
    assert ours.decode([*ours.encode("fox"), ours.mask, ours.eos], mask_text="_") == "fox_"
    assert [ids.tolist() for ids in ours.encode_batch(["a", ""])] == [oracle.encode("a").ids, []]
    assert "exists" in run_here(tool.main, arguments, capsys).complaint()


def test_merges_are_not_dropped(tmp_path: Path) -> None:
    """A file can ask for BPE dropout: a dataset would be another one every time."""
    path = tmp_path / "tokenizer.json"
    write_hugging_face(path, ["<|endoftext|>", "<pad>"])
    oracle = tokenizers.Tokenizer.from_file(str(path))
    oracle.no_truncation()
    oracle.no_padding()
    dropping = tokenizers.Tokenizer.from_file(str(path))
    dropping.model.dropout = 0.9
    dropping.save(str(path))
    import_tokenizer(path, {}, tmp_path / "t")
    ids = Tokenizer.load(tmp_path / "t").encode_batch(CORPUS)
    assert [each.tolist() for each in ids] == [one.ids for one in oracle.encode_batch(CORPUS)]


def test_special_tokens_are_named_or_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tokenizer.json"
    write_hugging_face(path, ["[MASK]", "[PAD]", "stop"])
    arguments = ["--import-json", str(path), "--output", str(tmp_path / "t")]
    assert "--eos-token" in run_here(tool.main, arguments, capsys).complaint()
    complaint = run_here(tool.main, [*arguments, "--eos-token", "no"], capsys).complaint()
    assert "has no token no" in complaint
    complaint = run_here(tool.main, [*arguments, "--eos-token", "[MASK]"], capsys).complaint()
    assert "must be three tokens" in complaint
    assert not (tmp_path / "t").exists()
    assert run_here(tool.main, [*arguments, "--eos-token", "stop"], capsys).code == 0
    loaded = Tokenizer.load(tmp_path / "t")
    assert (loaded.mask, loaded.pad, loaded.eos) == (0, 1, 2)
    path.write_text("{}")
    complaint = run_here(tool.main, [*arguments[:3], str(tmp_path / "u")], capsys).complaint()
    assert "is not a tokenizer.json" in complaint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mask_id", -1),
        ("mask_id", "../etc"),
        ("mask_id", 3.0),
        ("mask_id", None),
        ("mask_id", True),
        ("mask_id", 10**9),
        ("mask_id", 2),  # that of eos
        ("pad_id", -1),
        ("eos_id", 10**30),
        ("unk_id", -2),
        ("unk_id", []),
        ("vocab_size", "300"),
        ("vocab_size", 0),
        ("vocab_size", 301),  # the model has one less
        ("mask_id", 50),  # an ordinary token: text would become the mask
        ("unk_id", 50),
        ("model_type", "../x"),
        ("format", 2),
    ],
)
def test_special_ids_that_no_tokenizer_has(tmp_path: Path, name: str, value: object) -> None:
    train_tokenizer(CORPUS, 300, "bpe", tmp_path / "t")
    path = tmp_path / "t/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(
        UserError, match=r"t/tokenizer\.json is damaged \(.*(_id|vocab_size|format|model_type)"
    ):
        Tokenizer.load(tmp_path / "t")
