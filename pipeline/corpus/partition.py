"""A corpus cut into units of work: inputs, options and the spans of each unit, written once as plan.json.

A unit is a list of spans that one worker turns into one part. A partition holds everything that the dataset
depends on, so the parts of equal partitions can be joined, whichever machines made them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.base.cli import option
from pipeline.base.errors import UserError
from pipeline.base.files import replace_text
from pipeline.corpus.reading import Span, cut
from pipeline.corpus.records import LONGEST_RECORD, Keys, check_formats
from pipeline.corpus.sources import Hub, Source, find, hub_source
from pipeline.corpus.special_text import check_format
from pipeline.data.tokenizer import Tokenizer

FORMAT = 1
PARTITION_FILE = "plan.json"
MANY_UNITS = 4096
SMALLEST, LARGEST = 2**23, 2**30  # bytes of a unit, without --unit-bytes
TAIL, SMALLEST_OF_TAIL = 8, 2**20  # a unit has at most 1/8 of the remaining bytes: workers finish together


_LATER = ("chat_template", "every_turn")


@dataclass(frozen=True)
class Options:
    """The options that change the dataset.

    Attributes:
        keys: which values of a record are read.
        append_eos: append the end-of-sequence token to every document.
        max_document_bytes: longest line, paragraph or text.
        min_tokens: shorter documents are dropped.
        max_tokens: longer documents are dropped; None for no limit.
        deduplicate: drop documents whose texts came before.
        shuffle_seed: seed of a shuffle of all documents; None keeps the order of the input.
    """

    keys: Keys
    append_eos: bool = False
    max_document_bytes: int = LONGEST_RECORD
    min_tokens: int = 0
    max_tokens: int | None = None
    deduplicate: bool = False
    shuffle_seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the options as one flat JSON object."""
        values = dataclasses.asdict(self)
        values = {**values.pop("keys"), **values, "names": list(self.keys.names)}
        # Options that earlier versions lack are only written where they are given: plans stay as they were.
        return {name: value for name, value in values.items() if value or name not in _LATER}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Options:
        """Return the options from the result of `to_json`."""
        names = {field.name for field in dataclasses.fields(Keys)}
        keys = {k: v for k, v in values.items() if k in names}
        keys["names"] = tuple(keys["names"])
        return cls(Keys(**keys), **{k: v for k, v in values.items() if k not in names})


