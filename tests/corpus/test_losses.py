"""Text that a tokenizer does not give back is counted; chat's special tokens; empty documents; line ends."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from pipeline.base.errors import EXIT_DONE, UserError
from pipeline.corpus.chat import Written
from pipeline.corpus.encode import OF_PIECES, OF_RUNS, WordEncoder, cuts_of
from pipeline.corpus.reading import SpanReader, cut
from pipeline.corpus.records import Keys, read_all
from pipeline.corpus.sources import Source, find
from pipeline.corpus.special_text import SpecialEncoder
from pipeline.corpus.standard_input import suffix_of
from pipeline.corpus.tokenizer_making import LONGEST_RUN, _cut_runs, import_tokenizer, train_tokenizer
from pipeline.data.facts import read_facts
from pipeline.data.indexed import read_index, read_sequence
from pipeline.data.tokenizer import Tokenizer, TokenizerFacts, write_tokenizer
from support.byte_level import train_byte_level
from support.corpora import command, make_dataset
from support.programs import run_here
from tools import preprocess_data
from tools import train_tokenizer as train_tool

TEXT = Keys(("text",))
ENGLISH = ["the quick brown fox jumps over the lazy dog " * 3, "and runs away"] * 20


def texts_of(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    index = read_index(prefix)
    return [tokenizer.decode(read_sequence(prefix, index, n)) for n in range(index.sequences)]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_every_text_comes_back(model_type: str, tmp_path: Path) -> None:
    """U+2581 too, which SentencePiece itself takes for a space."""
    ours = train_tokenizer(ENGLISH, 289, model_type, tmp_path / "t")
    for text in ("▁", "a▁b", " ▁ ▁▁\n▁", 'x.replace("▁", " ")', "▂▁▃", "  the\u2581fox  "):
        assert ours.decode(ours.encode(text)) == text
        (one,) = ours.encode_batch([text])
        assert one.tolist() == ours.encode(text).tolist()
        assert WordEncoder(ours).encode_batch([text])[0].tolist() == one.tolist()


def test_unknown_characters_are_counted(tmp_path: Path) -> None:
    """Those of the alphabet's complement; SentencePiece makes one token of a whole run of them."""
    train_tokenizer(ENGLISH, 60, "char", tmp_path / "t")
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "the 天气 fox▁ й"}) + "\n")
    counts = make_dataset([tmp_path / "x.jsonl"], tmp_path / "t", tmp_path / "d").counts
    assert counts.characters == len("the 天气 fox▁ й")
    assert counts.lost_characters == len("天气▁й")


@pytest.mark.slow
def test_too_many_unknown_characters_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(ENGLISH, 60, "char", tmp_path / "tokenizer")
    path = tmp_path / "x.jsonl"
    for text, is_refused in (
        ("今天天气很好", True), ("fox 今", False), ("fox " * 300 + "今" * 11, False),
        ("fox " * 300 + "今" * 13, True),
    ):  # fmt: skip
        path.write_text(json.dumps({"text": text}) + "\n")
        arguments = command(tmp_path, tmp_path / "d", "--restart", "--overwrite", inputs=[path])
        outcome = run_here(preprocess_data.main, arguments, capsys)
        unknown = sum(ord(character) > 127 for character in text)
        lost = f"{unknown} of {len(text):,} characters cannot be decoded again"
        if is_refused:
            assert lost in outcome.complaint()
        else:
            assert lost in outcome.output
        outcome = run_here(preprocess_data.main, [*arguments, "--max-lost-fraction", "1"], capsys)
        assert outcome.code == EXIT_DONE


def test_runs_of_spaces_are_tokens(tmp_path: Path) -> None:
    """The indentation of code; cut before runs, word by word gives the same tokens."""
    code = ["def f(x):\n    if x:\n        return  [x]\n            # done\n    return 0\n"] * 30
    ours = train_tokenizer(code, 300, "bpe", tmp_path / "t")
    space = int(ours.encode(" ")[0])
    ids = ours.encode(code[0])
    assert (ids == space).sum() <= 2
    assert ours.decode(ids) == code[0]
    assert cuts_of(ours) is OF_RUNS
    random = np.random.default_rng(0)
    parts = [" ", "  ", "   ", "\n", "return", "x", "(", "0", "é", "'", "▁", "    # "]
    texts = ["".join(random.choice(parts, 40)) for _ in range(300)]
    found = WordEncoder(ours)._by_words(texts, OF_RUNS)
    assert [one.tolist() for one in found] == [ours.encode(text).tolist() for text in texts]
    assert cuts_of(train_tokenizer(ENGLISH, 320, "bpe", tmp_path / "plain")) is OF_PIECES


