"""Training data settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from pipeline.config.checks import require, require_not_negative, require_positive


@dataclass
class PhaseConfig:
    """A later mix of the training data.

    Args:
        first_step: Step from which on every new example is drawn from this mix; chains under way end on their
            old examples.
        prefixes: Datasets of the phase; as data.prefixes.
        weights: As data.weights.
        temperature: As data.temperature.
        max_epochs: As data.max_epochs.
    """

    first_step: int
    prefixes: list[str]
    weights: list[float] | None = None
    temperature: float | None = None
    max_epochs: list[float] | None = None


class Phase(NamedTuple):
    """A phase of the data, the first one included.

    Attributes:
        section: where its mix is set, ``data`` or ``data.phases[0]``.
        first_step: from which on new examples are drawn from it; 1 for the first phase.
        data: the settings of its examples.
    """

    section: str
    first_step: int
    data: DataConfig


@dataclass
class DataConfig:
    """Training data.

    Args:
        tokenizer: Tokenizer folder (tools/train_tokenizer.py).
        prefixes: Datasets written by tools/preprocess_data.py; each is a path without .bin/.idx, or
            s3://BUCKET/..., which each node fetches to data.cache before the start.
        kind: pairs = each document is a prompt and an answer and becomes one example; packed = documents are
            concatenated and cut into examples of sequence_length tokens.
        sequence_length: Tokens per example.
        weights: Sampling weight of each prefix in the blend; null = use every example once per epoch.
        temperature: Instead of weights, sample each prefix in proportion to its tokens^(1/temperature). 1 =
            by size; higher values favour small datasets; null = off.
        max_epochs: For each prefix, the maximum number of times that one epoch of the blend repeats its
            examples; the other prefixes fill the gap. Requires weights or temperature; null = no limit.
        isolate_documents: With packed, no position sees a position of another document: each document is
            trained as if it were alone in its example.
        random_length_share: With packed, the share of the training examples that are cut to a random length,
            uniform from 2 tokens to sequence_length; the rest of the example is padding that the model never
            sees. LLaDA takes 0.01, so that the model also knows short texts.
        split: Shares of the documents for training, validation and test.
        padding: What follows an answer shorter than its example: ignored = padding that the model never
            sees; eos_targets = end-of-sequence tokens that count as part of the answer, so that the model
            learns where to stop.
        too_long: Action for a pair longer than sequence_length: error = stop; drop = leave it out.
        cache: Folder for example indices and fetched datasets; null = dataset_cache in the run folder.
        workers: Threads that prefetch examples; 0 = read in the training thread.
        phases: Later mixes, such as [{first_step: 1001, prefixes: [data/math], temperature: 2}]; prefixes and
            weights above are the first mix.
    """

    tokenizer: str = "data/tokenizer"
    prefixes: list[str] = field(default_factory=list)
    kind: Literal["pairs", "packed"] = "packed"
    sequence_length: int = 512
    weights: list[float] | None = None
    temperature: float | None = None
    max_epochs: list[float] | None = None
    isolate_documents: bool = False
    random_length_share: float = 0.0
    split: str = "98,2,0"
    padding: Literal["ignored", "eos_targets"] = "ignored"
    too_long: Literal["error", "drop"] = "error"
    cache: str | None = None
    workers: int = 2
    phases: list[PhaseConfig] = field(default_factory=list)

    @property
    def sources(self) -> list[str]:
        """Names of the prefixes in metrics: their last parts, if these differ; none for a single prefix."""
        short = [prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in self.all_prefixes]
        names = short if len(set(short)) == len(short) else self.all_prefixes
        return names if len(names) > 1 else []

    def by_phase(self) -> list[Phase]:
        """Return the settings of each phase, in order."""
        found = [Phase("data", 1, replace(self, phases=[]))]
        for number, phase in enumerate(self.phases):
            mix = {key: value for key, value in vars(phase).items() if key != "first_step"}
            settings = replace(self, **mix, phases=[])
            found.append(Phase(f"data.phases[{number}]", phase.first_step, settings))
        return found

    @property
    def all_prefixes(self) -> list[str]:
        """The datasets of all phases, each once."""
        return list(dict.fromkeys(prefix for phase in self.by_phase() for prefix in phase.data.prefixes))

    @property
    def added_prefixes(self) -> list[set[str]]:
        """For each phase, the datasets that no phase before it has."""
        found: list[set[str]] = []
        for phase in self.by_phase():
            found.append(set(phase.data.prefixes).difference(*found))
        return found

    def check(self, steps: int) -> None:
        """Raise a `UserError` for the first setting that is invalid in a run of `steps` steps."""
        require_positive("data", self, "sequence_length")
        require_not_negative("data", self, "workers")
        for key, unset in (("padding", "ignored"), ("too_long", "error")):
            value = getattr(self, key)
            require(
                self.kind == "pairs" or value == unset,
                f"data.{key} is {value!r}, which has no effect with data.kind = {self.kind!r}: leave it out, "
                "or set data.kind to 'pairs'.",
            )
        for key in ("isolate_documents", "random_length_share"):
            value = getattr(self, key)
            require(
                self.kind == "packed" or not value,
                f"data.{key} is {value}, which has no effect with data.kind = {self.kind!r}, where each "
                "example is one document: leave it out.",
            )
        require(
            0 <= self.random_length_share <= 1,
            f"data.random_length_share is {self.random_length_share}: give a share from 0 to 1.",
        )
        before = 1
        for phase in self.by_phase():
            if phase.section != "data":
                _check_first_step(phase, before, steps)
            before = phase.first_step
            _check_mix(phase)
        parts = self.split.split(",")
        require(
            len(parts) == 3
            and all(p.strip().replace(".", "", 1).isdigit() for p in parts)
            and float(parts[0]) > 0,
            f"data.split is {self.split!r}: give three shares for training, validation and test, "
            "the first above 0, such as '98,2,0'.",
        )


def _check_first_step(phase: Phase, before: int, steps: int) -> None:
    key, first = f"{phase.section}.first_step", phase.first_step
    what = "the first step, of data.prefixes" if before == 1 else "that of the phase before it"
    require(first > before, f"{key} is {first}: it must be above {before}, {what}.")
    require(
        first <= steps,
        f"{key} is {first}, beyond train.steps = {steps}: lower it, leave the phase out, or train longer.",
    )


def _check_mix(phase: Phase) -> None:
    """Raise a `UserError` for the first invalid setting of a phase's mix."""
    section, mix = phase.section, phase.data
    require(
        bool(mix.prefixes),
        f"{section}.prefixes is empty: name at least one dataset written by tools/preprocess_data.py.",
    )
    repeated = [prefix for prefix in mix.prefixes if mix.prefixes.count(prefix) > 1]
    require(
        not repeated,
        f"{section}.prefixes names {', '.join(repeated[:1])} more than once: list it once, and set "
        f"{section}.weights to sample it more often.",
    )
    for key in ("weights", "max_epochs"):
        values = getattr(mix, key)
        require(
            values is None or (len(values) == len(mix.prefixes) and all(value > 0 for value in values)),
            f"{section}.{key} is {values}: give one number above 0 for each of the {len(mix.prefixes)} "
            f"{section}.prefixes.",
        )
    require_positive(section, mix, "temperature")
    require(
        mix.weights is None or mix.temperature is None,
        f"{section}.weights and {section}.temperature ({mix.temperature}) are both set: keep one of them.",
    )
    require(
        mix.max_epochs is None or mix.weights is not None or mix.temperature is not None,
        f"{section}.max_epochs is {mix.max_epochs}, but each epoch uses every example once: set "
        f"{section}.weights or {section}.temperature too, or leave it out.",
    )
