"""Generative perplexity during training: samples of the engine that trains, scored by a causal model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.data.tokenizer import Tokenizer
from pipeline.decoding.batching import stack_sequences, up_to_end
from pipeline.decoding.sampling import SamplingSettings
from pipeline.engine.protocol import Engine
from pipeline.evaluation.quality import NGRAMS, GenerativePerplexity, read_excerpts, to_be_written
from pipeline.evaluation.results import Row
from pipeline.evaluation.scorers import find_scorer, load_scorer
from pipeline.objectives import decoding_layout
from pipeline.ranks import Ranks
from pipeline.training.filling import fill

KEYS = ("prompt", "answer")
COMPARED = ("perplexity", "entropy")  # with the same figures of the true texts


class ScheduledSamples:
    """The task generative-perplexity; see `scheduled.Scheduled` for the methods.

    Samples are drawn at temperature 1, by noise that is the same at every measurement. The scorer is in
    memory only while a task is measured.

    Attributes:
        settings: what to measure, and when.
        excerpts: what the samples are compared with.
    """

    def __init__(self, number: int, config: Config, tokenizer: Tokenizer, ranks: Ranks) -> None:
        """Read the texts, and load the scorer once on the first rank; every rank calls this.

        Args:
            number: of the task in ``evaluation.tasks``.
            config: the run.
            tokenizer: its tokenizer.
            ranks: all of the run.

        Raises:
            UserError: on every rank, for texts or a scorer that cannot be used.
        """
        self.settings, self.config, self.tokenizer = config.evaluation.tasks[number], config, tokenizer
        self.sampler = SamplingSettings(temperature=1.0, tokens_per_step=self.settings.tokens_per_step)
        settings = self.settings
        keys = (settings.text_key,) if settings.text_key is not None else KEYS
        scorer = Path(settings.scorer or "")

        def called(name: str) -> str:
            return f"evaluation.tasks[{number}].{name}"

        self.scorer_name = called("scorer")
        with ranks.agreeing():
            cut = settings.prefix_length, settings.length, settings.samples
            room = config.data.sequence_length
            self.excerpts = read_excerpts(Path(settings.data), keys, tokenizer, room, *cut, called)
            if ranks.is_first:
                scorer = find_scorer(scorer, self.scorer_name)
                loaded = load_scorer(scorer, torch.device("cpu"), self.scorer_name)
                GenerativePerplexity(self.excerpts, loaded, self.sampler).check(tokenizer, config)
        self.scorer = ranks.all_gather(scorer)[0]

    def measure(self, engine: Engine, step: int, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Return the figures of the samples, and those of the true texts to read them by.

        Raises:
            UserError: on every rank, if the scorer is no longer what it was at the start.
        """
        ranks, count = engine.ranks, len(self.excerpts)
        layout = decoding_layout(self.config, self.tokenizer.mask, step)
        kind, pad, eos = self.config.data.kind, self.tokenizer.pad, self.tokenizer.eos
        with ranks.agreeing():
            scorer = load_scorer(self.scorer, ranks.device, self.scorer_name)
        quality, rows = GenerativePerplexity(self.excerpts, scorer, self.sampler), list[Row]()
        for indices in ranks.batches(count, self.config.train.micro_batch_size):
            numbers = [i % count for i in indices]  # past the end: not counted
            sequences = to_be_written([self.excerpts[i] for i in numbers], self.tokenizer)
            examples, masked = stack_sequences(sequences, numbers, kind, pad, ranks.device)
            found = fill(engine, examples, masked, layout, step, self.sampler, stopped, eos)
            if found is None:
                return None
            samples = [
                (up_to_end(self.tokenizer, tokens[where].tolist()), 1 + int(order.max()))
                for tokens, order, where in zip(*found, masked, strict=True)
            ]
            if ranks.rank % ranks.sequence_size == 0:  # the others of the group have the same samples
                mine = numbers[: max(0, count - indices.start)]
                rows += quality.scored(mine, samples[: len(mine)], self.tokenizer)
        every = [row for part in ranks.all_gather(rows) for row in part]
        figures = quality.figures(sorted(every, key=lambda row: int(row["item"])))
        low, high = figures["perplexity_interval"] or (None, None)
        chosen = {name: figures[name] for name in (*COMPARED, *(f"distinct_{n}" for n in NGRAMS), "empty")}
        chosen |= {"low": low, "high": high}
        chosen |= {f"reference_{name}": figures["reference"][name] for name in COMPARED}
        return {name: value for name, value in chosen.items() if value is not None}

    def describe(self, figures: dict[str, float]) -> str:
        if "perplexity" not in figures:
            return f"perplexity ?: all {len(self.excerpts)} samples are empty"
        return (
            f"perplexity {figures['perplexity']:.3f} of {len(self.excerpts)} samples, unigram entropy "
            f"{figures['entropy']:.3f} nats (true texts: {figures['reference_perplexity']:.3f}, "
            f"{figures['reference_entropy']:.3f})"
        )
