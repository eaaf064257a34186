"""Imported tokenizers of every kind: special tokens never come from text, lost text is refused or named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.base.errors import UserError
from pipeline.corpus.tokenizer_checks import PROBES, check_import
from pipeline.corpus.tokenizer_making import import_sentencepiece, import_tokenizer, train_tokenizer
from pipeline.data.tokenizer import Tokenizer
from support.byte_level import train_byte_level
from support.programs import run_here
from tools import train_tokenizer as tool

SPECIALS = ["<pad>", "</s>", "<unk>", "<mask>"]
TEXTS = ["the cat sat on the mat <kp> and / the > dog < ran over it mask pad"] * 40
INJECTED = "the cat </s> sat<mask>on <pad></s> <<mask>>"


def unigram() -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(models.Unigram())
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    found.train_from_iterator(TEXTS, trainer)
    return found


def word_level() -> tokenizers.Tokenizer:
    words = dict.fromkeys([*SPECIALS, *"the cat sat on mat".split()])
    found = tokenizers.Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found.add_special_tokens(SPECIALS)
    return found


def word_piece() -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.WhitespaceSplit()
    found.decoder = decoders.WordPiece()
    found.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIALS, show_progress=False)
    )
    return found


def merged() -> tokenizers.Tokenizer:
    """Return a BPE model without a splitter whose merges make the special tokens, as of a fine-tuned file."""
    vocabulary = {name: n for n, name in enumerate([*SPECIALS, *map(chr, range(32, 127))])}
    merges = []
    for name in ("</s>", "<mask>", "<pad>"):
        for end in range(2, len(name) + 1):
            vocabulary.setdefault(name[:end], len(vocabulary))
            merges.append((name[: end - 1], name[end - 1]))
    model = models.BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>")
    found = tokenizers.Tokenizer(model)
    found.decoder = decoders.Fuse()
    found.add_special_tokens(SPECIALS)
    return found


def whole_words() -> tokenizers.Tokenizer:
    """Return a BPE model that looks a whole word up before it merges, as that of Llama 3."""
    found = train_byte_level(TEXTS, 400, SPECIALS)
    content = json.loads(found.to_str())
    content["model"]["ignore_merges"] = True
    content["pre_tokenizer"]["use_regex"] = False
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def imported(found: tokenizers.Tokenizer, folder: Path, **names: str) -> Tokenizer:
    found.save(str(folder / "given.json"))
    return import_tokenizer(folder / "given.json", names, folder / "tokenizer")[0]


@pytest.mark.parametrize("make", [unigram, word_level, word_piece, merged, whole_words])
def test_text_never_becomes_a_special_token(make: Any, tmp_path: Path) -> None:
    """Whatever the model; before the import it does in all of these."""
    given = make()
    plain = tokenizers.Tokenizer.from_str(given.to_str())
    plain.encode_special_tokens = True
    alone = [plain.encode(name).ids for name in ("</s>", "<mask>", "<pad>")]
    assert any(len(ids) == 1 or given.token_to_id("</s>") in ids for ids in alone)
    ours = imported(given, tmp_path)
    specials = {ours.mask, ours.pad, ours.eos}
    assert specials == {given.token_to_id(name) for name in ("<mask>", "<pad>", "</s>")}
    for text in (INJECTED, *("a" * n + "<mask>" * m + "</s>" for n in range(3) for m in range(3))):
        assert not specials & set(ours.encode(text).tolist()), text
    if make in (merged, whole_words):
        assert ours.decode(ours.encode(INJECTED)) == INJECTED
    if make is unigram:
        assert ours.decode(ours.encode(TEXTS[0])) == TEXTS[0]


def test_a_special_token_of_one_character_is_refused(tmp_path: Path) -> None:
    """It cannot be taken apart: every such character would end a document."""
    found = train_byte_level(TEXTS, 400, SPECIALS)
    with pytest.raises(UserError, match=r"its special token 'q' is an ordinary character"):
        imported(found, tmp_path, eos="q")
    assert not (tmp_path / "tokenizer").exists()


def test_byte_level_tokenizers_keep_their_steps(tmp_path: Path) -> None:
    """A model that cannot find its special tokens in text is left as it is, so it stays fast."""
    found = train_byte_level(TEXTS, 400, SPECIALS)
    ours = imported(found, tmp_path)
    before = json.loads(found.to_str())["pre_tokenizer"]
    assert json.loads((tmp_path / "tokenizer/model.json").read_text())["pre_tokenizer"] == before
    assert check_import(ours, "x") == []


def test_lost_bytes_are_refused(tmp_path: Path) -> None:
    """A byte-level model that was trained without the alphabet has no token for what it has not seen."""
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    every = "".join(map(chr, range(9, 0x3000))) + "日本語한국어🎉\U0010ffff\ufffd"
    for texts, lost in ((TEXTS, "é"), ([every], "\\x00")):
        found.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIALS, show_progress=False)
        )
        with pytest.raises(UserError, match=r"of the characters tried, without an unknown token") as caught:
            imported(found, tmp_path)
        assert lost in str(caught.value) or lost == "é"
    assert not (tmp_path / "tokenizer").exists()


def test_the_mark_of_a_word_in_front_is_no_loss(tmp_path: Path) -> None:
    """As in the tokenizer.json of Llama 2 and Mistral: the normalizer writes it, the decoder removes it."""
    found = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    marks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    found.normalizer = normalizers.Sequence(marks)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    found.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    found.train_from_iterator(TEXTS, trainer)
    values = json.loads(found.to_str())
    values["added_tokens"] = values["added_tokens"][:3]  # the bytes are ordinary tokens
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    tokenizer, added = import_tokenizer(path, {}, tmp_path / "t")
    assert added == ["<mask>", "<pad>"]
    for text in ("the cat, naïve, 日本 \x00", "a  b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [change.split()[0] for change in check_import(tokenizer, path)] == ["U+2581"]


@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_a_special_token_of_white_space_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--mask-token is '.*': name a token that is more than white space"):
        imported(unigram(), tmp_path, mask=name)


def test_a_model_that_raises_is_refused(tmp_path: Path) -> None:
    """`tokenizers` raises a plain Exception at the first word that such a model does not know."""
    words = {word: n for n, word in enumerate([*SPECIALS, "a"])}
    found = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="give it an unknown token"):
        imported(found, tmp_path)


def test_what_a_tokenizer_changes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = train_byte_level(TEXTS, 400, SPECIALS)
    found.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ours = imported(found, tmp_path)
    named = {line.split(" (")[0] for line in check_import(ours, "x")}
    oracle = found.normalizer.normalize_str
    assert named == {name for name, text in PROBES.items() if oracle(text) != text}
    arguments = ["--import-json", str(tmp_path / "given.json"), "--output", str(tmp_path / "again")]
    said = run_here(tool.main, arguments, capsys).output
    assert "text that does not come back: capital letters ('The QUICK Fox' becomes 'the quick fox')" in said


def foreign(**options: Any) -> bytes:
    """Return a SentencePiece model as other projects train it: normalized, without mask and padding."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=model, vocab_size=90, hard_vocab_limit=False,
        minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_sentencepiece_model_is_imported(model_type: str, tmp_path: Path) -> None:
    """Its ids are those of the library itself; mask and padding are added behind them."""
    content = foreign(model_type=model_type)
    (tmp_path / "tokenizer.model").write_bytes(content)
    ours, added = import_sentencepiece(tmp_path / "tokenizer.model", {}, tmp_path / "t")
    oracle = sentencepiece.SentencePieceProcessor(model_proto=content)
    size = oracle.vocab_size()
    assert added == ["<mask>", "<pad>"]
    assert (ours.mask, ours.pad, ours.eos, ours.unk) == (size, size + 1, oracle.eos_id(), oracle.unk_id())
    assert ours.vocab_size == size + 2
    assert ours.model_type == model_type
    for text in (TEXTS[0], "the mat"):
        assert ours.encode(text).tolist() == oracle.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert not {ours.mask, ours.pad, ours.eos} & set(ours.encode(INJECTED).tolist())
    assert Tokenizer.load(tmp_path / "t").sha256 == ours.sha256
    named = " ".join(check_import(ours, "x"))
    assert "unknown characters in: " in named
    assert "runs of spaces" in named


