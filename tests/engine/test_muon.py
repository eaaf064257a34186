"""Muon on ZeRO's shards equals torch.optim.Muon on whole matrices, bit for bit, wherever the cuts are."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.base.errors import UserError
from pipeline.config import ModelConfig, OptimizerConfig
from pipeline.engine.deepspeed import muon
from pipeline.engine.deepspeed.muon import ShardedMuon, plan_rounds
from pipeline.engine.optimizer import is_muon, parameter_groups, set_learning_rate
from pipeline.engine.weights import Piece
from pipeline.model.batch import Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel

SHAPES = {"wide": (8, 24), "tall": (24, 8), "square": (16, 16), "small": (2, 3)}
SIZE = sum(a * b for a, b in SHAPES.values())
STEPS, RATE, DECAY = 20, 3e-3, 0.1


def cut(places: list[int]) -> list[list[Piece]]:
    """Return the pieces of each rank when the flattened matrices are cut at `places`, as by ZeRO-1 and 2."""
    ranks = []
    for first, last in zip([0, *places], [*places, SIZE], strict=True):
        pieces, begin = [], 0
        for name, shape in SHAPES.items():
            count = shape[0] * shape[1]
            start, stop = max(first, begin), min(last, begin + count)
            if start < stop:
                pieces.append(Piece(name, shape, start - begin, 0, start - first, stop - start))
            begin += count
        ranks.append(pieces)
    return ranks


def split_each(count: int) -> list[list[Piece]]:
    """Return the pieces of each rank when each matrix is cut in `count` equal parts, as by ZeRO-3."""
    ranks = []
    for rank in range(count):
        pieces, start = [], 0
        for name, shape in SHAPES.items():
            part = -(-shape[0] * shape[1] // count)
            offset = rank * part
            length = min(part, max(0, shape[0] * shape[1] - offset))
            pieces.append(Piece(name, shape, offset, 0, start, length))
            start += part
        ranks.append(pieces)
    return ranks


@dataclass
class Wires:
    """Exchanges between threads in place of processes."""

    count: int

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count)
        self.outgoing: dict[int, list[Tensor]] = {}
        self.rank = threading.local()

    def exchange(self, buffer: Tensor, sent: list[int], received: list[int]) -> Tensor:
        own = self.rank.value
        self.outgoing[own] = list(buffer.split(sent))
        self.barrier.wait()
        incoming = [self.outgoing[source][own].clone() for source in range(self.count)]
        self.barrier.wait()
        assert [len(part) for part in incoming] == received
        return torch.cat(incoming)


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def initial() -> dict[str, Tensor]:
    return gradients(-1)


def rate_of(step: int) -> float:
    return RATE * (1 + step) / STEPS


def by_torch() -> dict[str, Tensor]:
    """Return the weights after 20 steps of torch.optim.Muon."""
    weights = {name: nn.Parameter(value) for name, value in initial().items()}
    optimizer = torch.optim.Muon(
        list(weights.values()), momentum=0.9, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate_of(step) * 2
        for name, gradient in gradients(step).items():
            weights[name].grad = gradient
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def shard(values: dict[str, Tensor], pieces: list[Piece]) -> Tensor:
    """Return one rank's flat tensor of `values`, with padding at its end."""
    flat = torch.zeros(sum(piece.length for piece in pieces) + 3)
    for piece in pieces:
        flat[piece.start : piece.start + piece.length] = values[piece.name].flatten()[piece.offset :][
            : piece.length
        ]
    return flat


def train_shards(ranks: list[list[Piece]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Return the weights after 20 steps of `ShardedMuon`, one thread a rank."""
    wires = Wires(len(ranks))
    monkeypatch.setattr(muon, "_exchange", wires.exchange)
    trained = {name: torch.full((a * b,), torch.nan) for name, (a, b) in SHAPES.items()}
    problems: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            wires.rank.value = rank
            pieces = ranks[rank]
            weight = nn.Parameter(shard(initial(), pieces))
            group = {"params": [weight], "weight_decay": DECAY, "lr_ratio": 2.0, "momentum": 0.9}
            optimizer = ShardedMuon([group])
            optimizer.assign([weight], ranks, rank)
            for step in range(STEPS):
                set_learning_rate(optimizer, rate_of(step))
                weight.grad = shard(gradients(step), pieces)
                optimizer.step()
            assert set(optimizer.state[weight]) == {"step", "exp_avg"}, "no second moment"
            for p in pieces:
                trained[p.name][p.offset : p.offset + p.length] = weight.detach()[p.start :][: p.length]
        except BaseException as problem:
            problems.append(problem)
            wires.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for problem in problems:
        raise problem
    return {name: trained[name].view(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    "ranks",
    [cut([]), cut([100, 300]), cut([5, 6, 200]), split_each(2), split_each(4)],
    ids=["whole", "cut", "cut-often", "each-in-2", "each-in-4"],
)
@pytest.mark.parametrize("room", [1, 300, muon.MUON_ROUND])
def test_shards_equal_torch_muon(
    ranks: list[list[Piece]], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps in bf16 from equal gradients: the same bits, in any number of rounds."""
    monkeypatch.setattr(muon, "MUON_ROUND", room)
    expected = by_torch()
    for name, weight in train_shards(ranks, monkeypatch).items():
        assert torch.equal(weight, expected[name]), name


def test_the_work_is_shared() -> None:
    """Of eight equal matrices cut over four ranks, each rank orthogonalises two; small pieces move."""
    names = [str(number) for number in range(8)]
    ranks = [[Piece(name, (8, 8), 16 * rank, 0, 0, 16) for name in names] for rank in range(4)]
    found = [plan_rounds(ranks, rank) for rank in range(4)]
    assert [sum(len(each.matrices) for each in rounds) for rounds in found] == [2] * 4
    whole, splinter = Piece("a", (8, 8), 8, 0, 0, 56), Piece("a", (8, 8), 0, 0, 0, 8)
    assert [each.sent for each in plan_rounds([[splinter], [whole]], 0)] == [[0, 8]]
    assert [each.sent for each in plan_rounds([[splinter], [whole]], 1)] == [[0, 56]]


@pytest.mark.parametrize("tied", [True, False])
def test_muon_updates_the_matrices_of_the_blocks_alone(tied: bool) -> None:
    model = MaskedDiffusionModel(ModelConfig(tie_embeddings=tied, attention_bias=True), Vocabulary(16, 16, 3))
    config = OptimizerConfig(kind="muon", learning_rate=1e-3, muon_learning_rate=2e-3, weight_decay=0.3)
    groups = parameter_groups(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    owner = {names[p]: number for number, group in enumerate(groups) for p in group["params"]}
    assert owner.keys() == set(names.values())
    matrices = {name for name, number in owner.items() if is_muon(groups[number])}
    assert matrices == {name for name in owner if name.endswith("_proj.weight")}
    assert Counter(is_muon(group) for group in groups) == {True: 1, False: 1 if tied else 2}
    optimizer = torch.optim.SGD(groups, lr=0.0)
    set_learning_rate(optimizer, 1e-4)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(2e-4 if is_muon(group) else 1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"muon_learning_rate": 1e-3}, "has no effect with optimizer.kind = 'adamw'"),
        ({"muon_momentum": 0.9}, "has no effect with optimizer.kind = 'adamw'"),
        ({"kind": "muon", "muon_learning_rate": 0.0}, "optimizer.muon_learning_rate is 0.0"),
        ({"kind": "muon", "muon_learning_rate": 0.5}, "give 0.1 or less"),
        ({"kind": "muon", "muon_momentum": 1.0}, "optimizer.muon_momentum is 1.0"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**settings).check()
