"""Small datasets in memory, and a small model for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

from pipeline.config import Config, DataConfig, EngineConfig, ModelConfig
from pipeline.data.examples import ANSWER, PADDING, PROMPT, Array
from pipeline.engine.plain import PlainEngine
from pipeline.model.batch import Vocabulary
from pipeline.ranks import Ranks

MASK = 4


class Pairs:
    """Prompts of 2 tokens and answers of 1 to `longest`; token 100 + i marks example i."""

    def __init__(self, size: int, longest: int = 6) -> None:
        self.size = size
        self.longest = longest

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Array]:
        assert 0 <= index < self.size
        random = np.random.default_rng(index)
        length = int(random.integers(1, self.longest + 1))
        roles = np.full(2 + self.longest, PADDING, np.int8)
        roles[:2], roles[2 : 2 + length] = PROMPT, ANSWER
        tokens = random.integers(5, 50, 2 + self.longest)
        tokens[0] = 100 + index
        return {"tokens": tokens, "roles": roles}


@contextmanager
def sharp_engine(
    length: int, prediction: Literal["same", "shifted"] = "same", sharpness: float = 10.0
) -> Iterator[PlainEngine]:
    """Give a plain engine with a small model of `Pairs` whose tokens differ much in how likely they are."""
    config = Config(
        "unused",
        data=DataConfig(sequence_length=length),
        model=ModelConfig(layers=1, hidden_size=32, heads=2, intermediate_size=48, prediction=prediction),
        engine=EngineConfig(kind="plain"),
    )
    engine = PlainEngine(config, Ranks(), Vocabulary(160, 150, MASK))
    with torch.no_grad():
        engine.model.lm_head.weight.mul_(sharpness)  # type: ignore[union-attr,operator]
    yield engine
    engine.close()