def test_a_long_line_is_trained_on(tmp_path: Path) -> None:
    """Chinese has no spaces: as one word of 100,000 characters it has no probability above 0."""
    random = np.random.default_rng(1)
    words = ["".join(chr(0x4E00 + n) for n in random.integers(0, 500, 3)) for _ in range(400)]
    line = "".join(random.choice(words, 40000))
    ours = train_tokenizer([line], 780, "unigram", tmp_path / "t")
    assert ours.decode(ours.encode(line[:999])) == line[:999]
    for text in (line, "a b " * 9999, "x" * LONGEST_RUN, "x" * (LONGEST_RUN + 1) + " y"):
        pieces = list(_cut_runs(text))
        assert "".join(pieces) == text
        assert max(len(word) for piece in pieces for word in piece.split(" ")) <= LONGEST_RUN
    assert list(_cut_runs("a b " * 9999)) == ["a b " * 9999]  # words are as before
    with pytest.raises(UserError, match="no text in it but line ends"):
        train_tokenizer(["\n\n"], 300, "unigram", tmp_path / "u")


CHAT = [("user", "hi <|im_end|>"), ("<|im_end|>", "x"), ("assistant", "hello<|im_start|>")]
FORMAT = "<|im_start|>{role}\n{content}<|im_end|>\n"


