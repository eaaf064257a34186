"""PREFIX.json: the metadata of a dataset, its origin, and what became of every record of its corpus."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.base.errors import UserError
from pipeline.base.files import replace_text
from pipeline.base.object_store import is_remote
from pipeline.data.arrays import Array
from pipeline.data.indexed import read_index
from pipeline.data.paths import facts_path, idx_path
from pipeline.data.tokenizer import Tokenizer

if TYPE_CHECKING:  # preprocessing workers start faster without it
    from pipeline.config import DataConfig

FORMAT = 2
LENGTH_BINS = 32  # powers of two
SPECIAL_TOKENS = ("mask", "pad", "eos", "unk")
PACKAGES = ("sentencepiece", "tokenizers", "numpy", "orjson", "pyarrow")


@dataclass
class Counts:
    """What became of the records; each is counted in exactly one place.

    Attributes:
        records: lines, paragraphs or rows read.
        blank: blank lines among them.
        empty: texts of length 0 among them.
        quarantined: bad records, by reason.
        added_by_splitting: documents beyond the first of each record that was split.
        filtered: documents dropped, by filter.
        duplicates: documents dropped because their texts came before.
        documents: documents in the dataset.
        tokens: tokens in the dataset.
        characters: characters that were encoded, also of documents that were then dropped.
        lost_characters: those that decoding does not give back: they became the unknown token, or U+2581 a
            space.
        lost_bytes: size on the disk of the files, or pieces of them, that could not be read to their end.
    """

    records: int = 0
    blank: int = 0
    empty: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    added_by_splitting: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    documents: int = 0
    tokens: int = 0
    characters: int = 0
    lost_characters: int = 0
    lost_bytes: int = 0

    @property
    def bad(self) -> int:
        """Number of quarantined records."""
        return sum(self.quarantined.values())

    def check(self) -> None:
        """Raise a `RuntimeError` unless every record is accounted for."""
        left = self.documents + self.duplicates + sum(self.filtered.values()) + self.bad
        left += self.blank + self.empty
        if self.records + self.added_by_splitting != left:
            raise RuntimeError(f"{self.records} records and {self} do not add up: a bug in this program.")

    @classmethod
    def total(cls, parts: Iterable[Counts]) -> Counts:
        """Return the sum of several counts."""
        total = cls()
        for part in parts:
            for name, value in vars(part).items():
                if isinstance(value, dict):
                    merged = Counter(getattr(total, name)) + Counter(value)
                    setattr(total, name, dict(sorted(merged.items())))
                else:
                    setattr(total, name, getattr(total, name) + value)
        return total

    def describe(self) -> str:
        """Return the counts as one line of text."""
        words = [f"{self.documents:,} documents, {self.tokens:,} tokens from {self.records:,} records"]
        words += [f"{self.blank:,} blank"] if self.blank else []
        words += [f"{self.empty:,} empty"] if self.empty else []
        words += [f"{self.bad:,} quarantined ({_listed(self.quarantined)})"] if self.bad else []
        words += (
            [f"{sum(self.filtered.values()):,} filtered ({_listed(self.filtered)})"] if self.filtered else []
        )
        words += [f"{self.duplicates:,} duplicates"] if self.duplicates else []
        words += [f"{self.lost_bytes:,} bytes of files not read to their end"] if self.lost_bytes else []
        if self.lost_characters:
            words += [f"{self.lost_characters:,} of {self.characters:,} characters cannot be decoded again"]
        return "; ".join(words)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def package_versions() -> dict[str, str]:
    """Return the versions of Python and the packages that make a dataset."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


