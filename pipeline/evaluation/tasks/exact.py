"""Exact match."""

from __future__ import annotations

from pipeline.evaluation.tasks.task import Item, Task, Verdict


class Exact(Task):
    """The answer must equal the reference, up to the amount of white space between words."""

    def score(self, item: Item, answer: str) -> Verdict:
        found = " ".join(answer.split())
        return Verdict(found == " ".join(item.reference.split()), found)
