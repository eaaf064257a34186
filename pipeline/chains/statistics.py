"""Statistics of chains and scores: sums in bins, added up on the device and read once an interval.

Every sum has a fixed place in one tensor, to which a step adds. No operation has a data-dependent size, so
nothing waits for the device. Each bin is a sum over all rows in a fixed order, where a scatter would add in
the order in which a GPU's threads arrive, and round differently each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.data.examples import PROMPT
from pipeline.model.batch import HeadOutput
from pipeline.objectives.seam import Chains, ChainState, Reveals

TENTHS = 10  # bins of mask ratio and confidence
MOST_BINS = 64  # of stage and age; longer chains have several stages in a bin
_TIE = 1e-5  # nats: largest rounding difference between two sums of the same logits


class Walk(NamedTuple):
    """One training step of the chains of B sequences.

    Attributes:
        chains: the clean sequences, and how they are cut into chains.
        state: masks and stages that the step was trained on.
        age: [B] int64, steps that each example has been trained on before this one.
        ended: [B] bool, examples that leave their slot after the step.
        reveals: what the chains reveal after the step, if the objective reveals at all.
    """

    chains: Chains
    state: ChainState
    age: Tensor
    ended: Tensor
    reveals: Reveals | None


# Metrics that are means over the steps and groups of an interval: their value [] in one step of a group, from
# the walk and the number of masked positions of each chain, [B, N].
MEANS: dict[str, Callable[[Walk, Tensor], Tensor]] = {
    "masked_fraction": lambda walk, count: (
        (count.sum(dim=1) / walk.chains.examples.answer_length).double().mean()
    ),
    "mean_stage": lambda walk, count: (walk.state.stage * (count > 0)).sum() / (count > 0).sum().clamp(min=1),
}
TOTALS = (
    "steps",
    *MEANS,
    "prompt",
    "chains_ended",
    "length_sum",
    *(f"reveals_{name}" for name in Reveals._fields),
)


class Histogram(NamedTuple):
    """Counts between consecutive edges."""

    edges: list[float]
    counts: list[float]


class ChainFigures(NamedTuple):
    """Figures of an interval.

    Attributes:
        scalars: figures by name.
        bins: by name, a figure for each bin that is not empty.
        histograms: by name.
        masked_rows: masked positions per step, over all ranks.
        prompt_length: mean tokens per prompt.
    """

    scalars: dict[str, float]
    bins: dict[str, dict[str, float]]
    histograms: dict[str, Histogram]
    masked_rows: float
    prompt_length: float


class ChainStatistics:
    """Sums over one group of slots since they were last taken."""

    def __init__(self, longest: int, device: torch.device, sources: Sequence[str] = ()) -> None:
        """Begin with zeros.

        Args:
            longest: most steps that an example is trained on, which is also the largest number of stages.
            device: device of the chains.
            sources: names of the datasets, if the examples tell theirs.
        """
        self.longest = longest
        self.sources = list(sources)
        self.bins = min(longest, MOST_BINS)
        sizes = {  # in the order of `of_step`
            **dict.fromkeys(TOTALS, 1),
            "ratio_count": TENTHS,
            "ratio_nll": TENTHS,
            "stage_count": self.bins,
            "stage_nll": self.bins,
            "confidence_count": TENTHS,
            "confidence_sum": TENTHS,
            "confidence_correct": TENTHS,
            "age": self.bins,
            "length": self.bins,
            "source_count": len(self.sources),
            "source_loss": len(self.sources),
        }
        self.places: dict[str, slice] = {}
        total = 0
        for name, size in sizes.items():
            self.places[name] = slice(total, total + size)
            total += size
        self.sums = torch.zeros(total, dtype=torch.float64, device=device)

    def of_step(self, walk: Walk, rows: Tensor, weights: Tensor, output: HeadOutput) -> Tensor:
        """Return the sums of one step of the group, for `add`, without waiting for the device.

        Args:
            walk: the step of the chains.
            rows: [R] int64, the masked positions as indices into the flattened [B * L].
            weights: [R] float32, their weights in the loss.
            output: loss and scores of `rows`.
        """
        chains, state = walk.chains, walk.state
        count, length = chains.sums(state.masked), chains.length  # [B, N]
        totals = {
            "steps": torch.ones_like(walk.age[0]),
            **{name: value(walk, count) for name, value in MEANS.items()},
            "prompt": (chains.examples.roles == PROMPT).sum(dim=1).double().mean(),
            "chains_ended": walk.ended.sum(),
            "length_sum": ((walk.age + 1) * walk.ended).sum(),
        }
        if walk.reveals is not None:
            totals |= {f"reveals_{name}": each.sum() for name, each in walk.reveals._asdict().items()}
        zero = torch.zeros_like(walk.age[:1], dtype=torch.float64)  # [1]
        parts = [totals[name].double()[None] if name in totals else zero for name in TOTALS]

        tenth = (TENTHS * count - 1).div(length.clamp(min=1), rounding_mode="floor")  # (0, 0.1] is the first
        width = chains.index.shape[1]
        chain = rows // width * chains.count + chains.index.flatten()[rows]  # [R], in the flattened [B, N]
        nll, confidence = output.nll, output.confidence  # [R]
        one = torch.ones_like(nll)
        parts += _sums(tenth.clamp(0, TENTHS - 1).flatten()[chain], TENTHS, one, nll)
        parts += _sums(self._bin(state.stage).flatten()[chain], self.bins, one, nll)
        right = nll + confidence.log() < _TIE  # x0 is the likeliest token
        bins = (confidence * TENTHS).long().clamp(0, TENTHS - 1)
        parts += _sums(bins, TENTHS, one, confidence, right)
        parts += _sums(self._bin(walk.age), self.bins, torch.ones_like(walk.age), walk.ended)
        if self.sources:
            sources = chains.examples.sources
            assert sources is not None
            losses = nll * weights * len(sources)  # the mean over sequences becomes a sum
            parts += _sums(sources, len(self.sources), torch.ones_like(sources))
            parts += _sums(sources[rows // width], len(self.sources), losses)
        return torch.cat(parts)

    def add(self, sums: Tensor) -> None:
        """Add the sums of one step."""
        self.sums += sums

    def _bin(self, values: Tensor) -> Tensor:
        """Return the bins of stages or ages, which are below `longest`."""
        return (values * self.bins // self.longest).clamp(0, self.bins - 1)

    def take(self) -> Tensor:
        """Return the sums since the last call, on the device; those of all groups and ranks can be added."""
        taken, self.sums = self.sums, torch.zeros_like(self.sums)
        return taken

    def figures(self, sums: list[float], steps: int, sequence_size: int = 1) -> ChainFigures:
        """Return the figures of added sums.

        Args:
            sums: sum of `take` over all groups and ranks.
            steps: optimizer steps in them.
            sequence_size: ranks that hold, and count, the same chains.
        """
        part = {name: sums[place] for name, place in self.places.items()}
        total = {name: part[name][0] for name in TOTALS}
        positions, right = max(1, sum(part["confidence_count"])), part["confidence_correct"]
        scalars = {
            **{name: total[name] / total["steps"] for name in MEANS},
            "chains_ended_per_step": total["chains_ended"] / steps / sequence_size,
            "calibration/confidence": sum(part["confidence_sum"]) / positions,
            "calibration/accuracy": sum(right) / positions,
            "calibration/error": calibration_error(part["confidence_sum"], right, positions),
        }
        if total["chains_ended"]:
            scalars["chains/mean_length"] = total["length_sum"] / total["chains_ended"]
        if total["reveals_chains"]:
            revealed = total["reveals_ranked"] + total["reveals_by_threshold"]
            scalars["chains/reveals_per_step"] = revealed / total["reveals_chains"]
            scalars["chains/threshold_share"] = total["reveals_by_threshold"] / max(1, revealed)
        tenths = [f"{number / TENTHS:.1f}-{(number + 1) / TENTHS:.1f}" for number in range(TENTHS)]
        starts = [-(-number * self.longest // self.bins) for number in range(self.bins + 1)]
        stages = [f"{start:02d}" for start in starts]
        bins = {
            "loss_by_mask_ratio": _means(tenths, part["ratio_nll"], part["ratio_count"]),
            "loss_by_stage": _means(stages, part["stage_nll"], part["stage_count"]),
            "accuracy_by_confidence": _means(tenths, right, part["confidence_count"]),
        }
        if self.sources:
            bins["loss_by_source"] = _means(self.sources, part["source_loss"], part["source_count"])
        lasted = [float(start + 1) for start in starts]  # an age of 0 is the first step
        histograms = {
            "confidence": Histogram([n / TENTHS for n in range(TENTHS + 1)], part["confidence_count"]),
            "chain_age": Histogram(lasted, part["age"]),
            "chain_length": Histogram(lasted, part["length"]),
        }
        prompt_length = total["prompt"] / total["steps"]
        return ChainFigures(scalars, bins, histograms, positions / steps / sequence_size, prompt_length)


def _sums(bins: Tensor, count: int, *values: Tensor) -> list[Tensor]:
    """Return for each of the `values` [R] its sums in the `bins` [R] int64, [count] float64."""
    inside = bins == torch.arange(count, device=bins.device)[:, None]  # [count, R]
    return [torch.where(inside, value.double(), 0.0).sum(dim=1) for value in values]


def _means(names: list[str], totals: list[float], counts: list[float]) -> dict[str, float]:
    """Return the means of the bins that are not empty."""
    found = zip(names, totals, counts, strict=False)
    return {name: total / count for name, total, count in found if count}


def calibration_error(confidences: list[float], right: list[float], positions: float) -> float:
    """Return the expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

    Args:
        confidences: sum of the confidences in each bin.
        right: positions in each bin where the likeliest token is the true one.
        positions: in all bins.
    """
    return sum(abs(each - true) for each, true in zip(confidences, right, strict=True)) / positions
