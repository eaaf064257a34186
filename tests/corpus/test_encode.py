"""Word by word the tokens are those of the whole text, or it is not done: the libraries are the oracle."""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from pipeline.base.errors import UserError
from pipeline.corpus import encode, tokenizer_making
from pipeline.corpus.encode import GPT_4O, LLAMA_3, QWEN_2, WordEncoder
from pipeline.corpus.tokenizer_making import import_tokenizer, train_tokenizer
from pipeline.data.tokenizer import Tokenizer
from support.byte_level import train_byte_level
from support.corpora import command, digests
from support.programs import run_here
from tools import preprocess_data

pytestmark = pytest.mark.slow

CORPUS = [
    f"the {a} {b} jumps over\n\n{b}'s  lazy dogs, {n}{n}! don't DON'T (see {a}.{b}/{n})\t"
    f"<a href='{b}'>é ü</a>\r\n  x_{n}= {n}*2;\n"
    for a in ("quick", "slow", "Größe", "日本語")
    for b in ("fox", "cat's", "camelCase", "ſ")
    for n in range(20)
]  # fmt: skip
EXPRESSIONS = {"gpt_2": None, "llama_3": LLAMA_3, "qwen_2": QWEN_2, "gpt_4o": GPT_4O}
NORMALIZED = {
    "id": 900, "content": "Å", "normalized": True, "special": False,
    "single_word": False, "lstrip": False, "rstrip": False,
}  # fmt: skip
SPACES = ["  ", "   ", "    "]


def byte_level(expression: str | None) -> tokenizers.Tokenizer:
    """Return a tokenizer that takes texts apart by this expression, or by GPT-2's."""
    return train_byte_level(CORPUS, 900, ["<mask>", "<pad>", "</s>"], expression)


