"""What a step needs, on random text: for benchmarks that measure the engine and not the data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline import config as configuration
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


@dataclass(frozen=True)
class RandomText:
    """1,000 sequences of random tokens."""

    tokens: int
    length: int

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, Array]:
        tokens = np.random.default_rng(index).integers(MASK + 1, self.tokens, self.length)
        return {"tokens": tokens, "roles": np.full(self.length, ANSWER, np.int8)}


@contextmanager
def config_with(deepspeed: Mapping[str, Any], arguments: Sequence[str]) -> Iterator[Config]:
    """Give the configuration of a training's arguments, with this DeepSpeed JSON and a folder of its own."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "deepspeed.json")
        path.write_text(json.dumps(deepspeed))
        fixed = ["--run_dir", folder, "--data.prefixes", "[unused]", "--engine.deepspeed_config", str(path)]
        yield configuration.load([*fixed, *arguments])


@contextmanager
def engine_on_random_text(config: Config, tokens: int) -> Iterator[tuple[Engine, list[SlotGroup]]]:
    """Give the configured engine and this rank's slots, over sequences of `tokens` different tokens."""
    ranks = join_ranks(config.engine.device, config.engine.sequence_parallel_size)
    ranks.connect()
    engine = build_engine(config, ranks, Vocabulary(tokens, tokens, MASK))
    text = RandomText(tokens, config.data.sequence_length)
    stream = SlotStream(text, config.slots, config.train.seed, workers=1)
    yield engine, SlotGroups(config, ranks, stream, objectives.build(config, MASK, False)).turns[0]
    stream.close()
    engine.close()
    ranks.disconnect()
