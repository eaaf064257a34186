"""Documents from raw records: which keys are read, how chat becomes pairs, what cannot be used."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from pipeline.base.errors import UserError, nearest
from pipeline.corpus.reading import BadRecord, Content, Reading, SpanReader, cut
from pipeline.corpus.sources import Source, open_file

MESSAGE_FORMAT = "{role}: {content}\n"
EXCERPTS, SMALLEST_EXCERPT = 4096, 2**20  # spans that an excerpt is taken from, and bytes of the smallest
MAX_BAD_FRACTION, FEW_RECORDS = 0.01, 1000  # of bad records; before so many, a reader does not give up
LONGEST_RECORD = 2**23  # bytes: SentencePiece takes about 30 of memory for each
ONE_A_LINE = "each line must hold an object, which jq -c '.[]' makes of an array"
TEXT, PAIR = ("text",), ("prompt", "answer")

# After full stops and their like with closing quotes, before white space; after full-width ones anywhere.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？]+[”’」』]*")


@dataclass(frozen=True)
class Keys:
    """Which values of a record are read: a text, a prompt and an answer, or a list of chat messages.

    Attributes:
        names: (text,), (prompt, answer) or (messages,); ``a.b`` is key b of the object at key a.
        messages: the one name is a list of {"role", "content"}; the answer is the last message, which must be
            the assistant's, the prompt is all before it.
        message_format: how a message of the prompt is written; what precedes {content} also opens the answer.
        split: cut each text into documents of a line or a sentence.
    """

    names: tuple[str, ...]
    messages: bool = False
    message_format: str = MESSAGE_FORMAT
    split: Literal["line", "sentence"] | None = None

    @property
    def is_pair(self) -> bool:
        """Whether documents are prompt/answer pairs."""
        return self.messages or len(self.names) == 2

    def reading(self, limit: int = LONGEST_RECORD) -> Reading:
        """Return how raw records are read: of a table the columns of the keys, or of their first parts."""
        columns = dict.fromkeys(part for name in self.names for part in (name, name.split(".")[0]))
        return Reading(self.split == "line", limit, tuple(columns))


def documents(content: Content, keys: Keys, is_text: bool) -> list[tuple[str, ...]]:
    """Return the documents of a raw record: (text,) or (prompt, answer); several where texts are split.

    Args:
        content: what a `SpanReader` gave.
        keys: what is read.
        is_text: the record is of a text file.

    Raises:
        BadRecord: when it cannot be used.
    """
    if isinstance(content, BadRecord):
        raise content
    if is_text:
        assert isinstance(content, bytes)
        texts: tuple[str, ...] = (_decoded(content),)
    else:
        tree = _parsed(content) if isinstance(content, bytes) else content
        texts = _from_messages(tree, keys) if keys.messages else tuple(_value(tree, n) for n in keys.names)
    if not texts[-1]:
        what = ("empty_answer", "an answer") if keys.is_pair else ("empty_text", "a text")
        raise BadRecord(what[0], f"{what[1]} of length 0")
    if keys.split is None or keys.is_pair:
        return [texts]
    cut = texts[0].split("\n") if keys.split == "line" else sentences(texts[0])
    pieces: list[tuple[str, ...]] = [(piece,) for piece in cut if piece and not piece.isspace()]
    if not pieces:
        raise BadRecord("empty_text", f"no {keys.split} with anything but white space")
    return pieces


def sentences(text: str) -> list[str]:
    """Return the sentences of a text without the white space around them, by their closing punctuation."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [text[a:b].strip() for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            "invalid_utf8", f"not valid UTF-8 ({error.reason} at its byte {error.start})"
        ) from None


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        tree = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        _decoded(line)
        lines = f", or one of several lines: {ONE_A_LINE}" if line.strip() in (b"{", b"[") else ""
        raise BadRecord("invalid_json", f"not valid JSON ({error.msg}){lines}") from None
    if not isinstance(tree, dict):
        lines = f"an array, but {ONE_A_LINE}" if isinstance(tree, list) else "no JSON object, such as {...}"
        raise BadRecord("wrong_type", lines)
    return tree


def _find(tree: dict[str, Any], name: str) -> Any:
    """Return the value of a key, which may be nested; the whole name comes first."""
    if name in tree:
        return tree[name]
    found: Any = tree
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            has = ", ".join(map(repr, tree)) or "none"
            raise BadRecord("missing_key", f"no key {name!r}; it has {has}.{nearest(name, tree)}".rstrip("."))
        found = found[part]
    return found


def _value(tree: dict[str, Any], name: str) -> str:
    value = _find(tree, name)
    if not isinstance(value, str):
        raise BadRecord("wrong_type", f"{name!r} is of type {type(value).__name__}, not a text")
    return value


def _from_messages(tree: dict[str, Any], keys: Keys) -> tuple[str, str]:
    messages = _find(tree, keys.names[0])
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages) or not messages:
        raise BadRecord(
            "wrong_type", f"{keys.names[0]!r} is no list of messages, [{{'role', 'content'}}, ...]"
        )
    turns = [(_value(message, "role"), _value(message, "content")) for message in messages]
    role, answer = turns[-1]
    if role != "assistant":
        raise BadRecord("empty_answer", f"the last message is of {role!r}, not of 'assistant'")
    opening = keys.message_format.split("{content}")[0].replace("{role}", role)
    prompt = "".join(keys.message_format.replace("{role}", r).replace("{content}", c) for r, c in turns[:-1])
    return prompt + opening, answer


