"""Tokenizers: a folder with the model, of SentencePiece or Hugging Face, and a small JSON of special ids."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from pipeline.base.errors import UserError
from pipeline.base.files import creating_folder
from pipeline.corpus.records import LONGEST_RECORD
from pipeline.data.arrays import Array

MODEL_TYPES = ("unigram", "bpe", "char", "word")
HUGGING_FACE = "huggingface"
MODEL_FILE, HUGGING_FACE_FILE, FACTS_FILE = "tokenizer.model", "model.json", "tokenizer.json"
FORMAT = 1
MASK = "<mask>"
# Usual names of special tokens in Hugging Face files, the most specific first.
USUAL_NAMES = {
    "mask": (MASK, "<|mask|>", "[MASK]", "<|mdm_mask|>"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>"),
    "eos": (
        "</s>",
        "<eos>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|im_end|>",
        "[EOS]",
        "[SEP]",
    ),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
}


@dataclass
class TokenizerFacts:
    """What tokenizer.json holds: the special ids, and the identity of the model file.

    unk_id is -1 where every text can be encoded.
    """

    format: int
    model_type: str
    vocab_size: int
    unk_id: int
    pad_id: int
    eos_id: int
    mask_id: int
    sha256: str

    @property
    def model_file(self) -> str:
        """Name of the model file in the folder."""
        return HUGGING_FACE_FILE if self.model_type == HUGGING_FACE else MODEL_FILE


class Model(Protocol):
    """What the two libraries have in common; special tokens never come from text."""

    def encode(self, text: str) -> Array:
        """Return the ids [n] int32 of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[Array]:
        """Return the ids [n] int32 of each text, by one thread."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""

    def token(self, token_id: int) -> str:
        """Return the name of an id."""


class SentencePieceModel:
    """A SentencePiece model."""

    def __init__(self, content: bytes) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)

    def encode(self, text: str) -> Array:
        """See `Model`."""
        ids: Array = self.processor.encode(text, out_type="numpy")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Array]:
        """See `Model`; no Python list of numbers in between."""
        ids: list[Array] = self.processor.encode(list(texts), out_type="numpy", num_threads=1)
        return ids

    def decode(self, ids: list[int]) -> str:
        """See `Model`."""
        text: str = self.processor.decode(ids)
        return text

    def token(self, token_id: int) -> str:
        """See `Model`."""
        name: str = self.processor.id_to_piece(token_id)
        return name


class HuggingFaceModel:
    """A tokenizer.json of Hugging Face's `tokenizers`."""

    def __init__(self, content: bytes) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        self.tokenizer.encode_special_tokens = True  # "<mask>" in a text is text
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        if getattr(self.tokenizer.model, "dropout", None):
            self.tokenizer.model.dropout = None  # the same text has the same tokens

    def encode(self, text: str) -> Array:
        """See `Model`."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Array]:
        """See `Model`; one thread because the workers set TOKENIZERS_PARALLELISM."""
        found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in found]

    def decode(self, ids: list[int]) -> str:
        """See `Model`."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def token(self, token_id: int) -> str:
        """See `Model`."""
        return str(self.tokenizer.id_to_token(token_id))


def _model(content: bytes, model_type: str) -> Model:
    return HuggingFaceModel(content) if model_type == HUGGING_FACE else SentencePieceModel(content)


