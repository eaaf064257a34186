"""Special tokens in chat: those that format or template write become tokens, those in a message are text."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pipeline.base.errors import UserError
from pipeline.corpus.chat import Written
from pipeline.corpus.encode import WordEncoder
from pipeline.corpus.records import Keys
from pipeline.data.arrays import Array
from pipeline.data.tokenizer import Tokenizer

_LOOKS_SPECIAL = re.compile(r"<\|[^|<>{}\s]+\|>|</s>|<s>")


def check_format(tokenizer: Tokenizer, keys: Keys) -> list[str]:
    """Return what looks like special tokens in the message format or template and is none of the tokenizer's.

    Raises:
        UserError: for the mask or the padding token in it.
    """
    if not keys.messages:
        return []
    source = "--message-format" if keys.chat_template is None else "--chat-template"
    text = keys.chat_template or keys.message_format
    for name, number in tokenizer.model.specials().items():
        if number in (tokenizer.mask, tokenizer.pad) and name in text:
            raise UserError(f"{source} holds {name}, which training keeps for itself: leave it out.")
    known = tokenizer.model.specials()
    return sorted({name for name in _LOOKS_SPECIAL.findall(text) if name not in known})


class SpecialEncoder:
    """Encodes texts as a `WordEncoder` does, and special tokens of `Written` texts as those tokens."""

    def __init__(self, encoder: WordEncoder) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer = encoder.tokenizer
        kept = (tokenizer.mask, tokenizer.pad, tokenizer.unk)
        self.ids = {name: number for name, number in tokenizer.model.specials().items() if number not in kept}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first))) if self.ids else None

    def encode_batch(self, texts: Sequence[str]) -> list[Array]:
        """Return the token ids [n] int32 of each text."""
        taken = [self._taken_apart(text) for text in texts]
        plain = iter(
            self.encoder.encode_batch([part for parts in taken for part in parts if isinstance(part, str)])
        )
        return [
            np.concatenate([next(plain) if isinstance(part, str) else part for part in parts], dtype=np.int32)
            for parts in taken
        ]

    def _taken_apart(self, text: str) -> list[str | Array]:
        """Return the text as pieces of plain text and special ids; at least one piece."""
        if self.pattern is None or not isinstance(text, Written):
            return [str(text)]
        parts: list[str | Array] = []
        done = 0
        for start, end in text.by_format:
            for match in self.pattern.finditer(text, start, end):
                if match.start() > done:
                    parts.append(text[done : match.start()])
                parts.append(np.array([self.ids[match.group()]], np.int32))
                done = match.end()
        return [*parts, text[done:]] if done < len(text) or not parts else parts