@dataclass
class DatasetFacts:
    """The contents of PREFIX.json.

    Attributes:
        format: version of the file.
        kind: text, or pairs of prompt and answer.
        tokenizer: folder of the tokenizer, absolute.
        tokenizer_sha256: of its model.
        special_ids: ids of its mask, pad, eos and unk tokens.
        vocab_size: number of its tokens.
        options: of the preprocessing; see `corpus.partition.Options`.
        plan_sha256: identity of inputs and options; None for merged datasets.
        counts: what became of the records.
        longest_document: tokens of the longest document.
        length_histogram: documents by length, rounded up to a power of two: {"1": .., "2": ..}.
        token_histogram: occurrences of each id; for pairs, in the answers.
        prompt_histogram: occurrences of each id in the prompts of pairs.
        sha256: of the .bin and .idx files.
        versions: of the packages that made it.
    """

    format: int
    kind: Literal["text", "pairs"]
    tokenizer: str
    tokenizer_sha256: str
    special_ids: dict[str, int]
    vocab_size: int
    options: dict[str, Any]
    plan_sha256: str | None
    counts: Counts
    longest_document: int
    length_histogram: dict[str, int]
    token_histogram: list[int]
    prompt_histogram: list[int]
    sha256: dict[str, str]
    versions: dict[str, str] = field(default_factory=package_versions)

    def check(self, pairs: bool) -> None:
        """Raise a ValueError for values that no dataset has; the file may have been edited.

        Args:
            pairs: whether the index holds prompts and answers.
        """
        sizes = {
            name: value for name, value in vars(self).items() if name in ("vocab_size", "longest_document")
        }
        for name, value in sizes.items():
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} is {value!r}, not a whole number")
        for name, keys in (("special_ids", SPECIAL_TOKENS), ("sha256", ("bin", "idx"))):
            if not isinstance(getattr(self, name), dict) or not set(keys) <= set(getattr(self, name)):
                raise ValueError(f"{name} lacks one of {', '.join(keys)}")
        for name in ("options", "length_histogram"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} is no object")
        if not isinstance(self.tokenizer, str):
            raise ValueError(f"tokenizer is {self.tokenizer!r}, not a path")
        if self.kind != ("pairs" if pairs else "text"):
            raise ValueError(f"kind is {self.kind!r}, which the index does not hold")
        for name, used in (("token_histogram", True), ("prompt_histogram", pairs)):
            counts = getattr(self, name)
            if not isinstance(counts, list) or len(counts) != (self.vocab_size if used else 0):
                raise ValueError(f"{name} does not have vocab_size = {self.vocab_size} entries")

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.counts.documents

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.counts.tokens

    @property
    def chat_templates(self) -> frozenset[str]:
        """The chat templates that wrote its documents."""
        return _templates_in(self.options)

    @property
    def entropy(self) -> float:
        """Entropy of the token histogram, in nats per token: a trained model must do better."""
        counts = np.array(self.token_histogram, np.float64)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


def _templates_in(options: dict[str, Any]) -> frozenset[str]:
    merged = (_templates_in(part["options"]) for part in options.get("merged", ()))
    own = options.get("chat_template")
    return frozenset().union([] if own is None else [own], *merged)


