"""A tokenizer: a folder with a model of SentencePiece or Hugging Face, and a small JSON of special ids."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from pipeline.base.errors import UserError
from pipeline.base.files import write_json
from pipeline.data.arrays import Array

HUGGING_FACE = "huggingface"
MODEL_TYPES = ("unigram", "bpe", "char", "word")  # of SentencePiece
SPACE = "\u2581"  # what SentencePiece, and Metaspace of `tokenizers`, write for a space
MODEL_FILE, HUGGING_FACE_FILE, FACTS_FILE = "tokenizer.model", "model.json", "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"  # beside a tokenizer: what wrote the chats of the training
FORMAT = 1


@dataclass
class TokenizerFacts:
    """The contents of tokenizer.json.

    Attributes:
        format: version of the file.
        model_type: unigram, bpe, char or word of SentencePiece, or HUGGING_FACE.
        vocab_size: tokens, special ones included.
        unk_id: of the unknown token; -1 if every text can be encoded.
        pad_id: of padding.
        eos_id: of the end of a sequence.
        mask_id: of the mask token.
        sha256: of the model file.
    """

    format: int
    model_type: str
    vocab_size: int
    unk_id: int
    pad_id: int
    eos_id: int
    mask_id: int
    sha256: str

    def check(self) -> None:
        """Raise a ValueError for values that no tokenizer has; the file may have been written by hand."""
        special = {"pad_id": self.pad_id, "eos_id": self.eos_id, "mask_id": self.mask_id}
        numbers = special | {"format": self.format, "vocab_size": self.vocab_size, "unk_id": self.unk_id}
        for name, number in numbers.items():
            if type(number) is not int:
                raise ValueError(f"{name} is {number!r}, not a whole number")
        if self.model_type not in (*MODEL_TYPES, HUGGING_FACE):
            raise ValueError(f"model_type is {self.model_type!r}, a kind of tokenizer")
        if self.format != FORMAT:
            raise ValueError(f"format is {self.format}, this program reads {FORMAT}")
        for name, token in special.items():
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} is {token}, not one of {self.vocab_size} tokens")
        if not -1 <= self.unk_id < self.vocab_size or len(set(special.values())) < len(special):
            raise ValueError("unk_id is no token, or two of pad_id, eos_id and mask_id are the same")

    @property
    def model_file(self) -> str:
        """Name of the model file in the folder."""
        return HUGGING_FACE_FILE if self.model_type == HUGGING_FACE else MODEL_FILE


def read_facts(folder: Path) -> TokenizerFacts:
    """Return the facts of the tokenizer in a folder; raise a `UserError` if they are missing or damaged."""
    path = folder / FACTS_FILE
    _require(folder, path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and "model" in values:
            raise UserError(f"tokenizer {folder} holds a tokenizer.json of Hugging Face: {_import(path)}.")
        facts = TokenizerFacts(**values)
        facts.check()
    except (ValueError, TypeError) as error:
        raise _wrong_facts(path, str(error).split(":")[0]) from None
    return facts


def _wrong_facts(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged ({reason}): train the tokenizer again, or import a Hugging Face file with "
        "tools/train_tokenizer.py --import-json."
    )


class Model(Protocol):
    """What both libraries provide; text never encodes to special tokens."""

    def encode(self, text: str) -> Array:
        """Return the ids [n] int32 of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[Array]:
        """Return the ids [n] int32 of each text, using one thread."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""

    def size(self) -> int:
        """Return the number of tokens, special ones included."""

    def token(self, token_id: int) -> str:
        """Return the name of an id."""

    def specials(self) -> dict[str, int]:
        """Return the ids of the special tokens by their names: text never encodes to them."""

    def lost(self, text: str, unk: int) -> int:
        """Return how many characters of a text become the id `unk`, or U+2581 a space."""


class SentencePieceModel:
    """A SentencePiece model.

    SentencePiece writes a space as U+2581, so this character itself would come back as a space. It is encoded
    as its three bytes; by a model without bytes, as the unknown token.
    """

    def __init__(self, content: bytes) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        size, unk = self.processor.vocab_size(), self.processor.unk_id()
        ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        is_bytes = all(0 <= number < size and self.processor.is_byte(number) for number in ids)
        self.space = np.array(ids if is_bytes else [unk], np.int32)

    def unknown(self) -> int:
        """Return the id of the unknown token."""
        number: int = self.processor.unk_id()
        return number

    def encode(self, text: str) -> Array:
        if SPACE in text:
            return self._with_space(text)
        ids: Array = self.processor.encode(text, out_type="numpy")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Array]:
        """See `Model`; no Python list of ints in between."""
        ids: list[Array] = self.processor.encode(list(texts), out_type="numpy", num_threads=1)
        for number, text in enumerate(texts):
            if SPACE in text:
                ids[number] = self._with_space(text)
        return ids

    def _with_space(self, text: str) -> Array:
        parts = self.processor.encode(text.split(SPACE), out_type="numpy", num_threads=1)
        found = [ids for part in parts for ids in (part, self.space)]
        return np.concatenate(found[:-1], dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        text: str = self.processor.decode(ids)
        return text

    def size(self) -> int:
        """See `Model`."""
        number: int = self.processor.vocab_size()
        return number

    def token(self, token_id: int) -> str:
        name: str = self.processor.id_to_piece(token_id)
        return name

    def specials(self) -> dict[str, int]:
        """See `Model`."""
        ids = (number for number in range(self.processor.vocab_size()) if self.processor.is_control(number))
        return {self.token(number): number for number in ids}

    def lost(self, text: str, unk: int) -> int:
        """See `Model`."""
        count = text.count(SPACE) if self.space.tolist() == [unk] else 0
        for part in text.split(SPACE):
            pieces = self.processor.encode(part, out_type="proto").pieces
            count += sum(len(piece.surface) for piece in pieces if piece.id == unk)
        return count


class HuggingFaceModel:
    """A tokenizer.json of Hugging Face's `tokenizers`."""

    loses_space = True

    def __init__(self, content: bytes) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        self.tokenizer.encode_special_tokens = True  # "<mask>" in a text is text
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        if getattr(self.tokenizer.model, "dropout", None):
            self.tokenizer.model.dropout = None  # BPE dropout: the same text must have the same tokens
        with contextlib.suppress(UserError):  # a model without an unknown token
            self.loses_space = SPACE not in self.decode(self.encode(f"a{SPACE}b").tolist())

    def unknown(self) -> int:
        """Return the id of the model's unknown token; -1 if it has none."""
        model = json.loads(self.tokenizer.to_str())["model"]
        name, number = model.get("unk_token"), model.get("unk_id")
        number = self.tokenizer.token_to_id(name) if number is None and name is not None else number
        return -1 if number is None else int(number)

    def encode(self, text: str) -> Array:
        try:
            return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        except UnicodeEncodeError:
            raise
        except Exception as error:  # `tokenizers` raises plain Exceptions
            raise _cannot_encode(error) from None

    def encode_batch(self, texts: Sequence[str]) -> list[Array]:
        """See `Model`; one thread if TOKENIZERS_PARALLELISM is false, as in the workers."""
        try:
            found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except UnicodeEncodeError:
            raise
        except Exception as error:  # `tokenizers` raises plain Exceptions
            raise _cannot_encode(error) from None
        return [np.array(one.ids, np.int32) for one in found]

    def decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def size(self) -> int:
        """See `Model`; ids may have gaps."""
        return int(max(self.tokenizer.get_vocab().values())) + 1

    def token(self, token_id: int) -> str:
        return str(self.tokenizer.id_to_token(token_id))

    def specials(self) -> dict[str, int]:
        """See `Model`."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def lost(self, text: str, unk: int) -> int:
        """See `Model`."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        pairs = zip(found.ids, found.offsets, strict=True)
        unknown = [text[start:end] for number, (start, end) in pairs if number == unk]
        # A character may itself be the name of the unknown token.
        lost = "".join(surface for surface in unknown if surface != self.token(unk))
        return len(lost) + (text.count(SPACE) - lost.count(SPACE) if self.loses_space else 0)