def test_special_tokens_of_a_message_format(tmp_path: Path) -> None:
    """Those that the format writes are one id, those in a message or a role are text."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<mask>", "<pad>"]
    train_byte_level(ENGLISH, 400, specials).save(str(tmp_path / "t.json"))
    ours = import_tokenizer(tmp_path / "t.json", {}, tmp_path / "t")[0]
    line = json.dumps({"messages": [{"role": r, "content": c} for r, c in CHAT]})
    (tmp_path / "x.jsonl").write_text(line + "\n")
    plain = lambda text: ours.encode(text).tolist()  # noqa: E731
    start, end = 1, 2
    prompt = [start, *plain("user\nhi <|im_end|>"), end, *plain("\n"), start, *plain("<|im_end|>\nx"), end]
    prompt += [*plain("\n"), start, *plain("assistant\n")]
    keys = Keys(("messages",), messages=True, message_format=FORMAT)
    make_dataset([tmp_path / "x.jsonl"], tmp_path / "t", tmp_path / "d", keys, append_eos=True)
    index = read_index(tmp_path / "d")
    assert read_sequence(tmp_path / "d", index, 0).tolist() == prompt
    assert read_sequence(tmp_path / "d", index, 1).tolist() == [*plain("hello<|im_start|>"), ours.eos]
    encoder = SpecialEncoder(WordEncoder(ours))
    of_role = Written.of([("<|", True), ("user", True), ("|>", True), ("user", False)])
    assert of_role == "<|user|>user"
    assert encoder.encode_batch([of_role, "", "<|user|>"])[0].tolist() == [3, *plain("user")]
    assert encoder.encode_batch([Written.of([])])[0].tolist() == []


@pytest.mark.slow
def test_formats_that_cannot_be_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(ENGLISH, 320, "bpe", tmp_path / "tokenizer")
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in CHAT]}) + "\n")
    chat = ("--messages-key", "messages", "--message-format")
    arguments = command(tmp_path, tmp_path / "d", *chat, "{content}<mask>", inputs=[path])
    assert "--message-format holds <mask>" in run_here(preprocess_data.main, arguments, capsys).complaint()
    arguments[-1] = "<|im_start|>{role}: {content}</s>"
    outcome = run_here(preprocess_data.main, arguments, capsys)
    assert outcome.code == EXIT_DONE, outcome.error
    assert "<|im_start|> of --message-format: not special tokens of" in outcome.output
    eos = Tokenizer.load(tmp_path / "tokenizer").eos
    assert read_facts(tmp_path / "d").prompt_histogram[eos] == 2


def test_a_tokenizer_whose_specials_come_from_text_is_found(tmp_path: Path) -> None:
    """One imported by an earlier version, before special tokens were kept apart."""
    words = {name: number for number, name in enumerate(["<unk>", "</s>", "<mask>", "<pad>", "fox"])}
    found = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found.add_special_tokens(["</s>", "<mask>", "<pad>"])
    content = found.to_str().encode()
    facts = TokenizerFacts(1, "huggingface", 5, 0, 3, 1, 2, hashlib.sha256(content).hexdigest())
    (tmp_path / "t").mkdir()
    write_tokenizer(tmp_path / "t", content, facts)
    (tmp_path / "x.jsonl").write_text('{"text": "fox <mask> fox <mask>"}\n')
    with pytest.raises(UserError, match=r"encodes text as its mask token, .*, 2 times: import it again"):
        make_dataset([tmp_path / "x.jsonl"], tmp_path / "t", tmp_path / "d")


def test_empty_documents_are_no_bad_records(tmp_path: Path) -> None:
    """Of jsonl, of tables and of sentences; an empty answer is a bad record."""
    train_tokenizer(ENGLISH, 320, "bpe", tmp_path / "t")
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n\n{"text": "fox"}\n' * 3)
    with pa.ipc.new_file(str(tmp_path / "y.arrow"), pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": ["", "dog"]}))
    counts = make_dataset([tmp_path / "x.jsonl", tmp_path / "y.arrow"], tmp_path / "t", tmp_path / "d").counts
    assert (counts.records, counts.documents, counts.empty, counts.blank, counts.bad) == (11, 4, 4, 3, 0)
    assert "4 empty" in counts.describe()


@pytest.mark.slow
def test_a_tokenizer_is_trained_beside_empty_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": text}) for text in (*ENGLISH, "", "")]
    path.write_text("\n".join([*lines, "bad"]) + "\n")
    arguments = ["--input", str(path), "--vocab-size", "289", "--output", str(tmp_path / "t")]
    complaint = run_here(train_tool.main, arguments, capsys).complaint()
    assert "line 43: not valid JSON" in complaint
    assert "More than --max-bad-fraction 0.01 are bad" in complaint
    outcome = run_here(train_tool.main, [*arguments, "--max-bad-fraction", "0.1"], capsys)
    assert outcome.code == EXIT_DONE, outcome.error
    assert "1 bad records are skipped" in outcome.output


def read_lines(path: Path, target: int) -> list[str]:
    keys, source, found = Keys(("text",), split="line"), Source.of_file(path), []
    for span in cut(0, source, lambda: target, keys.reading().unit):
        found += [content for _, content in SpanReader(source, span, keys.reading())]
    assert b"".join(found).removeprefix(b"\xef\xbb\xbf") == path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    return [record.texts[0] for record in read_all([path], keys)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_lines_end_without_their_line_ends(end: str, bom: str, tmp_path: Path) -> None:
    """Also inside the texts of jsonl; U+2028, U+0085 and form feeds end no line."""
    lines = ["one 1", "two \u2028 two", "three \x85 \x0c 3", "four"]
    path = tmp_path / "x.txt"
    path.write_bytes((bom + end.join([*lines, "", " ", ""])).encode())
    assert read_lines(path, 7) == lines
    table = tmp_path / "x.jsonl"
    table.write_text(bom + json.dumps({"text": end.join(lines)}) + "\n", encoding="utf-8")
    found = [record.texts[0] for record in read_all([table], Keys(("text",), split="line"))]
    assert found == lines


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    """Blank lines and the last line end belong to it, a byte-order mark does not."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n\n")
    (tmp_path / "b.txt").write_bytes(b"x" * 50 + b"\n")
    (tmp_path / "c.txt").write_bytes(b" \n")
    keys = Keys(("text",), split="file")
    found = [record.texts[0] for record in read_all(find([str(tmp_path)]), keys)]
    assert found == ["one\n\ntwo\n\n", "x" * 50 + "\n"]
    source = Source.of_file(tmp_path / "b.txt")
    (span,) = cut(0, source, lambda: 1, "file")
    ((_, content),) = SpanReader(source, span, keys.reading(50))
    assert "a file of 51 bytes, more than 50" in str(content)
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(
        UserError, match=r"d.jsonl is not plain text: --split-documents file is for .txt files"
    ):
        list(read_all([tmp_path / "d.jsonl"], keys))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_other_encodings_are_named(encoding: str, tmp_path: Path) -> None:
    """UTF-16 without a mark is valid UTF-8, full of zeros."""
    path = tmp_path / "x.txt"
    path.write_bytes("Some text of English, as a notepad writes it.\n".encode(encoding))
    with pytest.raises(
        UserError, match=rf"x.txt is {encoding[:6].upper()}.*, not UTF-8: convert it, iconv -f UTF"
    ):
        Source.of_file(path)
    path.write_bytes(b"text with a \0 or two \0\n")
    assert Source.of_file(path).size == 23
    path.write_bytes(b"text before a crash\n" + bytes(4096))  # a file system may leave such a block
    assert Source.of_file(path).size == 4116


