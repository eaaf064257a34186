"""The loss by source: in training against loops, held out against differences of the loss itself."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import objectives
from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.config import Config, DataConfig, ObjectiveConfig
from pipeline.data.examples import Array
from pipeline.objectives.layouts import Whole
from pipeline.training.held_out import held_out_loss
from support.host_reads import host_reads
from support.programs import Outcome
from support.runs import metrics
from support.synthetic import MASK, Pairs, sharp_engine
from support.walks import WIDTH, output

NAMES = ["web", "books", "code"]


class Sourced(Pairs):
    """Pairs of which two in three come from the web, and none from code."""

    def __getitem__(self, index: int) -> dict[str, Array]:
        return super().__getitem__(index) | {"source": np.array(int(index % 3 == 0))}


@pytest.mark.parametrize(
    ("kind", "block", "compiled"),
    [
        ("puma", None, False),
        ("puma", 2, False),
        ("random_masking", None, False),
        ("random_masking", 2, False),
        pytest.param("puma", 2, True, marks=pytest.mark.slow),
    ],
)
def test_training_loss_by_source_equals_loops(kind: str, block: int | None, compiled: bool) -> None:
    """Mean over sequences of the mean over chains of the mean NLL; nothing is read back in a step."""
    settings = ObjectiveConfig(kind, block_size=block, stages=3)  # type: ignore[arg-type]
    schedule = objectives.build(Config("unused", objective=settings), MASK, True)
    stream = SlotStream(Sourced(30), 6, 1, workers=0)
    group = SlotGroup(range(6), stream, schedule, torch.device("cpu"), compiled=compiled, sources=NAMES)
    expected: dict[str, list[float]] = defaultdict(list)
    losses = []
    for number in range(1, 13):
        batch = group.inputs(number)
        found = output(group, batch)
        losses.append(float((found.nll * batch.weights).sum()))
        nll = dict(zip(batch.rows.tolist(), found.nll.tolist(), strict=True))
        for row, position in enumerate(group.examples.ids.tolist()):
            answer = np.flatnonzero(group.examples.roles[row].numpy() == 2)
            chains = [answer[i : i + (block or 9)] for i in range(0, len(answer), block or 9)]
            shown = [[nll[row * WIDTH + p] for p in chain if row * WIDTH + p in nll] for chain in chains]
            source = NAMES[int(stream.index(position) % 3 == 0)]
            expected[source].append(float(np.mean([np.mean(each) for each in shown if each])))
        if compiled:
            group.advance(batch, found, number)
        else:
            with host_reads([group._report]) as reads:
                group.advance(batch, found, number)
            assert reads == []
    figures = group.statistics.figures(group.statistics.take().tolist(), 12)
    by_source = figures.bins["loss_by_source"]
    assert by_source == pytest.approx({name: np.mean(values) for name, values in expected.items()})
    total = sum(by_source[name] * len(expected[name]) for name in by_source)
    assert total / 72 == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_held_out_loss_by_source_is_that_of_its_examples(batch_size: int) -> None:
    """The loss of an example is the difference of the sums with and without it; empty sources have none."""
    layout, data = Whole(MASK, has_padding=True), Sourced(11)
    with sharp_engine(WIDTH) as engine:
        sums = [0.0]
        for count in range(1, 9):
            found = held_out_loss(engine, data, count, 1, layout, 1)
            assert found is not None
            sums.append(found.loss * count)
        each = np.diff(sums)
        result = held_out_loss(engine, data, 8, batch_size, layout, 1, sources=NAMES)
    assert result is not None
    assert result.loss == pytest.approx(sums[8] / 8)
    books = [index % 3 == 0 for index in range(8)]
    wanted = {"web": each[np.logical_not(books)].mean(), "books": each[books].mean()}
    assert result.by_source == pytest.approx(wanted, rel=1e-5)


def test_names_are_short_where_they_differ() -> None:
    assert DataConfig(prefixes=["data/web", "data/books"]).sources == ["web", "books"]
    assert DataConfig(prefixes=["a/web", "b/web"]).sources == ["a/web", "b/web"]
    assert DataConfig(prefixes=["data/web"]).sources == []


@pytest.mark.slow
def test_a_run_on_a_blend_records_them(data: Path, train: Callable[..., Outcome], tmp_path: Path) -> None:
    """Two datasets alike: training figures of both, and held-out ones whose mean is the held-out loss."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(data / f"pairs{suffix}", tmp_path / f"twins{suffix}")
    prefixes = f"[{data / 'pairs'}, {tmp_path / 'twins'}]"
    more = ["--train.steps", "8", "--data.prefixes", prefixes, "--optimizer.ema_decay", "0.5"]
    assert train(tmp_path / "run", *more).code == 0
    lines = metrics(tmp_path / "run")
    trained = [line["loss_by_source"] for line in lines if "loss_by_source" in line]
    assert [set(each) for each in trained] == [{"pairs", "twins"}] * 2
    held_out = next(line for line in lines if "held_out/loss" in line)
    for prefix in ("", "ema_"):
        both = [held_out[f"held_out_by_source/{prefix}{name}"] for name in ("pairs", "twins")]
        assert np.mean(both) == pytest.approx(held_out[f"held_out/{prefix}loss"])