def _cannot_encode(error: Exception) -> UserError:
    return UserError(f"the tokenizer cannot encode a text ({error}): give it an unknown token.")


def _model(content: bytes, model_type: str) -> Model:
    return HuggingFaceModel(content) if model_type == HUGGING_FACE else SentencePieceModel(content)


class Tokenizer:
    """Text to token ids and back; it has the attributes that megatron-core's datasets expect.

    Attributes:
        model_type: see `TokenizerFacts`.
        vocab_size: tokens, special ones included.
        unk, pad, eos, mask: special ids; no text encodes to pad, eos or mask.
        loses_space: U+2581 is decoded as a space, or not at all.
        sha256: of the model, hexadecimal.
    """

    def __init__(self, model: Model, facts: TokenizerFacts) -> None:
        """Wrap a model; see `load`."""
        self.model, self.model_type = model, facts.model_type
        self.vocab_size = facts.vocab_size
        self.unk, self.pad, self.eos, self.mask = facts.unk_id, facts.pad_id, facts.eos_id, facts.mask_id
        self.eod = self.eos  # megatron-core's name
        self.sha256 = facts.sha256
        self.loses_space = isinstance(model, HuggingFaceModel) and model.loses_space
        self.unique_identifiers = OrderedDict(class_name=type(self).__name__, sha256=facts.sha256)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Return the tokenizer in a folder; raise a `UserError` if it is missing or damaged."""
        facts, facts_path = read_facts(folder), folder / FACTS_FILE
        model = folder / facts.model_file
        _require(folder, model)
        content = model.read_bytes()
        if hashlib.sha256(content).hexdigest() != facts.sha256:
            raise UserError(f"{model} does not match its sha256 in {facts_path}: train the tokenizer again.")
        loaded = _model(content, facts.model_type)
        if loaded.size() != facts.vocab_size:
            raise _wrong_facts(
                facts_path, f"vocab_size is {facts.vocab_size}, but {model} has {loaded.size()}"
            )
        special = set(loaded.specials().values())
        if isinstance(loaded, SentencePieceModel) and facts.unk_id != loaded.unknown():
            raise _wrong_facts(facts_path, f"unk_id is {facts.unk_id}, {model} has {loaded.unknown()}")
        for name in ("pad_id", "eos_id", "mask_id"):
            if (number := getattr(facts, name)) not in special:
                raise _wrong_facts(facts_path, f"{name} is {number}, an ordinary token of {model}")
        return cls(loaded, facts)

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
        """Return the text of token ids, without pad and eos; a mask token becomes `mask_text`."""
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
        remedy = "name a folder that tools/train_tokenizer.py made"
        if is_own(folder.parent / FACTS_FILE):
            remedy = f"name the folder {folder.parent}"
        elif folder.suffix in (".json", ".model"):
            remedy = _import(folder)
        raise UserError(f"tokenizer {folder} is a file: {remedy}.")
    if path.is_file():
        return
    for name in (FACTS_FILE, MODEL_FILE, "spiece.model", "sentencepiece.bpe.model"):
        if path.name == FACTS_FILE and (folder / name).is_file():
            raise UserError(
                f"tokenizer {folder}: {path} is missing, but {name} is there: {_import(folder / name)}."
            )
    raise UserError(f"tokenizer {folder}: {path} is missing; make one with tools/train_tokenizer.py.")


def is_own(path: Path) -> bool:
    """Return whether a file is the FACTS_FILE of a tokenizer in our format."""
    try:
        return path.is_file() and "mask_id" in json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False


def _import(path: Path) -> str:
    """Return the remedy for a tokenizer of another project."""
    kind = "json" if path.suffix == ".json" else "model"
    return f"import it: python tools/train_tokenizer.py --import-{kind} {path} --output data/tokenizer"


def write_tokenizer(folder: Path, content: bytes, facts: TokenizerFacts) -> Tokenizer:
    """Write the two files of a tokenizer into a folder, and return it."""
    (folder / facts.model_file).write_bytes(content)
    write_json(folder / FACTS_FILE, dataclasses.asdict(facts))
    return Tokenizer(_model(content, facts.model_type), facts)
