"""Measures of a model, accuracy or likelihood, and the loop over the items of an evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Protocol

import torch

from pipeline.base.progress import Progress
from pipeline.checkpoint.load_model import Loaded
from pipeline.corpus.chat_template import asked
from pipeline.data.tokenizer import Tokenizer
from pipeline.decoding.batching import MaskedSequence, behind_prompts, that_fit
from pipeline.decoding.completing import Completion, fill_sequences
from pipeline.decoding.sampling import SamplingSettings
from pipeline.evaluation.defaults import DRAWS
from pipeline.evaluation.intervals import wilson_interval
from pipeline.evaluation.likelihood import likelihood_of, likelihood_totals, score_answers
from pipeline.evaluation.results import Results, Row
from pipeline.evaluation.tasks import Item, Task, Verdict
from pipeline.ranks import Ranks

_REPORT_EVERY = 10  # seconds, in a log file


class Measure(Protocol):
    """A measure gives one row of results per item, and figures over all rows."""

    def __len__(self) -> int:
        """Return the number of items."""

    def rows(self, loaded: Loaded, numbers: Sequence[int], batch_size: int) -> list[Row]:
        """Return the results of the items `numbers`; each row has its number as ``item``."""

    def figures(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the figures over all rows."""

    def summary(self, figures: dict[str, Any]) -> str:
        """Return the figures as readable lines."""


@dataclasses.dataclass(frozen=True)
class Answers(Measure):
    """Accuracy of decoded answers; an item whose prompt leaves no room for an answer counts as wrong.

    Attributes:
        task: judges the answers.
        items: the items.
        settings: settings of the sampler.
        length: answer length in tokens; None = the task's.
        prompt_format: template of the model's input; ``{prompt}`` is replaced by the item's prompt.
        chat_template: makes that the message of a user; the answer then ends at the special token of a turn.
    """

    task: Task
    items: Sequence[Item]
    settings: SamplingSettings
    length: int | None = None
    prompt_format: str = "{prompt}"
    chat_template: str | None = None

    def __len__(self) -> int:
        return len(self.items)

    def prompts(self, items: Sequence[Item], tokenizer: Tokenizer) -> list[str]:
        """Return the model's input for each item."""
        texts = [self.prompt_format.replace("{prompt}", item.prompt) for item in items]
        if self.chat_template is None:
            return texts
        return [asked(self.chat_template, text, list(tokenizer.model.specials())) for text in texts]

    def answer(self, completion: Completion, tokenizer: Tokenizer) -> str:
        """Return the text that is judged."""
        if self.chat_template is None:
            return completion.text
        ends = set(tokenizer.model.specials().values()) - {tokenizer.pad, tokenizer.unk}
        return tokenizer.decode(itertools.takewhile(lambda token: token not in ends, completion.tokens))

    def check(self, loaded: Loaded) -> None:
        """Raise a `UserError` for prompts that the model cannot answer, before the evaluation starts."""
        prompts = self.prompts(self.items, loaded.tokenizer)
        if not self._that_fit(prompts, loaded):  # raise the error of the first
            behind_prompts(prompts, self._length, loaded.tokenizer, loaded.config)

    @property
    def _length(self) -> int | None:
        return self.length or self.task.answer_length(self.items)

    def _that_fit(self, prompts: Sequence[str], loaded: Loaded) -> dict[int, MaskedSequence]:
        return that_fit(prompts, self._length, loaded.tokenizer, loaded.config)

    def rows(self, loaded: Loaded, numbers: Sequence[int], batch_size: int) -> list[Row]:
        items = [self.items[number] for number in numbers]
        prompts = self.prompts(items, loaded.tokenizer)
        fitting = self._that_fit(prompts, loaded)
        asked, ids, stop = list(fitting.values()), [numbers[i] for i in fitting], loaded.tokenizer.eos
        found = fill_sequences(loaded, asked, self.settings, batch_size, stop, numbers=ids)
        answers = [self.answer(one, loaded.tokenizer) for one in found]
        verdicts = self.task.score_all([items[i] for i in fitting], answers)
        answered = dict(zip(fitting, zip(found, verdicts, strict=True), strict=True))
        nothing = Completion("", [], [], 0), Verdict(False, "not answered: the prompt leaves no room")
        return [
            {
                "item": number,
                "prompt": prompt,
                "reference": item.reference,
                "answer": completion.text,
                "right": verdict.right,
                "found": verdict.found,
                "tokens": completion.tokens,
                "order": completion.order,
                "steps": completion.steps,
            }
            for i, (number, prompt, item) in enumerate(zip(numbers, prompts, items, strict=True))
            for completion, verdict in [answered.get(i, nothing)]
        ]

    def figures(self, rows: Sequence[Row]) -> dict[str, Any]:
        right = sum(row["right"] for row in rows)
        return {
            "right": right,
            "total": len(rows),
            "accuracy": right / len(rows),
            "interval": wilson_interval(right, len(rows)),
            "not_answered": sum(row["steps"] == 0 for row in rows),
            "tokens_per_forward": sum(len(row["tokens"]) for row in rows) / sum(row["steps"] for row in rows),
        }

    def summary(self, figures: dict[str, Any]) -> str:
        low, high = figures["interval"]
        missing = (
            f"{figures['not_answered']} of {figures['total']} items have a prompt that leaves no room for an "
            "answer: they count as wrong\n"
        )
        return (
            f"{missing if figures['not_answered'] else ''}"
            f"accuracy {figures['accuracy']:.4f}, 95% interval {low:.4f} to {high:.4f} (Wilson), "
            f"{figures['tokens_per_forward']:.2f} tokens per forward\n"
            + self.task.summary(figures["right"], figures["total"])
        )


