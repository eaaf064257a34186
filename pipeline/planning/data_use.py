"""What a run uses of its data: steps, examples and epochs of each phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipeline.config import Config
from pipeline.data.blend import Share, estimated_shares
from pipeline.data.facts import read_facts
from pipeline.data.paths import facts_path
from pipeline.objectives import stages_at


@dataclass(frozen=True)
class PhaseUse:
    """What a phase uses of its data.

    Attributes:
        first_step: of the phase.
        last_step: of the phase.
        examples: that chains begin in it; with objective.threshold, at least.
        epochs: how often an epoch of its mix fits into it.
            None when a dataset does not exist yet.
        datasets: how often it uses an example of each dataset, on average.
        is_least: whether chains may end early, so that these figures are the least.
    """

    first_step: int
    last_step: int
    examples: int
    epochs: float | None
    datasets: dict[str, float]
    is_least: bool

    def describe(self) -> str:
        """Return the figures as a line of text."""
        each = ", ".join(f"{prefix} {epochs:.2f}" for prefix, epochs in self.datasets.items())
        among = (
            "datasets not preprocessed yet" if self.epochs is None else f"{self.epochs:.2f} epochs ({each})"
        )
        return (
            f"steps {self.first_step:,} to {self.last_step:,}: {'at least' if self.is_least else 'about'} "
            f"{self.examples:,} examples, {among}"
        )


def data_use(config: Config, shares: Sequence[Sequence[Share]]) -> list[PhaseUse]:
    """Return the use of each phase.

    Args:
        config: the run.
        shares: for each phase, what its datasets contribute to an epoch; empty = unknown.
    """
    first_steps = [phase.first_step for phase in config.data.by_phase()] + [config.train.steps + 1]
    found = []
    for first, end, parts in zip(first_steps, first_steps[1:], shares, strict=False):
        examples = _begun(config, first, end)
        total = sum(share.used for share in parts)
        epochs = examples / total if total else None
        datasets = {share.prefix: (epochs or 0.0) * share.epochs for share in parts}
        found.append(PhaseUse(first, end - 1, round(examples), epochs, datasets, _may_end_early(config)))
    return found


def planned_use(config: Config) -> list[PhaseUse]:
    """Return the use of each phase by the metadata of its datasets, those that exist; nothing is built.

    Raises:
        UserError: when a dataset is damaged.
    """
    phases = [phase.data for phase in config.data.by_phase()]
    there = [prefix for prefix in config.data.all_prefixes if facts_path(Path(prefix)).exists()]
    facts = {prefix: read_facts(prefix) for prefix in there}
    known = [all(prefix in facts for prefix in data.prefixes) for data in phases]
    return data_use(
        config,
        [
            estimated_shares(data, facts) if is_known else []
            for data, is_known in zip(phases, known, strict=True)
        ],
    )


def _begun(config: Config, first: int, end: int) -> float:
    """Return the examples that begin from step `first` to before `end`: each is trained on for K steps."""
    objective = config.objective
    changes = {objective.switch_step or 0} | config.train.batches.keys()
    if objective.stages_increment:
        changes |= set(range(objective.stages_first_increase or 1, end, objective.stages_interval or 1))
    examples = 0.0
    for start, stop in pairwise([first, *sorted(step for step in changes if first < step < end), end]):
        lasts = stages_at(objective, start) or (2 if objective.complementary else 1)
        examples += (stop - start) * config.train.batch_at(start) / lasts
    return examples


def _may_end_early(config: Config) -> bool:
    return config.objective.threshold is not None