class Tokenizer:
    """Text to token ids and back; also what megatron-core's datasets ask of a tokenizer.

    Attributes:
        model_type: one of MODEL_TYPES, or HUGGING_FACE.
        vocab_size: tokens, special ones included.
        unk, pad, eos, mask: special ids; no text ever encodes to pad, eos or mask.
        sha256: identity of the model, hexadecimal.
    """

    def __init__(self, model: Model, facts: TokenizerFacts) -> None:
        """Wrap a loaded model; see `load`."""
        self.model, self.model_type = model, facts.model_type
        self.vocab_size = facts.vocab_size
        self.unk, self.pad, self.eos, self.mask = facts.unk_id, facts.pad_id, facts.eos_id, facts.mask_id
        self.eod = self.eos  # megatron-core's name
        self.sha256 = facts.sha256
        self.unique_identifiers = OrderedDict(class_name=type(self).__name__, sha256=facts.sha256)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Return the tokenizer of a folder; raise a `UserError` when it is missing or damaged."""
        facts_path = folder / FACTS_FILE
        _require(folder, facts_path)
        try:
            facts = TokenizerFacts(**json.loads(facts_path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{facts_path} is damaged ({str(error).split(':')[0]}): train the tokenizer again, or "
                "import a Hugging Face file with tools/train_tokenizer.py --import-json."
            ) from None
        model = folder / facts.model_file
        _require(folder, model)
        content = model.read_bytes()
        if hashlib.sha256(content).hexdigest() != facts.sha256:
            raise UserError(
                f"{model} is not the file that {facts_path} describes: train the tokenizer again."
            )
        return cls(_model(content, facts.model_type), facts)

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of the special tokens by name."""
        return {"mask": self.mask, "pad": self.pad, "eos": self.eos, "unk": self.unk}

    def encode(self, text: str) -> Array:
        """Return the token ids [n] int32 of a text."""
        return self.model.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Array]:
        """Return the token ids [n] int32 of each text."""
        return self.model.encode_batch(texts)

    def decode(self, ids: Iterable[int], mask_text: str = "") -> str:
        """Return the text of token ids; pad and eos are left out, mask tokens shown as `mask_text`."""
        text: list[str] = []
        run: list[int] = []
        for token in (int(i) for i in ids):
            if token == self.mask:
                text.append(self.model.decode(run) + mask_text)
                run = []
            elif token not in (self.pad, self.eos):
                run.append(token)
        return "".join([*text, self.model.decode(run)])


