"""Answers that are right word for word."""

from __future__ import annotations

from pipeline.evaluation.tasks.task import Item, Task, Verdict


class Exact(Task):
    """The answer equals the reference; white space counts only as what separates words."""

    def score(self, item: Item, answer: str) -> Verdict:
        """See `Task`."""
        found = " ".join(answer.split())
        return Verdict(found == " ".join(item.reference.split()), found)
