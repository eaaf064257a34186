"""Chat messages as prompts and answers, written by a message format; see `chat_template` for templates."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pipeline.corpus.reading import BadRecord

Message = dict[str, Any]
_ROLE = re.compile(r"\w+")


class Written(str):
    """A text written by a message format or a chat template.

    Attributes:
        by_format: start and end of each stretch in which special tokens count.
    """

    by_format: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, pieces: Iterable[tuple[str, bool]]) -> Written:
        """Join pieces of text, each with whether the format wrote it."""
        spans: list[tuple[int, int]] = []
        texts: list[str] = []
        end = 0
        for text, by_format in pieces:
            texts.append(text)
            if by_format and text:
                start = spans.pop()[0] if spans and spans[-1][1] == end else end
                spans.append((start, end + len(text)))
            end += len(text)
        return cls._with("".join(texts), spans)

    @classmethod
    def apart(cls, pieces: Sequence[str]) -> Written:
        """Join pieces that the format wrote; no special token reaches from one piece into another."""
        ends = [0, *itertools.accumulate(map(len, pieces))]
        return cls._with("".join(pieces), list(itertools.pairwise(ends)))

    @classmethod
    def _with(cls, text: str, spans: list[tuple[int, int]]) -> Written:
        found = cls(text)
        found.by_format = tuple(spans)
        return found


def pairs_by_format(
    messages: Sequence[Message], message_format: str, every_turn: bool
) -> list[tuple[str, str]]:
    """Return (prompt, answer) of the last turn, or of every turn of the assistant.

    Args:
        messages: each with role and content.
        message_format: see `records.Keys`.
        every_turn: see `pairs_by_template`.

    Raises:
        BadRecord: for a chat without an answer.
    """
    turns = [(message["role"], message["content"]) for message in messages]
    parts = _parts_of(message_format)
    opening = parts[: parts.index("{content}")]
    found: list[tuple[str, str]] = []
    for place in answers_in(messages, every_turn):
        role, answer = turns[place]
        pieces = [piece for turn in turns[:place] for piece in _filled(parts, *turn)]
        found.append((Written.of([*pieces, *_filled(opening, role, "")]), answer))
    return found


@functools.cache
def _parts_of(message_format: str) -> list[str]:
    return [part for part in re.split(r"(\{role\}|\{content\})", message_format) if part]


def _filled(parts: list[str], role: str, content: str) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a message, and whether the format wrote them; roles that are words count."""
    for part in parts:
        if part == "{content}":
            yield content, False
        else:
            yield (role, _ROLE.fullmatch(role) is not None) if part == "{role}" else (part, True)


def answers_in(messages: Sequence[Message], every_turn: bool) -> list[int]:
    """Return the places of the messages that are answers; raise a `BadRecord` if there is none."""
    last = messages[-1]["role"]
    if not every_turn and last != "assistant":
        raise BadRecord("empty_answer", f"the last message is by {last!r}, not by 'assistant'")
    places = range(len(messages)) if every_turn else [len(messages) - 1]
    found = [i for i in places if messages[i]["role"] == "assistant" and _says_something(messages[i])]
    if not found:
        raise BadRecord("empty_answer", "no message by 'assistant' that is not empty")
    return found


def _says_something(message: Message) -> bool:
    return any(value for name, value in message.items() if name != "role")