@dataclass(frozen=True)
class Partition:
    """Everything that a dataset is made from, and how the work is cut.

    Attributes:
        sources: the inputs, in order.
        options: see `Options`.
        tokenizer: folder of the tokenizer, absolute.
        tokenizer_sha256: of its model.
        units: spans of each unit; the dataset keeps this order.
    """

    sources: tuple[Source, ...]
    options: Options
    tokenizer: str
    tokenizer_sha256: str
    units: tuple[tuple[Span, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the partition as plain JSON values."""
        return {
            "format": FORMAT,
            "options": self.options.to_json(),
            "tokenizer": self.tokenizer,
            "tokenizer_sha256": self.tokenizer_sha256,
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "units": [[dataclasses.astuple(span) for span in unit] for unit in self.units],
        }

    @cached_property
    def sha256(self) -> str:
        """Identity of inputs and options; the cut into units does not change the dataset."""
        values = dataclasses.replace(self, units=()).to_json()
        del values["units"], values["tokenizer"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def size_of(self, unit: int) -> int:
        """Return the bytes of a unit on the disk."""
        return sum(span.size for span in self.units[unit])


def make_partition(
    inputs: Sequence[str], hub: Hub | None, tokenizer: Path, options: Options, unit_bytes: int | None
) -> Partition:
    """Cut a corpus into units; of each file only the head, the tail and the cuts are read.

    Args:
        inputs: see `sources.find`.
        hub: a dataset that `datasets` streams, after the inputs.
        tokenizer: folder of the tokenizer.
        options: see `Options`.
        unit_bytes: size of a unit; None for about 4,096 units of 8 MiB to 1 GiB, smaller ones at the end.

    Raises:
        UserError: for an input that is missing or unreadable, or that cannot hold the keys.
    """
    sources = [Source.of_file(path) for path in find(inputs)] + ([hub_source(hub)] if hub else [])
    check_formats(sources, options.keys)
    empty = [source.path for source in sources if source.size == 0]
    if 0 < len(empty) < len(sources):
        print(f"{len(empty)} of {len(sources)} files have 0 bytes, the first: {empty[0]}")
    total = sum(source.size for source in sources)
    most = unit_bytes or min(max(total // MANY_UNITS, SMALLEST), LARGEST)
    least = most if unit_bytes or hub else SMALLEST_OF_TAIL
    unit = options.keys.reading().unit
    units: list[tuple[Span, ...]] = []
    held: list[Span] = []
    size = 0  # of the spans in `held`, which may be very many
    left = total

    def target() -> int:
        return max(least, min(most, left // TAIL))

    for number, source in enumerate(sources):
        for span in cut(number, source, target, unit):
            held.append(span)
            size += span.size
            if size >= target():
                units.append(tuple(held))
                left -= size
                held, size = [], 0
    units += [tuple(held)] if held else []
    found = Tokenizer.load(tokenizer)
    if missing := check_format(found, options.keys):
        where = "--message-format" if options.keys.chat_template is None else "--chat-template"
        names = f"{', '.join(missing)} of {where}"
        print(f"{names}: not special tokens of {tokenizer}, encoded as ordinary text")
    folder = os.path.abspath(tokenizer)
    return Partition(tuple(sources), options, folder, found.sha256, tuple(units))


def _absolute(source: Source) -> str:
    """Return the path of a source; plans of version 0.2.0 and earlier have paths as they were given."""
    return source.path if source.hub else os.path.abspath(source.path)


Difference = tuple[str, Any, Any]


def differences(old: Partition, new: Partition) -> list[Difference]:
    """Return what differs between two partitions, except the cut into units: (name, then, now)."""
    found: list[Difference] = []
    before, now = old.options.to_json(), new.options.to_json()
    names = {"names": "the keys", "messages": option("messages_key"), "split": option("split_documents")}
    found += [
        (names.get(name, option(name)), before.get(name), now.get(name))
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if old.tokenizer_sha256 != new.tokenizer_sha256:
        found.append(("the tokenizer's sha256", old.tokenizer_sha256[:12], new.tokenizer_sha256[:12]))
    before_paths, paths = ([_absolute(source) for source in of.sources] for of in (old, new))
    if before_paths != paths:
        gone = [path for path in before_paths if path not in set(paths)]
        come = [path for path in paths if path not in set(before_paths)]
        found.append(
            ("the list of inputs", gone or f"{len(old.sources)} files", come or f"{len(new.sources)} files")
        )
        return found
    for one, other in zip(old.sources, new.sources, strict=True):
        for what in ("size", "mtime_ns", "ends"):
            if getattr(one, what) != getattr(other, what):
                name = {"ends": "hash of head and tail", "mtime_ns": "time of change (ns)"}.get(what, what)
                found.append((f"{one.path}: its {name}", getattr(one, what), getattr(other, what)))
                break
    return found


def write_partition(partition: Partition, folder: Path) -> None:
    """Write plan.json into the folder of the parts."""
    values = partition.to_json()
    lines = [f"{json.dumps(key)}: {_listed(value)}" for key, value in values.items()]
    replace_text(folder / PARTITION_FILE, "{\n" + ",\n".join(lines) + "\n}\n")


def _listed(value: Any) -> str:
    """Return a value as JSON, a list with one entry per line."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[" + ",".join(f"\n  {json.dumps(entry)}" for entry in value) + "]"


def read_partition(folder: Path) -> Partition | None:
    """Return the partition in a folder of parts, or None; raise a `UserError` if plan.json is damaged."""
    path = folder / PARTITION_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, this program reads {FORMAT}")
        return Partition(
            tuple(Source.from_json(source) for source in values["sources"]),
            Options.from_json(values["options"]),
            values["tokenizer"],
            values["tokenizer_sha256"],
            tuple(tuple(Span(*span) for span in unit) for unit in values["units"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): start over with --restart.") from None