def imported(found: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    """Return it as the project's own."""
    folder.mkdir(exist_ok=True)
    found.save(str(folder / "given.json"))
    return import_tokenizer(folder / "given.json", {}, folder / "tokenizer")[0]


@pytest.fixture(scope="module", params=["bpe", *EXPRESSIONS, "nfc", "added"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    if request.param == "bpe":
        return train_tokenizer(CORPUS, 600, "bpe", folder / "tokenizer")
    found = byte_level(EXPRESSIONS.get(request.param, LLAMA_3))
    if request.param == "nfc":
        found.normalizer = tokenizers.normalizers.NFC()
    if request.param == "added":  # as those of Qwen and of GPT-NeoX, and others
        found.add_tokens([*SPACES, "<tool_call>", "</tool_call>", "<|x|>", "日本", "\u0301", "quick", "0"])
        found.add_tokens([AddedToken("ß", lstrip=True), AddedToken("Z", rstrip=True)])
        found.add_tokens([AddedToken("don", single_word=True)])
        found.add_special_tokens([AddedToken("x </s>", lstrip=True, rstrip=True)])
    return imported(found, folder)


PARTS = [
    "a", "Z", "the", "quick", "fox", "don", "'", "'s", "'S", "'re", "’s", "ſ", "0", "12", "3456", "٣", "é",
    "ß", "e\u0301", "\u0301", "ж", "日本", " ", "  ", "   ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x85",
    "\xa0", "\u180e", "\u2028", "\u3000", "_", "-", "--", ".", ",", "(", ")/", "=", "▁", "\x00", "\x7f",
    "\x80", "🎉", "<mask>", "</s>", "<tool_call>", "<tool", "_call>", "<|x|>", "|", "\ufeff", "\u200d", "Å",
    "\u212b", "가", "\u1100\u1161",
]  # fmt: skip
# Up to 30 parts. Drawn as bytes they take a fifth of the time of lists, which was most of these tests'.
JOINED = st.binary(max_size=30).map(lambda drawn: "".join(PARTS[number % len(PARTS)] for number in drawn))


@settings(deadline=None, max_examples=1500)
@given(texts=st.lists(JOINED, max_size=3), text=st.text())
@example(texts=["x" * 129 + " " + "-" * 200, "日" * 200], text="")
def test_the_tokens_are_those_of_the_whole_text(tokenizer: Tokenizer, texts: list[str], text: str) -> None:
    encoder = WordEncoder(tokenizer)
    assert encoder.cuts is not None
    for batch in ([*texts, text], [f"a{text}9 {one}" for one in texts]):
        for found, one in zip(encoder.encode_batch(batch), batch, strict=True):
            assert found.tolist() == tokenizer.encode_batch([one])[0].tolist()


@settings(deadline=None, max_examples=500)
@given(text=JOINED)
def test_units_end_where_cuts_are_right(tokenizer: Tokenizer, text: str) -> None:
    cuts = WordEncoder(tokenizer).cuts
    assert cuts is not None
    units = cuts.units.findall(text)
    assert "".join(units) == text
    for end in itertools.accumulate(map(len, units[:-1])):
        before, (last, first, *after) = text[: end - 1], text[end - 1 : end + 2]
        assert is_right(tokenizer.model_type == "bpe", last, first, after), (before, last, first, after)


def is_right(pieces: bool, last: str, first: str, after: list[str]) -> bool:
    """Return whether there may be a cut between `last` and `first`, which `after` follows, if anything."""
    other = first.isascii() and first != "'"
    if last.isascii() and last.isalpha():
        return other and not first.isalpha()
    if pieces:
        return first in " \n"
    if last.isascii() and last.isdigit():
        return other and not first.isdigit()
    if last in string.punctuation:
        return first == " " or (first.isascii() and first.isdigit())
    return last in " \t\r\n" and first == " " and after[0].isascii() and after[0].isalnum()


def test_words_are_asked_for_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    encode = tokenizer.model.encode
    monkeypatch.setattr(tokenizer.model, "encode", lambda text: asked.append(text) or encode(text))
    WordEncoder(tokenizer).encode_batch(["the fox 1 fox", "the fox\n"])
    assert asked == ["the", " fox", " 1", "\n"]


def test_what_is_forgotten_is_asked_for_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "REMEMBERED", 5)
    encoder = WordEncoder(tokenizer)
    for _ in range(3):
        for first in range(0, len(CORPUS), 16):
            batch = CORPUS[first : first + 16]
            expected = [ids.tolist() for ids in tokenizer.encode_batch(batch)]
            assert [ids.tolist() for ids in encoder.encode_batch(batch)] == expected


def test_a_wrong_word_is_found(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the batch that is encoded both ways."""
    encoder = WordEncoder(tokenizer)
    monkeypatch.setattr(encode, "FIRST_TRIAL", 2)
    encoder.encode_batch(["the fox"])
    encoder._words[" fox"] += b"\0\0\0\0"
    with pytest.raises(UserError, match=r"give --whole-texts and --restart \(the text: 'a fox'\)"):
        encoder.encode_batch(["the", "a fox"])


@pytest.mark.parametrize("is_faster", [True, False])
def test_the_faster_way_is_gone_on_with(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, is_faster: bool
) -> None:
    encoder = WordEncoder(tokenizer)
    monkeypatch.setattr(encode, "FIRST_TRIAL", 1)
    clock = iter([0.0, 1.0, 3.0] if is_faster else [0.0, 2.0, 3.0])
    monkeypatch.setattr(encode.time, "process_time", lambda: next(clock))
    encoder.encode_batch(["a fox"])
    encoder.encode_batch(["a dog"])
    assert (" dog" in encoder._words) == is_faster


def changed(**changes: Any) -> Any:
    """Return a change of a tokenizer.json."""

    def change(content: dict[str, Any]) -> None:
        for name, value in changes.items():
            is_part = isinstance(value, dict) and isinstance(content[name], dict)
            content[name] = content[name] | value if is_part else value

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed(normalizer={"type": "NFKC"}),
        changed(normalizer={"type": "NFC"}, added_tokens=[NORMALIZED]),
        changed(normalizer={"type": "Prepend", "prepend": "▁"}),
        changed(pre_tokenizer=None),
        changed(pre_tokenizer={"add_prefix_space": True}),
        changed(pre_tokenizer={"use_regex": False}),
        changed(pre_tokenizer={"type": "Whitespace"}),
    ],
)
def test_other_tokenizers_are_left_alone(
    tmp_path: Path, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = imported(byte_level(None), tmp_path)
    path = tmp_path / "given.json"
    content = json.loads(path.read_text())
    change(content)
    monkeypatch.setattr(tokenizer_making, "check_import", lambda tokenizer, path: [])  # some lose bytes
    other = imported(tokenizers.Tokenizer.from_str(json.dumps(content)), tmp_path / "other")
    assert WordEncoder(tokenizer).cuts is not None
    assert WordEncoder(other).cuts is None
    assert WordEncoder(tokenizer, cut=False).cuts is None
    for ids, text in zip(WordEncoder(other).encode_batch(CORPUS[:9]), CORPUS, strict=False):
        assert ids.tolist() == other.encode(text).tolist()


def test_an_unknown_expression_is_left_alone(tmp_path: Path) -> None:
    """This one makes a token of a letter and what follows it."""
    assert WordEncoder(imported(byte_level(r"\p{L}+\.?|[^\p{L}]+"), tmp_path)).cuts is None


def test_unigram_models_are_left_alone(tmp_path: Path) -> None:
    """SentencePiece adds the scores of the whole text up in 32 bits: what comes before can change a word."""
    assert WordEncoder(train_tokenizer(CORPUS, 360, "unigram", tmp_path / "u")).cuts is None
    assert WordEncoder(train_tokenizer(CORPUS, 360, "char", tmp_path / "c")).cuts is None


def test_whole_texts_make_the_same_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(CORPUS, 500, "bpe", tmp_path / "tokenizer")
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS * 40))
    found = []
    for name, options in (("words", ()), ("wholes", ("--whole-texts",))):
        arguments = command(tmp_path, tmp_path / name, "--workers", "2", *options, inputs=[corpus])
        outcome = run_here(preprocess_data.main, arguments, capsys)
        assert outcome.code == 0, outcome.error
        found.append(digests(tmp_path / name))
    assert found[0] == found[1]
