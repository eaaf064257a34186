"""Training data settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.checks import require, require_not_negative, require_positive


@dataclass
class DataConfig:
    """Training data.

    Args:
        tokenizer: Tokenizer folder (tools/train_tokenizer.py).
        prefixes: Datasets written by tools/preprocess_data.py; each is a path without .bin/.idx.
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
        cache: Folder for the example indices; null = dataset_cache in the run folder.
        workers: Threads that prefetch examples; 0 = read in the training thread.
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

    @property
    def sources(self) -> list[str]:
        """Names of the prefixes in metrics: their last parts, if these differ; none for a single prefix."""
        short = [prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in self.prefixes]
        names = short if len(set(short)) == len(short) else self.prefixes
        return names if len(names) > 1 else []

    def check(self) -> None:
        """Raise a `UserError` for the first invalid setting."""
        require_positive("data", self, "sequence_length")
        require_not_negative("data", self, "workers")
        require(
            bool(self.prefixes),
            "data.prefixes is empty: name at least one dataset written by tools/preprocess_data.py.",
        )
        repeated = [prefix for prefix in self.prefixes if self.prefixes.count(prefix) > 1]
        require(
            not repeated,
            f"data.prefixes names {', '.join(repeated[:1])} more than once: list it once, and set "
            "data.weights to sample it more often.",
        )
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
        for key in ("weights", "max_epochs"):
            values = getattr(self, key)
            require(
                values is None or (len(values) == len(self.prefixes) and all(value > 0 for value in values)),
                f"data.{key} is {values}: give one number above 0 for each of the {len(self.prefixes)} "
                "data.prefixes.",
            )
        require_positive("data", self, "temperature")
        require(
            self.weights is None or self.temperature is None,
            f"data.weights and data.temperature ({self.temperature}) are both set: keep one of them.",
        )
        require(
            self.max_epochs is None or self.weights is not None or self.temperature is not None,
            f"data.max_epochs is {self.max_epochs}, but each epoch uses every example once: set data.weights "
            "or data.temperature too, or leave it out.",
        )
        parts = self.split.split(",")
        require(
            len(parts) == 3
            and all(p.strip().replace(".", "", 1).isdigit() for p in parts)
            and float(parts[0]) > 0,
            f"data.split is {self.split!r}: give three shares for training, validation and test, "
            "the first above 0, such as '98,2,0'.",
        )