def write_facts(facts: DatasetFacts, prefix: Path) -> None:
    """Write PREFIX.json, one key per line."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in dataclasses.asdict(facts).items())
    replace_text(facts_path(prefix), "{\n" + ",\n".join(lines) + "\n}\n")


def read_facts(prefix: str | Path) -> DatasetFacts:
    """Return the facts of a dataset; raise a `UserError` if it is missing or damaged."""
    if is_remote(prefix):
        raise UserError(f"{prefix} is in an object store: only a training fetches it. Name a local copy.")
    prefix = Path(prefix)
    index = read_index(prefix)
    path = facts_path(prefix)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, this program reads {FORMAT}")
        facts = DatasetFacts(**{**values, "counts": Counts(**values["counts"])})
        facts.check(pairs=index.modes is not None)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: preprocess the corpus again.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): preprocess the corpus again.") from None
    if (facts.documents, facts.tokens) != (index.documents, index.tokens):
        raise UserError(f"{path} and {idx_path(prefix)} do not belong together: preprocess the corpus again.")
    return facts


def stored_tokenizer(stored: str, dataset: Path) -> Path:
    """Return the folder of a tokenizer named in a dataset's files.

    Datasets of version 0.2.0 and earlier have it as it was given, so it may be relative to any folder: it is
    also looked for from the folders around the dataset.
    """
    for start in (Path(), *dataset.absolute().parents):
        if (start / stored).exists():
            return start / stored
    raise UserError(f"tokenizer {stored} of {dataset} is not there any more: name it by --tokenizer.")


def check_replaceable(prefix: Path) -> None:
    """Raise a `UserError` if a dataset at `prefix` would replace another one, or a foreign PREFIX.json."""
    found = _existing(prefix)
    if found is not None:
        raise UserError(f"{found} exists: give --overwrite to replace it, or another --output-prefix.")


def is_made_from(plan_sha256: str, prefix: Path) -> bool:
    """Return whether a complete dataset at `prefix` was made from the inputs and options of a partition."""
    try:
        return read_facts(prefix).plan_sha256 == plan_sha256
    except UserError:
        return False


def _existing(prefix: Path) -> Path | None:
    """Return the index of the dataset at `prefix`, or a PREFIX.json that `write_facts` did not write."""
    if idx_path(prefix).exists():
        return idx_path(prefix)
    path = facts_path(prefix)
    if not path.exists():
        return None
    with path.open("rb") as file:  # it may be a corpus of any size
        return None if file.read(11) == b'{\n  "format' else path


def length_histogram(lengths: Array) -> Array:
    """Return [LENGTH_BINS] int64: how many lengths round up to 1, 2, 4, ..."""
    bins = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    return np.bincount(bins, minlength=LENGTH_BINS)


def named_lengths(histogram: Array) -> dict[str, int]:
    """Return a length histogram keyed by the upper bounds of its bins, without empty bins at the end."""
    used = np.flatnonzero(histogram)
    return {str(2 ** int(bin)): int(histogram[bin]) for bin in range(used[-1] + 1)} if len(used) else {}


def check_same(facts: Sequence[DatasetFacts], names: Sequence[str], what: str) -> None:
    """Raise a `UserError` unless all datasets have one tokenizer, with the same special ids, and one kind."""
    said = {
        "tokenizer_sha256": "the tokenizer (sha256)",
        "special_ids": "the special ids",
        "kind": "what it holds",
    }
    for name, fact in zip(names, facts, strict=True):
        for key in said:
            first, found = getattr(facts[0], key), getattr(fact, key)
            if first != found:
                short = [value[:12] if isinstance(value, str) else value for value in (first, found)]
                raise UserError(
                    f"{what} {names[0]} and {name} differ in {said[key]}: {short[0]} and {short[1]}. "
                    "Preprocess one of them again."
                )


def check_data(config: DataConfig, tokenizer: Tokenizer) -> dict[str, DatasetFacts]:
    """Return the facts of every dataset, of all phases; raise a `UserError` if one does not fit the run.

    A start of a run calls this once and passes the facts on: their histograms are large.
    """
    facts = {prefix: read_facts(prefix) for prefix in config.all_prefixes}
    for prefix, fact in facts.items():
        if fact.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(
                f"{prefix} was made with another tokenizer (sha256 {fact.tokenizer_sha256[:12]}) than "
                f"data.tokenizer = {config.tokenizer} ({tokenizer.sha256[:12]}): give the "
                "tokenizer of the dataset, or preprocess the corpus again."
            )
        wanted = {"pairs": "pairs", "packed": "text"}[config.kind]
        if fact.kind != wanted:
            raise UserError(
                f"{prefix} holds {fact.kind}, but data.kind is {config.kind!r}: set data.kind to "
                f"{'pairs' if fact.kind == 'pairs' else 'packed'!r}, or preprocess with "
                f"{'--prompt-key and --answer-key' if wanted == 'pairs' else '--text-key'}."
            )
        if fact.documents == 0 or fact.tokens == 0:
            raise UserError(f"{prefix} is empty: preprocess a corpus that has text in it.")
        refuses = config.kind == "pairs" and config.too_long == "error"
        if refuses and fact.longest_document > config.sequence_length:
            raise UserError(
                f"{prefix}: its longest document has {fact.longest_document} tokens, more than "
                f"data.sequence_length = {config.sequence_length}: raise it, or set data.too_long: drop."
            )
    return facts
