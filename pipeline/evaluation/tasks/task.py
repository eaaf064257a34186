"""What a task is: items to answer, and a verdict on an answer."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.errors import UserError
from pipeline.corpus.records import Document, Keys, read_all


@dataclass(frozen=True)
class Item:
    """One thing that is asked.

    Attributes:
        prompt: what the model is given.
        reference: what the answer is compared with; empty where rules decide.
    """

    prompt: str
    reference: str


@dataclass(frozen=True)
class Verdict:
    """What a task thinks of an answer.

    Attributes:
        right: whether it is right.
        found: what was read out of it, such as a number, or why nothing was.
    """

    right: bool
    found: str


class Task:
    """Reads its items, and scores one answer at a time; to be closed after use.

    Attributes:
        keys: of prompt and reference in a record of its files.
        parallel: answers that are scored at a time.
    """

    keys: tuple[str, str] = ("prompt", "answer")
    parallel = 1

    def read(self, path: Path, keys: tuple[str, str] | None = None) -> list[Item]:
        """Return the items of a file of records (jsonl, also compressed; parquet, arrow).

        Args:
            path: the file.
            keys: where prompt and reference are, instead of `Task.keys`.

        Raises:
            UserError: for a file without items, or with a record that is none; it names the line.
        """
        items: list[Item] = []
        for record in read_all([path], Keys(keys or self.keys)):
            item = Item(*record.texts)
            self.check(item, record, items)
            items.append(item)
        if not items:
            raise UserError(f"{path} holds no item: give --data a file with one at least.")
        return items

    def check(self, item: Item, record: Document, before: Sequence[Item]) -> None:
        """Raise a `UserError` for a record that is no item, or not one of the kind of those before it."""

    def answer_length(self, items: Sequence[Item]) -> int | None:
        """Return how many tokens an answer has; None for as many as fit behind the prompt."""
        return None

    def score(self, item: Item, answer: str) -> Verdict:
        """Judge an answer; several threads may."""
        raise NotImplementedError

    def score_all(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        """Judge an answer to each item, `parallel` at a time."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self.score, items, answers))

    def summary(self, right: int, total: int) -> str:
        """Return the last line of an evaluation."""
        return f"right {right / total:.4f} of {total} items"

    def close(self) -> None:
        """Give back what scoring took."""
