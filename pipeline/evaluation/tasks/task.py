"""The base class of tasks: items to answer, and verdicts on answers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.errors import UserError
from pipeline.corpus.records import Document, Keys, read_all


@dataclass(frozen=True)
class Item:
    """An item of a task.

    Attributes:
        prompt: input of the model.
        reference: the right answer; empty if rules decide.
    """

    prompt: str
    reference: str


@dataclass(frozen=True)
class Verdict:
    """The judgement of an answer.

    Attributes:
        right: whether the answer is right.
        found: what was parsed from it, such as a number, or why parsing failed.
    """

    right: bool
    found: str


class Task:
    """A task reads items and scores answers; call `close` after use.

    Attributes:
        keys: keys of prompt and reference in a record.
        parallel: number of answers scored in parallel.
    """

    keys: tuple[str, str] = ("prompt", "answer")
    parallel = 1

    def read(self, path: Path, keys: tuple[str, str] | None = None) -> list[Item]:
        """Return the items of a file of records (jsonl, also compressed; parquet, arrow).

        Args:
            path: the file.
            keys: keys of prompt and reference, instead of `Task.keys`.

        Raises:
            UserError: for a file without items, or a bad record; it names the line.
        """
        items: list[Item] = []
        for record in read_all([path], Keys(keys or self.keys)):
            item = Item(*record.texts)
            self.check(item, record, items)
            items.append(item)
        if not items:
            raise UserError(f"{path} holds no items: give --data a file with at least one.")
        return items

    def check(self, item: Item, record: Document, before: Sequence[Item]) -> None:
        """Raise a `UserError` for a record that is not a valid item, or differs in kind from those before."""

    def answer_length(self, items: Sequence[Item]) -> int | None:
        """Return the answer length in tokens; None = up to the trained sequence length."""
        return None

    def score(self, item: Item, answer: str) -> Verdict:
        """Judge an answer; must be thread-safe if `parallel` > 1."""
        raise NotImplementedError

    def score_all(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        """Judge one answer per item, `parallel` at a time."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self.score, items, answers))

    def summary(self, right: int, total: int) -> str:
        """Return the last line of an evaluation's output."""
        return f"right {right / total:.4f} of {total} items"

    def close(self) -> None:
        """Release resources, such as a sandbox."""
