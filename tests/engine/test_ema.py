"""The moving average of the weights: closed form, exchange, files of any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.base.errors import UserError
from pipeline.engine.ema import WeightAverage, file_name, open_average
from pipeline.engine.weights import Piece
from support import oracles

SHAPES = {"wide": (3, 5), "tall": (7, 2), "one": (1,)}


def cut(values: dict[str, torch.Tensor], rank: int, ranks: int) -> WeightAverage:
    """Return the average of one rank of several: every parameter cut into runs of equal length."""
    flat, pieces = [], []
    start = 0
    for name, value in values.items():
        part = -(-value.numel() // ranks)
        mine = value.flatten()[rank * part : (rank + 1) * part]
        pieces.append(Piece(name, tuple(value.shape), rank * part, 0, start, len(mine)))
        flat.append(torch.cat([mine, torch.full((part - len(mine),), torch.nan)]))  # padding, as ZeRO has
        start += part
    return WeightAverage(0.9, [torch.cat(flat)], pieces)


def write(average: WeightAverage, folder: Path, rank: int) -> None:
    torch.save(average.state_dict(), folder / file_name(rank))


def draw(seed: int) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(seed)
    return {name: torch.from_numpy(random.normal(size=s).astype(np.float32)) for name, s in SHAPES.items()}


def test_closed_form_and_exchange() -> None:
    """After each of 200 updates the average is the weighted sum of all weights; an exchange undoes itself."""
    random = np.random.default_rng(0)
    history = [random.normal(size=(4, 3)) for _ in range(201)]
    weight = torch.nn.Parameter(torch.from_numpy(history[0].copy()))
    average = WeightAverage(0.9, [weight], [Piece("w", (4, 3), 0, 0, 0, 12)])
    for n, value in enumerate(history[1:], start=1):
        weight.data.copy_(torch.from_numpy(value))
        average.update()
        np.testing.assert_allclose(
            average.average[0], oracles.weight_average(history[: n + 1], 0.9), atol=1e-12
        )
    before = average.average[0].clone()
    average.exchange()
    assert torch.equal(weight.data, before)
    assert torch.equal(average.average[0], torch.from_numpy(history[-1]))
    average.exchange()
    assert torch.equal(average.average[0], before)
    assert torch.equal(weight.data, torch.from_numpy(history[-1]))


@pytest.mark.parametrize("writers", [1, 2, 4, 16])
def test_files_of_any_number_of_ranks(tmp_path: Path, writers: int) -> None:
    """What 1 to 16 ranks wrote is read by 1, 2, 3 and 5, padding and empty parts included."""
    values = draw(1)
    for rank in range(writers):
        average = cut(values, rank, writers)
        average.updates = 17
        write(average, tmp_path, rank)
    whole = open_average(tmp_path)
    assert {name: w.shape for name, w in whole.items()} == SHAPES
    for name, value in values.items():
        assert torch.equal(whole[name].read(), value)
    for readers in (1, 2, 3, 5, writers):
        for rank in range(readers):
            average = cut(draw(2), rank, readers)
            average.load(tmp_path, rank)
            assert average.updates == 17
            expected = cut(values, rank, readers).state()
            assert all(torch.equal(part, expected[name]) for name, part in average.state().items())


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    for rank in range(2):
        write(cut(draw(1), rank, 2), tmp_path, rank)
    second = tmp_path / file_name(1)
    content = second.read_bytes()
    second.write_bytes(content[:40])
    with pytest.raises(UserError, match=r"ema_00001.pt is damaged"):
        cut(draw(1), 1, 2).load(tmp_path, 1)
    second.unlink()
    with pytest.raises(UserError, match=r"8 of 15 averaged elements of wide"):
        cut(draw(1), 0, 1).load(tmp_path, 0)


def test_a_run_can_begin_to_average(tmp_path: Path) -> None:
    """A checkpoint without an average is no error: the average begins at the weights that were read."""
    average = cut(draw(1), 0, 1)
    average.update()
    average.weights[0].copy_(cut(draw(2), 0, 1).weights[0])
    average.load(tmp_path, 0)
    assert average.updates == 0
    assert torch.equal(average.state()["wide"], draw(2)["wide"].flatten())
