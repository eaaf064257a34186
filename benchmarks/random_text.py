"""What a step needs, on random text: for benchmarks that time the engine and not the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pipeline import objectives
from pipeline.chains.groups import SlotGroups
from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.config import Config
from pipeline.data.examples import ANSWER, Array
from pipeline.engine.build import build_engine
from pipeline.engine.protocol import Engine
from pipeline.model.batch import Vocabulary
from pipeline.ranks import join_ranks

MASK = 3


class RandomText:
    """1,000 sequences of random tokens."""

    def __init__(self, tokens: int, length: int) -> None:
        self.tokens = tokens
        self.length = length

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, Array]:
        tokens = np.random.default_rng(index).integers(MASK + 1, self.tokens, self.length)
        return {"tokens": tokens, "roles": np.full(self.length, ANSWER, np.int8)}


@contextmanager
def engine_on_random_text(
    config: Config, tokens: int, length: int
) -> Iterator[tuple[Engine, list[SlotGroup]]]:
    """Give the configured engine and this rank's slots, over sequences of `length` of `tokens` tokens."""
    ranks = join_ranks(config.engine.device, config.engine.sequence_parallel_size)
    ranks.connect()
    engine = build_engine(config, ranks, Vocabulary(tokens, tokens, MASK))
    stream = SlotStream(RandomText(tokens, length), config.slots, config.train.seed, workers=1)
    yield engine, SlotGroups(config, ranks, stream, objectives.build(config, MASK, False)).turns[0]
    stream.close()
    engine.close()
    ranks.disconnect()
