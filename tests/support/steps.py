"""Run training steps on synthetic pairs and write what came of them; started by the tests.

usage: steps.py OUTPUT.pt STEPS LEADER.pt|- [--section.key value ...]

The chains reveal by the scores that LEADER.pt, the output of one process, has for the same slot and step. Two
engines round differently, and scores that nearly tie are ranked differently then: chains that followed each
engine's own scores would part, and with them all that is compared.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline import config as configuration
from pipeline import objectives
from pipeline.base import cli
from pipeline.base.files import write_hashed
from pipeline.chains.groups import SlotGroups
from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.data.examples import ANSWER, PADDING, PROMPT, Array, stack_examples
from pipeline.engine.build import build_engine
from pipeline.engine.plain import PlainEngine
from pipeline.evaluation.likelihood import estimate
from pipeline.model.batch import HeadOutput, MaskedBatch, Vocabulary
from pipeline.objectives.seam import Scores
from pipeline.ranks import join_ranks
from pipeline.train import train_step
from pipeline.training.learning_rate import learning_rate
from support.weights import read_weights

LENGTH, VOCABULARY, MASK = 12, 24, 3


class SyntheticPairs:
    """37 random prompts of 4 tokens with an answer of 4 to 8, the prompt again and again, and padding.

    Kept apart, each half is a document of its own.
    """

    def __init__(self, apart: bool) -> None:
        self.apart = apart

    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> dict[str, Array]:
        prompt = np.random.default_rng(index).integers(4, VOCABULARY, 4)
        answer = 4 + index % 5
        roles = np.array([PROMPT] * 4 + [ANSWER] * answer + [PADDING] * (8 - answer), np.int8)
        example = {"tokens": np.tile(prompt, 3), "roles": roles}
        return example | {"documents": np.repeat(np.int32([0, 1]), 6)} if self.apart else example


def weights_of(engine: PlainEngine) -> dict[str, torch.Tensor]:
    """Return a copy of the weights by name."""
    return {name: weight.detach().clone() for name, weight in engine.model.named_parameters()}


class Notes:
    """What this rank's slots show and score at each step, and the scores that their chains follow.

    Attributes:
        values: "masked" and each score by name, [steps, S, L]; NaN where another rank holds the slot.
    """

    def __init__(self, steps: int, slots: int, leader: dict[str, torch.Tensor] | None) -> None:
        self.shape = steps, slots, LENGTH
        self.leader = leader
        self.values: dict[str, torch.Tensor] = {}

    def put(self, name: str, step: int, slots: Array, values: torch.Tensor) -> None:
        """Note `values` [B, L] of `slots` [B]."""
        self.values.setdefault(name, torch.full(self.shape, torch.nan))[step - 1, slots] = values.float()

    def attach(self, group: SlotGroup) -> None:
        """Note every step of `group`, and let its chains follow the leader."""
        advance = group.advance

        def noted(batch: MaskedBatch, output: HeadOutput, step: int) -> None:
            masked = group.state.masked
            self.put("masked", step, group.slots, masked)
            own = {k: v for k, v in vars(Scores.of(output, batch.rows, masked)).items() if v is not None}
            for name, values in own.items():
                self.put(name, step, group.slots, values)
            if self.leader is not None:
                led = {name: self.leader[name][step - 1, group.slots].flatten() for name in own}
                output = output._replace(**{name: values[batch.rows] for name, values in led.items()})
            advance(batch, output, step)

        group.advance = noted  # type: ignore[method-assign]


def orthogonalise_in_fp32() -> None:
    """Let Muon's Newton-Schulz run in fp32, in torch's own and in the engine's.

    It multiplies the smallest singular values by hundreds, and with them bf16's rounding of a gradient whose
    last bit differs between two engines. In bf16 they are compared on equal gradients (test_muon.py).
    """

    def whitened(grad: torch.Tensor, abc: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
        x = grad / grad.norm().clamp(min=eps)
        for _ in range(steps):
            x = abc[0] * x + abc[1] * (x @ x.T) @ x + abc[2] * (x @ x.T) @ (x @ x.T) @ x
        return x

    torch.optim._muon._zeropower_via_newtonschulz = whitened
    if "pipeline.engine.deepspeed.muon" in sys.modules:
        sys.modules["pipeline.engine.deepspeed.muon"].PRECISION = torch.float32


def main(output: str, steps: int, leader: str, arguments: list[str]) -> None:
    config = configuration.load(["--run_dir", "unused", "--data.prefixes", "[unused]", *arguments])
    ranks = join_ranks(config.engine.device, config.engine.sequence_parallel_size)
    ranks.connect()
    engine = build_engine(config, ranks, Vocabulary(VOCABULARY, VOCABULARY, MASK))
    orthogonalise_in_fp32()
    data = SyntheticPairs(config.data.isolate_documents)
    slots, *larger = config.train.batches.items()
    stream = SlotStream(data, slots[1], config.train.seed, workers=1, larger=dict(larger))
    groups = SlotGroups(config, ranks, stream, objectives.build(config, MASK, True))
    led_by = None if leader == "-" else torch.load(leader, weights_only=True)["notes"][0]
    notes = Notes(steps, config.slots, led_by)
    attached: set[SlotGroup] = set()
    losses, norms, history = [], [], []
    if isinstance(engine, PlainEngine):
        history.append(weights_of(engine))
    for step in range(1, steps + 1):
        rate = learning_rate(step, steps, config.optimizer.learning_rate, config.schedule)
        for group in set(groups.of_step(step)) - attached:
            notes.attach(group)
            attached.add(group)
        loss, norm = train_step(engine, groups.of_step(step), rate, step)
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
    examples = stack_examples([data[i] for i in few], few).to(ranks.device)
    layout = objectives.build(config, MASK, True).at(steps).layout
    likelihood = estimate(engine.evaluate, layout, examples, steps, draws=16, batch_size=20)
    folder = Path(output + ".model")
    for name, state in engine.snapshot(folder).items():
        write_hashed(folder / name, partial(torch.save, state))
    everywhere = ranks.all_gather(notes.values)
    if ranks.is_first:
        result = {"notes": everywhere, "sequence_size": ranks.sequence_size}
        result |= {"losses": losses, "norms": norms, "averaged_nll": averaged, "history": history}
        result |= {"nll": likelihood.nll, "standard_error": likelihood.standard_error}
        result["communication_share"] = engine.take_communication_share()
        result |= {"weights": read_weights(folder), "average": read_weights(folder, averaged=True)}
        torch.save(result, output)
    stream.close()
    engine.close()


if __name__ == "__main__":
    output, steps, leader, *settings = sys.argv[1:]
    cli.run(lambda _: main(output, int(steps), leader, settings), of_ranks=True)
