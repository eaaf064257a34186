"""How far rounding moves a training that takes its sums in another order.

    python -m benchmarks.rounding --output benchmarks/results/rounding.json

It trains the 4x4 puzzles of configs/sudoku_demo.yaml from the same weights with one micro-batch per step, and
with one per rank of `--ranks` ranks: another number of ranks changes the arithmetic in the same way. The
second training runs twice. Once its chains follow the confidences of the first, so both see equal inputs at
every step; once they follow its own. Further options are settings of pipeline.train (--train.steps 200).
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.figures import add_output, write_figures
from benchmarks.trainings import sudoku_settings
from pipeline import config as configuration
from pipeline import objectives
from pipeline.base.cli import ToolParser, run
from pipeline.chains.groups import SlotGroups
from pipeline.chains.stream import SlotStream
from pipeline.config import Config
from pipeline.data.datasets import Datasets, build_datasets
from pipeline.data.facts import check_data
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.build import build_engine
from pipeline.objectives.seam import Scores
from pipeline.ranks import Ranks
from pipeline.training.learning_rate import learning_rate
from pipeline.training.preflight import read_vocabulary

CLOSE = (1e-7, 1e-6, 1e-5)  # gaps whose shares are reported


class Shown(NamedTuple):
    """One step of a training, over all S slots.

    Attributes:
        loss: mean over the slots.
        masked: [S, L] bool, masks of the inputs.
        confidence: [S, L], -inf at unmasked positions.
        revealed: [S, L] bool, what its own scores reveal in chains that do not end.
        kept: [S, L] bool, what they leave masked.
    """

    loss: float
    masked: Tensor
    confidence: Tensor
    revealed: Tensor
    kept: Tensor


class Training:
    """A training in this process, a step at a time."""

    def __init__(self, config: Config, tokenizer: Tokenizer, data: Datasets, micro_batch: int) -> None:
        """Build it, with the global batch in micro-batches of `micro_batch` sequences."""
        self.config = config = replace(config, train=replace(config.train, micro_batch_size=micro_batch))
        self.engine = build_engine(config, Ranks(), read_vocabulary(config, tokenizer))
        stream = SlotStream(data.train, config.slots, config.train.seed, workers=0)
        schedule = objectives.build(config, tokenizer.mask, data.has_padding)
        self.groups = SlotGroups(config, Ranks(), stream, schedule).turns[0]

    def step(self, step: int, leader: Shown | None = None) -> Shown:
        """Run a step; the chains follow the confidences of `leader`, if it is given."""
        losses, parts = [], []
        for group in self.groups:
            batch = group.inputs(step)
            output = self.engine.forward(batch)
            masked = group.state.masked
            scores = Scores.of(output, batch.rows, masked)
            objective = group.objectives.at(step)
            after, _, _ = objective.advance(group.chains, group.state, scores, step, step + 1)
            alive = after.masked.any(dim=1, keepdim=True)
            parts.append((masked, scores.confidence, masked & ~after.masked & alive, after.masked))
            if leader is not None:
                led = leader.confidence[group.slots].flatten()[batch.rows]
                output = output._replace(confidence=led)
            group.advance(batch, output, step)
            self.engine.backward(output.loss)
            losses.append(output.loss.detach())
        train = self.config.train
        self.engine.step(
            learning_rate(step, train.steps, self.config.optimizer.learning_rate, self.config.schedule)
        )
        return Shown(torch.stack(losses).mean().item(), *map(torch.cat, zip(*parts, strict=True)))


class Interval:
    """Counts over some steps."""

    def __init__(self) -> None:
        self.gaps: list[Tensor] = []  # one per chain that reveals and keeps something
        self.parted = 0
        self.losses: list[tuple[float, float, float]] = []
        self.confidences: list[Tensor] = []

    def add(self, one: Shown, led: Shown, free: Shown) -> None:
        """Add a step of the three trainings."""
        assert led.masked.equal(one.masked), "the chains follow"
        lowest = one.confidence.masked_fill(~one.revealed, torch.inf).amin(dim=1)
        highest = one.confidence.masked_fill(~one.kept, -torch.inf).amax(dim=1)
        gaps = lowest - highest
        self.gaps.append(gaps[gaps.isfinite()])
        self.parted += int((led.kept != one.kept).any(dim=1).sum())
        self.losses.append((one.loss, led.loss, free.loss))
        self.confidences.append((led.confidence - one.confidence)[one.masked].abs())
        self.apart = int((free.masked != one.masked).any(dim=1).sum())

    def figures(self) -> dict[str, float]:
        """Return the figures of the interval."""
        gaps, losses = torch.cat(self.gaps), torch.tensor(self.losses, dtype=torch.float64)
        differing, confidences = (losses[:, 1:] - losses[:, :1]).abs(), torch.cat(self.confidences)
        close = {f"gaps_below_{x:.0e}": (gaps < x).sum().item() / max(1, len(gaps)) for x in CLOSE}
        return {
            "loss": losses[:, 0].mean().item(),
            "confidence_difference_median": confidences.median().item(),
            "confidence_difference": confidences.max().item(),
            "loss_difference": differing[:, 0].max().item(),
            "chain_steps": len(gaps),
            **close,
            "chains_parting": self.parted,
            "own_chains_loss": losses[:, 2].mean().item(),
            "own_chains_loss_difference": differing[:, 1].max().item(),
            "own_chains_apart": self.apart,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the three trainings side by side; print and write a line per interval."""
    parser = ToolParser(description="How far rounding moves a training that takes its sums in another order.")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/benchmark_rounding"), help="puzzles, scratch"
    )
    parser.add_argument("--ranks", type=int, default=4, help="ranks that the second training imitates")
    parser.add_argument("--interval", type=int, default=100, help="steps per line")
    add_output(parser)
    options, settings = parser.parse_known_args(arguments)
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    data_settings = sudoku_settings(options.folder, size=4, clues=8, count=20000)
    fixed = ["--run_dir", str(options.folder), "--engine.kind", "plain", "--engine.device", "cpu"]
    config = configuration.load(["--config", "configs/sudoku_demo.yaml", *data_settings, *fixed, *settings])
    tokenizer = Tokenizer.load(Path(config.data.tokenizer))
    facts_of_data = check_data(config.data, tokenizer)
    cache = options.folder / "cache"
    data = build_datasets(config.data, facts_of_data, tokenizer, config.train.seed, cache, Ranks())
    batch = config.train.global_batch_size
    one, led, free = (
        Training(config, tokenizer, data, part)
        for part in (batch, batch // options.ranks, batch // options.ranks)
    )
    lines, interval = [], Interval()
    for step in range(1, config.train.steps + 1):
        shown = one.step(step)
        interval.add(shown, led.step(step, shown), free.step(step))
        if step % options.interval == 0 or step == config.train.steps:
            lines.append({"step": step, **interval.figures()})
            print("  ".join(f"{name} {value:.3g}" for name, value in lines[-1].items()), flush=True)
            interval = Interval()
    facts = {"settings": settings, "ranks": options.ranks, "global_batch_size": batch}
    facts["machine"] = f"{platform.machine()}, torch {torch.__version__}, 1 thread"
    write_figures(options.output, facts | {"intervals": lines})


if __name__ == "__main__":
    run(main)
