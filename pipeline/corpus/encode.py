"""Encoding a corpus word by word, each word once: most of a corpus is words that came before.

A text may be cut where no token can span the cut and neither side influences the tokens of the other. Its
tokens are then those of its units, the texts between the cuts, concatenated. The patterns below match the
units of the tokenizers for which this is proven; other tokenizers encode whole texts.
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
from pipeline.data.tokenizer import SPACE, HuggingFaceModel, SentencePieceModel, Tokenizer

REMEMBERED = 2**17  # units in each of two generations, about 30 MB
LONGEST_UNIT = 128  # characters of a cached unit
FIRST_TRIAL, TRIALS = 4, 64  # the batch that is encoded both ways, in every so many
TRIAL_CHARACTERS = 2**21  # of a longer batch never: a whole text can take over 100 times its size in memory

LETTER, DIGIT, MARK, OTHER = "A-Za-z", "0-9", r"!-/:-@\[-`{-~", r"\x80-\U0010ffff"  # ASCII, then the rest
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
        units: matches the texts between the cuts, in order.
        never: a text that contains one of these is not cut.
    """

    units: re.Pattern[str]
    never: tuple[str, ...] = ()


# SentencePiece: cuts are before spaces and line ends, and after letters, before an ASCII character that is
# neither a letter nor "'".
OF_PIECES = Cuts(
    re.compile(
        rf"[ \n]?[^{LETTER} \n]*[{LETTER}]+(?:['{OTHER}][^{LETTER} \n]*[{LETTER}]*)*"
        rf"|[ \n]?[^{LETTER} \n]+|[ \n]"
    ),
    never=(SPACE,),
)
# The same for a model with pieces of several spaces: cuts are before the first space of a run.
OF_RUNS = Cuts(
    re.compile(OF_PIECES.units.pattern.replace(r"[ \n]?", r"(?: +|\n)?").replace(r"[ \n]", r" +|\n")),
    (SPACE,),
)
# Byte-level BPE first splits a text by one of the expressions above, or by GPT-2's. Cuts are
# - after letters, before an ASCII character that is neither a letter nor "'", and likewise after digits: once
#   an expression has matched a letter it matches only letters (then "'s" and the like, in GPT-4o's), and once
#   a digit, only digits;
# - after marks, before a space or a digit: after a mark an expression matches only marks and line ends, or
#   letters;
# - after white space, before a space that a letter or a digit follows: a match of white space leaves a final
#   space to the next match.
# So a match ends at every cut. The text after a cut is matched as if it began there, because no expression
# looks back. Expressions look ahead from white space only, and the white space before a cut is matched as a
# whole, as at the end of a text.
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
    """Returns the tokens of the tokenizer, faster if words repeat.

    Now and then a batch is encoded both ways. The tokens must be equal, and the next batches take the faster
    way, so texts without common words cost no more than with the tokenizer alone.
    """

    def __init__(self, tokenizer: Tokenizer, cut: bool = True) -> None:
        """Start with an empty cache.

        Args:
            tokenizer: encodes what is not in the cache.
            cut: cut texts, if the tokenizer allows it.
        """
        self.tokenizer = tokenizer
        self.cuts = cuts_of(tokenizer) if cut else None
        self._words = _Words(tokenizer)
        self._is_faster = True
        self._batches = 0

    def encode_batch(self, texts: Sequence[str]) -> list[Array]:
        """Return the token ids [n] int32 of each text.

        Raises:
            UserError: if whole texts have other tokens: a library may have changed.
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
                    "word-by-word encoding differs from the tokenizer's own: give --whole-texts and "
                    f"--restart (the text: {text[:200]!r})."
                )
        return whole

    def _by_words(self, texts: Sequence[str], cuts: Cuts) -> list[Array]:
        self._words.make_room()
        found = [self._encode(text, cuts) for text in texts]
        rest = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        whole = iter(self.tokenizer.encode_batch(rest))
        return [next(whole) if ids is None else ids for ids in found]

    def _encode(self, text: str, cuts: Cuts) -> Array | None:
        """Return the ids [n] int32 of a text, or None if it must not be cut."""
        if any(part in text for part in cuts.never):
            return None
        return np.frombuffer(b"".join(map(self._words.__getitem__, cuts.units.findall(text))), np.int32)


class _Words(dict[str, bytes]):
    """A cache of the ids of units, int32 bytes; units of the older generation move over when they recur."""

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
        """Start a new generation if this one is full; a batch may overfill it."""
        if len(self) > REMEMBERED:
            self.older = dict(self)
            self.clear()


def cuts_of(tokenizer: Tokenizer) -> Cuts | None:
    """Return where texts may be cut for a tokenizer; None if that is not proven."""
    model = tokenizer.model
    if isinstance(model, HuggingFaceModel):
        return _of_expressions(json.loads(model.tokenizer.to_str()))
    # Not for unigram: SentencePiece sums the scores of a whole text in 32 bits, and rounding can change the
    # tokens of a word.
    if isinstance(model, SentencePieceModel) and tokenizer.model_type == "bpe":
        return _of_pieces(model.processor.serialized_model_proto())
    return None


def _of_pieces(serialized: bytes) -> Cuts | None:
    """Return the cuts of a BPE model that does not normalize, if no piece spans a cut.

    Merges only produce pieces, and their order within a unit depends on their scores alone.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # slow, and rarely needed

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
    pieces = [piece.piece.replace(SPACE, " ") for piece in content.pieces if piece.type in kinds]
    for cuts in (OF_PIECES, OF_RUNS):
        if all(len(cuts.units.findall(piece)) <= 1 for piece in pieces):
            return cuts
    return None


def _of_expressions(content: dict[str, Any]) -> Cuts | None:
    """Return the cuts of a tokenizer.json with a BPE model that splits by one of `EXPRESSIONS` or as GPT-2's.

    NFC never composes across a cut: the character after it is ASCII. Added tokens are matched first, except
    special ones, which text never matches: a text that contains one is not cut.
    """
    normalizer = content["normalizer"]
    if content["model"]["type"] != "BPE" or normalizer not in (None, {"type": "NFC"}):
        return None
    if not _is_known(content["pre_tokenizer"] or {}):
        return None
    added = [token for token in content["added_tokens"] if not token["special"]]
    if normalizer is not None and any(token["normalized"] for token in added):
        return None  # a text may contain one only after normalization
    return dataclasses.replace(OF_EXPRESSIONS, never=tuple(token["content"] for token in added))


def _is_known(splitter: dict[str, Any]) -> bool:
    """Return whether the "pre_tokenizer" of a tokenizer.json splits by one of `EXPRESSIONS` or as GPT-2's."""

    def is_bytes(part: dict[str, Any], use_regex: bool) -> bool:
        wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}
        return wanted.items() <= part.items()

    match splitter.get("pretokenizers"):
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}, last]:
            return regex in EXPRESSIONS and is_bytes(last, use_regex=False)
    return is_bytes(splitter, use_regex=True)  # GPT-2's
