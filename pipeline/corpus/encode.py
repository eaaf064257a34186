"""Encoding a corpus a word at a time, and each word once: it says the same ones again and again.

A text may be cut where no token can reach across, and where what lies on one side has no influence on the
tokens of the other. Its tokens are then those of its units, the texts between the cuts, one after the other.
The patterns below match the units of the tokenizers for which that can be shown; what others encode, they
encode as a whole.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.base.errors import UserError
from pipeline.data.arrays import Array
from pipeline.data.tokenizer import HuggingFaceModel, SentencePieceModel, Tokenizer

REMEMBERED = 2**17  # units in each of two generations, of 30 MB or so
LONGEST_UNIT = 128  # characters of a unit that is remembered
FIRST_TRIAL, TRIALS = 4, 64  # this batch, and every so many, are encoded both ways, unless it is very long:
TRIAL_CHARACTERS = 2**21  # a text as a whole can take more than a hundred times its size

LETTER, DIGIT, MARK, OTHER = "A-Za-z", "0-9", r"!-/:-@\[-`{-~", r"\x80-\U0010ffff"  # in ASCII, and not in it
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA_3 = (
    CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTION + "?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTION + "?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXPRESSIONS = (LLAMA_3, QWEN_2, GPT_4O)


@dataclass(frozen=True)
class Cuts:
    """Where texts are cut.

    Attributes:
        units: matches the texts between the cuts, one after the other.
        never: a text that holds one of these is not cut.
    """

    units: re.Pattern[str]
    never: tuple[str, ...] = ()


# For SentencePiece cuts are before spaces and line ends; and after letters, before other ASCII characters
# than letters and "'".
OF_PIECES = Cuts(
    re.compile(
        rf"[ \n]?[^{LETTER} \n]*[{LETTER}]+(?:['{OTHER}][^{LETTER} \n]*[{LETTER}]*)*"
        rf"|[ \n]?[^{LETTER} \n]+|[ \n]"
    )
)
# Byte-level BPE takes a text apart by one of the expressions above first, or by GPT-2's. Cuts are
# - after letters, before other ASCII characters than letters and "'", and after digits, likewise: what
#   matches a letter matches nothing but letters from there on (then "'s" and the like, in the newest), and
#   what matches a digit nothing but digits;
# - after marks, before a space or a digit: what matches a mark matches nothing but marks and line ends from
#   there on, or letters;
# - after white space, before a space that a letter or a digit follows: what matches white space leaves its
#   last character to what follows, if it is a space.
# So a match ends at every cut. What lies behind a cut is matched as if it began a text, for no expression
# looks back. They look ahead from white space only, and what a cut leaves of that is matched in whole, as it
# is where a text ends.
OF_EXPRESSIONS = Cuts(
    re.compile(
        rf" ?[{LETTER}]+(?![{LETTER}{OTHER}'])"
        rf"| ?[{MARK}]+(?=[ {DIGIT}])"
        rf"|[^{LETTER}{DIGIT}]*[ \t\r\n](?= [{LETTER}{DIGIT}])"
        rf"|[^{LETTER}{DIGIT}]*(?:[{LETTER}]+|[{DIGIT}]+)"
        rf"(?:['{OTHER}][^{LETTER}{DIGIT}]*(?:[{LETTER}]+|[{DIGIT}]+)?)*"
        rf"|[^{LETTER}{DIGIT}]+"
    )
)


class WordEncoder:
    """Gives the tokens that the tokenizer gives, faster where words come again.

    From time to time a batch is encoded both ways: the tokens must be the same, and the faster way is gone on
    with, so that texts without common words cost no more than they would.
    """

    def __init__(self, tokenizer: Tokenizer, cut: bool = True) -> None:
        """Begin with nothing remembered.

        Args:
            tokenizer: is asked for what is new.
            cut: whether texts are cut, if that is known to be right for the tokenizer.
        """
        self.tokenizer = tokenizer
        self.cuts = cuts_of(tokenizer) if cut else None
        self._words = _Words(tokenizer)
        self._is_faster = True
        self._batches = 0

    def encode_batch(self, texts: Sequence[str]) -> list[Array]:
        """Return the token ids [n] int32 of each text.

        Raises:
            UserError: if texts have other tokens as a whole: a library may have changed.
        """
        if self.cuts is None:
            return self.tokenizer.encode_batch(texts)
        self._batches += 1
        if self._batches % TRIALS == FIRST_TRIAL and sum(map(len, texts)) <= TRIAL_CHARACTERS:
            return self._both_ways(texts, self.cuts)
        return self._by_words(texts, self.cuts) if self._is_faster else self.tokenizer.encode_batch(texts)

    def _both_ways(self, texts: Sequence[str], cuts: Cuts) -> list[Array]:
        began = time.process_time()
        found = self._by_words(texts, cuts)
        half = time.process_time()
        whole = self.tokenizer.encode_batch(texts)
        self._is_faster = half - began < time.process_time() - half
        for text, one, other in zip(texts, found, whole, strict=True):
            if not np.array_equal(one, other):
                raise UserError(
                    "the tokens of a text's words are not those of the text with this tokenizer, which this "
                    f"version does not know: give --whole-texts and --restart (the text: {text[:200]!r})."
                )
        return whole

    def _by_words(self, texts: Sequence[str], cuts: Cuts) -> list[Array]:
        self._words.make_room()
        found = [self._encode(text, cuts) for text in texts]
        rest = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        whole = iter(self.tokenizer.encode_batch(rest))
        return [next(whole) if ids is None else ids for ids in found]

    def _encode(self, text: str, cuts: Cuts) -> Array | None:
        """Return the ids of a text, or None if it is not cut."""
        if any(part in text for part in cuts.never):
            return None
        return np.frombuffer(b"".join(map(self._words.__getitem__, cuts.units.findall(text))), np.int32)


class _Words(dict[str, bytes]):
    """The ids of units as int32; those of the last generation that are asked for again are taken over."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.older: dict[str, bytes] = {}

    def __missing__(self, unit: str) -> bytes:
        ids = self.older.get(unit) or self.tokenizer.encode(unit).tobytes()
        if len(unit) <= LONGEST_UNIT:
            self[unit] = ids
        return ids

    def make_room(self) -> None:
        """Begin a new generation if this one is large; a batch may take it beyond that."""
        if len(self) > REMEMBERED:
            self.older = dict(self)
            self.clear()