def _require(folder: Path, path: Path) -> None:
    if folder.is_file():
        raise UserError(
            f"tokenizer {folder} is a file: name the folder that tools/train_tokenizer.py makes, of a "
            "tokenizer.json of Hugging Face with --import-json."
        )
    if not path.is_file():
        raise UserError(f"tokenizer {folder}: {path} is missing; make one with tools/train_tokenizer.py.")


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Make the folder of a tokenizer, whole or not at all; that it cannot be made shows before the work."""
    if output.exists():
        raise UserError(f"--output {output} exists: remove it, or name another folder.")
    with creating_folder(output) as folder:
        yield folder


def _write(folder: Path, content: bytes, facts: TokenizerFacts) -> Tokenizer:
    (folder / facts.model_file).write_bytes(content)
    (folder / FACTS_FILE).write_text(json.dumps(dataclasses.asdict(facts), indent=2) + "\n", encoding="utf-8")
    return Tokenizer(_model(content, facts.model_type), facts)


def import_tokenizer(path: Path, names: dict[str, str | None], output: Path) -> tuple[Tokenizer, list[str]]:
    """Write the folder of a Hugging Face tokenizer.json.

    A mask or padding token that the file does not have is added behind its last id: models that were not made
    for masking have none.

    Args:
        path: the tokenizer.json.
        names: the special tokens by use (mask, pad, eos); None for one of the usual names.
        output: the folder; it must not exist.

    Returns:
        The tokenizer, and the tokens that were added.

    Raises:
        UserError: for a file that `tokenizers` cannot read, or tokens that it does not have.
    """
    with _new_folder(output) as folder:
        content, facts, added = _imported(path, names)
        return _write(folder, content, facts), added


def _imported(path: Path, names: dict[str, str | None]) -> tuple[bytes, TokenizerFacts, list[str]]:
    """Return the file with its special tokens, the facts, and the tokens that were added."""
    try:
        found = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # its errors are plain Exceptions
        if isinstance(error, OSError):
            raise
        raise UserError(f"--import-json {path} is no tokenizer.json ({error}): bring it again.") from None
    ids: dict[str, int] = {}
    added: list[str] = []
    for use, usual in USUAL_NAMES.items():
        given = names.get(use)
        known = [t for t in ([given] if given else usual) if found.token_to_id(t) is not None]
        if not known and use in ("mask", "pad"):
            known = [given or usual[0]]
            added.append(known[0])
        if not known and use == "eos":
            raise UserError(
                f"--import-json {path} has no token {given or ' or '.join(usual)}: name its end-of-sequence "
                "token with --eos-token."
            )
        if known and use != "unk":
            found.add_special_tokens([known[0]])  # one that was an ordinary token must never come from text
        ids[use] = int(found.get_vocab()[known[0]]) if known else -1
    if len({ids["mask"], ids["pad"], ids["eos"]}) < 3:
        raise UserError(f"--import-json {path}: mask, pad and eos must be three tokens, not {ids}.")
    content = found.to_str().encode()
    facts = TokenizerFacts(
        format=FORMAT,
        model_type=HUGGING_FACE,
        vocab_size=max(found.get_vocab().values()) + 1,
        unk_id=ids["unk"],
        pad_id=ids["pad"],
        eos_id=ids["eos"],
        mask_id=ids["mask"],
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return content, facts, added


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_type: str, output: Path) -> Tokenizer:
    """Train a SentencePiece model and write its folder, whole or not at all.

    Nothing of the text is changed on the way: no normalisation, no dummy prefix, whitespace as it is. unigram
    and bpe fall back to bytes, so that decoding gives back any text; char and word map what they have not
    seen to the unknown token. The same texts give the same bytes.

    Args:
        texts: the corpus.
        vocab_size: tokens, special ones included; char and word may have fewer.
        model_type: one of MODEL_TYPES.
        output: the folder; it must not exist.

    Raises:
        UserError: when the corpus is empty or does not fit the vocabulary size.
    """
    with _new_folder(output) as folder:
        content = _trained(texts, vocab_size, model_type)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        facts = TokenizerFacts(
            format=FORMAT,
            model_type=model_type,
            vocab_size=processor.vocab_size(),
            unk_id=processor.unk_id(),
            pad_id=processor.pad_id(),
            eos_id=processor.eos_id(),
            mask_id=processor.piece_to_id(MASK),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        return _write(folder, content, facts)


def _trained(texts: Iterable[str], vocab_size: int, model_type: str) -> bytes:
    """Return a trained model; see `train_tokenizer`."""
    falls_back = model_type in ("unigram", "bpe")
    model = io.BytesIO()
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise UserError("there is no text in the corpus: look for another --input.")
    raised: list[BaseException] = []

    def lines() -> Iterator[str]:
        try:
            for text in chain([first], texts):
                yield from filter(None, text.split("\n"))
        except BaseException as error:  # SentencePiece would make a RuntimeError of it
            raised.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=falls_back,
            character_coverage=0.9995 if falls_back else 1.0,
            byte_fallback=falls_back,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            pad_id=1,
            eos_id=2,
            bos_id=-1,
            control_symbols=[MASK],
            max_sentence_length=LONGEST_RECORD,  # a longer line is passed over in silence: 4,192 by default
            # The trainer sees single lines, so a line end would otherwise be unknown to it.
            user_defined_symbols=["\n"],
            num_threads=1,  # the order of its floating-point sums, and so the model, depends on the threads
            minloglevel=2,
        )
    except RuntimeError as error:
        if raised:
            raise raised[0] from None
        reason = str(error).rsplit("] ", 1)[-1].split(" Increase ")[0].strip(" .") or "no reason given"
        raise UserError(
            f"--vocab-size {vocab_size} cannot be had for --model-type {model_type} from this text: {reason}."
        ) from None
    return model.getvalue()
