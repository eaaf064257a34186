"""Cost of a training step: ours with PUMA, ours with random masking, and a straightforward full-logit step.

    python -m benchmarks.train_step --shape paper --batch-size 4 --output benchmarks/results/train_step.json

All three train the same network in one process, in turns which each of them begins as often as the others, on
batches with the same number of masked positions. The full-logit step is written here as one would first write
it: logits of every position in fp32, a log-softmax over them for the loss, a softmax over them for the
confidence.

On a GPU times are wall-clock times. On a CPU they are the processor time of one thread, which stays
comparable on a machine that has other work; with --wall-clock those of the clock, on all cores.
"""

from __future__ import annotations

import contextlib
import statistics
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.figures import add_output, machine, seconds, write_figures
from benchmarks.random_text import MASK, RandomText
from pipeline import objectives
from pipeline.base import cli
from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.config import (
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ObjectiveConfig,
    Recompute,
    TrainConfig,
)
from pipeline.engine.plain import PlainEngine
from pipeline.model.batch import MaskedBatch, Vocabulary, masked_batch
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.objectives.seam import take_highest
from pipeline.planning.flops import step_flops
from pipeline.planning.live_memory import LiveStorages
from pipeline.ranks import join_ranks
from pipeline.train import train_step

RATE = 1e-4


