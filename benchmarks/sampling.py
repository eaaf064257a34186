"""Tokens a second of the sampler: with and without the cache, one and several tokens a step, by threshold.

    python -m benchmarks.sampling --output benchmarks/results/sampling.json

One network decodes the same prompts in every way, in turns, in one process: seeing everything, or in blocks.
Its weights are random, which changes nothing but how many tokens a threshold lets through at a step (given as
tokens a forward); or those of a checkpoint are taken (--checkpoint).

On a GPU times are wall-clock times. On a CPU they are the processor time of one thread, which stays
comparable on a machine that has other work.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.figures import add_output, seconds, write_figures
from benchmarks.random_text import MASK
from pipeline.base import cli
from pipeline.checkpoint.load_model import load_model
from pipeline.config import ModelConfig
from pipeline.data.examples import ANSWER, PROMPT, Examples
from pipeline.decoding.decoding import decode
from pipeline.decoding.sampling import SamplingSettings
from pipeline.model.batch import Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.objectives.layouts import Blocks, Whole
from pipeline.objectives.seam import Layout


@dataclass(frozen=True)
class Way:
    """One way of decoding.

    Attributes:
        blocks: positions see their own block and the ones before it, not everything.
        settings: of the sampler.
    """

    blocks: bool
    settings: SamplingSettings


def ways(threshold: float) -> dict[str, Way]:
    """Return everything that is compared."""
    steps = {f"{n} a step": SamplingSettings(tokens_per_step=n) for n in (1, 2, 4)}
    steps["threshold"] = SamplingSettings(threshold=threshold)
    found = {f"everything, {name}": Way(False, settings) for name, settings in steps.items()}
    for name, settings in steps.items():
        found[f"blocks, {name}, no cache"] = Way(
            True, SamplingSettings(**(vars(settings) | {"cache": False}))
        )
        found[f"blocks, {name}, cache"] = Way(True, settings)
    return found


RATIOS = {
    "cache / no cache, 1 a step": ("blocks, 1 a step, cache", "blocks, 1 a step, no cache"),
    "cache / no cache, 4 a step": ("blocks, 4 a step, cache", "blocks, 4 a step, no cache"),
    "cache / no cache, threshold": ("blocks, threshold, cache", "blocks, threshold, no cache"),
    "4 / 1 a step, everything": ("everything, 4 a step", "everything, 1 a step"),
    "2 / 1 a step, everything": ("everything, 2 a step", "everything, 1 a step"),
    "threshold / 1 a step, everything": ("everything, threshold", "everything, 1 a step"),
    "4 / 1 a step, cache": ("blocks, 4 a step, cache", "blocks, 1 a step, cache"),
    "threshold / 1 a step, cache": ("blocks, threshold, cache", "blocks, 1 a step, cache"),
    "cache, 4 a step / everything, 1 a step": ("blocks, 4 a step, cache", "everything, 1 a step"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.ToolParser((__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="run folder: its weights instead of random ones")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=96, help="tokens that are decoded")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--repetitions", type=int, default=3)
    add_output(parser)
    return parser


def network(options: argparse.Namespace, device: torch.device) -> MaskedDiffusionModel:
    """Return the network; random weights are so large that a few confidences are above 0.9."""
    if options.checkpoint is not None:
        return load_model(options.checkpoint, device).model
    torch.manual_seed(0)
    config = ModelConfig(
        layers=options.layers,
        hidden_size=options.hidden_size,
        heads=options.hidden_size // 32,
        intermediate_size=3 * options.hidden_size,
        init_std=0.5,
    )
    vocabulary = Vocabulary(options.vocabulary, options.vocabulary, MASK)
    return MaskedDiffusionModel(config, vocabulary).to(device).eval()


def prompts(options: argparse.Namespace, vocabulary: Vocabulary, device: torch.device) -> Examples:
    """Return random prompts with room for answers."""
    size = options.batch_size, options.prompt + options.answer
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, vocabulary.tokens, size, generator=generator)
    roles = torch.where(torch.arange(size[1]) < options.prompt, PROMPT, ANSWER).expand(size)
    return Examples(tokens, roles, torch.arange(size[0])).to(device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every way in turns; print and write the medians and their ratios."""
    options = build_parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    model = network(options, device)
    examples = prompts(options, model.lm_head.vocabulary, device)
    mask_id = model.lm_head.vocabulary.mask_id
    layouts: dict[bool, Layout] = {
        False: Whole(mask_id, False, model.shifted),
        True: Blocks(mask_id, False, model.shifted, size=options.block_size),
    }
    everything = ways(options.threshold)
    rates: dict[str, list[float]] = {name: [] for name in everything}
    forwards: dict[str, float] = {}
    for repetition in range(options.repetitions + 1):
        for name, way in everything.items():
            visibility = layouts[way.blocks].decoding(examples)
            run = partial(decode, model, examples, examples.answer, way.settings, visibility)
            if repetition == 0:  # warms up
                forwards[name] = float(run().steps.double().mean())
            else:
                rates[name].append(examples.answer.sum().item() / seconds(run, device))
    report(options, device, rates, forwards)


def report(
    options: argparse.Namespace,
    device: torch.device,
    rates: dict[str, list[float]],
    forwards: dict[str, float],
) -> None:
    """Print the figures, and write them where --output says."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {name: medians[a] / medians[b] for name, (a, b) in RATIOS.items()}
    for name, value in medians.items():
        print(f"{name:32} {value:9.1f} tokens/s  {options.answer / forwards[name]:5.2f} tokens a forward")
    for name, value in ratios.items():
        print(f"{name:40} {value:.2f}")
    facts = {
        "settings": {
            k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "output"
        },
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "clock": "wall" if device.type == "cuda" else "processor time of one thread",
        "tokens_per_second": medians,
        "all": rates,
        "tokens_per_forward": {name: options.answer / value for name, value in forwards.items()},
        "ratios": ratios,
    }
    write_figures(options.output, facts)


if __name__ == "__main__":
    cli.run(main)