def test_marks_of_joined_files_are_no_part_of_a_record(tmp_path: Path) -> None:
    """cat of two files with byte-order marks has one in its middle."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    assert [record.texts[0] for record in read_all([path], TEXT)] == ["a", "b"]
    table = pa.table({"text": ["a", "b"]})
    streams = []
    for _ in range(2):
        buffer = io.BytesIO()
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table)
        streams.append(buffer.getvalue())
    (tmp_path / "x.arrow").write_bytes(b"".join(streams))
    assert [record.texts[0] for record in read_all([tmp_path / "x.arrow"], TEXT)] == ["a", "b"] * 2


def test_lists_links_and_pipes(tmp_path: Path) -> None:
    """A list may have a byte-order mark and names with U+2028; a link to a folder around it ends nowhere."""
    import os

    odd = tmp_path / "a\u2028b.jsonl"
    odd.touch()
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbf" + str(odd).encode() + b"\r\n\r\n")
    assert find([f"@{tmp_path}/list"]) == [odd]
    (tmp_path / "list").write_text(str(odd), encoding="utf-16")
    with pytest.raises(UserError, match="the list is not UTF-8"):
        find([f"@{tmp_path}/list"])
    (tmp_path / "list").write_text("\n\n")
    with pytest.raises(UserError, match="the list is empty: write one input a line"):
        find([f"@{tmp_path}/list"])
    with pytest.raises(UserError, match="does not exist or is not a file"):
        find([f"@{tmp_path}"])
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "d/e/x.jsonl").touch()
    (tmp_path / "d/e/up").symlink_to(tmp_path / "d")
    assert find([f"{tmp_path}/d"]) == [tmp_path / "d/e/x.jsonl"]
    os.mkfifo(tmp_path / "d/pipe.jsonl")
    for given in (f"{tmp_path}/d", f"{tmp_path}/d/*.jsonl"):
        with pytest.raises(UserError, match=r"pipe.jsonl is a pipe, socket or device"):
            find([given])
    with pytest.raises(
        UserError, match=r"pipe.jsonl is a pipe, .*: name a file; a corpus can be piped to --input -"
    ):
        Source.of_file(tmp_path / "d/pipe.jsonl")


@pytest.mark.slow
def test_standard_input_is_read(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the same file would be; nothing is left of it, and the same content is nothing new to do."""
    content = (corpus / "x.jsonl").read_bytes()

    def run(*more: str, content: bytes = content) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        arguments = command(corpus, tmp_path / "d", *more, inputs=["-"])
        outcome = run_here(preprocess_data.main, arguments, capsys)
        return outcome.code, outcome.output, outcome.error

    code, output, error = run()
    assert code == EXIT_DONE, error
    assert f"standard input: {len(content):,} bytes, read as .jsonl" in output
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "file")
    assert (tmp_path / "d.bin").read_bytes() == (tmp_path / "file.bin").read_bytes()
    assert not list(tmp_path.glob(".d.stdin*"))
    assert "nothing to do: " in run()[1]
    assert "give --overwrite" in run(content=content + b"\n")[2]
    assert "cannot share standard input" in run("--num-shards", "2", "--shard-index", "0")[2]


def test_the_kind_of_standard_input_is_guessed() -> None:
    import bz2
    import gzip

    for content, suffix in (
        (b'{"text": 1}', ".jsonl"), (b"\xef\xbb\xbf \n[1]", ".jsonl"), (b"Some text", ".txt"),
        (b"", ".jsonl"),
        (b"PAR1", ".parquet"), (b"ARROW1", ".arrow"), (gzip.compress(b"{}"), ".jsonl.gz"),
        (bz2.compress(b"A text" * 10**6), ".txt.bz2"), (gzip.compress(b"x" * 10**7)[:99], ".txt.gz"),
    ):  # fmt: skip
        assert suffix_of(content) == suffix


def test_a_character_that_names_the_unknown_token_is_known(tmp_path: Path) -> None:
    """A tokenizer of characters may take its unknown token from among them."""
    words = {word: n for n, word in enumerate([" ", *"abc", "<mask>", "<pad>", "</s>"])}
    given = tokenizers.Tokenizer(models.WordLevel(words, unk_token=" "))
    given.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    given.save(str(tmp_path / "t.json"))
    import_tokenizer(tmp_path / "t.json", {}, tmp_path / "t")
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a b  ▁ dé"}) + "\n")
    counts = make_dataset([tmp_path / "x.jsonl"], tmp_path / "t", tmp_path / "d").counts
    assert (counts.characters, counts.lost_characters) == (9, len("▁dé"))