def cuts_of(tokenizer: Tokenizer) -> Cuts | None:
    """Return where the texts of a tokenizer are cut; None if it is not known that they may be."""
    model = tokenizer.model
    if isinstance(model, HuggingFaceModel):
        return _of_expressions(json.loads(model.tokenizer.to_str()))
    # A unigram model will not do: SentencePiece adds up the scores of a whole text in 32 bits, and their
    # rounding may decide within a word.
    if isinstance(model, SentencePieceModel) and tokenizer.model_type == "bpe":
        return _of_pieces(model.processor.serialized_model_proto())
    return None


def _of_pieces(serialized: bytes) -> Cuts | None:
    """Return the cuts of a BPE model that changes no text, and no piece of which reaches across one.

    Merges make pieces only, and their order in a unit is that of their scores.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # slow, and seldom needed

    content = ModelProto.FromString(serialized)
    trainer, normalizer = content.trainer_spec, content.normalizer_spec
    changes = (
        normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
    )
    if changes or trainer.model_type != TrainerSpec.BPE or not trainer.byte_fallback:
        return None
    kinds = (ModelProto.SentencePiece.NORMAL, ModelProto.SentencePiece.USER_DEFINED)
    pieces = (piece.piece.replace("▁", " ") for piece in content.pieces if piece.type in kinds)
    return None if any(len(OF_PIECES.units.findall(piece)) > 1 for piece in pieces) else OF_PIECES


def _of_expressions(content: dict[str, Any]) -> Cuts | None:
    """Return the cuts of a tokenizer.json with a BPE model behind one of `EXPRESSIONS`, or GPT-2's.

    NFC composes nothing with an ASCII character behind it. Added tokens are looked for first, but for the
    special ones, which no text is taken for: a text that has one is not cut.
    """
    normalizer = content["normalizer"]
    if content["model"]["type"] != "BPE" or normalizer not in (None, {"type": "NFC"}):
        return None
    if not _is_known(content["pre_tokenizer"] or {}):
        return None
    added = [token for token in content["added_tokens"] if not token["special"]]
    if normalizer is not None and any(token["normalized"] for token in added):
        return None  # a text may have one after normalisation only
    return dataclasses.replace(OF_EXPRESSIONS, never=tuple(token["content"] for token in added))


def _is_known(splitter: dict[str, Any]) -> bool:
    """Return whether the "pre_tokenizer" of a tokenizer.json uses one of `EXPRESSIONS`, or GPT-2's."""

    def is_bytes(part: dict[str, Any], use_regex: bool) -> bool:
        wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}
        return wanted.items() <= part.items()

    match splitter.get("pretokenizers"):
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}, last]:
            return regex in EXPRESSIONS and is_bytes(last, use_regex=False)
    return is_bytes(splitter, use_regex=True)  # GPT-2's