@dataclasses.dataclass(frozen=True)
class Likelihoods(Measure):
    """The bound on the negative log-likelihood of each sequence; exact for autoregressive models.

    Attributes:
        pairs: token ids of (prompt, answer); prompts may be empty.
        too_long: number of pairs excluded because they exceed the trained sequence length.
        draws: masks per sequence.
        seed: seed of the masks.
    """

    pairs: Sequence[tuple[list[int], list[int]]]
    too_long: int = 0
    draws: int = DRAWS
    seed: int = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def rows(self, loaded: Loaded, numbers: Sequence[int], batch_size: int) -> list[Row]:
        pairs = [self.pairs[number] for number in numbers]
        scores = score_answers(loaded, pairs, self.draws, batch_size, self.seed, numbers=numbers)
        return [
            {"item": number, **dataclasses.asdict(score)}
            for number, score in zip(numbers, scores, strict=True)
        ]

    def figures(self, rows: Sequence[Row]) -> dict[str, Any]:
        columns = [
            torch.tensor([row[name] for row in rows], dtype=torch.float64)
            for name in ("nll", "tokens", "bytes")
        ]
        found = dataclasses.asdict(likelihood_of(likelihood_totals(*columns)))
        noise = math.sqrt(sum(row["standard_error"] ** 2 for row in rows)) / len(rows)
        figures = found | {"standard_error_of_masks": noise, "too_long": self.too_long}
        return {name: None if figure != figure else figure for name, figure in figures.items()}  # no NaN

    def summary(self, figures: dict[str, Any]) -> str:
        numbers = {name: "?" if f is None else f"{f:.4f}" for name, f in figures.items()}
        missing = (
            f"{self.too_long} pairs exceed the trained sequence length: excluded\n" if self.too_long else ""
        )
        return (
            f"{missing}bound {numbers['nll']} nats per sequence, standard error {numbers['standard_error']} "
            f"({numbers['standard_error_of_masks']} from the masks)\n"
            f"perplexity {numbers['perplexity']}, {numbers['bits_per_byte']} bits per byte, "
            f"{figures['sequences']} sequences"
        )


def measure_items(
    measure: Measure,
    loaded: Loaded,
    ranks: Ranks,
    batch_size: int,
    results: Results | None = None,
    on_start: Callable[[int, int], Progress] = lambda total, done: Progress(total, done, "item", False),
) -> list[Row]:
    """Return the rows of all items in order, on every rank; they do not depend on the world size.

    Args:
        measure: the measure.
        loaded: the model.
        ranks: the ranks, which split the items; every rank calls this.
        batch_size: items per batch and rank.
        results: file of finished rows; items found there are not measured again.
        on_start: creates the progress display of the first rank.

    Raises:
        UserError: on every rank, for an error on any rank; finished rows are kept in `results`.
    """
    with ranks.agreeing():
        done = results.read() if results is not None and ranks.is_first else {}
    done = ranks.all_gather(done)[0]
    left = [number for number in range(len(measure)) if number not in done]
    mine = left[ranks.rank :: ranks.world_size]
    rows: list[Row] = []
    progress, reported = on_start(len(measure), len(done)), time.monotonic()
    with ranks.agreeing(), closing(progress):
        for start in range(0, len(mine), batch_size):
            found = measure.rows(loaded, mine[start : start + batch_size], batch_size)
            rows += found
            if results is not None:
                results.write(ranks.rank, found)
            progress.advance(min(len(measure), len(done) + len(rows) * ranks.world_size))
            if time.monotonic() - reported > _REPORT_EVERY:
                progress.report(f"ranks: {ranks.world_size}")
                reported = time.monotonic()
    every = [row for part in ranks.all_gather(rows) for row in part] + list(done.values())
    return sorted(every, key=lambda row: int(row["item"]))