@dataclass(frozen=True)
class Shape:
    """A network, its vocabulary and the sequences that it is trained on."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocabulary: int
    length: int

    def model(self) -> ModelConfig:
        """Return the settings of the network."""
        return ModelConfig(
            layers=self.layers,
            hidden_size=self.hidden_size,
            heads=self.heads,
            intermediate_size=self.intermediate_size,
        )

    def tokens(self) -> Vocabulary:
        """Return the vocabulary; its rows are aligned, as those of a run are, for the products of a GPU."""
        return Vocabulary(self.model().rows_for(self.vocabulary), self.vocabulary, MASK)


SHAPES = {
    "paper": Shape(14, 512, 8, 1536, 151_645, 512),  # arXiv 2602.10314, the 125M run
    "small": Shape(4, 192, 6, 512, 4_000, 128),  # configs/tiny_text.yaml
    "miniature": Shape(2, 64, 4, 96, 500, 32),  # shows that the program runs, and nothing else
}


def full_logit_loss(model: MaskedDiffusionModel, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
    """Return loss [] and confidence [B * L] by logits of every position."""
    hidden = model.model(batch.input_ids, batch.attention_mask)  # [B, L, H]
    logits = F.linear(hidden, model.lm_head.weight).float().flatten(0, 1)  # [B * L, V]
    logits[:, MASK] = -torch.inf
    logits[:, model.lm_head.vocabulary.tokens :] = -torch.inf
    log_probabilities = F.log_softmax(logits, dim=-1)
    nll = -log_probabilities[batch.rows, batch.targets]
    with torch.no_grad():
        confidence = F.softmax(logits, dim=-1).amax(dim=-1)
    return (nll * batch.weights).sum(), confidence


class Contest:
    """One network and the three ways to train it."""

    def __init__(self, shape: Shape, batch_size: int, recompute: Recompute, wall_clock: bool = False) -> None:
        """Make the network and the chains."""
        self.shape, self.batch_size, self.wall_clock = shape, batch_size, wall_clock
        self.config = config = Config(
            "unused",
            data=DataConfig(prefixes=["unused"], sequence_length=shape.length),
            model=shape.model(),
            objective=ObjectiveConfig(stages=12),
            train=TrainConfig(global_batch_size=batch_size, micro_batch_size=batch_size),
            engine=EngineConfig(kind="plain", activation_checkpointing=recompute),
        )
        config.check()
        ranks = join_ranks(config.engine.device)
        self.device = ranks.device
        self.engine = PlainEngine(config, ranks, shape.tokens())
        stream = SlotStream(
            RandomText(shape.vocabulary, shape.length), batch_size, config.train.seed, workers=1
        )
        objective = objectives.build(config, MASK, False)
        self.group = SlotGroup(range(batch_size), stream, objective, self.device)
        self.step = 0

    def turn(self, first: int) -> dict[str, float]:
        """Train a step in each way, with as many masked positions in each row; return their seconds.

        Args:
            first: number of the way that begins: the place in the turn costs time too.
        """
        chains = self.group.inputs(self.step + 1)
        masked, tokens = self.group.state.masked, self.group.examples.tokens
        noise = torch.rand(masked.shape, device=self.device)
        matched = take_highest(torch.ones_like(masked), noise, masked.sum(dim=1))
        random = masked_batch(tokens, matched, len(chains.rows), MASK)
        ways: list[tuple[str, Callable[[], None]]] = [
            ("full_logits", lambda: self.full_logits(chains)),
            ("random_masking", lambda: self.random_masking(random)),
            ("puma", self.puma),
        ]
        ways = ways[first % len(ways) :] + ways[: first % len(ways)]
        return {"rows": len(chains.rows)} | {name: self.seconds(way) for name, way in ways}

    def puma(self) -> None:
        """Train a step as `pipeline.train` does."""
        self.step += 1
        train_step(self.engine, [self.group], RATE, self.step)

    def random_masking(self, batch: MaskedBatch) -> None:
        """Train a step on a batch that was made before: masking itself costs nothing here."""
        self.engine.backward(self.engine.forward(batch).loss)
        self.engine.step(RATE)

    def full_logits(self, batch: MaskedBatch) -> None:
        """Train a full-logit step."""
        enabled = self.engine.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            loss, _ = full_logit_loss(self.engine.model, batch)  # type: ignore[arg-type]
        self.engine.backward(loss)
        self.engine.step(RATE)

    def seconds(self, action: Callable[[], Any]) -> float:
        """Return how long an action takes."""
        return seconds(action, self.device, self.wall_clock)


def peak_bytes(shape: Shape, batch_size: int, recompute: Recompute, device: str) -> dict[str, int]:
    """Return the most memory that forward and backward of each loss hold at once, at half the rows masked.

    Beyond weights, gradients and optimizer state, which are there before. On "cuda" torch's allocator is
    asked. On "meta" nothing is computed: operations return tensors without contents, and their sizes are
    added up while they live, so that any batch can be counted; what an operation uses inside is left out.
    """
    with FakeTensorMode() if device == "meta" else contextlib.nullcontext():
        real = "cpu" if device == "meta" else device
        with torch.device(real):
            model = MaskedDiffusionModel(shape.model(), shape.tokens(), recompute)
            tokens = torch.zeros(batch_size, shape.length, dtype=torch.int64)
            masked = torch.arange(shape.length).expand_as(tokens) % 2 == 0
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        batch = masked_batch(tokens, masked, tokens.numel() // 2, MASK)
        return {
            "full_logits": peak_of(lambda: full_logit_loss(model, batch)[0], model, batch),
            "ours": peak_of(lambda: model(batch).loss, model, batch),
        }


def peak_of(loss: Callable[[], Tensor], model: torch.nn.Module, batch: MaskedBatch) -> int:
    """Return the most bytes that `loss()` and its backward hold at once, gradients of the weights aside."""
    if batch.rows.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            value = loss()
        value.backward()
        return torch.cuda.max_memory_allocated() - before
    weights = list(model.parameters())
    present = [*weights, *(w.grad for w in weights), *batch]
    with LiveStorages(tensor for tensor in present if isinstance(tensor, Tensor)) as live:
        loss().backward()
    return live.peak


def matmul_flops_per_second(contest: Contest, dtype: torch.dtype) -> float:
    """Return the highest rate of a square product of matrices, of three."""
    size = 8192 if contest.device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=contest.device, dtype=dtype)
    return 2 * size**3 / min(contest.seconds(lambda: a @ b) for _ in range(3))


def measure(
    shape: Shape, batch_size: int, repetitions: int, recompute: Recompute, wall_clock: bool = False
) -> dict[str, Any]:
    """Return times and utilisation of the three steps, and the memory of their forward and backward.

    On a GPU the first turn, which loads kernels, is not counted.
    """
    contest = Contest(shape, batch_size, recompute, wall_clock)
    on_gpu = contest.device.type == "cuda"
    dtype = torch.bfloat16 if contest.engine.precision == "bf16" else torch.float32
    turns, rates = [], []
    for number in range(repetitions + on_gpu):
        rates.append(matmul_flops_per_second(contest, dtype))
        turns.append(contest.turn(number))
        print("  ".join(f"{name} {value:.3f}" for name, value in turns[-1].items()), flush=True)
    turns = turns[on_gpu:]
    median = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    achieved = [
        step_flops(contest.config, shape.tokens().rows, turn["rows"]).model / turn["puma"] for turn in turns
    ]
    memory_batch = batch_size if on_gpu else max(batch_size, 32)
    memory = peak_bytes(shape, memory_batch, recompute, "cuda" if on_gpu else "meta")
    contest.engine.close()
    return {
        "shape": asdict(shape),
        "batch_size": batch_size,
        "activation_checkpointing": recompute,
        "precision": str(dtype).removeprefix("torch."),
        "clock": "wall" if on_gpu or wall_clock else "processor",
        "machine": machine(contest.device),
        "masked_share": median["rows"] / (batch_size * shape.length),
        "seconds": turns,
        "peak_bytes": {"batch_size": memory_batch, **memory},
        "matmul_flops_per_second": max(rates),
        "ratios": {
            "time, PUMA / full logits": median["puma"] / median["full_logits"],
            "time, PUMA / random masking": median["puma"] / median["random_masking"],
            "peak memory, ours / full logits": memory["ours"] / memory["full_logits"],
            "model FLOPs utilisation": statistics.median(achieved) / max(rates),
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure as the command line says, print the ratios and write the figures."""
    parser = cli.ToolParser(description="Compare the cost of a training step with a full-logit one.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="network and sequences")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences a step")
    parser.add_argument("--repetitions", type=int, default=6, help="turns of the three steps")
    parser.add_argument(
        "--activation-checkpointing",
        choices=typing.get_args(Recompute),
        default=EngineConfig.activation_checkpointing,
        help="what all three compute again in the backward",
    )
    parser.add_argument(
        "--wall-clock",
        action="store_true",
        help="on an idle CPU: time by the clock, on all cores",
    )
    add_output(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.wall_clock:
        torch.set_num_threads(1)
    shape = SHAPES[options.shape]
    recompute = options.activation_checkpointing
    result = measure(shape, options.batch_size, options.repetitions, recompute, options.wall_clock)
    for name, value in result["ratios"].items():
        print(f"{name:32} {value:.3f}")
    write_figures(options.output, result)


if __name__ == "__main__":
    cli.run(main)
