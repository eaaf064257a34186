"""Documents from records: which keys are read, which records are bad."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from pipeline.base.errors import UserError, nearest
from pipeline.corpus.chat import pairs_by_format
from pipeline.corpus.reading import BOM, DAMAGED, BadRecord, Content, Reading, SpanReader, cut
from pipeline.corpus.sources import Source, open_file

MESSAGE_FORMAT = "{role}: {content}\n"
EXCERPTS, SMALLEST_EXCERPT = 4096, 2**20  # spans that an excerpt is taken from, and bytes of the smallest
MAX_BAD_FRACTION = 0.01  # share of bad records that is tolerated,
FEW_RECORDS = 1000  # judged from so many records on
LONGEST_RECORD = 2**23  # bytes; SentencePiece needs about 30 bytes of memory for each
ONE_A_LINE = "each line must hold an object; jq -c '.[]' converts an array"

EMPTY = "empty_text"  # the reason of a record that is no bad one: it is skipped
LINE_END = re.compile(r"\r\n|\n|\r")
# After . ! ? and closing quotes before white space; after full-width marks anywhere.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？]+[”’」』]*")


@dataclass(frozen=True)
class Keys:
    """Which values of a record are read: a text, a prompt and an answer, or a list of chat messages.

    Attributes:
        names: (text,), (prompt, answer) or (messages,); ``a.b`` is key b of the object at key a.
        messages: the name is that of a list of {"role", "content"}; the last message, the assistant's, is the
            answer, the others are the prompt.
        message_format: of a message in the prompt; the part before {content} also opens the answer.
        chat_template: writes the messages instead of the format; see `chat_template.read_template`.
        every_turn: every message by the assistant is an answer, given those before it.
        split: make each line or sentence of a text a document, or each text file.
    """

    names: tuple[str, ...]
    messages: bool = False
    message_format: str = MESSAGE_FORMAT
    chat_template: str | None = None
    every_turn: bool = False
    split: Literal["line", "sentence", "file"] | None = None

    @property
    def is_pair(self) -> bool:
        """Whether documents are prompt/answer pairs."""
        return self.messages or len(self.names) == 2

    def reading(self, limit: int = LONGEST_RECORD) -> Reading:
        """Return how raw records are read; of a table, the columns of the keys or of their first parts."""
        columns = dict.fromkeys(part for name in self.names for part in (name, name.split(".")[0]))
        unit = self.split if self.split in ("line", "file") else "paragraph"
        return Reading(unit, limit, tuple(columns))


def documents(
    content: Content, keys: Keys, is_text: bool, specials: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """Return the documents of a raw record, (text,) or (prompt, answer); several if it is split.

    Args:
        content: from a `SpanReader`.
        keys: which values are read.
        is_text: whether the record is from a text file.
        specials: the names of the tokenizer's special tokens, which no message may become.

    Raises:
        BadRecord: if it cannot be used.
    """
    if isinstance(content, BadRecord):
        raise content
    if is_text:
        assert isinstance(content, bytes)
        texts: tuple[str, ...] = (_decoded(content),)
    else:
        tree = _parsed(content) if isinstance(content, bytes) else content
        if keys.messages:
            if keys.chat_template is not None:
                from pipeline.corpus.chat_template import pairs_by_template  # Jinja is rarely needed

                messages = _messages(tree, keys.names[0], "role")  # a template may need no content
                return [*pairs_by_template(messages, keys.chat_template, keys.every_turn, specials)]
            messages = _messages(tree, keys.names[0], "role", "content")
            return [*pairs_by_format(messages, keys.message_format, keys.every_turn)]
        texts = tuple(_value(tree, name) for name in keys.names)
    if not texts[-1]:
        what = ("empty_answer", "an answer") if keys.is_pair else (EMPTY, "a text")
        raise BadRecord(what[0], f"{what[1]} of length 0")
    if keys.split in (None, "file") or keys.is_pair:
        return [texts]
    cut = LINE_END.split(texts[0]) if keys.split == "line" else sentences(texts[0])
    pieces: list[tuple[str, ...]] = [(piece,) for piece in cut if piece and not piece.isspace()]
    if not pieces:
        raise BadRecord(EMPTY, f"no {keys.split} with anything but white space")
    return pieces


def sentences(text: str) -> list[str]:
    """Split a text after closing punctuation; return its sentences without the white space around them."""
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
        if line.startswith(BOM):  # of a file that another one was appended to
            return _parsed(line.removeprefix(BOM))
        _decoded(line)
        lines = f", or one of several lines: {ONE_A_LINE}" if line.strip() in (b"{", b"[") else ""
        raise BadRecord("invalid_json", f"not valid JSON ({error.msg}){lines}") from None
    if not isinstance(tree, dict):
        lines = (
            f"an array, but {ONE_A_LINE}" if isinstance(tree, list) else "not a JSON object, such as {...}"
        )
        raise BadRecord("wrong_type", lines)
    return tree


def _find(tree: dict[str, Any], name: str) -> Any:
    """Return the value of a key, which may be nested; a key with the whole name wins."""
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


def _messages(tree: dict[str, Any], name: str, *needed: str) -> list[dict[str, Any]]:
    messages = _find(tree, name)
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages) or not messages:
        raise BadRecord("wrong_type", f"{name!r} is not a list of messages, [{{'role', 'content'}}, ...]")
    for message, key in itertools.product(messages, needed):
        _value(message, key)
    return messages


class Document(NamedTuple):
    """The texts of a document and where they come from.

    Attributes:
        texts: (text,) or (prompt, answer).
        source: of the record.
        position: of the record in the source; see `SpanReader`.
    """

    texts: tuple[str, ...]
    source: Source
    position: int

    @property
    def place(self) -> str:
        """The file and line or row of the record, for messages."""
        return place(self.source, self.position)


def place(source: Source, position: int) -> str:
    """Return the place of a record for messages: ``FILE, line N`` or ``FILE, row N``."""
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
    """Return the sources of files; raise a `UserError` if one is missing or cannot hold the keys."""
    sources = [Source.of_file(path) for path in paths]
    check_formats(sources, keys)
    return sources


def check_formats(sources: Sequence[Source], keys: Keys) -> None:
    """Raise a `UserError` for a source that cannot hold the keys."""
    for source in sources:
        if source.format == "text" and keys.is_pair:
            raise UserError(f"{source.path} is plain text: prompt/answer pairs come from jsonl or tables.")
        if source.format != "text" and keys.split == "file":
            raise UserError(f"{source.path} is not plain text: --split-documents file is for .txt files.")


OnBad = Callable[[Source, int, BadRecord], None]  # the arguments of `complaint`


def too_many(bad: int, records: int, limit: float = MAX_BAD_FRACTION, final: bool = True) -> bool:
    """Return whether more than `limit` of the records are bad; few records are judged only if `final`."""
    return bad > limit * records and (final or records >= FEW_RECORDS)


class BadRecords:
    """Counts bad records, and raises when there are too many.

    Attributes:
        count: bad records.
        good: the others; the reader counts them.
        lost_bytes: size of the files that could not be read to their end.
        total_bytes: size of the corpus, known to the reader.
    """

    def __init__(self, limit: float = MAX_BAD_FRACTION) -> None:
        """Start at zero; `limit` is the share that is tolerated."""
        self.limit = limit
        self.count = self.good = self.lost_bytes = self.total_bytes = 0
        self.first: tuple[Source, int, BadRecord] | None = None

    def add(self, source: Source, position: int, bad: BadRecord) -> None:
        """Count a bad record; raise a `UserError` about the first if there are too many."""
        self.count += 1
        if bad.reason == DAMAGED:
            self.lost_bytes += source.size
        self.first = self.first or (source, position, bad)
        self.check(final=False)

    def check(self, final: bool = True) -> None:
        """Raise a `UserError` about the first bad record if there are too many; see `too_many`."""
        if self.first is None:
            return
        if too_many(self.count, self.count + self.good, self.limit, final) or (
            final and self.lost_bytes > self.limit * self.total_bytes
        ):
            raise UserError(f"{complaint(*self.first)} More than --max-bad-fraction {self.limit} are bad.")


def read_all(paths: Iterable[Path], keys: Keys, on_bad: OnBad | None = None) -> Iterator[Document]:
    """Yield every document of the files, in order.

    Args:
        paths: the files.
        keys: which values are read.
        on_bad: called with each bad record; without it the first one raises a `UserError`.
    """
    for source in check_inputs(paths, keys):
        for span in cut(0, source, lambda: sys.maxsize, keys.reading().unit):
            yield from _records(SpanReader(source, span, keys.reading()), keys, on_bad)


def read_excerpt(
    sources: Sequence[Source],
    keys: Keys,
    limit: float,
    on_read: Callable[[float, float], None],
    bad: BadRecords,
) -> Iterator[Document]:
    """Yield documents with about `limit` bytes of text, spread evenly over a corpus; all of a smaller corpus.

    The corpus is cut into many spans. From the start of each, documents are read until the text is in
    proportion to the bytes up to the end of the span. Of a compressed file only the start is read. The same
    corpus gives the same documents.

    Args:
        sources: from `check_inputs`.
        keys: which values are read.
        limit: bytes of text.
        on_read: called for each document with the bytes of files passed so far, and of text taken.
        bad: counts the bad records, which are skipped.

    Raises:
        UserError: for too many bad records.
    """
    total = bad.total_bytes = sum(source.size for source in sources)
    size = max(total // EXCERPTS, SMALLEST_EXCERPT)
    behind = text = 0  # bytes
    for source in sources:
        for span in cut(0, source, lambda: size, keys.reading().unit):
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


def _records(reader: SpanReader, keys: Keys, on_bad: OnBad | None = None) -> Iterator[Document]:
    for position, content in reader:
        if isinstance(content, bytes) and not content.strip():
            continue
        try:
            found = documents(content, keys, reader.source.format == "text")
        except BadRecord as bad:
            if on_bad is None:
                raise UserError(complaint(reader.source, position, bad)) from None
            if bad.reason == EMPTY:
                continue
            on_bad(reader.source, position, bad)
            continue
        for texts in found:
            yield Document(texts, reader.source, position)


def complaint(source: Source, position: int, bad: BadRecord) -> str:
    """Return the message about a bad record, with its place and the remedy."""
    return f"{place(source, position)}: {bad.detail.rstrip('.?')}. {remedy(bad.reason)}"


def remedy(reason: str) -> str:
    """Return what to do about a bad record, in a sentence."""
    return {
        "missing_key": "Set --text-key, --prompt-key, ... to its keys, or rename them.",
        "too_long": "Raise --max-document-bytes, or shorten the record.",
        DAMAGED: "Get a complete copy of the file.",
        "invalid_utf8": "Fix or remove the record, or convert the file by iconv.",
    }.get(reason, "Fix or remove the record.")
