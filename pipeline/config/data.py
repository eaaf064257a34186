"""Settings of the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.checks import require, require_positive


@dataclass
class DataConfig:
    """What the model is trained on.

    Args:
        tokenizer: Folder of the tokenizer (tools/train_tokenizer.py).
        prefixes: Datasets as written by tools/preprocess_data.py, each a path without .bin/.idx.
        kind: pairs = one document of prompt and answer is an example; packed = text is cut into examples of
            sequence_length tokens.
        sequence_length: Tokens in an example.
        weights: Share of each prefix in a blend; without it every example of each is used once an epoch.
        temperature: Instead of weights: shares in proportion to tokens^(1/temperature). 1 = by size, more =
            more of the small ones.
        max_epochs: Most times that the examples of each prefix come in an epoch of a blend with weights or a
            temperature; the others give more instead.
        split: Shares of the documents for training, validation and test.
        padding: What follows a short answer: ignored = never seen by the model; eos_targets = end-of-sequence
            tokens that are part of the answer, so that the model learns where to stop.
        too_long: What to do with a pair longer than sequence_length: error or drop.
        cache: Folder of the built example indices; by default dataset_cache in the run folder.
        workers: Threads that read examples ahead; 0 reads in the training thread.
    """

    tokenizer: str = "data/tokenizer"
    prefixes: list[str] = field(default_factory=list)
    kind: Literal["pairs", "packed"] = "packed"
    sequence_length: int = 512
    weights: list[float] | None = None
    temperature: float | None = None
    max_epochs: list[float] | None = None
    split: str = "98,2,0"
    padding: Literal["ignored", "eos_targets"] = "ignored"
    too_long: Literal["error", "drop"] = "error"
    cache: str | None = None
    workers: int = 2

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require_positive("data", self, "sequence_length")
        require(self.workers >= 0, f"data.workers is {self.workers}: it must be 0 or more.")
        require(
            bool(self.prefixes),
            "data.prefixes is empty: name at least one dataset written by tools/preprocess_data.py.",
        )
        repeated = [prefix for prefix in self.prefixes if self.prefixes.count(prefix) > 1]
        require(
            not repeated,
            f"data.prefixes names {', '.join(repeated[:1])} more than once: name it once, and set "
            "data.weights to use it more often.",
        )
        for key, unset in (("padding", "ignored"), ("too_long", "error")):
            value = getattr(self, key)
            require(
                self.kind == "pairs" or value == unset,
                f"data.{key} is {value!r}, which has no effect with data.kind = {self.kind!r}: leave it out, "
                "or set data.kind to 'pairs'.",
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
            f"data.weights and data.temperature ({self.temperature}) are both set: give one of them.",
        )
        require(
            self.max_epochs is None or self.weights is not None or self.temperature is not None,
            f"data.max_epochs is {self.max_epochs}, but every example comes once an epoch: set data.weights "
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
