"""Run training steps on synthetic pairs and write losses and final weights; started by the tests.

usage: steps.py OUTPUT.pt STEPS [--section.key value ...]
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline import config as configuration
from pipeline import objectives
from pipeline.base.files import write_hashed
from pipeline.chains.slots import make_groups
from pipeline.chains.stream import SlotStream
from pipeline.data.examples import ANSWER, PADDING, PROMPT, Array, stack_examples
from pipeline.engine.build import build_engine, read_weights
from pipeline.engine.plain import PlainEngine
from pipeline.evaluation.likelihood import estimate
from pipeline.model.batch import Vocabulary
from pipeline.ranks import join_ranks
from pipeline.train import train_step
from pipeline.training.learning_rate import learning_rate

LENGTH, VOCABULARY, MASK = 12, 24, 3


class SyntheticPairs:
    """37 random prompts of 4 tokens with an answer of 4 to 8, the prompt again and again, and padding."""

    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> dict[str, Array]:
        prompt = np.random.default_rng(index).integers(4, VOCABULARY, 4)
        answer = 4 + index % 5
        roles = np.array([PROMPT] * 4 + [ANSWER] * answer + [PADDING] * (8 - answer), np.int8)
        return {"tokens": np.tile(prompt, 3), "roles": roles}


def weights_of(engine: PlainEngine) -> dict[str, torch.Tensor]:
    """Return a copy of the weights by name."""
    return {name: weight.detach().clone() for name, weight in engine.model.named_parameters()}


def main(output: str, steps: int, arguments: list[str]) -> None:
    config = configuration.load(["--run_dir", "unused", "--data.prefixes", "[unused]", *arguments])
    ranks = join_ranks(config.engine.device, config.engine.sequence_parallel_size)
    ranks.connect()
    engine = build_engine(config, ranks, Vocabulary(VOCABULARY, VOCABULARY, MASK))
    stream = SlotStream(SyntheticPairs(), config.slots, config.train.seed, workers=1)
    groups = make_groups(config, ranks, stream, objectives.build(config, MASK, True))[0]
    losses, norms, history = [], [], []
    if isinstance(engine, PlainEngine):
        history.append(weights_of(engine))
    for step in range(1, steps + 1):
        rate = learning_rate(step, steps, config.optimizer.learning_rate, config.schedule)
        loss, norm = train_step(engine, groups, rate, step)
        losses.append(float(ranks.sum(loss[None])) / ranks.world_size)
        norms.append(float(norm))
        if isinstance(engine, PlainEngine):
            history.append(weights_of(engine))
    batch = groups[0].inputs(steps + 1)
    before = engine.evaluate(batch).nll
    with engine.averaged_weights():
        averaged = engine.evaluate(batch).nll
    assert torch.equal(engine.evaluate(batch).nll, before), "the weights are back, bit for bit"
    assert not torch.equal(averaged, before)
    few = range(4)
    examples = stack_examples([SyntheticPairs()[i] for i in few], few).to(ranks.device)
    layout = objectives.build(config, MASK, True).at(steps).layout
    likelihood = estimate(engine.evaluate, layout, examples, steps, draws=16, batch_size=20)
    folder = Path(output + ".model")
    for name, state in engine.snapshot(folder).items():
        write_hashed(folder / name, partial(torch.save, state))
    engine.ranks.barrier()
    if ranks.is_first:
        result = {"losses": losses, "norms": norms, "averaged_nll": averaged, "history": history}
        result |= {"nll": likelihood.nll, "standard_error": likelihood.standard_error}
        result["communication_share"] = engine.take_communication_share()
        result |= {"weights": read_weights(folder), "average": read_weights(folder, averaged=True)}
        torch.save(result, output)
    stream.close()
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
