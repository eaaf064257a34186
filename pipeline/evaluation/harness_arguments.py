"""What --model_args may hold, and how it is refused; importing this needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.base.errors import UserError, nearest
from pipeline.checkpoint.manifest import find
from pipeline.corpus.chat_template import read_template
from pipeline.decoding.sampling import NUMBERS, SamplingSettings
from pipeline.evaluation.defaults import DRAWS

OWN_OPTIONS = ("batch_size", "max_batch_size", "device")  # of the harness, which passes them on
_SAMPLER = [field.name for field in dataclasses.fields(SamplingSettings)]
_OPTIONAL = [name for name in _SAMPLER if getattr(SamplingSettings(), name) is None]


@dataclass(frozen=True)
class ModelArguments:
    """The arguments of the harness's model.

    Attributes:
        checkpoint: run folder, RUN:STEP, or checkpoint folder.
        weights: ema or raw; None = ema if the checkpoint has it.
        device: torch device; by default a GPU if available. Of several ranks each has its own.
        batch_size: sequences per forward.
        draws: masks per sequence for its likelihood, an even number.
        check_greedy: also decode each scored continuation, because some metrics (accuracy of lambada_openai)
            need to know whether decoding finds it; False saves one forward per token.
        max_batch_size: unused; the harness passes it for its own batch size search.
        trust_remote_code: unused; the harness passes it for data sets with code.
        verify: compare the hashes of the checkpoint's files.
        chat_template: what --apply_chat_template applies instead of the template of the training; see
            `chat_template.read_template`. Special tokens in all contexts are then those tokens.
        sampler: fields of `SamplingSettings`, such as tokens_per_step=4 or seed=1.
    """

    checkpoint: str
    weights: Literal["ema", "raw"] | None = None
    device: str | None = None
    batch_size: int | str = 64
    draws: int = DRAWS
    check_greedy: bool = True
    max_batch_size: int | None = None
    trust_remote_code: bool = False
    verify: bool = True
    chat_template: str | None = None
    sampler: SamplingSettings = dataclasses.field(default_factory=SamplingSettings)

    @classmethod
    def read(cls, given: dict[str, Any]) -> ModelArguments:
        """Return the checked arguments; raise a `UserError` for the first that is unknown or invalid."""
        own = [field.name for field in dataclasses.fields(cls) if field.name != "sampler"]
        known = sorted({*own, *_SAMPLER} - set(OWN_OPTIONS))
        for name, value in given.items():
            if name not in (*own, *_SAMPLER):
                raise UserError(
                    f"--model_args has unknown setting {name}: choose from {known}.{nearest(name, known)}"
                )
            _check_type(name, value)
        sampler = SamplingSettings(**{name: given[name] for name in _SAMPLER if name in given})
        sampler.check(lambda name: f"{name} in --model_args")
        found = cls(
            **{"checkpoint": ""} | {name: given[name] for name in own if name in given}, sampler=sampler
        )
        found._check()
        return found

    def _check(self) -> None:
        if not self.checkpoint:
            raise UserError("--model_args names no checkpoint: add checkpoint=RUN, a run folder.")
        if self.weights not in (None, "ema", "raw"):
            raise UserError(f"weights in --model_args is {self.weights}: choose from ema, raw.")
        if not str(self.batch_size).isdecimal() or int(self.batch_size) < 1:
            raise UserError(f"--batch_size is {self.batch_size}: give a number of sequences, 1 or more.")
        if self.draws < 2 or self.draws % 2:
            raise UserError(f"draws in --model_args is {self.draws}: give an even number, 2 or more.")

    def check_files(self) -> None:
        """Raise a `UserError` for a checkpoint that is missing or incomplete, or a bad chat template."""
        find(Path(str(self.checkpoint)))
        if self.chat_template is not None:
            read_template(Path(str(self.chat_template)))


def _check_type(name: str, value: Any) -> None:
    """Raise a `UserError` for a value of a wrong type: the harness makes numbers and booleans of texts."""
    if name in ("draws", *NUMBERS):
        right, words = type(value) is int, "a whole number"
    elif name in ("threshold", "temperature", "top_p", "eta"):
        right, words = type(value) in (int, float), "a number"
    elif name in ("cache", "check_greedy", "verify", "trust_remote_code"):
        right, words = type(value) is bool, "true or false"
    else:
        right, words = not isinstance(value, (dict, list)), "a text"
    if not right and (value is not None or name not in _OPTIONAL):
        raise UserError(f"{name} in --model_args is {value}: it must be {words}.")
