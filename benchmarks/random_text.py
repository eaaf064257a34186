"""What a step needs, on random text: for benchmarks that time the engine and not the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pipeline import objectives
from pipeline.config import Config
from pipeline.data.batch import ANSWER, Array
from pipeline.data.streams import SlotStream
from pipeline.model.batch import Vocabulary
from pipeline.runtime import Engine, build_engine, read_launch
from pipeline.slots import SlotGroup, slots_of_rank

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
    launch, train = read_launch(config), config.train
    engine = build_engine(config, launch, Vocabulary(tokens, tokens, MASK))
    stream = SlotStream(RandomText(tokens, length), train.global_batch_size, train.seed, workers=1)
    accumulation = train.accumulation(launch.data_size)
    slots = slots_of_rank(launch.data_rank, accumulation, train.micro_batch_size)
    schedule = objectives.build(config, MASK, False)
    yield engine, [SlotGroup(part, stream, schedule, launch.device) for part in slots]
    stream.close()
    engine.close()
