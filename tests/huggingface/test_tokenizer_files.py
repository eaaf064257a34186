"""Exported tokenizers in transformers against our own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from pipeline.base.errors import UserError
from pipeline.corpus.tokenizer_making import import_tokenizer, train_tokenizer
from pipeline.data.tokenizer import Tokenizer
from pipeline.huggingface.export import CODE
from pipeline.huggingface.tokenizer_files import write_tokenizer
from support.byte_level import train_byte_level

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces,\ttab\nand lines\n\n",
    "naïve café — 12.5 %",
]
STRANGE = ["", " ", "\n", "a  b   c ", " leading", "Ünïcode 🎉\u2028", "<0x41> ▁ </s", "tab\t\ttab"]


def make(model_type: str, folder: Path) -> Tokenizer:
    """Make a small tokenizer; that of Hugging Face would put a token before and after each text."""
    if model_type != "huggingface":
        return train_tokenizer(CORPUS * 3, 300, model_type, folder)
    model = train_byte_level(CORPUS, 300, ["<s>", "</s>"])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    file = folder.with_suffix(".json")
    model.save(str(file))
    assert len(model.encode("x").ids) == 3
    return import_tokenizer(file, {}, folder)[0]


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char", "word", "huggingface"])
def test_transformers_reads_our_tokenizers(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ids and texts; special tokens are known by their use; saved again by transformers too."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ours = make(model_type, tmp_path / "t")
    folder = tmp_path / "exported"
    folder.mkdir()
    write_tokenizer(tmp_path / "t", folder, 77)
    code = CODE / "tokenization_masked_diffusion.py"
    (folder / code.name).write_text(code.read_text())
    assert Tokenizer.load(folder / "tokenizer").sha256 == ours.sha256
    random = np.random.default_rng(0)
    words = " ".join(CORPUS).split(" ")
    texts = [*CORPUS, *STRANGE, *(" ".join(random.choice(words, 6)) for _ in range(30))]
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    theirs.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    for tokenizer in (theirs, again):
        assert (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (
            ours.mask, ours.pad, ours.eos,
        )  # fmt: skip
        assert tokenizer.model_max_length == 77
        assert len(tokenizer) == ours.vocab_size
        for text in texts:
            ids = ours.encode(text).tolist()
            assert tokenizer(text)["input_ids"] == ids, text
            if ours.unk not in ids:  # transformers writes <unk>, SentencePiece a sign of its own
                assert tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        mask, eos = tokenizer.mask_token, tokenizer.eos_token
        filled = tokenizer(f" quick{mask}{mask} fox{eos}")["input_ids"]
        assert filled == [*ours.encode(" quick"), ours.mask, ours.mask, *ours.encode(" fox"), ours.eos]
        assert tokenizer.decode(filled[:-1]) == f" quick{mask}{mask} fox"
        batch = tokenizer([" fox", " quick brown fox"], padding=True)
        assert batch["attention_mask"][0] == [1] * len(ours.encode(" fox")) + [0] * (
            len(ours.encode(" quick brown fox")) - len(ours.encode(" fox"))
        )


def test_a_chat_template_that_is_a_link_is_not_exported(tmp_path: Path) -> None:
    """Nor one that is no text."""
    make("bpe", tmp_path / "t")
    (tmp_path / "secret").write_text("of this machine")
    (tmp_path / "t/chat_template.jinja").symlink_to(tmp_path / "secret")
    for number, message in enumerate(("is a link, which no run writes", "must be UTF-8")):
        folder = tmp_path / f"exported_{number}"
        folder.mkdir()
        with pytest.raises(UserError, match=f"chat_template.jinja .*{message}"):
            write_tokenizer(tmp_path / "t", folder, 77)
        (tmp_path / "t/chat_template.jinja").unlink()
        (tmp_path / "t/chat_template.jinja").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize("model_type", ["bpe", "huggingface"])
def test_nothing_else_of_the_folder_is_exported(model_type: str, tmp_path: Path) -> None:
    """A checkpoint from someone else may hold links to files of this machine."""
    make(model_type, tmp_path / "t")
    (tmp_path / "secret").write_text("of this machine")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/one").write_text("of this machine")
    (tmp_path / "t/link").symlink_to(tmp_path / "secret")
    (tmp_path / "t/links").symlink_to(tmp_path / "secrets")
    (tmp_path / "t/notes.txt").write_text("forgotten")
    folder = tmp_path / "exported"
    folder.mkdir()
    ours = write_tokenizer(tmp_path / "t", folder, 77)
    model_file = "model.json" if model_type == "huggingface" else "tokenizer.model"
    assert {path.name for path in (folder / "tokenizer").iterdir()} == {"tokenizer.json", model_file}
    assert not any("of this machine" in path.read_text("latin-1") for path in folder.rglob("*.*"))
    assert Tokenizer.load(folder / "tokenizer").sha256 == ours.sha256
