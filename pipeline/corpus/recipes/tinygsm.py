"""TinyGSM (arXiv 2312.09241): which records to train on, to hold out and to drop.

A record is a word problem (``question``) and a Python function that solves it (``code``). A question may come
with several programs.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Literal

Part = Literal["train", "held_out"]
GRAM = 13  # words in a row that count as copied, as in GPT-3's decontamination (arXiv 2005.14165, appendix C)
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def defines_a_function(code: str) -> bool:
    """Say whether `code` is Python that defines a function; nothing is run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the parsed code, such as "\d" in a string
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return any(isinstance(node, ast.FunctionDef) for node in tree.body)


class Selection:
    """Assigns records one by one; the held-out set does not depend on their order.

    Memory is about 100 bytes per accepted record.

    Attributes:
        counts: records by outcome: train, held_out, or the reason for dropping them.
    """

    def __init__(self, benchmark: Iterable[str], held_out_share: float) -> None:
        """Start with nothing seen.

        Args:
            benchmark: questions that must not be trained on, such as GSM8K's test split.
            held_out_share: share of questions, with all their programs, to hold out.
        """
        self.limit = int(held_out_share * 2**64)
        self.counts: Counter[str] = Counter()
        self._seen: set[bytes] = set()
        self._copied = {gram for question in benchmark for gram in _grams(words(question))}

    def part(self, question: str, code: str) -> Part | None:
        """Return where a record belongs; None if it is dropped."""
        asked = words(question)
        what = self._reason(asked, code) or self._part(asked)
        self.counts[what] += 1
        return what if what in ("train", "held_out") else None  # type: ignore[return-value]

    def _reason(self, asked: list[str], code: str) -> str | None:
        if not asked:
            return "empty question"
        if not defines_a_function(code):
            return "no Python function"
        if not self._copied.isdisjoint(_grams(asked)):
            return "in the benchmark"
        key = _digest(" ".join(asked), code.strip())
        if key in self._seen:
            return "duplicate"
        self._seen.add(key)
        return None

    def _part(self, asked: list[str]) -> Part:
        number = int.from_bytes(_digest("held out", " ".join(asked)), "big")
        return "held_out" if number < self.limit else "train"


def _grams(asked: list[str]) -> Iterable[str]:
    """Return all n-grams of GRAM words; a shorter question is one."""
    return {" ".join(asked[i : i + GRAM]) for i in range(max(1, len(asked) - GRAM + 1))}


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