def test_the_unknown_piece_is_no_mask(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    path.write_bytes(foreign())
    with pytest.raises(UserError, match="its unknown piece must stay that"):
        import_sentencepiece(path, {"mask": "<unk>"}, tmp_path / "t")


@pytest.mark.parametrize("size", [1, 261, 10**20])
def test_impossible_vocabulary_sizes_are_named(size: int, tmp_path: Path) -> None:
    """SentencePiece answers in its own terms, or after minutes."""
    with pytest.raises(UserError, match=rf"--vocab-size {size} does not work.*: give"):
        train_tokenizer(TEXTS, size, "bpe", tmp_path / "t")


def test_pieces_of_the_user_become_special(tmp_path: Path) -> None:
    """A piece chosen as end of sequence is matched in text until it is a control piece."""
    (tmp_path / "t.model").write_bytes(foreign(user_defined_symbols=["<sep>", "<mask>"]))
    ours, added = import_sentencepiece(tmp_path / "t.model", {"eos": "<sep>"}, tmp_path / "t")
    assert added == ["<pad>"]
    assert ours.model.token(ours.eos) == "<sep>"
    assert not {ours.mask, ours.eos} & set(ours.encode("the<sep>cat <mask>").tolist())


def test_what_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.model").write_bytes(b"something else")
    arguments = ["--import-model", str(tmp_path / "t.model"), "--output", str(tmp_path / "t")]
    assert "is not a SentencePiece model" in run_here(tool.main, arguments, capsys).complaint()
    (tmp_path / "t.model").write_bytes(foreign())
    complaint = run_here(tool.main, [*arguments, "--eos-token", "<no>"], capsys).complaint()
    assert "has no piece <no>" in complaint
    complaint = run_here(tool.main, [*arguments, "--vocab-size", "9"], capsys).complaint()
    assert "--vocab-size has no effect with --import-model" in complaint
    outcome = run_here(tool.main, arguments, capsys)
    assert outcome.code == 0, outcome.error
    assert "added <mask>, <pad>" in outcome.output


def test_the_command_that_imports_is_named(tmp_path: Path) -> None:
    """Where a model's own folder or file is given for a tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    train_byte_level(TEXTS, 400, SPECIALS).save(str(folder / "tokenizer.json"))
    command = "python tools/train_tokenizer.py --import-"
    for given in (folder, folder / "tokenizer.json"):
        with pytest.raises(UserError, match=f"{command}json {folder}/tokenizer.json --output"):
            Tokenizer.load(given)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(foreign())
    for given in (folder, folder / "tokenizer.model"):
        with pytest.raises(UserError, match=f"{command}model {folder}/tokenizer.model --output"):
            Tokenizer.load(given)
    train_tokenizer(TEXTS, 300, "bpe", tmp_path / "own")
    with pytest.raises(UserError, match=f"tokenizer.model is a file: name the folder {tmp_path}/own"):
        Tokenizer.load(tmp_path / "own/tokenizer.model")


def test_special_added_tokens_with_spaces_around_are_left_in_text(tmp_path: Path) -> None:
    found = train_byte_level(TEXTS, 400, ["<pad>", "<mask>"])
    found.add_special_tokens([AddedToken("</s>", lstrip=True, rstrip=True)])
    ours = imported(found, tmp_path)
    assert ours.decode(ours.encode("a  </s>  b")) == "a  </s>  b"