@dataclass(frozen=True)
class Record:
    """One document with the place that it comes from.

    Attributes:
        texts: (text,), or (prompt, answer).
        source: the input that it comes from.
        position: where in it; see `SpanReader`.
    """

    texts: tuple[str, ...]
    source: Source
    position: int

    @property
    def place(self) -> str:
        """Where the document is, for messages."""
        return place(self.source, self.position)


def place(source: Source, position: int) -> str:
    """Return where a raw record is, for people: ``FILE, line N`` or ``FILE, row N``."""
    if source.format not in ("lines", "text"):
        return f"{source.path}, row {position + 1}"
    file, raw = open_file(source)
    with raw, file:
        line = 1
        while position > 0 and (piece := file.read(min(position, 2**20))):
            line += piece.count(b"\n")
            position -= len(piece)
    return f"{source.path}, line {line}"


def check_inputs(paths: Iterable[Path], keys: Keys) -> list[Source]:
    """Return the sources of files; raise a `UserError` for one that is missing or holds no such records."""
    sources = [Source.of_file(path) for path in paths]
    check_kinds(sources, keys)
    return sources


def check_kinds(sources: Sequence[Source], keys: Keys) -> None:
    """Raise a `UserError` for a source that cannot hold such records."""
    for source in sources:
        if source.format == "text" and keys.is_pair:
            raise UserError(f"{source.path} is text: prompt/answer pairs come from jsonl lines or tables.")


OnBad = Callable[[Source, int, BadRecord], None]  # the arguments of `complaint`


def too_many(bad: int, records: int, limit: float = MAX_BAD_FRACTION, final: bool = True) -> bool:
    """Return whether so many of the records are bad that reading ends; of few records only `final`ly."""
    return bad > limit * records and (final or records >= FEW_RECORDS)


class BadRecords:
    """Counts records that cannot be used, and gives up when they are too many.

    Attributes:
        count: how many.
        good: how many can be used; whoever reads keeps this up.
    """

    def __init__(self) -> None:
        self.count = self.good = 0
        self.first: tuple[Source, int, BadRecord] | None = None

    def add(self, source: Source, position: int, bad: BadRecord) -> None:
        """Count one; raise a `UserError` of the first when there are too many."""
        self.count += 1
        self.first = self.first or (source, position, bad)
        self.check(final=False)

    def check(self, final: bool = True) -> None:
        """Raise a `UserError` of the first when there are too many; see `too_many`."""
        if self.first is not None and too_many(self.count, self.count + self.good, final=final):
            raise UserError(complaint(*self.first))


def read_all(paths: Iterable[Path], keys: Keys, on_bad: OnBad | None = None) -> Iterator[Record]:
    """Yield every document of the files, in order.

    Args:
        paths: the files.
        keys: what is read.
        on_bad: called with each record that cannot be used; without it the first one is a `UserError`.
    """
    for source in check_inputs(paths, keys):
        for span in cut(0, source, lambda: sys.maxsize, keys.reading().by_line):
            yield from _records(SpanReader(source, span, keys.reading()), keys, on_bad)


def read_excerpt(
    sources: Sequence[Source],
    keys: Keys,
    limit: float,
    on_read: Callable[[float, float], None],
    bad: BadRecords,
) -> Iterator[Record]:
    """Yield documents spread evenly over a corpus, with about so much text; every one where there is no more.

    The corpus is cut into many spans, of which the first documents are read, until there is as much text as
    the corpus up to the end of the span has earned. Of a compressed file that is the beginning. The same
    corpus gives the same documents.

    Args:
        sources: of `check_inputs`.
        keys: what is read.
        limit: bytes of text.
        on_read: called with each document, the bytes of the files that are behind, and those of text.
        bad: counts the records that are passed over because they cannot be used.

    Raises:
        UserError: when these are too many.
    """
    total = sum(source.size for source in sources)
    size = max(total // EXCERPTS, SMALLEST_EXCERPT)
    behind = text = 0  # bytes
    for source in sources:
        for span in cut(0, source, lambda: size, keys.reading().by_line):
            earned = limit * (behind + span.size) / total
            reader = SpanReader(source, span, keys.reading())
            for record in _records(reader, keys, bad.add) if text < earned else ():
                bad.good += 1
                text += sum(len(part.encode()) for part in record.texts)
                on_read(behind + reader.done, text)
                yield record
                if text >= earned:
                    break
            behind += span.size
    bad.check()


def _records(reader: SpanReader, keys: Keys, on_bad: OnBad | None = None) -> Iterator[Record]:
    for position, content in reader:
        if isinstance(content, bytes) and not content.strip():
            continue
        try:
            found = documents(content, keys, reader.source.format == "text")
        except BadRecord as bad:
            if on_bad is None:
                raise UserError(complaint(reader.source, position, bad)) from None
            on_bad(reader.source, position, bad)
            continue
        for texts in found:
            yield Record(texts, reader.source, position)


def complaint(source: Source, position: int, bad: BadRecord) -> str:
    """Return the message for a record that cannot be used, with its place and the remedy."""
    remedy = {
        "missing_key": "Name its keys by the options (--text-key, --prompt-key, ...), or rename them.",
        "too_long": "Raise --max-document-bytes, or cut the record.",
        "damaged_file": "Bring a whole copy of the file.",
    }.get(bad.reason, "Mend or remove the record.")
    return f"{place(source, position)}: {bad.detail.rstrip('.?')}. {remedy}"
